"""Reads the GPUs of this machine from NVIDIA's management library. Without a driver there are no GPUs."""

from collections.abc import Callable
from typing import Any

import pynvml  # type: ignore[import-untyped]

KILOBYTE = 1000  # bytes; NVML gives PCIe traffic in KB a second


def open_gpus() -> list[Any]:
    """Returns a handle for each GPU, in NVML's order."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def gpu_names(gpus: list[Any]) -> list[dict[str, Any]]:
    return [{"name": _ask(pynvml.nvmlDeviceGetName, gpu), "memory_bytes": _ask(_memory, "total", gpu)} for gpu in gpus]


def gpu_columns(count: int) -> list[str]:
    """Returns the names of the columns of `count` GPUs."""
    names = (
        "utilisation_percent",
        "memory_bytes",
        "host_to_device_bytes_per_second",
        "device_to_host_bytes_per_second",
    )
    return [f"gpu{number}_{name}" for number in range(count) for name in names]


def sample_gpus(gpus: list[Any]) -> dict[str, float | None]:
    """Returns a cell for each of gpu_columns; a cell is None where the GPU does not tell the value.

    The driver watches each of the two PCIe counters for 20 ms, which takes wall time but no CPU time.
    """
    cells: list[float | None] = []
    for gpu in gpus:
        cells.append(_ask(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, gpu))
        cells.append(_ask(_memory, "used", gpu))
        cells.append(_ask(_pcie_bytes, pynvml.NVML_PCIE_UTIL_RX_BYTES, gpu))  # bytes that the GPU receives
        cells.append(_ask(_pcie_bytes, pynvml.NVML_PCIE_UTIL_TX_BYTES, gpu))
    return dict(zip(gpu_columns(len(gpus)), cells, strict=True))


def _memory(which: str, gpu: Any) -> int:
    return int(getattr(pynvml.nvmlDeviceGetMemoryInfo(gpu), which))


def _pcie_bytes(counter: int, gpu: Any) -> int:
    return int(pynvml.nvmlDeviceGetPcieThroughput(gpu, counter)) * KILOBYTE


def _ask(question: Callable[..., Any], *args: Any) -> Any:
    """Returns what NVML answers, or None where the GPU or the driver does not tell."""
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None
