"""Reads the accelerate YAMLs of a comparison, names them, and checks what can be checked without a launch."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError, user_error
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
TAKEN = ("charts",)  # the report has a folder of this name


@dataclass(frozen=True)
class Configuration:
    """Holds one accelerate YAML under the name that the comparison gives to it."""

    name: str
    file: str  # path of the accelerate YAML
    values: dict[str, Any]  # the values of the YAML, and those of the DeepSpeed JSON that it names
    num_processes: int


def read_configurations(files: list[str]) -> tuple[Configuration, ...]:
    """Returns the configurations of these files, or of DEFAULT_CONFIGURATIONS when there are none.

    Raises UserError for a file that cannot be read, or that asks for more than one machine.
    """
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
    """Names accel_configs/zero3.yaml zero3, and accel_configs/reference/stage0.yaml reference-stage0."""
    parent = path.resolve().parent
    return f"{parent.name}-{path.stem}" if parent.parent.name == "accel_configs" else path.stem


def _read_yaml(path: Path) -> dict[str, Any]:
    """Returns the values of an accelerate YAML, and of the DeepSpeed JSON that it names. Raises UserError."""
    said = f"--accel {path}"
    with user_error(f"{said}: cannot be read", "Give a file that `accelerate config` writes."):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        json_path = find_path(str(file))
        with user_error(f"{said}: its deepspeed_config_file {json_path} cannot be read", "Correct it."):
            values["deepspeed_config_file"] = json.loads(json_path.read_text(encoding="utf-8"))
    # The values get the types that they have when they are read from comparison.json.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
