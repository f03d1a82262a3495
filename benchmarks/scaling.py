"""Measures how time and memory grow with each size: `python -m benchmarks.scaling`

It measures step time and peak memory of the compute-bound model while one size at a time grows: rows in a micro-batch,
tokens in a row, hidden size, layers, processes. It also measures the loop's data while the number of rows grows from a
thousand to a million.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.train_throughput import Contender
from benchmarks.turns import take_turns, write_results
from benchmarks.workload import ANSWER, COMPUTE_BOUND, PROMPT, SHARED, TINY, Shape, write_compute_bound
from eval.peak import usable_cores
from eval.reporting.charts import Chart, to_svg
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes
from loop.recipe import ROOT

IMAGE = ROOT / "docs" / "images" / "scaling.svg"
ABOUT = """The compute-bound model (80 M parameters, bf16) with 8 rows of 20 + 10 + 19 tokens a process and step, the
recipe's defaults, stage 0; one of its sizes at a time is changed. The points of a line take turns; medians. Factors are
against the first point of a line. Memory is resident, with Python and its libraries."""
ABOUT_DATA = """The data alone: a JSONL file is read, tokenized with the embedded tokenizer, dealt out once in the order
of an epoch. Memory is what the process takes beyond a run of a thousand rows."""


@dataclass(frozen=True)
class Point:
    """Describes one training of a line. The line changes one size, which is `value` here; the other sizes are usual."""

    value: int
    shape: Shape = COMPUTE_BOUND
    rows: int = 8
    own: tuple[int, int] = (PROMPT, ANSWER)  # tokens that a row does not share: of its prompt, of its answer
    processes: int = 1


LINES: dict[str, list[Point]] = {
    "rows a micro-batch": [Point(n, rows=n) for n in (4, 8, 16, 32)],
    "own tokens a row": [Point(29 * n, own=(10 * n, 19 * n)) for n in (1, 2, 4, 8)],
    "hidden size": [
        Point(n, replace(COMPUTE_BOUND, hidden=n, intermediate=n * 7 // 2, heads=n // 64)) for n in (256, 512, 1024)
    ],
    "layers": [Point(n, replace(COMPUTE_BOUND, layers=n)) for n in (2, 4, 8, 16)],
    "processes": [Point(n, processes=n) for n in (1, 2)],
}

DATA = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from data.batch import epoch_order, windows
from data.load import Reading, load
from data.template import ChatTemplate
from loop.measure.memory import peak_host_memory

path, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
begun = time.perf_counter()
examples = load({str(path): 1}, [], Reading(ChatTemplate(tokenizer), 99)).train
read = time.perf_counter() - begun
seconds = []
begun = time.perf_counter()
for window in windows(examples, epoch_order(len(examples), 1, 0), 16, 1, 1, 0, "shared_prefix", 0):
    seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
first, last = (sorted(part)[len(part) // 2] for part in (seconds[1:50], seconds[-50:]))
print(json.dumps({"read": read, "first": first, "last": last, "peak_bytes": peak_host_memory()}))
"""


def measure_line(points: Sequence[Point], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Lets all points of a line take turns; returns for each the seconds of a step and the peak memory."""
    with tempfile.TemporaryDirectory() as directory:
        commands, ranks = {}, {}
        for point in points:
            name, folder = str(point.value), Path(directory) / str(point.value)
            write_compute_bound(folder, point.shape, (SHARED, *point.own))
            more = ("--micro_batch_size", str(point.rows))
            commands[name] = Contender("ours", "auto", more, "zero0", point.processes).command(folder, steps)
            ranks[name] = point.processes
        found = take_turns(commands, rounds, max(1, usable_cores() // max(ranks.values())), ranks)
    return [
        {"value": int(name), "step": statistics.median(one.seconds) / steps, "peak_bytes": one.notes["peak_bytes"]}
        for name, one in found.items()
    ]


def measure_data(count: int) -> dict[str, Any]:
    """Reads, tokenizes and deals out `count` rows in a process of its own; returns its seconds and its peak memory."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"instruction": f"{i}=", "output": f"王大丫丫的回答是--->{i} + 0"}) + "\n")
        command = [sys.executable, "-c", DATA, str(path), str(TINY)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"rows": count}


def line_table(name: str, points: Sequence[dict[str, Any]]) -> str:
    first = points[0]
    rows = []
    for point in points:
        cells = [str(point["value"]), f"{point['value'] / first['value']:g}", f"{point['step']:.3f}"]
        rows.append([*cells, f"{point['step'] / first['step']:.2f}", f"{point['peak_bytes'] / 1e6:,.0f}"])
    return markdown_table([name, "×", "step, s", "×", "peak memory, MB"], rows)


def data_table(points: Sequence[dict[str, Any]]) -> str:
    head = ["rows", "read and tokenized, s", "rows a second", "a step's batch, ms: at the start", "at the end"]
    rows = []
    for point in points:
        cells = [f"{point['rows']:,}", f"{point['read']:.1f}", f"{point['rows'] / point['read']:,.0f}"]
        cells += [f"{1000 * point[key]:.2f}" for key in ("first", "last")]
        rows.append([*cells, f"{(point['peak_bytes'] - points[0]['peak_bytes']) / 1e6:,.0f}"])
    return markdown_table([*head, "memory beyond 1,000 rows, MB"], rows)


def chart(found: dict[str, list[dict[str, Any]]]) -> Chart:
    """Draws each line's step time against its size, both as multiples of the line's first point."""
    series = {
        name: ([p["value"] / points[0]["value"] for p in points], [p["step"] / points[0]["step"] for p in points])
        for name, points in found.items()
    }
    series["in proportion"] = ([1.0, 8.0], [1.0, 8.0])
    return Chart("scaling", "Step time against one size at a time", "size, × the smallest", "step time, ×", series)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns that count, for each point")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows in the largest data set")
    args = parser.parse_args(argv)
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= args.rows]
    data = [measure_data(count) for count in counts]
    print(data_table(data), flush=True)
    lines = {}
    for name, points in LINES.items():
        lines[name] = measure_line(points, args.rounds, args.steps)
        print(line_table(name, lines[name]), flush=True)
    IMAGE.write_text(to_svg(chart(lines)), encoding="utf-8")
    text = [ABOUT, "![Step time against one size at a time](images/scaling.svg)"]
    text += [line_table(name, points) for name, points in lines.items()]
    text += [ABOUT_DATA, data_table(data)]
    write_results("scaling", "What grows with what", {"lines": lines, "data": data}, "\n\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
