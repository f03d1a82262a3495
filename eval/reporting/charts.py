"""Lines over time or steps, as SVG that is legible on a light and on a dark page and needs nothing else.

Text stays text. Axes and text take the colour of `currentColor`, which a style inside the SVG chooses.
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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eval.reporting.run_summary import PHASES, Run, measured

# Okabe and Ito's blue, vermilion, green and purple, and in the place of their other four, which a white or a black page
# swallows, three that reach a contrast of 3:1 on both and stay apart for protanopes and deuteranopes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#3091F2", "#805C26", "#666666")
DASHES = ((), (5, 1.5), (1.2, 1.2), (7, 1.5, 1.2, 1.5), (3, 3), (9, 2, 3, 2), (4, 1, 1, 1, 1, 1))  # in line widths
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#010203"  # of axes and text while matplotlib draws; then currentColor
LIGHT, DARK = "#1f2328", "#e6edf3"  # text on a light and on a dark page
LONGEST = 40  # letters of a name
PARTS = 100  # of the x axis
SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.0, "text.parse_math": False},
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12.0},
    **{"axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "lines.linewidth": 1.5, "lines.markersize": 5.0},
}


@dataclass(frozen=True)
class Chart:
    """A run without data keeps its place in `series`, and so its style."""

    name: str  # of its files, and before its ids
    title: str
    x_label: str
    y_label: str  # with the unit
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    missing: str = ""  # why, where no run has data
    ticks: Sequence[str] = field(default=())  # in the place of the numbers 0, 1, … on the x axis
    from_zero: bool = True

    @property
    def drawn(self) -> bool:
        return any(measured(values) for _, values in self.series.values())


def sample_chart(name: str, title: str, y_label: str, column: str, runs: Sequence[Run]) -> Chart:
    """Of a column of samples.csv over time. Memory gets its unit here."""
    seconds = {run.name: measured(run.samples.get("seconds", [])) for run in runs}
    columns = {run.name: run.samples.get(column) or [None] * len(seconds[run.name]) for run in runs}
    unit, divisor = memory_unit(columns.values()) if column.endswith("_bytes") else ("", 1.0)
    series = {name: (seconds[name], divided(values, divisor)) for name, values in columns.items()}
    missing = "no GPU is seen on this machine" if column.startswith("gpu") else "there are no samples"
    return Chart(name, title, "seconds since launch", y_label + unit, series, missing)


def metric_chart(key: str, title: str, y_label: str, runs: Sequence[Run], from_zero: bool = True) -> Chart:
    """Of a key of metrics.jsonl over the steps."""
    lines = {run.name: [line for line in run.metrics if key in line] for run in runs}
    series = {
        name: (measured(line["step"] for line in there), [line[key] for line in there]) for name, there in lines.items()
    }
    name = key.replace("/", "_")
    return Chart(name, title, "optimizer step", y_label, series, f"no {key} in metrics.jsonl", from_zero=from_zero)


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    named = {"train/loss": "Training loss", "val/loss": "Validation loss"}
    return [metric_chart(key, title, "nats a label token", runs, from_zero=False) for key, title in named.items()]


def phase_chart(runs: Sequence[Run]) -> Chart:
    """Peak memory of each phase."""
    figures = {run.name: run.figures.get("phase_peak_bytes") for run in runs}
    peaks = {name: figure if isinstance(figure, dict) else {} for name, figure in figures.items()}
    phases = [phase for phase in PHASES if any(phase in peak for peak in peaks.values())]
    columns = {name: [peak.get(phase) for phase in phases] for name, peak in peaks.items()}
    unit, divisor = memory_unit(columns.values())
    series = {name: (range(len(phases)), divided(column, divisor)) for name, column in columns.items()}
    kinds = sorted({run.memory_of for run in runs if run.usage})
    title = f"Peak memory of a rank ({' or '.join(kinds)})"
    return Chart("memory", title, "phase of the run", f"peak, {unit}", series, "there is no usage.json", ticks=phases)


def memory_unit(columns: Iterable[Sequence[float | None]]) -> tuple[str, float]:
    most = max((value for column in columns for value in measured(column)), default=0.0)
    return ("GB", 1e9) if most >= 1e10 else ("MB", 1e6)


def divided(values: Sequence[float | None], divisor: float) -> list[float | None]:
    return [None if value is None else value / divisor for value in values]


def to_csv(chart: Chart) -> str:
    """All points, one a row."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["run", chart.x_label, chart.y_label])
    for name, points in chart.series.items():
        for x, y in zip(*points, strict=True):
            rows.writerow([name, chart.ticks[int(x)] if chart.ticks else x, "" if y is None else y])
    return file.getvalue()


def to_svg(chart: Chart) -> str:
    """An `svg` element; every id in it begins with the chart's name."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": chart.name})
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks; the viewer's has them
        figure = Figure(figsize=(8.8, 3.9), layout="constrained")
        axes = figure.add_subplot()
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
        figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=4.5)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _adapt(file.getvalue(), chart)


def line_style(number: int) -> dict[str, Any]:
    """Of the first seven each part differs, of the first 49 the combination of colour and dashes."""
    place, turn = number % 7, number // 7
    dashes = (place + turn) % 7
    linestyle = (0, DASHES[dashes]) if DASHES[dashes] else "-"
    return {"color": COLOURS[place], "linestyle": linestyle, "marker": MARKERS[dashes]}


def _drawn_points(chart: Chart) -> Iterator[tuple[Any, Any]]:
    """Of each series: as they are or, where there are more than can be told apart, means over parts of the x axis."""
    points = [(np.array(x, dtype=float), np.array(y, dtype=float)) for x, y in chart.series.values()]
    part = max(x.max(initial=0.0) for x, _ in points) / PARTS
    for x, y in points:
        if len(x) <= PARTS or part <= 0:
            yield x, y
        else:
            places = x // part
            alike = [places == place for place in np.unique(places)]
            yield np.array([x[these].mean() for these in alike]), np.array([np.nanmean(y[these]) for these in alike])


def _label(name: str) -> str:
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _adapt(svg: str, chart: Chart) -> str:
    """What matplotlib wrote, with ids and style of its own, so that several share a page."""
    name = chart.name
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg).replace(INK, "currentColor")
    style = f"#{name} *{{stroke-linejoin:round}} #{name}{{color:{LIGHT};color-scheme:light dark}} "
    style += f"@media (prefers-color-scheme:dark){{#{name}{{color:{DARK}}}}}"
    svg = re.sub(r"<style.*?</style>", f"<style>{style}</style>", svg, count=1, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    root = head.replace("<svg", f'<svg id="{name}" role="img" aria-labelledby="{name}-title"')
    return f'{root}>\n <title id="{name}-title">{escape(chart.title)}</title>{rest}\n'
