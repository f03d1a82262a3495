"""Tests that memory is read where a process has it: on the GPU where there is one, otherwise in host memory."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from loop.measure.memory import free_host_memory, memory_in_use, peak_host_memory, peak_memory
from tests.memory_block import block_of

SIZE = 200_000_000  # bytes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tells_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell peaks"
)


@tells_peaks
def test_a_peak_counts_from_the_last_call_on() -> None:
    torch.zeros(1, device=DEVICE)  # a GPU counts from the first allocation on
    peak_memory()
    before = memory_in_use()
    assert before is not None
    block = block_of(SIZE, DEVICE)
    held = memory_in_use()
    del block
    first, second = peak_memory(), peak_memory()
    assert held is not None
    assert first is not None
    assert second is not None
    assert held - before == pytest.approx(SIZE, rel=0.1)
    assert first - before == pytest.approx(SIZE, rel=0.1)
    assert second - before < 0.1 * SIZE


@tells_peaks
def test_host_memory_is_told_on_a_machine_with_a_gpu_too() -> None:
    before = peak_host_memory(), peak_host_memory()
    block = block_of(SIZE, "cpu")
    del block
    after = peak_host_memory()
    assert before[1] is not None
    assert after is not None
    assert after - before[1] == pytest.approx(SIZE, rel=0.1)


def test_nothing_is_told_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> str:
        raise PermissionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert (peak_memory(), memory_in_use()) == (None, None)


def test_a_peak_that_cannot_be_counted_anew_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert peak_host_memory() is None


def test_ranks_on_a_machine_share_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 12

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_host_memory() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_host_memory() == 4
