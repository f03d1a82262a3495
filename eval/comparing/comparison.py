"""Defines a comparison: one recipe, the accelerate YAMLs, and the folder with the runs that are done."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.batch import num_windows
from data.errors import UserError, user_error
from eval.comparing.accel_files import Configuration, read_configurations
from eval.nested import without_nesting
from eval.peak import machine, matmul_peak
from loop.batch_arithmetic import num_steps, settle_accumulation
from loop.model.build import build_data, build_tokenizer, check_model
from loop.recipe import Recipe, parse_recipe, recipe_as_dict
from loop.saving.run_folder import PACKAGES, write_json

OURS = ("run_dir", "resume", "tracker")  # keys of the recipe that do not change what is learned


@dataclass(frozen=True)
class Comparison:
    """Holds what one command compares, and where."""

    out: Path
    recipe_name: str
    recipe: Recipe
    recipe_argv: tuple[str, ...]  # the options that loop/train.py gets
    config: str | None
    overrides: tuple[str, ...]
    interval: float  # seconds between two samples
    timeout: float  # seconds that one training, or one evaluation, may take
    configurations: tuple[Configuration, ...]  # the configurations that this command names
    known: dict[str, Any]  # content of comparison.json before this command; empty for a new comparison
    rows_per_step: int  # the effective batch, which is the same for all configurations

    def grad_accum_steps(self, configuration: Configuration) -> int:
        return self.rows_per_step // (self.recipe.rows_at_once * configuration.num_processes)


def plan_comparison(
    config: str | None, overrides: list[str], files: list[str], out: Path | None, interval: float, timeout: float
) -> Comparison:
    """Returns the comparison, checked as far as that is possible before a run. Writes nothing.

    Raises UserError for a recipe, YAMLs or a folder that cannot be used.
    """
    if any(word.partition("=")[0] == "--config" for word in overrides):
        raise UserError("--config stands after --. Give it before, as an option of this command.")
    argv = [*(["--config", config] if config is not None else []), *overrides]
    name, recipe = parse_recipe(argv)
    for key in ("run_dir", "resume"):
        if getattr(recipe, key) is not None:
            raise UserError(f"{key} is {getattr(recipe, key)}, but here each run has a folder of its own. Remove it.")
    if recipe.micro_batch_size == "auto":
        raise UserError("micro_batch_size is auto, which may differ between configurations. Give a number after --.")
    configurations = read_configurations(files)
    out = out if out is not None else Path("runs") / f"stages-{name}"
    known = _read_known(out)
    of_others = (values["num_processes"] for values in known.get("accel_values", {}).values())
    most = max(*(configuration.num_processes for configuration in configurations), *of_others, 1)
    for configuration in configurations:
        if recipe.rows_per_step is not None:
            _check_shares(recipe, configuration)
        elif recipe.grad_accum_steps * most % configuration.num_processes:
            raise UserError(
                f"--accel {configuration.file}: {configuration.num_processes} processes cannot learn from the batch of "
                f"{most}: grad_accum_steps {recipe.grad_accum_steps} x {most} is no multiple of "
                f"{configuration.num_processes}. Give another --grad_accum_steps after --."
            )
    rows_per_step = recipe.rows_per_step or recipe.rows_at_once * recipe.grad_accum_steps * most
    comparison = Comparison(
        out=out,
        recipe_name=name,
        recipe=recipe,
        recipe_argv=tuple(argv),
        config=config,
        overrides=tuple(overrides),
        interval=interval,
        timeout=timeout,
        configurations=configurations,
        known=known,
        rows_per_step=rows_per_step,
    )
    _check_same(comparison)
    return comparison


def _check_shares(recipe: Recipe, configuration: Configuration) -> None:
    """Raises UserError when the configuration's processes cannot share the recipe's rows_per_step."""
    try:
        settle_accumulation(recipe, configuration.num_processes)
    except UserError as error:
        raise UserError(f"--accel {configuration.file}: {error}") from error


def _read_known(out: Path) -> dict[str, Any]:
    """Returns comparison.json of the folder `out`, or an empty dictionary for a new or empty folder."""
    file = out / "comparison.json"
    if not out.exists() or (out.is_dir() and not file.exists() and not _holds_something(out)):
        return {}
    with user_error(f"--out {out}: is no folder of a comparison", "Name another one."):
        known = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not isinstance(known.get("accel_values"), dict):
        raise UserError(f"--out {out}: its comparison.json is not one of this command. Name another folder.")
    return known


def _holds_something(out: Path) -> bool:
    """Says whether the folder has an entry whose name does not begin with a dot."""
    return any(not path.name.startswith(".") for path in out.iterdir())


def learned(recipe: Recipe) -> dict[str, Any]:
    """Returns the part of the recipe that all configurations have in common."""
    return {key: value for key, value in recipe_as_dict(recipe).items() if key not in OURS}


def _check_same(comparison: Comparison) -> None:
    """Raises UserError with the differences when the folder holds a comparison of something else."""
    known = comparison.known
    if not known:
        return
    now: dict[str, Any] = {"recipe": learned(comparison.recipe), "rows_per_step": comparison.rows_per_step}
    there = {"recipe": known.get("recipe_values"), "rows_per_step": known.get("rows_per_step")}
    for configuration in comparison.configurations:
        if configuration.name in known["accel_values"]:
            now[configuration.name] = configuration.values
            there[configuration.name] = known["accel_values"][configuration.name]
    _refuse_differences(comparison, without_nesting(there), without_nesting(now))


def check_machine(comparison: Comparison) -> dict[str, Any]:
    """Describes this machine. Raises UserError when the earlier runs of the comparison were on another machine."""
    here = machine()
    there = comparison.known.get("machine", here)
    keys = ("cpu", "cores", "gpus")
    _refuse_differences(
        comparison,
        without_nesting({key: there.get(key) for key in keys}),
        without_nesting({key: here[key] for key in keys}),
    )
    return here


def _refuse_differences(comparison: Comparison, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError with the differences between `there`, the folder, and `now`, this command."""
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        lines = "\n".join(f"  {key}: {there.get(key)} there, {now.get(key)} now" for key in differing)
        raise UserError(f"--out {comparison.out}: holds a comparison of something else:\n{lines}\nName another folder.")


def check_recipe(comparison: Comparison) -> int:
    """Returns the number of steps of each training. Raises UserError when data or model cannot be opened."""
    tokenizer = build_tokenizer(comparison.recipe)
    data = build_data(comparison.recipe, tokenizer)
    check_model(comparison.recipe)
    recipe, steps_per_epoch = comparison.recipe, num_windows(len(data.train), comparison.rows_per_step)
    return num_steps(steps_per_epoch, recipe.epochs, recipe.max_steps)


@contextmanager
def only_one(comparison: Comparison) -> Iterator[None]:
    """Makes the folder and holds a lock in it. Raises UserError when another command holds the lock."""
    try:
        comparison.out.mkdir(parents=True, exist_ok=True)
        lock = (comparison.out / ".lock").open("a")
    except OSError as error:
        raise UserError(f"--out {comparison.out}: cannot be written: {error.strerror}. Name another one.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--out {comparison.out}: another comparison is at work there. Wait for its end."
            ) from error
        yield


def write_comparison(comparison: Comparison, this_machine: Mapping[str, Any]) -> None:
    """Writes comparison.json. When a comparison goes on, its peak and date stay, and configurations are added."""
    known = comparison.known
    peak: dict[str, Any] = {key: known[key] for key in ("matmul_peak_flops", "matmul_peak_flops_fp32") if key in known}
    if not peak:
        print("measuring the peak of a matrix product …", flush=True)
        speeds = matmul_peak()
        peak = {
            "matmul_peak_flops": {device: flops["bf16"] for device, flops in speeds.items()},
            "matmul_peak_flops_fp32": {device: flops["fp32"] for device, flops in speeds.items()},
        }
    files = {configuration.name: configuration.file for configuration in comparison.configurations}
    values = {configuration.name: configuration.values for configuration in comparison.configurations}
    write_whole(
        comparison.out / "comparison.json",
        {
            "recipe": comparison.recipe_name,
            "config": comparison.config,
            "overrides": comparison.overrides,
            "interval": comparison.interval,
            "timeout": comparison.timeout,
            "accel_configs": known.get("accel_configs", {}) | files,
            "machine": this_machine,
            **peak,
            "versions": {package: version(package) for package in PACKAGES},
            "date": known.get("date", date.today().isoformat()),
            "rows_per_step": comparison.rows_per_step,
            "recipe_values": learned(comparison.recipe),
            "accel_values": known.get("accel_values", {}) | values,
        },
    )


def write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file in such a way that the file is complete or does not exist."""
    beside = path.with_name(f".{path.name}.new")
    try:
        write_json(beside, value)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
