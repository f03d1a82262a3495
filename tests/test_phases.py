"""Tests the account that a process keeps of its phases.

Each test holds on a machine with a GPU and on one without: a test with a clock of its own turns the GPU's clock off.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from data.batch import Window
from data.examples import Example
from data.layout import collate
from loop.measure import phases
from loop.measure.phase_names import STEP_PHASES
from loop.measure.phases import Account, measured
from loop.step import train_step
from tests.distributed.launching import ROOT, start
from tests.memory_block import block_of


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock of the host. The account then never asks a GPU, which would measure real seconds."""
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(phases, "perf_counter", clock)
    return clock


@pytest.fixture
def account(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Account:
    fresh = Account()
    monkeypatch.setattr(phases, "ACCOUNT", fresh)
    return fresh


def test_each_second_belongs_to_one_phase(account: Account, clock: Clock) -> None:
    """An inner phase interrupts the phase around it."""
    clock.tick(1)
    account.enter("other")
    with measured("save"):
        clock.tick(2)
        with measured("validate"):
            clock.tick(4)
        clock.tick(8)
    clock.tick(16)
    account.enter("other")
    seconds = {phase: cost.seconds for phase, cost in account.costs.items()}
    assert seconds == {"start": 1, "validate": 4, "save": 10, "other": 16}
    assert account.phase == "other"


def test_a_step_lasts_from_its_data_to_its_update(account: Account, clock: Clock) -> None:
    """What is done between two steps, saving for example, is not part of a step."""

    def windows() -> Iterator[Window]:
        for seconds in (1, 2):
            clock.tick(seconds)
            yield Window([], label_weight=1, num_tokens=1)

    for _ in account.steps(windows()):
        for phase, seconds in (("forward", 10), ("backward", 20), ("update", 40)):
            account.enter(phase)  # type: ignore[arg-type]
            clock.tick(seconds)
        account.enter("other")
        with measured("save"):
            clock.tick(1000)
    assert account.step_seconds == [71, 72]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell peaks")
def test_a_peak_belongs_to_the_phase_in_which_it_was() -> None:
    """The block of memory is on the GPU where there is one, because the account then looks at the GPU."""
    size, device = 200_000_000, "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)  # the account looks at a GPU only once this process uses it
    account = Account()
    account.enter("load")
    account.enter("forward")
    block = block_of(size, device)
    account.enter("backward")
    del block
    account.enter("update")
    account.enter("other")
    peaks = {phase: cost.peak_bytes or 0 for phase, cost in account.costs.items()}
    assert peaks["forward"] - peaks["load"] > 0.9 * size
    assert peaks["backward"] >= peaks["forward"] - 0.1 * size, "backward began with the block"
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


def test_a_whole_phase_lets_no_other_begin(account: Account, clock: Clock) -> None:
    """When a training resumes it takes a step that is none of its own; the seconds of that step count as loading."""
    account.enter("other")
    with measured("load", whole=True):
        clock.tick(1)
        with measured("forward"):
            clock.tick(2)
        clock.tick(4)
    with measured("forward"):
        clock.tick(8)
    account.enter("other")
    assert {phase: cost.seconds for phase, cost in account.costs.items()} == {
        **{"start": 0, "other": 0, "load": 7, "forward": 8}
    }


def test_a_step_goes_through_its_phases(account: Account, clock: Clock) -> None:
    """Each stand-in below takes its own time, so that the seconds of a phase tell what was done in it."""
    weight = torch.nn.Parameter(torch.ones(2))

    class Model(torch.nn.Module):
        def forward(self, **inputs: Any) -> torch.Tensor:
            clock.tick(1)
            loss: torch.Tensor = Slow.apply(weight.sum())  # type: ignore[no-untyped-call]
            return loss

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            clock.tick(10)
            return gradients[0]

    class Optimizer(torch.optim.SGD):
        def step(self, *arguments: Any) -> None:  # type: ignore[override]
            clock.tick(100)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(Model(), Optimizer([weight], lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    window = Window([collate([Example.of(1, [1], [2])], "padded", 0)] * 3, label_weight=3, num_tokens=6)
    for each in account.steps([window, window]):
        train_step(each, model, optimizer, schedule, 1.0, accelerator)
    learned = STEP_PHASES[1:]  # the phases after "data", in which train_step does nothing
    costs = {phase: (account.costs[phase].count, account.costs[phase].seconds) for phase in learned}
    assert costs == {"forward": (6, 6), "backward": (6, 60), "update": (2, 200)}
    assert account.step_seconds == [133, 133]


@pytest.mark.launches
def test_collectives_are_counted_by_kind_and_size(tmp_path: Path) -> None:
    """Two real processes make collectives. A collective that another collective calls is not counted."""
    script = """
import json, os, sys, torch, torch.distributed as dist
from loop.measure.phases import ACCOUNT, count_collectives
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
    expected = '{"all_gather": [2, 48], "all_reduce": [2, 80], "broadcast": [1, 20], "reduce_scatter": [1, 16]}'
    assert done.output.count(expected) == 2, done.output  # the two lines may be mixed up


def test_a_gpus_phases_are_timed_on_the_gpu_without_waiting_for_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins replace CUDA's events, so that the test decides which events the GPU has reached."""
    reached: set[object] = set()
    waited: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def query(self) -> bool:
            return self in reached

        def synchronize(self) -> None:
            waited.append(self)
            reached.add(self)

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(phases, "peak_memory", lambda: None)  # nothing here has used a GPU's memory
    account = Account()
    for phase, seconds in (("forward", 1), ("backward", 2), ("update", 4)):
        account.enter(phase)  # type: ignore[arg-type]
        clock.tick(seconds)
    account.enter("other")
    reached.add(account.marks[0][2])
    account.settle()
    assert (account.costs["forward"].seconds, account.costs["backward"].seconds) == (1, 0)
    assert waited == []
    account.settle(wait=True)
    assert {phase: cost.seconds for phase, cost in account.costs.items()} == {
        **{"start": 0, "forward": 1, "backward": 2, "update": 4}
    }
    assert account.marks == []
