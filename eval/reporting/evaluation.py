"""Reads what an evaluation found: eval.json, as it is written now and as earlier versions wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.judging.statistics import Interval, wilson
from eval.reporting.run_files import number


@dataclass(frozen=True)
class Difference:
    """Holds how the tuned model's answers compare with the base model's, by one judge."""

    difference: float | None  # mean score of the tuned model less that of the base model
    interval: Interval | None  # of 95 %
    p_value: float | None
    better: int  # number of questions that the tuned model answers better
    worse: int


@dataclass(frozen=True)
class Evaluation:
    """Holds what eval.json says of each model; all of it is empty when nobody has asked the models."""

    asked: Mapping[str, Any] = field(default_factory=dict)  # data, judges and settings; empty in older files
    scores: Mapping[str, dict[str, float]] = field(default_factory=dict)  # numbers by the name of the model
    num_questions: Mapping[str, int] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of 95 %, of the accuracy
    differences: Mapping[str, Difference] = field(default_factory=dict)  # by the judge

    @property
    def first_judge(self) -> Difference | None:
        """Returns the comparison by the judge whose accuracy stands in front of the others'."""
        return next(iter(self.differences.values()), None)


def read_evaluation(content: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Returns the evaluation of one run; `content` is its eval.json and `answers` are the lines of its answers.jsonl.

    An older eval.json has only the scores, so the number of questions is that of the answers, and the intervals follow
    from it. Raises the errors of a damaged file, which the caller turns into a UserError.
    """
    older = "scores" not in content
    scores = content if older else content["scores"]
    rest: Mapping[str, Any] = {} if older else content
    numbers = {label: _numbers(score) for label, score in scores.items()}
    asked = dict(rest.get("asked", {}))
    counts = {label: sum(answer.get("model") == label for answer in answers) for label in scores}
    if "num_questions" in asked:
        counts = dict.fromkeys(scores, int(number(asked["num_questions"])))
    intervals = {}
    for label, score in scores.items():
        if score.get("interval"):
            intervals[label] = _interval(score["interval"])
        elif older and counts[label]:
            intervals[label] = wilson(numbers[label]["accuracy"] * counts[label], counts[label])
    differences = {judge: _difference(found) for judge, found in rest.get("comparisons", {}).items()}
    return Evaluation(asked, numbers, counts, intervals, differences)


def _numbers(score: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a score. Its accuracy has to be there, and is null where there was no judge."""
    numbers = {key: number(value) for key, value in score.items() if isinstance(value, int | float)}
    return {"accuracy": numbers["accuracy"]} | numbers if score["accuracy"] is not None else numbers


def _interval(ends: Sequence[Any]) -> Interval:
    low, high = ends
    return number(low), number(high)


def _difference(found: Mapping[str, Any]) -> Difference:
    value, p_value = found.get("difference"), found.get("p_value")
    return Difference(
        difference=None if value is None else number(value),
        interval=_interval(found["interval"]) if found.get("interval") else None,
        p_value=None if p_value is None else number(p_value),
        better=len(found.get("better", ())),
        worse=len(found.get("worse", ())),
    )
