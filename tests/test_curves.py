"""Tests the data from which the page's script draws curves."""

import json
import random

from eval.reporting.charts import loss_chart
from eval.reporting.curves import as_json, curve, thinned
from tests.sample_runs import run


def test_training_and_validation_share_one_picture() -> None:
    mine = run("mine")
    mine.metrics.extend(
        [
            {"step": 1.0, "train/loss": 10.123456789},
            {"step": 2.0, "train/loss": None, "val/loss": 2.0, "val/loss/a.jsonl": 1.5},
            {"step": 3.0, "train/loss": 0.9},
        ]
    )
    drawn = curve(loss_chart([mine]))
    assert drawn["x"] == [1.0, 2.0, 3.0]
    assert {each["name"]: each["y"] for each in drawn["series"]} == {
        "training": [10.1235, None, 0.9],
        "validation": [None, 2.0, None],
        "validation, a.jsonl": [None, 1.5, None],
    }
    assert [each["noisy"] for each in drawn["series"]] == [True, False, False]
    assert drawn["log"] is True, "10.1 is more than ten times 0.9"
    assert list(loss_chart([mine, run("other")]).series) == [
        *("mine: training", "other: training", "mine: validation", "mine: validation, a.jsonl", "other: validation")
    ]


def test_a_long_line_keeps_its_extremes_and_its_order() -> None:
    draw = random.Random(0)
    points = [(float(step), draw.random()) for step in range(100_000)]
    points[50_000] = (50_000.0, 7.0)
    points[70_001] = (70_001.0, -7.0)
    kept = thinned(points, most=500)
    assert len(kept) <= 500
    assert {points[50_000], points[70_001]} <= set(kept) <= set(points)
    assert kept == sorted(kept)
    assert thinned(points[:500], most=500) == points[:500]


def test_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--<script>", "b": [1, None]}
    assert "<" not in as_json(value)
    assert json.loads(as_json(value)) == value
