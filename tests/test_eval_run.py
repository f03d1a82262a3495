"""Tests what eval.run asks, what it refuses, and what it writes into the run folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import UserError
from eval.run import JUDGES, Score, parse, questions, table, write_results
from loop.recipe import ROOT, parse_recipe, recipe_as_dict
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


def test_a_finished_run_is_asked_before_and_after(run: Path) -> None:
    asked = questions(parse(["--run", str(run), "--limit", "3"]))
    assert [(q.label, q.adapter, len(q.rows)) for q in asked] == [("base", None, 3), ("tuned", run / "adapter", 3)]


def test_conversations_are_judged_by_their_own_answers(run: Path, tmp_path: Path) -> None:
    """The last question of a row is asked; without a judge for it, a row that is no sum is refused."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    words = ["--run", str(run), "--data", str(tmp_path / "rows.jsonl")]
    base, tuned = questions(parse([*words, "--judge", "exact"]))
    assert base.judge == tuned.judge == "exact"
    assert JUDGES["exact"](base.rows[0], " b ").right
    assert not JUDGES["exact"](base.rows[0], "c").right
    with pytest.raises(UserError, match="'a' is no question of the reference task"):
        questions(parse(words))
    score = Score(0.5, 0.5, 1.0, 2.0, None, None)
    assert "reference" not in table({"base": score}, 1, None, "exact")
    assert "prefix right" not in table({"base": score}, 1, None, "exact")
    assert "reference, base" in table({"base": score}, 1, None)


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
        questions(parse(["--run", str(run)]))


SCORE = Score(0.725, 1.0, seconds=2.0, tokens_per_second=50.0, peak_load_bytes=10**8, peak_inference_bytes=None)


def test_the_report_shows_the_new_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run folder holds an earlier evaluation with the accuracy 0.975."""
    folder = tmp_path / "run"
    write_run(folder, usage())
    write_evaluation(folder)
    line = {"model": "tuned", "instruction": "8=", "answer": "4 + 5", "right": False, "reason": "4 + 5 = 9, not 8"}
    write_results(folder, {"tuned": SCORE}, [json.dumps(line) + "\n"])
    assert json.loads((folder / "eval.json").read_text())["tuned"]["accuracy"] == 0.725
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "0.725" in page
    assert "0.975" not in page
    assert "4 + 5 = 9, not 8" in page
    assert capsys.readouterr().out.endswith(f"report: {folder / 'report.html'}\n")


def test_a_report_that_cannot_be_drawn_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    write_run(folder, usage())
    (folder / "metrics.jsonl").write_text("damaged\n")
    write_results(folder, {"tuned": SCORE}, [])
    assert (folder / "eval.json").exists()
    said = capsys.readouterr().out
    assert said.count("warning: no report: ") == 1
    assert "metrics.jsonl: is damaged" in said
    assert "report.html" not in said
