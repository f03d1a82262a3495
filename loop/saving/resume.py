"""Finds the checkpoint that --resume means, and refuses one that this run may not go on from."""

import os
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data.batch import Window
from data.errors import UserError
from data.examples import sha256_of
from loop.batch_arithmetic import BatchArithmetic, cut_up, settle_accumulation
from loop.engine.accelerator import mixed_precision, on_main_process
from loop.engine.optimizer_state import restore_optimizer, trainable_parameters
from loop.measure.phases import measured
from loop.model.build import Data
from loop.recipe import RUN_OPTIONS, Recipe, recipe_as_dict
from loop.saving.checkpoint import (
    CHECKPOINTS,
    VALIDATION_ROWS,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    names_in_files,
    unwrap,
)
from loop.saving.content import data_sha256, model_sha256

LENGTH = ("epochs", "max_steps")  # keys of the recipe that say how long a run is
DECIDED = ("batching", "gradient_checkpointing", "micro_batch_size")  # keys of the recipe that may say auto


def find_checkpoint(name: str, recipe: Recipe) -> Checkpoint | None:
    """The checkpoint that `recipe.resume` means, whole and verified; None where a new run is to start.

    auto takes the newest whole checkpoint of run_dir, or without a run_dir that of the newest run of the recipe
    `name`. Where nothing has been saved in run_dir yet, auto says so and the run starts. Raises UserError when there is
    nothing to resume, or when all checkpoints are damaged.
    """
    if recipe.resume is None:
        return None
    if recipe.resume != "auto":
        folder = Path(os.path.abspath(recipe.resume))  # not resolve(): checkpoints/ may be a link to a larger disk
        checkpoint = _newest(folder) if (folder / CHECKPOINTS).is_dir() else load_checkpoint(folder)
        if checkpoint is None:
            raise UserError(f"--resume {folder}: nothing has been saved there. Start without --resume, or with auto.")
        run_dir = checkpoint.run_dir
        if checkpoint.folder.parent.name != CHECKPOINTS or (
            recipe.run_dir and Path(recipe.run_dir).resolve() != run_dir.resolve()
        ):
            raise UserError(
                f"--resume {folder}: a run goes on in its own folder. Leave run_dir out, or set it to {run_dir}."
            )
        return checkpoint
    if recipe.run_dir:
        found = _newest(Path(recipe.run_dir))
        if found is None and os.environ.get("RANK", "0") == "0":
            print(f"--resume auto: no checkpoint in {recipe.run_dir} yet; starting at step 0", flush=True)
        return found
    own = re.compile(rf"{re.escape(name)}-\d{{8}}-\d{{6}}(-\d+)?")  # no run of a recipe whose name begins alike
    runs = [path for path in Path("runs").glob("*") if own.fullmatch(path.name) and list_checkpoints(path)]
    if not runs:
        raise UserError(f"--resume auto: no run of {name} with a checkpoint under runs/. Start without --resume.")
    return _newest(max(runs, key=os.path.getmtime))


def _newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint; names those that are damaged, and raises UserError when all of them are."""
    problems = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            problems.append(str(error))
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: passed over: {error}", flush=True)
    if problems:
        raise UserError(f"{run_dir} has no whole checkpoint:\n" + "\n".join(f"  {problem}" for problem in problems))
    return None


def keep_decisions(checkpoint: Checkpoint | None, recipe: Recipe, num_processes: int) -> Recipe:
    """The recipe with what was decided when the run began, wherever the recipe says auto, and with the accumulation
    that follows on so many processes. Raises UserError where these cannot share the rows of a step.

    A resumed run decides nothing again: the memory that is free by then may be another, and so is the day. Only a
    micro_batch_size that does not divide the processes' shares is decided anew, and so is what the checkpoint of an
    older version holds as auto itself.
    """
    then = checkpoint.state["run"]["recipe"] if checkpoint else {}
    kept = {key: then[key] for key in DECIDED if getattr(recipe, key) == "auto" and key in then}
    rows = recipe.rows_per_step
    if "micro_batch_size" in kept and rows is not None and rows % (kept["micro_batch_size"] * num_processes):
        del kept["micro_batch_size"]
    day = recipe.data.date or then.get("data", {}).get("date") or date.today().isoformat()
    return settle_accumulation(replace(recipe, data=replace(recipe.data, date=day), **kept), num_processes)


def fingerprint(recipe: Recipe, data: Data, batch: BatchArithmetic, accelerator: Accelerator) -> dict[str, Any]:
    """What decides the mathematics of a run; every rank enters. Checkpoints keep it, and a resume compares it.

    Rank 0 alone reads the files. Raises UserError where the ranks have tokenized other rows: each machine may have a
    file of its own under the same name.
    """
    hashes: list[dict[str, str]] = [{}]

    def read() -> None:
        hashes[0] = {
            "model_sha256": model_sha256(recipe),
            "train_file_sha256": data_sha256(recipe),
        }

    on_main_process(read, accelerator)
    broadcast_object_list(hashes)  # collective
    rows = sha256_of(data.train)
    of_ranks = gather_object([(rows, sha256_of(data.validation))])  # collective
    if other := [rank for rank, found in enumerate(of_ranks) if found != of_ranks[0]]:
        raise UserError(
            f"data: the ranks {other} have read other rows than rank 0. Copy the same files and tokenizer to "
            "every machine."
        )
    return {
        "recipe": recipe_as_dict(recipe),
        **hashes[0],
        "train_rows": len(data.train),
        "train_tokens_sha256": rows,
        VALIDATION_ROWS: sha256_of(data.validation),
        "rows_per_step": batch.rows_per_step,
        "mixed_precision": mixed_precision(accelerator),
    }


def check_resumable(
    checkpoint: Checkpoint | None,
    now: dict[str, Any],
    recipe: Recipe,
    data: Data,
    batch: BatchArithmetic,
    accelerator: Accelerator,
) -> None:
    """Raises UserError, with the list of differences, when going on would not be the same run; every rank enters.

    `now` is this run's fingerprint. Another number of epochs or max_steps, and more rows behind those of the run, are
    no reason to refuse: the run goes on with the schedule and the order of rows that it would have by now, and says so.
    """
    steps = gather_object([checkpoint.step if checkpoint else None])  # collective
    if len(set(steps)) > 1:
        raise UserError(f"--resume: not every rank has read the same checkpoint; their steps are {steps}.")
    if checkpoint is None:
        return
    then = checkpoint.state["run"]
    differences = [
        f"{key}: {old} then, {new} now"
        for key, old, new in _pairs(then["recipe"], now["recipe"])
        if old != new and key not in RUN_OPTIONS and key not in LENGTH
    ]
    if then["model_sha256"] != now["model_sha256"]:
        differences.append(f"model: the content of {recipe.model.name_or_path} is not that of the run's base model")
    before = replace(batch, **{key: then["recipe"].get(key) for key in LENGTH})  # the length as it was asked for then
    changed = [before.length] if before.total_steps != batch.total_steps else []
    if then["train_file_sha256"] != now["train_file_sha256"]:
        rows = then.get("train_rows")  # a checkpoint of an older version does not know
        if rows is None or rows > len(data.train) or sha256_of(data.train, rows) != then["train_tokens_sha256"]:
            differences.append(
                f"data.train_file: the content of {recipe.data.train_file} is not that of the run's file. (Rows may be "
                "added behind the others.)"
            )
        elif rows < len(data.train):
            changed.append(f"{rows:,} rows")
    elif then.get("train_tokens_sha256", now["train_tokens_sha256"]) != now["train_tokens_sha256"]:
        differences.append(
            "data.train_file: its rows become other tokens than then. (The chat template may be another, or another "
            "version of this project made the labels.)"
        )
    if then["mixed_precision"] != now["mixed_precision"]:
        differences.append(f"mixed_precision: {then['mixed_precision']} then, {now['mixed_precision']} now")
    if then["rows_per_step"] != now["rows_per_step"]:
        differences.append(_batch_advice(then["rows_per_step"], recipe, batch))
    if differences:
        raise UserError(
            f"checkpoint {checkpoint.folder}: this would not be the same run:\n"
            + "\n".join(f"  {difference}" for difference in differences)
        )
    if checkpoint.step > batch.total_steps:
        raise UserError(
            f"checkpoint {checkpoint.folder}: {checkpoint.step} steps are learned, and the run would have "
            f"{batch.total_steps}. Give {'a larger max_steps' if batch.cut_short else 'more epochs'}."
        )
    if changed and accelerator.is_main_process:
        print(_longer(" and ".join(changed), checkpoint.step, batch), flush=True)
    if then.get(VALIDATION_ROWS, now[VALIDATION_ROWS]) != now[VALIDATION_ROWS] and accelerator.is_main_process:
        print("note: the validation rows are others than before, so the losses before are not compared", flush=True)


def _longer(before: str, step: int, batch: BatchArithmetic) -> str:
    return (
        f"note: until step {step} this was a run of {before}. From here it goes on as one of {batch.length} and "
        f"{batch.num_rows:,} rows: {batch.total_steps} steps, with the learning rates and the order of rows of such a "
        f"run. It is not the run that would have begun with them, because its first {step} steps had others."
    )


def _pairs(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The dotted name, the old value and the new value of every key that either side has."""
    pairs = []
    for key in {**then, **now}:
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs += _pairs(old, new, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", old, new))
    return pairs


def _batch_advice(then: int, recipe: Recipe, batch: BatchArithmetic) -> str:
    said = f"the effective batch: {then} rows then, {batch.rows_per_step} now"
    processes = batch.num_processes
    found = cut_up(then, processes, batch.micro_batch_size)
    if found is None:
        return f"{said}; {processes} processes cannot share {then} rows, launch a number of them that divides it"
    micro, accumulation = found
    rows = f"--rows_per_step {then} " if recipe.rows_per_step is not None else ""
    return f"{said}; keep it with {rows}--micro_batch_size {micro} --grad_accum_steps {accumulation}"


@measured("load", whole=True)
def resume_optimizer(
    checkpoint: Checkpoint | None, model: Any, optimizer: Any, empty_window: Window, accelerator: Accelerator
) -> None:
    """Makes the optimizer what it was at `checkpoint`; every rank enters."""
    if checkpoint is None:
        return
    adapter = trainable_parameters(unwrap(model, accelerator))
    files = names_in_files(unwrap(model, accelerator), {name: name for name in adapter})
    # Where no master was saved the adapter is fp32, and its own master.
    masters = {f"master.{name}": checkpoint.adapter[file_name].float() for file_name, name in files.items()}
    restore_optimizer(masters | checkpoint.optimizer, checkpoint.updates, model, optimizer, empty_window, accelerator)
