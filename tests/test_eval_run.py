"""What eval.run asks, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import UserError
from eval.run import parse, questions
from loop.recipe import ROOT, parse_recipe, recipe_as_dict

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as the evaluation looks at it."""
    recipe = parse_recipe([])[1]
    lora = LoraConfig(task_type="CAUSAL_LM", r=recipe.lora.rank, target_modules=list(recipe.lora.target_modules))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_base"), lora)
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_as_dict(recipe), allow_unicode=True))
    return tmp_path


def test_a_finished_run_is_asked_before_and_after(run: Path) -> None:
    asked = questions(parse(["--run", str(run), "--limit", "3"]))
    assert [(q.label, q.adapter, len(q.rows)) for q in asked] == [("base", None, 3), ("tuned", run / "adapter", 3)]


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
