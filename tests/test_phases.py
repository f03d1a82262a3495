"""The account that a process keeps of its phases."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from loop import phases
from loop.phases import Account, measured
from tests.distributed.launching import ROOT, start


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Account:
    fresh = Account()
    monkeypatch.setattr(phases, "ACCOUNT", fresh)
    return fresh


def test_each_second_belongs_to_one_phase(account: Account) -> None:
    """An inner phase interrupts the one around it."""
    begun = time.perf_counter()
    account.enter("other")
    with measured("save"):
        time.sleep(0.05)
        with measured("validate"):
            time.sleep(0.1)
        time.sleep(0.05)
    account.enter("other")
    passed = time.perf_counter() - begun
    seconds = {phase: cost.seconds for phase, cost in account.costs.items()}
    assert seconds["validate"] >= 0.1
    assert 0.1 <= seconds["save"] < passed - 0.1 + 0.05
    assert sum(seconds.values()) - seconds["start"] == pytest.approx(passed, abs=0.01)
    assert account.phase == "other"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell peaks")
def test_a_peak_belongs_to_the_phase_in_which_it_was(account: Account) -> None:
    size = 200_000_000
    account.enter("load")
    account.enter("forward")
    block = torch.zeros(size, dtype=torch.uint8)
    account.enter("backward")
    del block
    account.enter("update")
    account.enter("other")
    peaks = {phase: cost.peak_bytes or 0 for phase, cost in account.costs.items()}
    assert peaks["forward"] - peaks["load"] > 0.9 * size
    assert peaks["backward"] >= peaks["forward"] - 0.1 * size, "it began with the block"
    assert peaks["forward"] - peaks["update"] > 0.9 * size


def test_a_phase_ends_with_an_exception(account: Account) -> None:
    account.enter("other")

    @measured("save")
    def fails() -> None:
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011
            fails()
        assert account.phase == "other"


def test_collectives_are_counted_by_kind_and_size(tmp_path: Path) -> None:
    """On two real processes; what a collective calls itself is not counted again."""
    script = """
import json, os, sys, torch, torch.distributed as dist
from loop.phases import ACCOUNT, count_collectives
count_collectives(); count_collectives()
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
ACCOUNT.enter("forward")
dist.all_reduce(torch.ones(10))
dist.all_reduce(torch.ones(10))
dist.all_gather_into_tensor(torch.zeros(6), torch.ones(3))
dist.all_gather([torch.zeros(3) for _ in range(2)], torch.ones(3))
dist.reduce_scatter_tensor(torch.zeros(4, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))
dist.broadcast(torch.ones(5), src=0)
dist.barrier()
found = {kind: (one.count, one.bytes) for kind, one in ACCOUNT.costs["forward"].collectives.items()}
print("found", json.dumps(found, sort_keys=True))
"""
    both = f"""
import subprocess, sys
run = [subprocess.Popen([sys.executable, "-c", {script!r}, str(rank), {str(tmp_path / "store")!r}]) for rank in (0, 1)]
sys.exit(sum(process.wait() for process in run))
"""
    done = start([sys.executable, "-c", both], ROOT)
    lines = [line for line in done.output.splitlines() if line.startswith("found")]
    expected = '{"all_gather": [2, 48], "all_reduce": [2, 80], "broadcast": [1, 20], "reduce_scatter": [1, 16]}'
    assert lines == [f"found {expected}"] * 2, done.output
