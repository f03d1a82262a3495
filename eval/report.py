"""Draws a page about a comparison of configurations, or about one or more runs: `python -m eval.report FOLDER …`.

This command writes report.html, which needs no other file, and report.md, summary.json, and charts/ with an SVG and a
CSV for each chart.
"""

import argparse
import errno
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import UserError
from eval.reference import PUBLISHED, PUBLISHED_ANSWERS
from eval.reporting.charts import Chart, to_csv, to_svg
from eval.reporting.conclusions import NOT_MEASURED, conclusions, sentences
from eval.reporting.first_screen import Card
from eval.reporting.page import ROWS, Page, comparison_page, state
from eval.reporting.render import to_html, to_markdown
from eval.reporting.run_files import read_object, reading
from eval.reporting.run_page import run_page
from eval.reporting.run_summary import Run, read_run
from eval.reporting.warning_signs import warning_signs
from eval.reporting.watch import watch
from loop.guard.process import RunError, exit_codes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # the disk is at fault, not the user


def summary(runs: Sequence[Run], **more: Any) -> dict[str, Any]:
    """Returns the content of summary.json; `more` are further keys of it."""
    keys = [row[1] for row in ROWS]
    return {
        "null": NOT_MEASURED,
        **more,
        "findings": sentences(runs),
        "runs": {
            run.name: {"state": state(run), "scores": run.evaluation.scores, "warnings": warning_signs(run)}
            | {key: run.figures.get(key) for key in keys}
            for run in runs
        },
    }


def write(out: Path, page: Page, numbers: Mapping[str, Any]) -> None:
    """Writes all files of a report into `out`; each of them is complete before the first takes its place.

    Raises RunError when the disk is full or broken, and UserError when `out` cannot be written for another reason.
    """
    charts = [block for blocks in page.sections.values() for block in blocks if isinstance(block, Chart)]
    svgs = {chart.name: to_svg(chart) for chart in charts if chart.drawn}
    files = {f"charts/{name}.svg": svg for name, svg in svgs.items()}
    files |= {f"charts/{chart.name}.csv": to_csv(chart) for chart in charts if chart.drawn}
    files["report.md"] = to_markdown(page)
    files["summary.json"] = json.dumps(numbers, indent=2, ensure_ascii=False) + "\n"
    files["report.html"] = to_html(page, svgs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as beside:
            (Path(beside) / "charts").mkdir()
            for name, text in files.items():
                (Path(beside) / name).write_bytes(text.encode("utf-8", errors="replace"))
            (out / "charts").mkdir(exist_ok=True)
            for name in files:
                os.replace(Path(beside) / name, out / name)
        for chart in charts:
            if not chart.drawn:  # an earlier report may have left a drawing of this chart
                (out / "charts" / f"{chart.name}.svg").unlink(missing_ok=True)
                (out / "charts" / f"{chart.name}.csv").unlink(missing_ok=True)
    except OSError as error:
        text = f"{out}: the report cannot be written: {error.strerror}. Free space there, or make it writable."
        raise (RunError if error.errno in FULL else UserError)(text) from error


def write_comparison_report(folder: Path) -> None:
    """Draws the report of a comparison, with the runs that are done so far.

    Raises UserError for damaged files and RunError for a full disk.
    """
    comparison = read_object(folder / "comparison.json")
    with reading(folder / "comparison.json"):
        runs = [read_run(name, folder / name, comparison) for name in comparison["accel_configs"]]
        page = comparison_page(comparison, runs)
    published = {name: asdict(training) for name, training in PUBLISHED.items()} | {"answers": PUBLISHED_ANSWERS}
    write(folder, page, summary(runs, comparison=comparison, published=published, conclusions=conclusions(runs)))


def write_run_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Draws one report about runs that belong to no comparison, and returns what the first screen says, in lines.

    Raises the errors of write_comparison_report.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(name, folder) for name, folder in zip(names, folders, strict=True)]
    page = run_page(runs)
    write(out, page, summary(runs))
    return [block.told() for block in page.sections["Summary"] if isinstance(block, Card)]


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="one comparison, or one or more runs")
    parser.add_argument("--out", type=Path, help="folder to write into (default: that of one run, report/ for several)")
    parser.add_argument("--watch", action="store_true", help="serve a page about a run while it trains")
    parser.add_argument("--port", type=int, help="with --watch: port on the loopback address (default 0: a free one)")
    args = parser.parse_args(argv)
    folders = list({folder.resolve(): folder for folder in args.folders}.values())
    if args.watch:
        if len(folders) > 1 or args.out:
            raise UserError("--watch follows one run and writes nothing. Give one folder, without --out.")
        return watch(folders[0], args.port or 0)
    if args.port is not None:
        raise UserError("--port goes with --watch, which serves a page while a run trains.")
    comparisons = [folder for folder in folders if (folder / "comparison.json").is_file()]
    for folder in folders:
        if not any((folder / file).is_file() for file in ("comparison.json", "recipe.yaml", "metrics.jsonl")):
            raise UserError(f"{folder}: is no folder of a run or of a comparison. Give runs/NAME.")
    if comparisons and (len(folders) > 1 or args.out):
        raise UserError(
            f"{comparisons[0]}: is a comparison, which has a page of its own. Give it alone, without --out."
        )
    out = args.out or (folders[0] if len(folders) == 1 else Path("report"))
    if comparisons:
        write_comparison_report(folders[0])
    else:
        write_run_report(folders, out)
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
