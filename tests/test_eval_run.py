"""Tests what eval.run asks, what it refuses, and what it writes into the run folder."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.chat import prompt_ids
from data.conversation import question
from data.errors import UserError
from data.sums import ANSWER_PREFIX, SYSTEM_PROMPT
from eval.answers.ask import Asked
from eval.answers.generate import Answer
from eval.answers.settings import Settings
from eval.judging.judges import build_judge
from eval.judging.scores import compare_models, judge_all, score_of
from eval.questions import Examination, examination
from eval.run import Results, choose_best, parse, show, write_results
from loop.model.build import build_template
from loop.recipe import ROOT, parse_recipe, recipe_as_dict
from loop.saving.publish import write_manifest
from tests.sample_runs import usage, write_evaluation, write_run

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Makes the folder of a finished run, with the files that the evaluation reads."""
    recipe = parse_recipe([])[1]
    lora = LoraConfig(task_type="CAUSAL_LM", r=recipe.lora.rank, target_modules=list(recipe.lora.target_modules))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_base"), lora)
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_as_dict(recipe), allow_unicode=True))
    return tmp_path


def examined(*words: str) -> Examination:
    return examination(parse(words))


def test_a_finished_run_is_asked_before_and_after(run: Path) -> None:
    asked = examined("--run", str(run), "--limit", "3").questions
    assert [(q.label, q.adapter, len(q.rows)) for q in asked] == [("base", None, 3), ("tuned", run / "adapter", 3)]


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def messages(*texts: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]
    return {"messages": turns, **more}


def test_each_trained_turn_is_asked_given_what_came_before(run: Path, tmp_path: Path) -> None:
    row = messages("a", "b", "c", "d", "e", "f")
    row["messages"][3]["train"] = False
    file = write_rows(tmp_path / "rows.jsonl", row, messages("g", "h"))
    examination = examined("--run", str(run), "--data", str(file), "--judge", "exact", "contains")
    base, tuned = examination.questions
    assert base.rows == tuned.rows
    assert [(row.number, len(row.turns), row.question, row.answer) for row in base.rows] == [
        *((1, 2, "a", "b"), (1, 6, "e", "f"), (2, 2, "g", "h"))
    ]
    assert [judge.name for judge in examination.judges] == ["exact", "contains"]
    with pytest.raises(UserError, match=r"3 of 3 rows are bad.*\n.*row 1: 'a' is no question of the reference task"):
        examined("--run", str(run), "--data", str(file))


def test_a_text_asks_nothing(run: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {"text": "a b"})
    with pytest.raises(UserError, match="row 1 is a text, which asks nothing"):
        examined("--run", str(run), "--data", str(file), "--judge", "exact")


def change_recipe(run: Path, **sections: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for section, values in sections.items():
        recipe[section] = recipe[section] | values if isinstance(values, dict) else values
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))


def test_the_recipe_names_its_examination(run: Path, tmp_path: Path) -> None:
    """The rows are those of eval.data, else the validation file's; the options of the command come first."""
    file = write_rows(tmp_path / "rows.jsonl", messages("a", "b"))
    assert examined("--run", str(run)).data.endswith("math_eval_200.json")
    change_recipe(run, eval={"data": str(file), "judge": ["number", "exact"], "max_new_tokens": 9})
    with pytest.raises(UserError, match="row 1: its own answer has no number; the judge is number"):
        examined("--run", str(run))
    found = examined("--run", str(run), "--judge", "exact")
    assert (found.data, found.questions[0].settings.max_new_tokens) == (str(file), 9)
    assert examined("--run", str(run), "--judge", "exact", "--max-new-tokens", "7").questions[0].settings == Settings(7)
    change_recipe(run, eval={"data": None, "judge": []}, data={"validation_file": None})
    with pytest.raises(UserError, match="--data is missing"):
        examined("--run", str(run))
    assert examined("--run", str(run), "--data", str(file)).judges == []


def test_an_answer_may_be_twice_as_long_as_the_longest_of_the_rows(run: Path, tmp_path: Path) -> None:
    tokens = len(AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_base")("b " * 70)["input_ids"])
    assert tokens > 64
    file = write_rows(tmp_path / "rows.jsonl", messages("a", "b " * 70), messages("a", "b"))
    words = ["--run", str(run), "--data", str(file), "--judge", "exact", "--limit"]
    assert examined(*words, "2").questions[0].settings.max_new_tokens == 2 * tokens
    (tmp_path / "rows.jsonl").write_text(json.dumps(messages("a", "b")))
    assert examined(*words, "1").questions[0].settings.max_new_tokens == 64


def test_a_system_prompt_that_overrides(run: Path, tmp_path: Path) -> None:
    row = messages("a", "b")
    row["messages"].insert(0, {"role": "system", "content": "of the row"})
    file = write_rows(tmp_path / "rows.jsonl", row, messages("a", "b"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_base")

    def prompts(*more: str) -> list[str]:
        question = examined("--run", str(run), "--data", str(file), "--judge", "exact", *more).questions[1]
        template = build_template(question.recipe, tokenizer)
        return [str(tokenizer.decode(prompt_ids(row, template))) for row in question.rows]

    def rendered(*system: str) -> str:
        turns = [*({"role": "system", "content": text} for text in system), {"role": "user", "content": "a"}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    assert prompts() == [rendered("of the row"), rendered(SYSTEM_PROMPT)]
    assert prompts("--system", "other") == [rendered("other")] * 2
    assert prompts("--system", "") == [rendered()] * 2


def test_a_judge_that_calls_the_rows_own_answers_wrong_is_said(run: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", messages("a", "b"), messages("a", "c"))
    words = ["--run", str(run), "--data", str(file), "--judge"]
    assert examined(*words, "exact").warnings == []
    (warning,) = examined(*words, "regex:b").warnings
    assert warning == "the judge regex:b calls 1 of 2 rows' own answers wrong, row 2: does not match 'b'"


def test_the_checkpoint_that_is_best_by_the_judge_becomes_the_adapter(run: Path) -> None:
    """Of three checkpoints two are equally good: the earlier one is chosen, and its answers are the tuned model's."""
    for number, step in enumerate((10, 20, 30)):
        folder = run / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(run / "adapter", folder)
        held = load_file(folder / ADAPTER.name)
        save_file({name: tensor + number for name, tensor in held.items()}, folder / ADAPTER.name)
        for name in ("optimizer.safetensors", "trainer_state.json"):
            (folder / name).touch()
        write_manifest(folder)
    words = ["--run", str(run), "--checkpoints", "all", "--limit", "3"]
    assert [q.label for q in examined(*words).questions] == [
        *("base", "step-000010", "step-000020", "step-000030", "tuned")
    ]
    change_recipe(run, choose_by="judge")
    examination = examined(*words)
    assert [q.label for q in examination.questions] == ["base", "step-000010", "step-000020", "step-000030"]
    (run / "adapter" / "tokenizer.json").write_text("kept")
    found = results(base=BASE, **{"step-000010": BASE, "step-000020": TUNED, "step-000030": TUNED})
    accuracies = {"step-000010": 0.5, "step-000020": 0.75, "step-000030": 0.75}
    scores = {label: replace(score, accuracy=accuracies.get(label, 0.0)) for label, score in found.scores.items()}
    assert choose_best(examination, scores) == "step-000020"
    best = run / "checkpoints" / "step-000020" / ADAPTER.name
    assert (run / ADAPTER).read_bytes() == best.read_bytes()
    assert (run / "adapter" / "tokenizer.json").read_text() == "kept"
    assert json.loads((run / "adapter" / "chosen.json").read_text()) == {
        **{"step": 20, "by": "sums", "value": 0.75},
        "of": {"10": 0.5, "20": 0.75, "30": 0.75},
    }


WRONG_OPTIONS = {
    "--temperature -1": "--temperature is -1.0, but has to be at least 0",
    "--temperature 1 --top-p 0": "--top-p is 0.0, but has to be above 0",
    "--temperature 1 --top-k -1": "--top-k is -1",
    "--samples 0": "--samples is 0, but has to be at least 1",
    "--samples 3": "--samples needs --temperature above 0",
    "--top-k 3": "--top-p and --top-k need --temperature above 0",
    "--stop ": "--stop is",
    "--verify -1": "--verify is -1",
}


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_an_option_out_of_range(options: str) -> None:
    with pytest.raises(UserError, match=WRONG_OPTIONS[options]):
        parse(["--run", "runs/x", *options.split(" ")])


@pytest.mark.parametrize("option", ["--checkpoints all", "--adapter-only"])
def test_a_recipe_has_no_adapter(option: str) -> None:
    with pytest.raises(UserError, match=f"{option.split(' ')[0]} goes with --run"):
        parse(["--config", "recipe.yaml", *option.split(" ")])


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        held = load_file(run / ADAPTER)
        change(held)
        save_file(held, run / ADAPTER)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor less": (rewrite(lambda held: held.popitem()), "is not of the model and the recipe of this run"),
    "another tensor": (rewrite(lambda held: held.update(x=torch.ones(1))), "is not of the model .*, first in x"),
    "another shape": (rewrite(lambda held: held.update({min(held): torch.ones(1)})), "is not of the model"),
    "truncated": (lambda run: (run / ADAPTER).write_bytes(b"x"), "cannot be read"),
    "no weights": (lambda run: (run / ADAPTER).unlink(), "no adapter/adapter_model.safetensors in there"),
    "no configuration": (lambda run: (run / "adapter" / "adapter_config.json").unlink(), "no adapter/adapter_config"),
    "no recipe": (lambda run: (run / "recipe.yaml").unlink(), "no recipe.yaml in there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_this_models(damage: str, run: Path) -> None:
    damages, said = DAMAGES[damage]
    damages(run)
    with pytest.raises(UserError, match=said):
        examined("--run", str(run))


def asked(*answers: str, cut_off: bool = False) -> Asked:
    """Answers, one to each row, of 10 tokens each, in 2 seconds."""
    return Asked([[Answer(text, 10, cut_off)] for text in answers], 2.0, 10**8, None)


def results(judges: Sequence[str] = ("sums",), **answers: Sequence[str]) -> Results:
    """The results of asking 5=, 6= and 8=."""
    rows = [question(number, f"{number}=", f"1 + {number - 1}") for number in (5, 6, 8)]
    built = [build_judge(name) for name in judges]
    judged = {label: judge_all(rows, asked(*texts), built) for label, texts in answers.items()}
    scores = {label: score_of(judged[label], asked(*answers[label]), 0) for label in answers}
    about = {"data": "rows.jsonl", "num_questions": 3, "judges": list(judges), "max_new_tokens": 64, "samples": 1}
    compared = compare_models(judged["base"], judged["tuned"]) if {"base", "tuned"} <= judged.keys() else {}
    return Results(about, judged, scores, compared)


BASE = ("?", f"{ANSWER_PREFIX}1 + 5", "?")
TUNED = (f"{ANSWER_PREFIX}1 + 4", f"{ANSWER_PREFIX}1 + 4", f"{ANSWER_PREFIX}4 + 5")


def test_what_an_evaluation_says(capsys: pytest.CaptureFixture[str]) -> None:
    """One row became better, one worse; two of three rows have the prefix after, and none before the base's right."""
    show(results(base=BASE, tuned=TUNED), None)
    said = capsys.readouterr().out
    assert "| accuracy | 0.000 | 1.000 | 0.333 | 0.333 |" in said
    assert "| prefix right | – | – | 0.333 | 1.000 |" in said
    assert "reference, base" in said
    assert "sums: no difference that chance alone would not explain: +0.000" in said
    assert "McNemar p = 1); 1 answers became better, 1 worse" in said
    show(results(("contains", "number"), base=BASE, tuned=TUNED), 4)
    said = capsys.readouterr().out
    assert "reference" not in said
    assert "prefix" not in said
    assert "| prompts, batch size | 3, 4 | 3, 4 |" in said
    assert "| accuracy, contains | 0.333 | 0.333 |" in said
    assert "| accuracy, number | 0.333 | 0.333 |" in said


def test_answers_side_by_side_without_a_judge(capsys: pytest.CaptureFixture[str]) -> None:
    found = results((), base=BASE, tuned=TUNED)
    show(found, None)
    said = capsys.readouterr().out
    assert f"  5=\n    base: '?'\n    tuned: {TUNED[0]!r}\n" in said
    assert "accuracy" not in said
    assert found.scores["base"].accuracy is None
    assert found.comparisons == {}


def test_samples_of_a_question() -> None:
    """Two rows of four samples: the first has 3 right ones, the second 1 right one, and two equal wrong ones."""
    rows = [question(1, "a", "x"), question(2, "a", "y")]
    texts = (("x", "x ", "z", "x"), ("y", "z", "z", "w"))
    several = Asked([[Answer(text, 1) for text in row] for row in texts], 1.0, None, None)
    score = score_of(judge_all(rows, several, [build_judge("exact")]), several, 0)
    assert (score.accuracy, score.pass_at_k, score.majority) == (0.5, 1.0, 0.5)
    assert score.tokens_per_second == 8


def test_the_report_shows_the_new_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run folder holds an earlier evaluation with the accuracy 0.975."""
    folder = tmp_path / "run"
    write_run(folder, usage())
    write_evaluation(folder)
    write_results(folder, results(base=BASE, tuned=TUNED))
    written = json.loads((folder / "eval.json").read_text())
    assert written["scores"]["tuned"]["accuracy"] == pytest.approx(1 / 3)
    assert (written["comparisons"]["sums"]["better"], written["comparisons"]["sums"]["worse"]) == ([5], [6])
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["model"], line["row"], line["right"]) for line in lines] == [
        *(("base", 5, False), ("base", 6, True), ("base", 8, False)),
        *(("tuned", 5, True), ("tuned", 6, False), ("tuned", 8, False)),
    ]
    assert (lines[5]["expected"], lines[5]["verdicts"]) == (
        "1 + 7",
        {"sums": {"score": 0, "reason": "4 + 5 = 9, not 8"}},
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "0.333" in page
    assert "0.975" not in page
    assert "4 + 5 = 9, not 8" in page
    assert capsys.readouterr().out.endswith(f"report: {folder / 'report.html'}\n")


def test_a_report_that_cannot_be_drawn_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    write_run(folder, usage())
    (folder / "metrics.jsonl").write_text("damaged\n")
    write_results(folder, results(base=BASE, tuned=TUNED))
    assert (folder / "eval.json").exists()
    said = capsys.readouterr().out
    assert said.count("warning: no report: ") == 1
    assert "metrics.jsonl: is damaged" in said
    assert "report.html" not in said
