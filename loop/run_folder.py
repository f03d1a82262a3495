"""The folder of a run: made once, never on top of another."""

import json
import math
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.errors import UserError
from loop.checkpoint import Checkpoint, delete_leftovers
from loop.recipe import Recipe, recipe_as_dict

PACKAGES = ("accelerate", "deepspeed", "peft", "safetensors", "swanlab", "tokenizers", "torch", "transformers")


def check_run_folder(recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Raises UserError when the recipe's run folder holds something; writes nothing.

    With --resume auto it may hold a run that has saved nothing yet.
    """
    folder = Path(recipe.run_dir) if recipe.run_dir else None
    if (
        checkpoint
        or folder is None
        or not folder.exists()
        or (recipe.resume == "auto" and (folder / "recipe.yaml").is_file())
    ):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"run_dir {folder} is not an empty folder. Name another one or remove it.")


def create_run_folder(name: str, recipe: Recipe, checkpoint: Checkpoint | None, accelerator: Accelerator) -> Path:
    """Makes the run folder with recipe.yaml and versions.json in it; every rank enters.

    A run that goes on after `checkpoint` keeps its folder; what its metrics.jsonl says of later steps goes.
    Raises UserError when the folder cannot be made.
    """
    run_dir = (
        checkpoint.run_dir if checkpoint else Path(recipe.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    told: list[Any] = [run_dir, None]
    if accelerator.is_main_process:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            delete_leftovers(run_dir)
            _cut_metrics(run_dir / "metrics.jsonl", checkpoint.step if checkpoint else 0)
            values = recipe_as_dict(recipe) | {"resume": None}
            (run_dir / "recipe.yaml").write_text(
                yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8"
            )
            write_json(run_dir / "versions.json", {package: version(package) for package in PACKAGES})
        except OSError as error:
            told[1] = f"run_dir {run_dir} cannot be written: {error.strerror}."
    broadcast_object_list(told)  # collective: the time in the name is rank 0's, and so is a failure
    if told[1] is not None:
        raise UserError(told[1])
    folder: Path = told[0]
    return folder


def _cut_metrics(file: Path, step: int) -> None:
    """Leaves the lines up to `step` in a metrics.jsonl; the last may be half a line, if the run was killed."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    beside = file.with_name(".metrics.jsonl.new")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(file)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented; infinity, which JSON does not have, becomes null."""
    value = {key: None if inner == math.inf else inner for key, inner in value.items()}
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
