"""Describes this machine and measures how fast it computes: `python -m eval.peak` times a matrix product.

The product runs on one GPU where there is a GPU, and otherwise on all cores. A report shows the speed of a training as
a share of this peak.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from eval.hardware.nvml import gpu_names, open_gpus

LONG_ENOUGH = 0.05  # seconds that one product has to take, so that the time to start it does not matter
LARGEST = 16384  # rows and columns: three matrices of 1 GB in fp32
SECONDS = 2.0  # seconds for which the product is repeated; the fastest repetition counts
TIMEOUT = 120.0  # seconds that the whole measurement may take


def machine() -> dict[str, Any]:
    """Describes this machine: its CPU, the cores that this process may use, its memory and its GPUs."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(open_gpus()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def matmul_peak() -> dict[str, dict[str, float]]:
    """Returns FLOP/s by device and precision, for example {"cpu": {"bf16": 2e11, "fp32": 1e11}}.

    The measurement runs in a process of its own, because this process may be limited by OMP_NUM_THREADS. When the
    measurement fails, this function prints a warning and returns an empty dictionary.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(usable_cores()))
    command = [sys.executable, "-m", "eval.peak"]
    try:
        done = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        peak: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        print(f"warning: the peak of a matrix product could not be measured: {error}", flush=True)
        return {}
    return peak


def measure(device: str, dtype: torch.dtype, largest: int = LARGEST, seconds: float = SECONDS) -> float:
    """Returns the FLOP/s of the fastest product [n, n] x [n, n]; n is doubled until a product takes long enough."""
    n = 256
    while True:
        left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = min(seconds_of_product(left, right) for _ in range(2))  # the first one also warms up
        if best >= LONG_ENOUGH or n >= largest:
            break
        n *= 2
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        best = min(best, seconds_of_product(left, right))
    return 2 * n**3 / best


def seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the seconds that the matrix product of `left` and `right` takes, on the GPU too."""
    if left.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(usable_cores())
    peak = {"bf16": measure(device, torch.bfloat16), "fp32": measure(device, torch.float32)}
    print(json.dumps({device: peak}))


if __name__ == "__main__":
    main()
