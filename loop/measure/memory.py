"""Reads how much memory this process takes, in bytes.

On a machine with a GPU it is the memory that PyTorch has allocated on the current GPU, elsewhere the host memory that
is resident. A function returns None where the system does not tell.
"""

import os
from pathlib import Path

import psutil
import torch


def peak_memory() -> int | None:
    """Returns the highest value since the last call, and starts to count anew."""
    if not torch.cuda.is_available():
        return peak_host_memory()
    if not torch.cuda.is_initialized():  # this process has no memory on the GPU, and asking would give it some
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def memory_in_use() -> int | None:
    """Returns the value of this moment."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _host_memory("VmRSS")


def peak_host_memory() -> int | None:
    """Returns the highest resident host memory since the last call, and starts to count anew, also where there is a
    GPU."""
    peak = _host_memory("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux then sets VmHWM to the current VmRSS
    except OSError:
        return None
    return peak


def free_host_memory() -> int:
    """Returns this process's share of the free memory of the machine: all ranks on it get the same share."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _host_memory(field: str) -> int | None:
    """Returns a size of /proc/self/status."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
