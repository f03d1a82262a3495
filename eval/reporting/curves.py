"""Turns charts into the data from which the page's script draws them anew with uPlot."""

import json
from collections.abc import Sequence
from typing import Any

from eval.reporting.charts import COLOURS, DASHES, Chart

# All lines of a chart share so many points; of a longer line each part keeps its lowest and its highest point.
MOST_POINTS, FEWEST_POINTS = 4000, 200
LOG_FROM = 10.0  # a chart whose largest value is so many times its smallest begins with a logarithmic axis

Points = list[tuple[float, float]]


def as_json(value: Any) -> str:
    """Returns JSON that can stand in a script element: it has no `<`, so it cannot end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def curve(chart: Chart) -> dict[str, Any]:
    """Returns what the script needs: one list of x for all series, and for each series a y or null for each x."""
    most = max(FEWEST_POINTS, MOST_POINTS // max(1, len(chart.series)))
    drawn = {
        name: thinned([(float(x), y) for x, y in zip(*points, strict=True) if y is not None], most)
        for name, points in chart.series.items()
    }
    xs = sorted({x for points in drawn.values() for x, _ in points})
    series: list[dict[str, Any]] = []
    for number, (name, points) in enumerate(drawn.items()):
        at = dict(points)
        series.append(
            {
                "name": name,
                "colour": COLOURS[number % len(COLOURS)],
                "dash": list(DASHES[number // len(COLOURS) % len(DASHES)]),
                "noisy": name in chart.noisy,
                "y": [round_off(at[x]) if x in at else None for x in xs],
            }
        )
    kept = [each for each in series if any(y is not None for y in each["y"])]
    values = [y for points in drawn.values() for _, y in points]
    log = not chart.from_zero and 0 < LOG_FROM * min(values, default=0.0) < max(values, default=0.0)
    labels = {"name": chart.name, "x_label": chart.x_label, "y_label": chart.y_label}
    return {**labels, "zero": chart.from_zero, "log": log, "x": xs, "series": kept}


def thinned(points: Points, most: int) -> Points:
    """Returns at most about `most` of the points, in their order: the extremes of parts with equally many points."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def round_off(value: float) -> float:
    """Returns the value with six significant digits, which is more than a picture shows."""
    return float(f"{value:.6g}")


def curves(blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the curves of those of the blocks that are interactive charts with data."""
    return [curve(block) for block in blocks if isinstance(block, Chart) and block.interactive and block.drawn]
