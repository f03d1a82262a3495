"""Asks the launcher's own code what `accelerate launch` would make of an accelerate YAML, without launching."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from data.errors import UserError
from loop.batch_arithmetic import settle_accumulation
from loop.engine.deepspeed_config import deepspeed_config, size_buckets_for_lora
from loop.engine.launch_settings import check_settings
from loop.internals.accelerate_internals import ask_launcher
from loop.planning.zero_memory import Sharding
from loop.recipe import Recipe, find_path

WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "no": 4}


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` would start."""

    name: str  # for example zero3 or reference/stage1
    file: str
    processes: int
    precision: str  # bf16, fp16 or no
    deepspeed: dict[str, Any] | None  # the resolved configuration; None without DeepSpeed
    grad_accum_steps: int  # micro-batches that each process adds up before an update

    @property
    def sharding(self) -> Sharding:
        """How this launch shares the model out over its processes."""
        zero = self.deepspeed["zero_optimization"] if self.deepspeed else {}
        accumulates = self.grad_accum_steps > 1
        return Sharding(zero.get("stage"), self.processes, WEIGHT_BYTES[self.precision], zero, accumulates)

    def cut_up(self, rows_at_once: int, grad_accum_steps: int) -> "Launch":
        """This launch with another cut of the same batch."""
        cut = {"train_micro_batch_size_per_gpu": rows_at_once, "gradient_accumulation_steps": grad_accum_steps}
        return replace(
            self,
            grad_accum_steps=grad_accum_steps,
            deepspeed=None if self.deepspeed is None else self.deepspeed | cut,
        )

    def with_processes(self, processes: int, recipe: Recipe) -> "Launch":
        """This launch with another number of processes or another recipe. Raises UserError where the processes cannot
        share the rows of a step."""
        settled = settle_accumulation(recipe, processes)
        return replace(self, processes=processes, grad_accum_steps=settled.grad_accum_steps)


def read_launch(file: str, recipe: Recipe, model: torch.nn.Module, processes: int | None = None) -> Launch:
    """Reads an accelerate YAML; `processes` overrides its number of processes.

    Raises UserError where accelerate cannot read the file or the file contradicts the recipe.
    """
    path = find_path(file)
    if not path.is_file():
        raise UserError(f"--accel {path}: there is no such file. Give an accelerate YAML, as those in accel_configs/.")
    try:
        environment, asked = ask_launcher(path, processes)
    except Exception as error:  # accelerate raises many kinds for what it cannot read
        raise UserError(f"--accel {file}: accelerate cannot read it: {type(error).__name__}: {error}") from error
    check_settings(asked)
    said, precision = asked.num_processes, str(asked.options["mixed_precision"])
    name = path.stem if path.parent.name == "accel_configs" else f"{path.parent.name}/{path.stem}"
    recipe = settle_accumulation(recipe, said)
    if environment is None:
        return Launch(name, file, said, precision, None, recipe.grad_accum_steps)
    config = deepspeed_config(recipe, said, environment)
    zero = config["zero_optimization"]
    size_buckets_for_lora(zero, model)
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:  # this file says the precision too
        precision = next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled") is True), "no")
    for part in ("offload_optimizer", "offload_param"):
        if "pin_memory" in zero.get(part, {}) and "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in environment:
            zero[part]["pin_memory"] = True  # this machine may have no GPU; one with a GPU pins the memory
    return Launch(name, file, said, precision, config, recipe.grad_accum_steps)
