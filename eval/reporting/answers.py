"""Puts the answers of all models to the same question side by side, for the table that the page filters."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.reporting.curves import as_json
from eval.reporting.run_files import number
from eval.reporting.run_summary import Run

BYTES = 1_300_000  # of the answers on a page; a page of 2,000 answers has to stay below 2 MB
SHORTER = (4000, 2000, 1000, 500, 250, 120)  # letters to which texts are cut, one after the other, until they fit
MOST_REASONS = 24  # number of reasons that the page offers to filter by
OTHER = "another reason"
LONGEST_REASON = 60

Key = tuple[object, ...]


@dataclass(frozen=True)
class Answers:
    """Holds what the page knows of the answers, as the page's script reads it.

    `questions` has a dictionary for each question: "q" the question, "e" the expected answer where it is known, and
    "a" with a list for each model that answered, by the model's place in `models`: the answer, 1 for right, 0 for
    wrong or null, the score or null, what is wrong, and the place in `reasons` of the kind of that.
    """

    models: list[str]
    reasons: list[str]
    questions: list[dict[str, Any]]
    note: str = ""  # says what does not stand on the page in full


def kind_of_reason(reason: str) -> str:
    """Returns a reason without its numbers and quotations, so that reasons of the same kind are the same."""
    kind = re.sub(r"'[^']*'|\"[^\"]*\"", "…", " ".join(reason.split()))
    kind = re.sub(r"-?\d+(\.\d+)?", "N", kind)
    return kind if len(kind) <= LONGEST_REASON else f"{kind[: LONGEST_REASON - 1]}…"


def collect_answers(runs: Sequence[Run]) -> Answers:
    """Returns all answers of the runs, cut to what fits on a page."""
    models: dict[str, int] = {}
    questions: dict[Key, dict[str, Any]] = {}
    kinds = Counter(kind_of_reason(str(line.get("reason") or "")) for run in runs for line in run.answers)
    del kinds[""]
    reasons = [kind for kind, _ in kinds.most_common(MOST_REASONS)]
    reasons += [OTHER] if len(kinds) > MOST_REASONS else []
    places = {kind: place for place, kind in enumerate(reasons)}
    by_row = all(line.get("row") is not None for run in runs for line in run.answers)
    for run in runs:
        for key, line in _keys(run.answers, by_row):
            label = str(line.get("model"))
            model = models.setdefault(label if len(runs) == 1 else f"{run.name}: {label}", len(models))
            question = questions.setdefault(key, {"q": str(line.get("instruction", "")), "e": "", "a": {}})
            question["e"] = question["e"] or str(line.get("expected") or "")
            reason = str(line.get("reason") or "")
            place = places.get(kind_of_reason(reason), len(reasons) - 1) if reason else -1
            question["a"][str(model)] = [str(line.get("answer", "")), *_verdict(line), reason, place]
    return fit(Answers(list(models), reasons, list(questions.values())))


def _keys(lines: Iterable[Mapping[str, Any]], by_row: bool) -> Iterable[tuple[Key, Mapping[str, Any]]]:
    """Yields each line with what identifies its question: its text, and its row and turn.

    Lines of older files have no row. Among those, the nth answers of all models to the same text belong together.
    """
    seen: Counter[object] = Counter()
    for line in lines:
        text, model = str(line.get("instruction", "")), line.get("model")
        seen[model, text] += 1
        yield (text, str(line["row"]), str(line.get("turn"))) if by_row else (text, seen[model, text]), line


def _verdict(line: Mapping[str, Any]) -> tuple[int | None, float | None]:
    right, score = line.get("right"), line.get("score")
    return (None if right is None else int(bool(right))), (None if score is None else number(score))


def fit(answers: Answers, most: int = BYTES) -> Answers:
    """Cuts texts, and then leaves questions out, until the answers take no more than `most` bytes as JSON.

    The note says what was cut and left out.
    """
    questions, note = answers.questions, ""
    for letters in SHORTER:
        if _size(questions) <= most:
            return Answers(answers.models, answers.reasons, questions, note)
        questions = [_cut(question, letters) for question in answers.questions]
        note = f"Texts are cut to {letters} letters here; answers.jsonl has them in full."
    while (size := _size(questions)) > most:
        questions = questions[: min(len(questions) - 1, int(len(questions) * most / size))]
        note = (
            f"These are the first {len(questions):,} of {len(answers.questions):,} questions, with texts cut to "
            f"{SHORTER[-1]} letters; answers.jsonl has all of them in full."
        )
    return Answers(answers.models, answers.reasons, questions, note)


def _size(questions: Sequence[Mapping[str, Any]]) -> int:
    return len(as_json(questions).encode("utf-8", errors="replace"))


def _cut(question: Mapping[str, Any], letters: int) -> dict[str, Any]:
    def short(text: str) -> str:
        return text if len(text) <= letters else f"{text[: letters - 1]}…"

    replies = {
        model: [short(answer), right, score, short(reason), place]
        for model, (answer, right, score, reason, place) in question["a"].items()
    }
    return {"q": short(question["q"]), "e": short(question["e"]), "a": replies}
