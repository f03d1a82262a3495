"""Measures what the loop costs beyond its arithmetic: `python -m benchmarks.loop_overhead`

The loop on one process takes turns with a bare forward, backward and AdamW on the same model and the same batches.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.train_throughput import Contender
from benchmarks.turns import spread, take_turns, write_results
from benchmarks.workload import write_compute_bound
from eval.peak import usable_cores
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes

ABOUT = """One process, the compute-bound model, 16 rows a step, shared prefix, activations kept, a log every 5 steps.
*bare* is forward, backward, clipping and AdamW on the same batches; *ours* all that a run does. They take turns, so a
ratio is of two turns that follow one another."""


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns that count, for each contender")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        write_compute_bound(folder)
        chosen = [Contender("bare", "none"), Contender("ours", "none", ("--batching", "shared_prefix"))]
        commands = {one.kind: one.command(folder, args.steps) for one in chosen}
        found = take_turns(commands, args.rounds, usable_cores())
    step = {kind: [seconds / args.steps for seconds in measured.seconds] for kind, measured in found.items()}
    ratios = [ours / bare for ours, bare in zip(step["ours"], step["bare"], strict=True)]
    rows = [["bare", spread(step["bare"]), "1"], ["ours", spread(step["ours"]), spread(ratios)]]
    text = markdown_table(["", "step, s", "× bare"], rows)
    print(text)
    write_results(
        "loop_overhead", "What the loop costs", {"step_seconds": step, "ratios": ratios}, f"{ABOUT}\n\n{text}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
