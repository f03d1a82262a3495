"""Tests that charts are legible on any page, alone or beside others, and that their lines differ without colour."""

import csv
import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from eval.reporting.charts import (
    COLOURS,
    DARK,
    LIGHT,
    X_PARTS,
    Chart,
    line_style,
    loss_charts,
    metric_chart,
    phase_chart,
    sample_chart,
    to_csv,
    to_svg,
)
from eval.reporting.run_summary import Run
from tests.sample_runs import run

SVG = "{http://www.w3.org/2000/svg}"
WHITE, BLACK = "#ffffff", "#0d1117"
# Machado, Oliveira, Fernandes 2009: full protanopia and deuteranopia, on linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def linear(colour: str) -> Any:
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colours, as WCAG 2.2 defines it with the relative luminance."""
    darker, lighter = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb: Any) -> Any:
    """Converts linear RGB to CIELAB, with the white point D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def chart(**changes: Any) -> Chart:
    values: dict[str, Any] = {
        **{"name": "loss", "title": "Loss", "x_label": "step", "y_label": "nats"},
        "series": {"zero2": ([1, 2, 3], [3.0, 2.0, 1.5]), "zero3": ([1, 2, 3], [3.0, None, 1.0])},
    }
    return Chart(**values | changes)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_contrast_formula() -> None:
    assert contrast("#000000", WHITE) == pytest.approx(21.0)
    assert contrast("#777777", WHITE) == pytest.approx(4.48, abs=0.01), "WCAG's well-known example"


@pytest.mark.parametrize("page", [WHITE, BLACK])
def test_every_line_stands_out_on_a_light_and_on_a_dark_page(page: str) -> None:
    assert min(contrast(colour, page) for colour in COLOURS) >= 3.0
    svg = to_svg(chart(series={str(number): ([1, 2], [1.0, 2.0]) for number in range(7)}))
    drawn = set(re.findall(r"stroke: (#\w+)", svg))
    assert drawn == {colour.lower() for colour in COLOURS}


def test_text_stands_out_on_its_page() -> None:
    assert min(contrast(LIGHT, WHITE), contrast(DARK, BLACK)) >= 7.0


@pytest.mark.parametrize("who", SEEN_BY)
def test_colours_stay_apart(who: str) -> None:
    """Any two of the seven colours have a distance of more than 10 in CIELAB; people notice a distance of 2.3."""
    seen = [lab(SEEN_BY[who] @ linear(colour)) for colour in COLOURS]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 10


def test_seven_lines_are_told_apart_without_colour() -> None:
    styles = [line_style(number) for number in range(7)]
    for part in ("color", "linestyle", "marker"):
        assert len({str(style[part]) for style in styles}) == 7
    assert len({str(line_style(number)) for number in range(49)}) == 49


def test_text_is_text_with_title_units_and_names() -> None:
    assert {"Loss", "step", "nats", "zero2", "zero3"} <= set(texts(to_svg(chart())))


def test_axes_and_text_take_the_pages_colour() -> None:
    svg = to_svg(chart())
    fills = re.findall(r"<text[^>]*fill: ([^;\"]+)", svg)
    assert len(fills) == len(texts(svg))
    assert set(fills) == {"currentColor"}
    assert "#000000" not in svg
    style = re.findall("<style>(.*?)</style>", svg)
    assert style == [
        f"#loss *{{stroke-linejoin:round}} #loss{{color:{LIGHT};color-scheme:light dark}} "
        f"@media (prefers-color-scheme:dark){{#loss{{color:{DARK}}}}}"
    ]


def test_the_background_is_transparent() -> None:
    patches = [group for group in ET.fromstring(to_svg(chart())).iter(f"{SVG}g") if "patch" in group.get("id", "")]
    areas = [path.get("style", "") for patch in patches for path in patch if "z" in path.get("d", "")]
    assert areas
    assert all("fill: none" in style for style in areas)


def test_charts_in_one_page_share_no_id() -> None:
    """Every id that an SVG refers to exists in the same SVG."""
    svgs = [to_svg(chart(name=name)) for name in ("one", "two", "three")]
    ids = [found for svg in svgs for found in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids)) > 100
    for svg in svgs:
        referred = set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg))
        assert referred
        assert referred <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_nothing_outside_is_referred_to() -> None:
    svg = to_svg(chart())
    assert set(re.findall(r'(?:href|src)="([^#][^"]*)"', svg)) == set()
    assert set(re.findall(r"url\(([^#])", svg)) == set()
    assert not re.search("@import|<script|<image|DOCTYPE|metadata", svg)


def test_the_same_chart_is_the_same_file() -> None:
    assert to_svg(chart()) == to_svg(chart())


@pytest.mark.parametrize("name", ["<b>&'\"", "_hidden", "$x_1$", "运行", "a\x07b\n", "x" * 300])
def test_any_name_of_a_run_is_legible(name: str) -> None:
    shown = texts(to_svg(chart(series={name: ([1], [1.0])})))
    if len(name) < 40:
        assert "".join(letter if letter.isprintable() else "?" for letter in name) in shown
    else:
        assert f"…{name[:39]}" in shown


def test_one_point_is_seen() -> None:
    markers = re.findall(r"<use [^>]*fill: #0072b2", to_svg(chart(series={"a": ([5], [0.0])})))
    assert len(markers) == 2, "in the chart and in the legend"


def test_a_run_without_data_keeps_its_style_for_other_charts() -> None:
    svg = to_svg(chart(series={"a": ([], []), "b": ([1, 2], [None, None]), "c": ([1, 2], [1.0, 2.0])}))
    assert set(re.findall(r"stroke: (#\w+)", svg)) == {COLOURS[2].lower()}
    assert "c" in texts(svg)
    assert not {"a", "b"} & set(texts(svg))
    assert not chart(series={"a": ([], []), "b": ([1], [None])}).drawn


def line_points(svg: str) -> list[tuple[float, float]]:
    path = next(
        path
        for path in ET.fromstring(svg).iter(f"{SVG}path")
        if "#0072b2" in path.get("style", "") and path.get("clip-path")
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def test_many_points_are_drawn_as_means_and_all_stand_in_the_csv() -> None:
    """The points are 0 and 2 in turn, ten in each part of the axis, so the line is flat at their mean."""
    x = [number / 10 for number in range(10 * X_PARTS)]
    y = [2.0 * (number % 2) for number in range(10 * X_PARTS)]
    many = chart(series={"a": (x, y)})
    heights = {round(height, 3) for _, height in line_points(to_svg(many))}
    assert len(heights) == 1
    rows = list(csv.reader(to_csv(many).splitlines()))
    assert len(rows) == 1 + len(x)
    assert rows[2] == ["a", "0.1", "2.0"]


def test_the_csv_says_what_its_columns_are() -> None:
    assert to_csv(chart(series={"a,b": ([1, 2], [0.5, None])})) == 'run,step,nats\n"a,b",1,0.5\n"a,b",2,\n'
    assert to_csv(chart(series={"a": ([0, 1], [1.0, 2.0])}, ticks=["load", "save"])) == (
        "run,step,nats\na,load,1.0\na,save,2.0\n"
    )


def sampled(name: str, **columns: list[float | None]) -> Run:
    made = run(name)
    made.samples.update({"seconds": [0.5, 1.0], **columns})
    return made


def test_samples_over_time() -> None:
    runs = [run("not begun"), sampled("a", tree_rss_bytes=[2e6, 3e6]), sampled("b", gpu_memory_bytes=[1e9, 2e10])]
    host = sample_chart("host", "Host", "resident, ", "tree_rss_bytes", runs)
    assert (host.x_label, host.y_label) == ("seconds since launch", "resident, MB")
    assert host.series == {"not begun": ([], []), "a": ([0.5, 1.0], [2.0, 3.0]), "b": ([0.5, 1.0], [None, None])}
    gpu = sample_chart("gpu", "GPU", "used, ", "gpu_memory_bytes", runs)
    assert (gpu.y_label, gpu.series["b"]) == ("used, GB", ([0.5, 1.0], [1.0, 20.0]))
    none = sample_chart("gpu_use", "GPU", "%", "gpu_utilisation_percent", runs)
    assert (none.drawn, none.missing) == (False, "no GPU is seen on this machine")


def test_metrics_over_steps() -> None:
    made = run("a")
    made.metrics.extend([{"step": 5, "train/lr": 0.1}, {"step": 10, "val/loss": None}, {"step": 15, "train/lr": 0.2}])
    assert metric_chart("train/lr", "LR", "lr", [made]).series == {"a": ([5, 15], [0.1, 0.2])}
    assert [each.drawn for each in loss_charts([made])] == [False, False]


def test_peaks_of_phases_stand_in_their_order() -> None:
    a = run("a", phase_peak_bytes={"save": 3e6, "forward": 2e6, "load": None})
    peaks = phase_chart([a, run("b")])
    assert list(peaks.ticks) == ["load", "forward", "save"]
    assert list(peaks.series["a"][1]) == [None, 2.0, 3.0]
    assert {"load", "forward", "save", "peak, MB"} <= set(texts(to_svg(peaks)))
