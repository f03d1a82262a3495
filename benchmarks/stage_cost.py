"""Measures what each configuration costs beside stage 0: `python -m benchmarks.stage_cost`

Two processes train the compute-bound model with 16 rows each, and then one process does, which also trains a model of
many narrow layers. The command measures step time, peak memory, the number of collectives and their bytes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.train_throughput import Contender
from benchmarks.turns import spread, take_turns, write_results
from benchmarks.workload import COMPUTE_BOUND, Shape, write_compute_bound
from eval.peak import usable_cores
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes

CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
NARROW = Shape(hidden=64, intermediate=176, layers=48, heads=4)  # everything in it is overhead
ABOUT = """16 rows a step in each process, random weights in bf16, rows of 20 shared tokens, 10 of prompt and 19 of
answer; the recipe's defaults. The configurations take turns; median and range of the turns, ratios within each. Memory
is resident host memory of rank 0; collectives are rank 0's, bytes of whole tensors. One process shares nothing out, so
that stage 3 shows what DeepSpeed's bookkeeping costs."""


@dataclass(frozen=True)
class Part:
    processes: int
    shape: Shape
    configs: tuple[str, ...]
    checkpointing: str = "auto"


PARTS = {
    "Two processes, 80 M parameters": Part(2, COMPUTE_BOUND, CONFIGS),
    "The same with gradient checkpointing": Part(2, COMPUTE_BOUND, CONFIGS, "non_reentrant"),
    "One process, 80 M parameters": Part(1, COMPUTE_BOUND, ("zero0", "zero3")),
    "One process, 48 layers of hidden size 64": Part(1, NARROW, ("zero0", "zero3")),
}


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    cells = []
    for row in rows:
        ratios = spread([a / b for a, b in zip(row["step_seconds"], first["step_seconds"], strict=True)])
        name, memory = row["config"], f"{row['peak_bytes'] / 1e6:,.0f}"
        traffic = [f"{row['collectives']:.0f}", f"{row['collective_bytes'] / 1e6:,.1f}"]
        cells.append([name, spread(row["step_seconds"]), ratios, memory, *traffic])
    return markdown_table(["", "step, s", "× zero0", "peak memory, MB", "collectives a step", "MB a step"], cells)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="turns that count, for each configuration")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    args = parser.parse_args(argv)
    tables = {title: measure(part, args.rounds, args.steps) for title, part in PARTS.items()}
    sections = [f"{title}:\n\n{as_markdown(rows)}" for title, rows in tables.items()]
    write_results("stage_cost", "What each stage costs", tables, "\n\n".join([ABOUT, *sections]))


def measure(part: Part, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Lets the configurations of `part` take turns and returns what each of them took."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        write_compute_bound(folder, part.shape)
        contenders = {name: Contender("ours", part.checkpointing, (), name, part.processes) for name in part.configs}
        commands = {name: one.command(folder, steps) for name, one in contenders.items()}
        threads = max(1, usable_cores() // part.processes)
        found = take_turns(commands, rounds, threads, dict.fromkeys(part.configs, part.processes))
    rows = [
        {
            "config": name,
            "checkpointing": part.checkpointing,
            "step_seconds": [seconds / steps for seconds in measured.seconds],
            **measured.notes,
        }
        for name, measured in found.items()
    ]
    print(as_markdown(rows), flush=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
