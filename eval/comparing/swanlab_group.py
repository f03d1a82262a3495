"""Hands one configuration of a comparison to SwanLab: `python -m eval.comparing.swanlab_group FOLDER [RECIPE OPTIONS]`.

SwanLab shows all configurations of a comparison as runs of one group, with the hardware samples beside the metrics.
"""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import swanlab  # type: ignore[import-untyped]
import yaml

from eval.reporting.run_files import read_jsonl
from loop.recipe import parse_recipe
from loop.telling.tracking import tracker_config

ENVIRONMENT = {
    "SWANLAB_PROBE_GIT": "false",  # a remote's URL may hold a password
    "SWANLAB_PROBE_MONITOR": "false",  # SwanLab would sample this process
    "SWANLAB_INTERACTIVE": "false",  # SwanLab would ask for a key and wait for an answer
    "SWANLAB_MODE": "offline",  # the default mode, online, needs an account and a network
}


def config_of(result: dict[str, Any], recipe_argv: list[str]) -> dict[str, Any]:
    """Returns what SwanLab shows as the configuration of the run: recipe, accelerate YAML and result."""
    recipe = tracker_config(parse_recipe(recipe_argv)[1])
    accel = yaml.safe_load(Path(result["accel_config"]).read_text(encoding="utf-8"))
    recipe["grad_accum_steps"] = result["grad_accum_steps"]
    return recipe | {"accel": accel, "result": result}


def metrics(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without the values that were not finite."""
    return [{key: value for key, value in values.items() if value is not None} for values in read_jsonl(file)]


def samples(file: Path) -> list[dict[str, float]]:
    """Returns the measured cells of each row of samples.csv."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as rows:
        return [{f"hardware/{name}": float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(rows)]


def main(argv: list[str]) -> None:
    folder, recipe_argv = Path(argv[0]), argv[1:]
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    run = swanlab.init(
        project="plainloop",
        group=folder.resolve().parent.name,
        name=folder.name,
        log_dir=str(folder / "swanlog"),
        config=config_of(result, recipe_argv),
    )
    for values in metrics(folder / "run" / "metrics.jsonl"):
        run.log(values, step=values.pop("step"))
    # SwanLab drops a step only when the same key had it before, so the samples may count steps of their own.
    run.define_metric("hardware/*", x_axis="hardware/seconds")
    for number, row in enumerate(samples(folder / "samples.csv")):
        run.log(row, step=number)
    run.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
