"""The GPUs of this machine, as NVIDIA's management library shows them. Without a driver there are none."""

from collections.abc import Callable
from typing import Any

import pynvml  # type: ignore[import-untyped]

KILOBYTE = 1000  # NVML gives traffic in KB a second


def open_gpus() -> list[Any]:
    """A handle for each GPU, in NVML's order."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def gpu_names(gpus: list[Any]) -> list[dict[str, Any]]:
    return [{"name": _ask(pynvml.nvmlDeviceGetName, gpu), "memory_bytes": _ask(_memory, "total", gpu)} for gpu in gpus]


def gpu_columns(count: int) -> list[str]:
    names = (
        "utilisation_percent",
        "memory_bytes",
        "host_to_device_bytes_per_second",
        "device_to_host_bytes_per_second",
    )
    return [f"gpu{number}_{name}" for number in range(count) for name in names]


def sample_gpus(gpus: list[Any]) -> dict[str, float | None]:
    """A cell for each of gpu_columns; None where a GPU does not tell.

    Each of the two traffic counters is watched by the driver for 20 ms, which takes wall time but no CPU time.
    """
    cells: list[float | None] = []
    for gpu in gpus:
        cells.append(_ask(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, gpu))
        cells.append(_ask(_memory, "used", gpu))
        cells.append(_ask(_traffic, pynvml.NVML_PCIE_UTIL_RX_BYTES, gpu))  # what the GPU receives
        cells.append(_ask(_traffic, pynvml.NVML_PCIE_UTIL_TX_BYTES, gpu))
    return dict(zip(gpu_columns(len(gpus)), cells, strict=True))


def _memory(which: str, gpu: Any) -> int:
    return int(getattr(pynvml.nvmlDeviceGetMemoryInfo(gpu), which))


def _traffic(counter: int, gpu: Any) -> int:
    return int(pynvml.nvmlDeviceGetPcieThroughput(gpu, counter)) * KILOBYTE


def _ask(question: Callable[..., Any], *args: Any) -> Any:
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None
