"""Measures the time from the launch to the first step: `python -m benchmarks.start_up`

It starts a training of the embedded model on the reference's rows in a few configurations, and measures how long each
part of the start takes.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launching import CONFIGS, run_to_end
from benchmarks.start_up_worker import BEGUN
from benchmarks.turns import spread, write_results
from eval.comparing.launch import accelerate_command
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes

STARTED = ("one_process", "zero0", "zero3")
ABOUT = """Seconds of rank 0, the embedded model and the reference's rows, the extensions built and the files in the
page cache; the configurations take turns; medians, and the range of the whole."""


def parts_of_start(config: str) -> dict[str, float]:
    """Starts a training with `config` and returns the seconds that each part of its start takes."""
    command = accelerate_command(CONFIGS / f"{config}.yaml")
    command += ["--module", "benchmarks.start_up_worker", "--config", "loop/recipes/tiny.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--run_dir", str(Path(folder) / "run")]
        done = run_to_end(command, {BEGUN: str(time.time())})
    ends = {part: float(seconds) for part, seconds in re.findall(r"^@(.+)@(.+)$", done.output, re.MULTILINE)}
    if "first step" not in ends:
        raise SystemExit(f"{config} did not start:\n{done.output[-4000:]}")
    return {part: end - before for (part, end), before in zip(ends.items(), [0.0, *ends.values()], strict=False)}


def as_markdown(found: dict[str, list[dict[str, float]]]) -> str:
    parts = list(found[STARTED[0]][0])
    rows = []
    for part in parts:
        cells = [f"{statistics.median(start[part] for start in starts):.2f}" for starts in found.values()]
        rows.append([part, *cells])
    whole = [spread([sum(start.values()) for start in starts]) for starts in found.values()]
    return markdown_table(["", *found], [*rows, ["**all**", *whole]])


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts that count, for each configuration")
    args = parser.parse_args(argv)
    found: dict[str, list[dict[str, float]]] = {config: [] for config in STARTED}
    for turn in range(args.rounds + 1):
        for config, starts in found.items():
            seconds = parts_of_start(config)
            if turn:
                starts.append(seconds)
    print(as_markdown(found))
    write_results("start_up", "From the launch to the first step", found, f"{ABOUT}\n\n{as_markdown(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
