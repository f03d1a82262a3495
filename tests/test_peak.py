"""Compares the peak of a matrix product with a product that is timed here, and with the number of its operations."""

import os
import time

import psutil
import pytest
import torch

from eval import peak
from eval.peak import machine, matmul_peak, measure, usable_cores


def test_operations_are_two_for_each_of_n_cubed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest product takes 0.1 s and the others 0.2 s; with n = 256 that makes 2 x 256^3 / 0.1 FLOP/s."""
    seconds = iter([0.2, 0.2, 0.1, *[0.2] * 100_000])
    monkeypatch.setattr(peak, "seconds_of_product", lambda left, right: next(seconds))
    assert measure("cpu", torch.float32, seconds=0.01) == pytest.approx(2 * 256**3 / 0.1)


def test_the_size_grows_until_a_product_takes_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def cubic(left: torch.Tensor, right: torch.Tensor) -> float:
        sizes.append(left.shape)
        return 0.001 * (len(left) / 256) ** 3

    monkeypatch.setattr(peak, "seconds_of_product", cubic)
    assert measure("cpu", torch.float32, seconds=0) == pytest.approx(2 * 256**3 / 0.001)
    assert sizes == [torch.Size([n, n]) for n in (256, 256, 512, 512, 1024, 1024)], "1024: 0.064 s"


def test_no_product_of_ours_is_faster() -> None:
    """Both sides use one thread and count the best of many products, because other processes may use the core too."""
    torch.set_num_threads(1)
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    seconds = []
    for _ in range(50):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    assert measure("cpu", torch.float32, largest=512, seconds=1.0) > 0.5 * 2 * 512**3 / min(seconds)


def test_all_cores_are_used_whatever_omp_num_threads_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked: dict[str, str] = {}

    def run(command: list[str], **options: object) -> object:
        env = options["env"]
        assert isinstance(env, dict)
        asked.update(env)
        raise OSError("not started")

    monkeypatch.setattr("eval.peak.subprocess.run", run)
    assert matmul_peak() == {}
    assert asked["OMP_NUM_THREADS"] == asked["MKL_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


@pytest.mark.launches
def test_in_a_process_of_its_own() -> None:
    ((device, flops),) = matmul_peak().items()
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert set(flops) == {"bf16", "fp32"}
    assert all(1e8 < value < 1e17 for value in flops.values())


def test_the_machine() -> None:
    here = machine()
    assert here["memory_bytes"] == psutil.virtual_memory().total
    assert here["cores"] == usable_cores() <= (os.cpu_count() or 0)
    assert here["cpu"]
    assert len(here["gpus"]) >= torch.cuda.device_count()
