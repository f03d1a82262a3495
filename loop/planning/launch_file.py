"""What `accelerate launch` makes of an accelerate YAML, without launching: the launcher's own code, asked."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from loop.engine.deepspeed_config import deepspeed_config, size_buckets_for_lora
from loop.planning.zero_memory import Layout
from loop.recipe import Recipe, find_path

WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "no": 4}


@dataclass(frozen=True)
class Launch:
    name: str  # zero3, reference/stage1
    file: str
    processes: int
    precision: str  # bf16, fp16 or no
    deepspeed: dict[str, Any] | None  # the resolved configuration; None without DeepSpeed

    @property
    def layout(self) -> Layout:
        config = self.deepspeed or {"zero_optimization": {}, "gradient_accumulation_steps": 1}
        zero, accumulates = config["zero_optimization"], config["gradient_accumulation_steps"] > 1
        return Layout(zero.get("stage"), self.processes, WEIGHT_BYTES[self.precision], zero, accumulates)


def read_launch(file: str, recipe: Recipe, model: torch.nn.Module, processes: int | None = None) -> Launch:
    """`processes` overrides the YAML's number. Raises UserError where it contradicts the recipe, or is none."""
    path = find_path(file)
    try:
        environment, said, precision = _ask_launcher(path, processes)
    except UserError:
        raise
    except Exception as error:  # accelerate has many for what it cannot read
        raise UserError(f"--accel {file}: accelerate cannot read it: {type(error).__name__}: {error}") from error
    name = path.stem if path.parent.name == "accel_configs" else f"{path.parent.name}/{path.stem}"
    if precision not in WEIGHT_BYTES:
        raise UserError(f"--accel {file}: mixed_precision: {precision} is not supported. Use bf16.")
    if environment is None:
        return Launch(name, file, said, precision, None)
    config = deepspeed_config(recipe, said, environment)
    zero = config["zero_optimization"]
    size_buckets_for_lora(zero, model)
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:  # which has the precision as well
        precision = next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled") is True), "no")
    for part in ("offload_optimizer", "offload_param"):
        if "pin_memory" in zero.get(part, {}) and "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in environment:
            zero[part]["pin_memory"] = True  # as it will be on a GPU
    return Launch(name, file, said, precision, config)


def _ask_launcher(path: Path, processes: int | None) -> tuple[dict[str, str] | None, int, str]:
    """The environment of its processes where they use DeepSpeed, their number, the precision."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    if not path.is_file():
        raise UserError(f"--accel {path}: there is no such file. Give an accelerate YAML, as those in accel_configs/.")
    words = ["--config_file", str(path), *(["--num_processes", str(processes)] if processes else []), "train.py"]
    with contextlib.redirect_stdout(io.StringIO()):
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        args.main_process_port, args.deepspeed_fields_from_accelerate_config = 0, ""
        environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else None
    many = args.use_deepspeed or args.multi_gpu  # otherwise it launches one process, whatever it is told
    return environment, int(args.num_processes) if many else 1, str(args.mixed_precision)
