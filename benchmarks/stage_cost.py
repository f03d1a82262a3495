"""Measures what each configuration costs beside stage 0: `python -m benchmarks.stage_cost`

Two processes train the compute-bound model with 16 rows each. The command measures step time, peak memory, the number
of collectives and their bytes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_throughput import Contender
from benchmarks.turns import spread, take_turns, write_results
from benchmarks.workload import write_compute_bound
from eval.peak import usable_cores
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes

CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
PROCESSES = 2
ABOUT = """Two processes with 16 rows each a step, 80 M parameters of random weights in bf16, rows of 20 shared tokens,
10 of prompt and 19 of answer; the recipe's defaults. The configurations take turns; median and range of the turns,
ratios within each. Memory is resident host memory of rank 0; collectives are rank 0's, bytes of whole tensors."""


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    cells = []
    for row in rows:
        ratios = spread([a / b for a, b in zip(row["step_seconds"], first["step_seconds"], strict=True)])
        name, memory = f"{row['config']} {row['checkpointing']}", f"{row['peak_bytes'] / 1e6:,.0f}"
        traffic = [f"{row['collectives']:.0f}", f"{row['collective_bytes'] / 1e6:,.1f}"]
        cells.append([name, spread(row["step_seconds"]), ratios, memory, *traffic])
    return markdown_table(["", "step, s", "× zero0", "peak memory, MB", "collectives a step", "MB a step"], cells)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="turns that count, for each configuration")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    args = parser.parse_args(argv)
    tables: dict[str, list[dict[str, Any]]] = {}
    for checkpointing in ("auto", "non_reentrant"):
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / "model"
            write_compute_bound(folder)
            contenders = {name: Contender("ours", checkpointing, (), name, PROCESSES) for name in CONFIGS}
            commands = {name: one.command(folder, args.steps) for name, one in contenders.items()}
            threads = max(1, usable_cores() // PROCESSES)
            found = take_turns(commands, args.rounds, threads, dict.fromkeys(CONFIGS, PROCESSES))
        tables[checkpointing] = [
            {
                "config": name,
                "checkpointing": {"auto": "", "non_reentrant": "checkpointed"}[checkpointing],
                "step_seconds": [seconds / args.steps for seconds in measured.seconds],
                **measured.notes,
            }
            for name, measured in found.items()
        ]
        print(as_markdown(tables[checkpointing]), flush=True)
    text = [ABOUT, as_markdown(tables["auto"]), "With gradient checkpointing:", as_markdown(tables["non_reentrant"])]
    write_results("stage_cost", "What each stage costs", tables, "\n\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
