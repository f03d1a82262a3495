"""Makes the folder of a run, once and never on top of another run."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.errors import UserError
from data.files import HUB
from loop.engine.accelerator import on_main_process
from loop.model.build import Data
from loop.recipe import Recipe, absolute, data_files, judge_file, recipe_as_dict
from loop.saving.checkpoint import Checkpoint, clear_up
from loop.saving.content import INPUTS

PACKAGES = ("accelerate", "deepspeed", "peft", "safetensors", "swanlab", "tokenizers", "torch", "transformers")


def check_run_folder(recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Raises UserError when the recipe's run folder holds something; writes nothing.

    With --resume auto the folder may hold a run that has saved nothing yet.
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


def create_run_folder(
    name: str,
    recipe: Recipe,
    run: Mapping[str, Any],
    data: Data,
    checkpoint: Checkpoint | None,
    accelerator: Accelerator,
) -> Path:
    """Makes the run folder and writes what is known before the first step; every rank enters.

    recipe.yaml holds what is run: where the recipe said auto, what was decided. inputs.json holds the hashes of the
    model and the training file, from the fingerprint `run`, and what became of the rows of each file. versions.json
    names the packages, and deepspeed_config.json what accelerate made of the configuration when it prepared the model.
    A run that goes on after `checkpoint` keeps its folder, and the lines that its metrics.jsonl has of later steps are
    removed. Raises UserError when the folder cannot be made.
    """
    step = checkpoint.step if checkpoint else 0
    chosen = [checkpoint.run_dir if checkpoint else Path(recipe.run_dir) if recipe.run_dir else _new_name(name)]
    broadcast_object_list(chosen)  # collective: the time in a new name is rank 0's
    run_dir = chosen[0]

    def create() -> None:
        with _writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            clear_up(run_dir, step)
            _cut_metrics(run_dir / "metrics.jsonl", step)
            values = recipe_as_dict(_that_can_move(recipe))
            (run_dir / "recipe.yaml").write_text(
                yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8"
            )
            inputs = {key: run[key] for key in ("model_sha256", "train_file_sha256")}
            write_json(run_dir / INPUTS, inputs | {"files": {name: asdict(one) for name, one in data.tallies.items()}})
            write_json(run_dir / "versions.json", {package: version(package) for package in PACKAGES})
            write_json(run_dir / "deepspeed_config.json", getattr(accelerator, "deepspeed_config", {}))

    on_main_process(create, accelerator)
    return run_dir


def _that_can_move(recipe: Recipe) -> Recipe:
    """The recipe with paths that mean the same from every folder; it does not name its own folder, which may move."""
    model, data = recipe.model, recipe.data
    train = {_anywhere(file): times for file, times in data_files(data.train_file).items()}
    validation = [_anywhere(file) for file in data_files(data.validation_file)]
    template = data.chat_template
    moved = replace(
        data,
        train_file=train if isinstance(data.train_file, dict) else _as_given(data.train_file, list(train)),
        validation_file=_as_given(data.validation_file, validation) if data.validation_file else None,
        chat_template=template if template in (None, "chatml") else absolute(str(template)),
    )
    return replace(
        recipe,
        model=replace(model, name_or_path=absolute(model.name_or_path)),
        data=moved,
        eval=replace(
            recipe.eval,
            data=_anywhere(recipe.eval.data) if recipe.eval.data else None,
            judge=tuple(map(_judge_anywhere, recipe.eval.judge)),
        ),
        run_dir=None,
        resume=None,
    )


def _anywhere(file: str) -> str:
    return file if file.startswith(HUB) else absolute(file)


def _judge_anywhere(judge: str) -> str:
    file = judge_file(judge)
    return f"{absolute(file)}{judge.removeprefix(file)}" if file else judge


def _as_given(given: str | list[str], paths: list[str]) -> str | list[str]:
    """The paths in the form in which the recipe had them: a single one, or a list."""
    return paths[0] if isinstance(given, str) else paths


def _new_name(name: str) -> Path:
    folder = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    begun_in_the_same_second = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], begun_in_the_same_second) if not path.exists())


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} cannot be written: {error.strerror}. Make it writable, free space there, "
            "or name another one."
        ) from error


def _cut_metrics(file: Path, step: int) -> None:
    """Removes the lines after `step` from a metrics.jsonl, and a last line that a kill left half written."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
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
    """Writes indented JSON. Infinity becomes null, because JSON has no infinity."""
    value = {key: None if inner == math.inf else inner for key, inner in value.items()}
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
