"""Opens the folder of a finished run, and says whether its base model and its adapter are those of that run."""

import json
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file

from data.errors import UserError, user_error
from loop.engine.optimizer_state import trainable_parameters
from loop.recipe import Recipe, parse_recipe
from loop.saving.checkpoint import ADAPTER, first_difference, names_in_files
from loop.saving.content import INPUTS, model_sha256


def finished_recipe(run: Path, name_or_path: str | None = None) -> Recipe:
    """The recipe of a finished run; `name_or_path` says where its base model lies now, if it was moved.

    Raises UserError where the folder lacks a file of a finished run, and for a recipe that cannot be read.
    """
    for file in ("recipe.yaml", "adapter/adapter_config.json", f"adapter/{ADAPTER}"):
        if not (run / file).is_file():
            raise UserError(f"{run}: no {file} in there. Give the folder of a finished training.")
    moved = ["--model.name_or_path", name_or_path] if name_or_path else []
    return parse_recipe(["--config", str(run / "recipe.yaml"), *moved])[1]


def check_content(run: Path, recipe: Recipe) -> None:
    """Raises UserError where the recipe's model is not the one that the run has trained."""
    file = run / INPUTS
    if not file.is_file():  # a run of an older version
        return
    with user_error(f"{file}: cannot be read", "Copy it anew.", (ValueError, KeyError, TypeError, OSError)):
        then = json.loads(file.read_text(encoding="utf-8"))["model_sha256"]
    if then != model_sha256(recipe):
        raise UserError(
            f"model.name_or_path {recipe.model.name_or_path}: its content is not that of the model that the run has "
            "trained. Name the right one with --model.name_or_path."
        )


def check_adapter(folder: Path, model: PeftModel) -> None:
    """Raises UserError where the adapter in `folder` is of another model. PEFT would only warn of it, and the answers
    would be the base's."""
    file = folder / ADAPTER
    # The kind is Exception because safetensors raises an exception type of its own.
    with user_error(f"{file}: cannot be read", "Copy it anew, or train once more.", (Exception,)):
        found = {name: tensor.shape for name, tensor in load_file(file).items()}
    expected = {name: tensor.shape for name, tensor in names_in_files(model, trainable_parameters(model)).items()}
    if other := first_difference(found, expected):
        raise UserError(f"{file}: is not of the model and the recipe of this run, first in {other}. Train once more.")
