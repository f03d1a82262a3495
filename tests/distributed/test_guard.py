"""One collective a step tells every rank of numbers that are not finite and of a signal; on two real processes."""

import json
import subprocess
import sys
from pathlib import Path

from tests.distributed.launching import ROOT

SCRIPT = """
import json, os, signal, sys, torch
from accelerate import Accelerator
from data.batch import Window
from data.examples import Example
from data.layout import collate
from loop.guard.guard import Guard
from loop.guard.process import RunError
from loop.guard.ranks import Watch
from loop.measure.phases import ACCOUNT, count_collectives
from loop.step import StepResult

rank, file, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
count_collectives()
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
accelerator = Accelerator(cpu=True)
watch = Watch(60, 0, accelerator)
window = Window([collate([Example.of(10 + rank, [1], [2])], "padded", 0)], label_weight=2, num_tokens=4)
for bad, signalled in cases:
    nll = torch.tensor([float("nan") if rank in bad else 1.0])
    with Guard(torch.nn.Linear(1, 1), watch, accelerator) as guard:
        if rank in signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        before = sum(one.count for one in ACCOUNT.cost().collectives.values())
        try:
            found = guard.check(7, window, StepResult(nll, 1.0, 0.1, False))
        except RunError as error:
            found = str(error)
        spent = sum(one.count for one in ACCOUNT.cost().collectives.values()) - before
        print("found", json.dumps([found, spent, watch.step]), flush=True)
os._exit(0)
"""


def check(folder: Path, *cases: tuple[list[int], list[int]]) -> list[list[list[object]]]:
    """For each case (ranks whose loss is not finite, ranks that get SIGTERM) and each rank, what the guard finds.

    That is its answer, the number of its collectives, and the step that it tells the watch.
    """
    given = [str(folder / "store"), json.dumps(cases)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), *given], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    found = [[json.loads(line[6:]) for line in out.splitlines() if line.startswith("found ")] for out in outputs]
    return [list(of_case) for of_case in zip(*found, strict=True)]


def test_every_rank_hears_of_everything(tmp_path: Path) -> None:
    signals: list[tuple[list[int], list[int]]] = [([], []), ([], [0]), ([], [1]), ([], [0, 1])]
    *found, nan_0, nan_1 = check(tmp_path, *signals, ([0], [1]), ([1], [0]))
    assert found == [[[0, 1, 7]] * 2, *([[[15, 1, 7]] * 2] * 3)]
    for ranks, rows in ((nan_0, "rows 10 on rank 0"), (nan_1, "rows 11 on rank 1")):
        for answer, _, _ in ranks:
            assert f"step 7: the loss is not finite in the micro-batch of {rows}." in str(answer)
