"""The memory and the speeds of a few GPUs, from their makers' data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """What the plan needs to know of a GPU."""

    memory: float  # bytes
    flops: float  # FLOP/s, dense bf16 with fp32 accumulation
    interconnect: float  # bytes a second one way between GPUs: NVLink, or the PCIe slot where there is none
    host_bus: float  # bytes a second one way to the host's memory: the PCIe slot


CARDS = {
    "rtx3090": Card(24 * GIB, 71e12, 32e9, 32e9),
    "rtx4090": Card(24 * GIB, 165.2e12, 32e9, 32e9),
    "rtx5090": Card(32 * GIB, 209.5e12, 64e9, 64e9),
    "a6000": Card(48 * GIB, 154.8e12, 32e9, 32e9),
    "l40s": Card(48 * GIB, 362e12, 32e9, 32e9),
    "a100-40gb": Card(40 * GIB, 312e12, 300e9, 32e9),
    "a100-80gb": Card(80 * GIB, 312e12, 300e9, 32e9),
    "h100": Card(80 * GIB, 989e12, 450e9, 64e9),
    "h200": Card(141e9, 989e12, 450e9, 64e9),
}
