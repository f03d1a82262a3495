"""The accelerate YAMLs of a comparison: read, named, and checked as far as that is possible without a launch."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError
from loop.recipe import find_path

DEFAULT_CONFIGURATIONS = (
    "one_process",
    "reference/stage0",
    "reference/stage1",
    "reference/stage2_offload",
    "reference/stage3_offload",
    "zero2",
    "zero3",
)
TAKEN = ("charts",)  # by the report


@dataclass(frozen=True)
class Configuration:
    name: str
    file: str  # the accelerate YAML
    values: dict[str, Any]  # what it says, the DeepSpeed JSON that it names included
    num_processes: int


def read_configurations(files: list[str]) -> tuple[Configuration, ...]:
    """Raises UserError for a file that cannot be read, or that is not of one machine."""
    used = Counter(TAKEN)
    configurations = []
    for file in files or [f"accel_configs/{name}.yaml" for name in DEFAULT_CONFIGURATIONS]:
        path = find_path(file)
        values = _read_yaml(path)
        name = _name(path)
        used[name] += 1
        if used[name] > 1:
            name = f"{name}-{used[name]}"
        configurations.append(Configuration(name, str(path), values, values["num_processes"]))
    return tuple(configurations)


def _name(path: Path) -> str:
    """zero3 of accel_configs/zero3.yaml, reference-stage0 of accel_configs/reference/stage0.yaml."""
    parent = path.resolve().parent
    return f"{parent.name}-{path.stem}" if parent.parent.name == "accel_configs" else path.stem


def _read_yaml(path: Path) -> dict[str, Any]:
    said = f"--accel {path}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{said}: cannot be read: {error}. Give a file that `accelerate config` writes.") from error
    if not isinstance(values, dict):
        raise UserError(f"{said}: is no accelerate YAML. It needs keys with values, at least num_processes.")
    processes = values.get("num_processes")
    if type(processes) is not int or processes < 1:
        raise UserError(f"{said}: num_processes is {processes!r}. Give the number of processes, at least 1.")
    if values.get("num_machines", 1) != 1:
        raise UserError(f"{said}: num_machines is {values['num_machines']!r}, but one machine is sampled. Give 1.")
    deepspeed = values.get("deepspeed_config")
    file = deepspeed.get("deepspeed_config_file") if isinstance(deepspeed, dict) else None
    if file is not None:
        values["deepspeed_config_file"] = _read_json(find_path(str(file)), said)
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))  # as comparison.json gives it back
    return plain


def _read_json(path: Path, said: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: its deepspeed_config_file {path} cannot be read: {error}. Correct it.") from error
