"""Draws lines over time or steps as SVG that is legible on light and dark pages and needs no other file.

Text in the SVG stays text. Axes and text have the colour `currentColor`, which a style inside the SVG sets.
"""

import csv
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eval.reporting.run_summary import Run, measured
from loop.measure.phase_names import PHASES

# The first four are the blue, vermilion, green and purple of Okabe and Ito. Their other four colours are hard to see on
# a white or a black page. The last three here have a contrast of 3:1 on both, and protanopes and deuteranopes can tell
# all seven apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#3091F2", "#805C26", "#666666")
DASHES = ((), (5, 1.5), (1.2, 1.2), (7, 1.5, 1.2, 1.5), (3, 3), (9, 2, 3, 2), (4, 1, 1, 1, 1, 1))  # in line widths
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#010203"  # matplotlib draws axes and text in this colour, which is then replaced by currentColor
LIGHT, DARK = "#1f2328", "#e6edf3"  # text on a light and on a dark page
LONGEST = 40  # a longer name loses its first letters in the legend
X_PARTS = 100  # a line with more points is drawn as means over so many parts of the x axis
STEPS, LOSS_UNIT = "optimizer step", "nats a label token"
SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.0, "text.parse_math": False},
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12.0},
    **{"axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "lines.linewidth": 1.5, "lines.markersize": 5.0},
}


@dataclass(frozen=True)
class Chart:
    """Holds what one chart shows. A run without data keeps its place in `series`, so that it keeps its style."""

    name: str  # name of its files, and prefix of the ids in its SVG
    title: str
    x_label: str
    y_label: str  # with the unit
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    missing: str = ""  # the reason, when no run has data
    ticks: Sequence[str] = field(default=())  # texts that stand on the x axis instead of the numbers 0, 1, …
    from_zero: bool = True
    interactive: bool = False  # the page draws the chart anew with tooltips, where its script runs
    noisy: frozenset[str] = frozenset()  # series that an interactive chart smooths, with the raw line behind

    @property
    def drawn(self) -> bool:
        return any(measured(values) for _, values in self.series.values())


def sample_chart(name: str, title: str, y_label: str, column: str, runs: Sequence[Run]) -> Chart:
    """Makes a chart of one column of samples.csv over time. A column of bytes is shown in MB or GB."""
    seconds = {run.name: measured(run.samples.get("seconds", [])) for run in runs}
    columns = {run.name: run.samples.get(column) or [None] * len(seconds[run.name]) for run in runs}
    unit, divisor = memory_unit(columns.values()) if column.endswith("_bytes") else ("", 1.0)
    series = {name: (seconds[name], divided(values, divisor)) for name, values in columns.items()}
    missing = "no GPU is seen on this machine" if column.startswith("gpu") else "there are no samples"
    return Chart(name, title, "seconds since launch", y_label + unit, series, missing)


def metric_chart(
    key: str, title: str, y_label: str, runs: Sequence[Run], from_zero: bool = True, interactive: bool = False
) -> Chart:
    """Makes a chart of one key of metrics.jsonl over the steps."""
    series = {run.name: _points_of(run, key) for run in runs}
    name = key.replace("/", "_")
    noisy = frozenset(series) if interactive and key != "train/lr" else frozenset()
    missing = f"no {key} in metrics.jsonl"
    return Chart(name, title, STEPS, y_label, series, missing, (), from_zero, interactive, noisy)


def _points_of(run: Run, key: str) -> tuple[list[float], list[float | None]]:
    there = [line for line in run.metrics if key in line]
    return measured(line["step"] for line in there), [line[key] for line in there]


def loss_chart(runs: Sequence[Run]) -> Chart:
    """Makes one interactive chart of training and validation loss, each validation file apart where there are several.

    The training losses of all runs come first.
    """
    trained = {_named(run, "training", runs): _points_of(run, "train/loss") for run in runs}
    validated = {}
    for run in runs:
        keys = dict.fromkeys(key for line in run.metrics for key in line if key.startswith("val/loss"))
        for key in keys or ["val/loss"]:
            part = key.removeprefix("val/loss").lstrip("/")
            validated[_named(run, f"validation, {part}" if part else "validation", runs)] = _points_of(run, key)
    missing = "no train/loss in metrics.jsonl"
    series = trained | validated
    return Chart("loss", "Loss", STEPS, LOSS_UNIT, series, missing, (), False, True, frozenset(trained))


def accuracy_chart(runs: Sequence[Run]) -> Chart | None:
    """Makes a chart of the accuracy of each checkpoint over the steps; None where no checkpoint was asked."""
    series: dict[str, tuple[Sequence[float], Sequence[float | None]]] = {}
    for run in runs:
        scores = {step: score for name, score in run.evaluation.scores.items() if (step := _step_of(name)) is not None}
        if scores:
            steps = sorted(scores)
            series[_named(run, "accuracy", runs)] = (steps, [scores[step].get("accuracy") for step in steps])
    if not series:
        return None
    return Chart("accuracy", "Accuracy of the checkpoints", STEPS, "accuracy", series, "no judge", (), True, True)


def _step_of(label: str) -> int | None:
    """The step of a checkpoint that was asked, step-000057; None for another model."""
    found = re.fullmatch(r"step-(\d+)", label)
    return int(found[1]) if found else None


def _named(run: Run, what: str, runs: Sequence[Run]) -> str:
    return what if len(runs) == 1 else f"{run.name}: {what}"


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    named = {"train/loss": "Training loss", "val/loss": "Validation loss"}
    return [metric_chart(key, title, LOSS_UNIT, runs, from_zero=False) for key, title in named.items()]


def phase_chart(runs: Sequence[Run]) -> Chart:
    """Makes a chart of the peak memory in each phase."""
    found = {run.name: run.figures.get("phase_peak_bytes") for run in runs}
    peaks = {name: figure if isinstance(figure, dict) else {} for name, figure in found.items()}
    phases = [phase for phase in PHASES if any(phase in peak for peak in peaks.values())]
    columns = {name: [peak.get(phase) for phase in phases] for name, peak in peaks.items()}
    unit, divisor = memory_unit(columns.values())
    series = {name: (range(len(phases)), divided(column, divisor)) for name, column in columns.items()}
    kinds = sorted({run.memory_of for run in runs if run.usage})
    title = f"Peak memory of a rank ({' or '.join(kinds)})"
    return Chart("memory", title, "phase of the run", f"peak, {unit}", series, "there is no usage.json", ticks=phases)


def memory_unit(columns: Iterable[Sequence[float | None]]) -> tuple[str, float]:
    """Returns the unit that suits the largest value, and the number of bytes in it."""
    most = max((value for column in columns for value in measured(column)), default=0.0)
    return ("GB", 1e9) if most >= 1e10 else ("MB", 1e6)


def divided(values: Sequence[float | None], divisor: float) -> list[float | None]:
    return [None if value is None else value / divisor for value in values]


def to_csv(chart: Chart) -> str:
    """Returns all points as CSV, each on a row of its own."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["run", chart.x_label, chart.y_label])
    for name, points in chart.series.items():
        for x, y in zip(*points, strict=True):
            rows.writerow([name, chart.ticks[int(x)] if chart.ticks else x, "" if y is None else y])
    return file.getvalue()


def to_svg(chart: Chart) -> str:
    """Returns an `svg` element; every id in it begins with the name of the chart."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # the user's own matplotlibrc does not count
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": chart.name})
        # matplotlib warns of letters that its own font lacks, but the font of the viewer draws them.
        warnings.simplefilter("ignore")
        canvas = Canvas(figsize=(8.8, 3.9), layout="constrained")
        axes = canvas.add_subplot()
        handles = []
        for number, (name, (x, y)) in enumerate(zip(chart.series, _drawn_points(chart), strict=True)):
            if np.isnan(y).all():
                continue
            style = line_style(number)
            every = max(1, len(x) // 8)
            axes.plot(x, y, markevery=(number * every // 7, every), **style)
            handles.append(Line2D([], [], label=_label(name), **style))
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if chart.ticks:
            axes.set_xticks(range(len(chart.ticks)), chart.ticks)
        canvas.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=4.5)
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _adapt(file.getvalue(), chart)


def line_style(number: int) -> dict[str, Any]:
    """Returns the style of line `number`.

    The first seven lines differ in colour, dashes and marker; the first 49 in the combination of colour and dashes.
    """
    place, turn = number % 7, number // 7
    dashes = (place + turn) % 7
    linestyle = (0, DASHES[dashes]) if DASHES[dashes] else "-"
    return {"color": COLOURS[place], "linestyle": linestyle, "marker": MARKERS[dashes]}


def _drawn_points(chart: Chart) -> Iterator[tuple[Any, Any]]:
    """Yields the points to draw for each series: the points themselves or, if there are too many, means of them."""
    points = [(np.array(x, dtype=float), np.array(y, dtype=float)) for x, y in chart.series.values()]
    part = max(x.max(initial=0.0) for x, _ in points) / X_PARTS
    for x, y in points:
        if len(x) <= X_PARTS or part <= 0:
            yield x, y
        else:
            places = x // part
            alike = [places == place for place in np.unique(places)]
            yield np.array([x[these].mean() for these in alike]), np.array([np.nanmean(y[these]) for these in alike])


def _label(name: str) -> str:
    """Returns the name of a run for the legend: printable, and its end when it is long."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _adapt(svg: str, chart: Chart) -> str:
    """Gives the SVG of matplotlib ids and a style of its own, so that several charts can share a page."""
    name = chart.name
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg).replace(INK, "currentColor")
    style = f"#{name} *{{stroke-linejoin:round}} #{name}{{color:{LIGHT};color-scheme:light dark}} "
    style += f"@media (prefers-color-scheme:dark){{#{name}{{color:{DARK}}}}}"
    svg = re.sub(r"<style.*?</style>", f"<style>{style}</style>", svg, count=1, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    root = head.replace("<svg", f'<svg id="{name}" role="img" aria-labelledby="{name}-title"')
    return f'{root}>\n <title id="{name}-title">{escape(chart.title)}</title>{rest}\n'
