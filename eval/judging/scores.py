"""Turns answers into scores: judges them, sums the verdicts up, and compares two models."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.conversation import Row
from data.rows import Problems
from eval.answers.ask import Asked
from eval.answers.generate import Answer
from eval.check import Verdict
from eval.judging.judges import Judge, spoken
from eval.judging.own import NotJudgeable
from eval.judging.statistics import Difference, Interval, compare, mean_interval


@dataclass(frozen=True)
class Judged:
    """Holds the answers of one model to one row, each with the verdicts of all judges by their names."""

    row: Row
    answers: list[Answer]
    verdicts: dict[str, list[Verdict]]

    def score(self, judge: str) -> float:
        """The mean score of the row's answers."""
        return sum(verdict.score for verdict in self.verdicts[judge]) / len(self.answers)


@dataclass(frozen=True)
class Score:
    """Holds the result of one model, as eval.json has it. Accuracies are None where there is no judge."""

    accuracy: float | None  # mean score of all answers by the first judge: the share of right ones, 0..1
    interval: Interval | None  # that of 95 %
    seconds: float  # time to generate all answers, without loading the model
    tokens_per_second: float  # generated tokens, end tokens included
    peak_load_bytes: int | None  # GPU memory, or resident host memory without a GPU; None if not known
    peak_inference_bytes: int | None  # memory beyond what the loaded model takes
    accuracies: dict[str, float]  # by every judge
    prefix_rate: float | None = None  # share of the answers with the prefix of the reference task
    pass_at_k: float | None = None  # share of the rows with a right answer among several, by the first judge
    majority: float | None = None  # share of the rows whose most frequent answer is right, by the first judge
    cut_off: int = 0  # number of answers that have ended at the most tokens that they may have
    verified: int = 0  # number of rows that were asked once more, one at a time
    different: int = 0  # number of these rows whose second answer differs


def check_rows(rows: Sequence[Row], judges: Sequence[Judge], name: str) -> list[str]:
    """Has each judge judge the rows' own answers; returns a warning for each judge that calls some of them wrong.

    Raises UserError, which names all bad rows, where a judge can judge no answer to a row.
    """
    problems, warnings = Problems(), []
    for judge in judges:
        wrong: list[str] = []
        for row in rows:
            problem = None
            try:
                verdict = judge(row, own_answer(row))
                if not verdict.right:
                    wrong.append(f"row {row.number}: {verdict.reason}")
            except NotJudgeable as error:
                problem = f"row {row.number}: {error}; the judge is {judge.name}"
            problems.add(problem)
        if wrong and judge.name != "sums":  # the reference's rows need no answer of their own
            warnings.append(
                f"the judge {judge.name} calls {len(wrong)} of {len(rows)} rows' own answers wrong, {wrong[0]}"
            )
    problems.fail(name)
    return warnings


def own_answer(row: Row) -> str:
    """Returns the answer that a row gives; its tool calls follow as JSON."""
    calls = row.turns[-1].tool_calls if row.turns else ()
    said = [json.dumps({key: call[key] for key in ("name", "arguments")}, ensure_ascii=False) for call in calls]
    return "\n".join(text for text in (row.answer, *said) if text)


def judge_all(rows: Sequence[Row], asked: Asked, judges: Sequence[Judge]) -> list[Judged]:
    """Judges all answers. Raises UserError where a judge of the user's fails."""
    return [
        Judged(row, answers, {judge.name: [judge(row, answer.text) for answer in answers] for judge in judges})
        for row, answers in zip(rows, asked.answers, strict=True)
    ]


def score_of(judged: Sequence[Judged], asked: Asked, verify: int) -> Score:
    names = list(judged[0].verdicts)
    scores = {name: [row.score(name) for row in judged] for name in names}
    verdicts = [verdict for row in judged for verdict in row.verdicts.get(names[0], [])] if names else []
    prefixes = [verdict.prefix for verdict in verdicts if verdict.prefix is not None]
    several = names and len(judged[0].answers) > 1
    accuracies = {name: _mean(values) for name, values in scores.items()}
    return Score(
        accuracy=accuracies[names[0]] if names else None,
        interval=mean_interval(scores[names[0]]) if names else None,
        seconds=asked.seconds,
        tokens_per_second=asked.num_tokens / asked.seconds,
        peak_load_bytes=asked.peak_load,
        peak_inference_bytes=asked.peak_inference,
        accuracies=accuracies,
        prefix_rate=_mean(prefixes) if prefixes else None,
        pass_at_k=_mean(any(verdict.right for verdict in row.verdicts[names[0]]) for row in judged)
        if several
        else None,
        majority=_mean(_majority(row, names[0]).right for row in judged) if several else None,
        cut_off=sum(answer.cut_off for row in judged for answer in row.answers),
        verified=min(verify, len(judged)),
        different=asked.different,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _majority(row: Judged, judge: str) -> Verdict:
    """The verdict on the most frequent answer, without its thought; of equally frequent ones on the first."""
    texts = [spoken(answer.text).strip() for answer in row.answers]
    return row.verdicts[judge][texts.index(Counter(texts).most_common(1)[0][0])]


@dataclass(frozen=True)
class Comparison:
    """Holds how two models differ by one judge: the difference, and the numbers of the rows that changed."""

    of: Difference
    better: list[int]
    worse: list[int]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.of), "better": self.better, "worse": self.worse}

    def sentence(self, judge: str) -> str:
        """Says which model is better by the judge, and how sure that is."""
        low, high = self.of.interval
        chance = f", McNemar p = {self.of.p_value:.2g}" if self.of.p_value is not None else ""
        verdict = f"the tuned model is {'better' if self.of.difference > 0 else 'worse'}"
        if not self.of.significant:
            verdict = "no difference that chance alone would not explain"
        return (
            f"{judge}: {verdict}: {self.of.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}{chance}); "
            f"{len(self.better)} answers became better, {len(self.worse)} worse"
        )


def compare_models(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Comparison]:
    """Compares two models on the same rows by each judge."""
    found = {}
    for judge in before[0].verdicts:
        pairs = [(one.row.number, one.score(judge), two.score(judge)) for one, two in zip(before, after, strict=True)]
        found[judge] = Comparison(
            compare([one for _, one, _ in pairs], [two for _, _, two in pairs]),
            [number for number, one, two in pairs if two > one],
            [number for number, one, two in pairs if two < one],
        )
    return found


def answer_lines(label: str, judged: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """Yields the lines of answers.jsonl: one for each answer."""
    for row in judged:
        for sample, answer in enumerate(row.answers):
            verdicts = {name: of[sample] for name, of in row.verdicts.items()}
            first = next(iter(verdicts.values()), None)
            yield {
                "model": label,
                "row": row.row.number,
                "turn": len(row.row.turns) or None,
                **({"sample": sample + 1} if len(row.answers) > 1 else {}),
                "instruction": row.row.question,
                "expected": own_answer(row.row),
                "answer": answer.text,
                "cut_off": answer.cut_off,
                "right": first.right if first else None,
                "score": first.score if first else None,
                "reason": first.reason if first else "",
                "verdicts": {name: {"score": of.score, "reason": of.reason} for name, of in verdicts.items()},
                **({"prefix": first.prefix} if first and first.prefix is not None else {}),
            }


def scores_as_json(
    asked: Mapping[str, Any], scores: Mapping[str, Score], comparisons: Mapping[str, Comparison]
) -> dict[str, Any]:
    """Returns the content of eval.json; `asked` says what was asked and how."""
    return {
        "asked": dict(asked),
        "scores": {label: asdict(score) for label, score in scores.items()},
        "comparisons": {judge: comparison.as_json() for judge, comparison in comparisons.items()},
    }
