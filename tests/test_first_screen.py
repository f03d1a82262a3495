"""Tests what the first screen of a run's page says, and that the evaluation is read from new and from older files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from eval.judging.statistics import wilson
from eval.reporting.answers import Answers, collect_answers, fit, kind_of_reason
from eval.reporting.evaluation import read_evaluation
from eval.reporting.first_screen import better, cost, duration, wrong
from eval.reporting.run_summary import Run, read_run
from tests.sample_runs import judged, run, usage, write_evaluation, write_judged_evaluation, write_run


def evaluated(**content: Any) -> Run:
    return replace(run("mine"), evaluation=read_evaluation(content, []))


def test_an_older_evaluation_gets_intervals_from_the_number_of_answers(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", usage())
    write_evaluation(tmp_path / "mine")
    found = read_run("mine", tmp_path / "mine").evaluation
    assert found.scores["tuned"]["accuracy"] == 0.975
    assert found.num_questions == {"base": 0, "tuned": 2}
    assert found.intervals == {"tuned": wilson(1.95, 2)}
    assert found.first_judge is None


def test_a_judged_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", usage())
    write_judged_evaluation(tmp_path / "mine")
    found = read_run("mine", tmp_path / "mine")
    assert found.figures["tuned_accuracy"] == 0.6
    card = better(found)
    assert card.figure == "20.0 % → 60.0 %"
    assert card.sentence == "Yes. The tuned model answers 3 of 5 questions right (95 % interval 23.1 to 88.2 %)."
    assert card.lines == [
        "The base model answers 1 of 5 questions right (95 % interval 3.6 to 62.4 %).",
        "3 answers became better, 1 became worse.",
        "The difference is +40.0 points (95 % interval +2.0 to +78.0, p = 0.03).",
    ]
    assert card.mood == "good"


@pytest.mark.parametrize(
    ("interval", "mood", "begin"),
    [([0.02, 0.78], "good", "Yes. "), ([-0.1, 0.5], "plain", "Not clearly"), ([-0.5, -0.1], "bad", "No, it got worse")],
)
def test_the_interval_of_the_difference_decides(interval: list[float], mood: str, begin: str) -> None:
    content = judged()
    content["comparisons"]["exact"]["interval"] = interval
    card = better(evaluated(**content))
    assert card.mood == mood
    assert card.sentence.startswith(begin)


def test_without_a_judge_there_is_no_accuracy(tmp_path: Path) -> None:
    content = judged()
    content["asked"]["judges"] = []
    for score in content["scores"].values():
        score |= {"accuracy": None, "interval": None}
    content["comparisons"] = {}
    mine = replace(evaluated(**content), metrics=[{"step": 5.0, "val/loss": 2.0}, {"step": 9.0, "val/loss": 1.5}])
    card = better(mine)
    assert card.figure == "val/loss 2 → 1.5"
    assert card.sentence == "val/loss went from 2 at step 5 to 1.5 at step 9."
    assert better(replace(mine, metrics=[])).figure == "not known"
    write_run(tmp_path / "mine")
    (tmp_path / "mine" / "eval.json").write_text(json.dumps(content))
    assert read_run("mine", tmp_path / "mine").figures["tuned_accuracy"] is None


@pytest.mark.parametrize(
    "damage",
    [{"scores": []}, {"scores": {"tuned": {}}}, {"scores": {}, "comparisons": {"exact": {"interval": [1]}}}],
)
def test_a_damaged_evaluation_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "mine")
    (tmp_path / "mine" / "eval.json").write_text(json.dumps(damage))
    with pytest.raises(UserError, match=r"eval\.json: is damaged"):
        read_run("mine", tmp_path / "mine")


def test_the_costs(tmp_path: Path) -> None:
    """Each rank is in forward and backward for 2 s of 70 s, and a steady step takes 2 s."""
    write_run(tmp_path / "mine", usage())
    card = cost(read_run("mine", tmp_path / "mine"))
    assert card.figure == "1 min 10 s"
    assert card.sentence == "On 2 processes (cpu x86, 0)."
    assert card.lines == [
        "Memory: 800 MB at the peak of a rank (resident host memory).",
        "Throughput: 160 tokens a second in a steady step.",
        "Utilisation: 3 % of the time in forward, backward and update, 0.1 GFLOP/s in a steady step.",
    ]
    assert cost(run("mine")).figure == "not known yet"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.96, "60.0 s"), (60, "1 min 0 s"), (151, "2 min 31 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_warnings_are_counted() -> None:
    assert wrong([]).figure == "nothing found"
    assert wrong(["a", "b"]).figure == "2 warnings"
    assert wrong(["a", "b"]).mood == "bad"


def test_base_and_tuned_are_paired_by_row_and_turn(tmp_path: Path) -> None:
    """The lines of the tuned model stand in another order than those of the base model."""
    write_run(tmp_path / "mine")
    write_judged_evaluation(tmp_path / "mine")
    answers = collect_answers([read_run("mine", tmp_path / "mine")])
    assert answers.models == ["base", "tuned"]
    sides = {each["q"]: (each["e"], each["a"]["0"][0], each["a"]["1"][0]) for each in answers.questions}
    assert sides["question 2"] == ("expected 2", "base 2", "tuned 2")
    assert len(sides) == len(answers.questions) == 5


def test_older_answers_are_paired_by_their_order() -> None:
    lines = [
        {"model": model, "instruction": question, "answer": f"{model} {place}", "right": True, "reason": ""}
        for model in ("base", "tuned")
        for place, question in enumerate(("same", "same", "other"))
    ]
    answers = collect_answers([replace(run("mine"), answers=lines)])
    assert [[reply[0] for reply in each["a"].values()] for each in answers.questions] == [
        ["base 0", "tuned 0"],
        ["base 1", "tuned 1"],
        ["base 2", "tuned 2"],
    ]


def test_answers_of_several_runs_stand_side_by_side() -> None:
    line = {"model": "tuned", "row": 1, "turn": 1, "instruction": "q", "answer": "a", "right": True, "reason": ""}
    answers = collect_answers([replace(run(name), answers=[line | {"answer": name}]) for name in ("A", "B")])
    assert answers.models == ["A: tuned", "B: tuned"]
    assert [reply[0] for reply in answers.questions[0]["a"].values()] == ["A", "B"]


def test_answers_of_an_older_and_a_new_run_are_paired_by_their_text() -> None:
    old = [{"model": "tuned", "instruction": text, "answer": "old", "right": True, "reason": ""} for text in "ab"]
    new = [line | {"row": row, "turn": 1, "answer": "new"} for row, line in enumerate(old)]
    answers = collect_answers([replace(run("A"), answers=old), replace(run("B"), answers=new[::-1])])
    assert [(each["q"], len(each["a"])) for each in answers.questions] == [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("1 + 2 = 3, not 4", "N + N = N, not N"), ("not '1 + 2'", "not …"), ("prefix missing", "prefix missing")],
)
def test_reasons_of_a_kind_are_one(reason: str, kind: str) -> None:
    assert kind_of_reason(reason) == kind


@pytest.mark.parametrize("letters", [50, 900, 100_000])
def test_answers_are_cut_until_they_fit_and_the_page_says_so(letters: int) -> None:
    questions = [{"q": "q", "e": "", "a": {"0": ["王" * letters, 1, 1.0, "", -1]}} for _ in range(100)]
    fitted = fit(Answers(["tuned"], [], questions), most=50_000)
    size = len(json.dumps(fitted.questions, ensure_ascii=False).encode())
    assert size < 60_000
    assert (fitted.note == "") == (letters == 50)
    assert len(fitted.questions) == 100
    assert len(fit(Answers(["tuned"], [], questions), most=5_000).questions) < 100
