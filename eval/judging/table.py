"""Makes the table that an evaluation prints."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from eval.judging.scores import Score
from eval.reference import PUBLISHED_ANSWERS
from eval.reporting.markdown import markdown_table

ABSENT = "–"


def table(scores: Mapping[str, Score], asked: Mapping[str, Any], batch_size: int | None) -> str:
    """Returns the scores as a Markdown table; in the reference's task beside those of the reference."""
    judges = asked["judges"]
    of_reference = list(judges) == ["sums"]
    published = PUBLISHED_ANSWERS if of_reference else {}
    columns: list[dict[str, Any]] = [*published.values(), *(asdict(score) for score in scores.values())]
    ours = f"{asked['num_questions']}, {batch_size or 'what fits'}"
    rows = [("prompts, batch size", ["20, 1"] * len(published) + [ours] * len(scores))]
    if judges:
        rows.append(
            ("accuracy" if len(judges) == 1 else f"accuracy, {judges[0]}", _each(columns, "accuracy", "{:.3f}"))
        )
        rows.append(("95 % interval", [_interval(column.get("interval")) for column in columns]))
    for judge in judges[1:]:
        rows.append((f"accuracy, {judge}", [f"{column['accuracies'][judge]:.3f}" for column in columns]))
    rows += [
        ("prefix right", _each(columns, "prefix_rate", "{:.3f}")),
        (f"pass@{asked['samples']}", _each(columns, "pass_at_k", "{:.3f}")),
        ("most frequent answer right", _each(columns, "majority", "{:.3f}")),
        ("seconds", _each(columns, "seconds", "{:.2f}")),
        ("tokens a second", _each(columns, "tokens_per_second", "{:.1f}")),
        ("peak memory, loading, MB", _each(columns, "peak_load_bytes", "{:,.1f}", 1e6)),
        ("peak memory, inference beyond that, MB", _each(columns, "peak_inference_bytes", "{:,.1f}", 1e6)),
    ]
    names = [f"reference, {label}" for label in published] + [f"ours, {label}" for label in scores]
    shown = [(name, cells) for name, cells in rows if set(cells) != {ABSENT}]
    return markdown_table(["", *names], [[name, *cells] for name, cells in shown])


def _each(columns: list[dict[str, Any]], key: str, form: str, divisor: float = 1) -> list[str]:
    return [ABSENT if column.get(key) is None else form.format(column[key] / divisor) for column in columns]


def _interval(interval: tuple[float, float] | None) -> str:
    return ABSENT if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
