"""Makes DeepSpeed's configuration of what the launcher says, what the recipe owns, and what LoRA needs.

Every number has one owner: stage, offload and precision come from the accelerate YAML, batch, accumulation and
clipping from the recipe. Where both name the same number, the two have to agree.
"""

import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from loop.batch_arithmetic import in_numbers
from loop.internals.deepspeed_internals import is_fetched_as_a_whole, numel_of
from loop.recipe import Recipe, find_path


def deepspeed_config(
    recipe: Recipe, num_processes: int, environment: MutableMapping[str, str] = os.environ
) -> dict[str, Any]:
    """Makes the configuration of a launch. Sizes that depend on the model stay "auto".

    `environment` holds the variables that the launcher has set. Raises UserError where the accelerate YAML, or the JSON
    file that it names, contradicts the recipe.
    """
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = _config_from_launcher(environment) if file == "none" else _read_json(find_path(file))
    where = "the accelerate YAML" if file == "none" else f"deepspeed_config_file {file}"
    _check_zero(config["zero_optimization"], where)
    _fill_from_recipe(config, recipe, num_processes, where)
    if file == "none":  # `config` holds these fields now; accelerate would compare both and complain
        environment.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a deepspeed_config_file. Raises UserError where the file cannot be a configuration for this loop."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {path} of the accelerate YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f"deepspeed_config_file {path}: needs an object zero_optimization with the stage.")
    for block in ("bf16", "fp16"):
        if not isinstance(config.get(block, {}), dict):
            raise UserError(f"deepspeed_config_file {path}: {block} has to be an object with enabled: true or false.")
    for block, owner in (("optimizer", "optim in the recipe"), ("scheduler", "optim.warmup_ratio in the recipe")):
        if block in config:
            raise UserError(f"deepspeed_config_file {path}: remove the block {block!r}; {owner} owns it.")
    return config


def _config_from_launcher(environment: Mapping[str, str]) -> dict[str, Any]:
    """Makes a DeepSpeed configuration of the answers of `accelerate config`, which the launcher put into variables."""

    def said(name: str, default: str) -> str:
        return environment.get(f"ACCELERATE_{name}", default)

    stage = said("DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"the accelerate YAML says zero_stage: {stage}. Give 0, 1, 2 or 3.")
    zero: dict[str, Any] = {"stage": int(stage)}
    for part, lowest_stage in (("OPTIMIZER", 1), ("PARAM", 3)):
        device = said(f"DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
        if device == "none":
            continue
        if zero["stage"] < lowest_stage:  # `accelerate config` asks this question at every stage
            if environment.get("RANK", "0") == "0":
                print(f"note: ZeRO-{zero['stage']} does not share out each {part.lower()}; offload to {device} ignored")
            continue
        if device == "nvme":
            raise UserError(
                f"the accelerate YAML offloads {part.lower()} to nvme, but accelerate 1.15 hands no nvme_path on. "
                "Say it in a deepspeed_config_file instead."
            )
        zero[f"offload_{part.lower()}"] = {"device": device, "pin_memory": torch.cuda.is_available()}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = said("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false") == "true"
    if zero["stage"] > 0:
        zero["reduce_bucket_size"] = "auto"
    if zero["stage"] == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        # DeepSpeed's linear function in Python keeps no weights for the backward pass, and PyTorch's does not either.
        zero["memory_efficient_linear"] = False
    config: dict[str, Any] = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if (value := said(key.upper(), "auto")) != "auto":
            config[key] = float(value)
    return config


def _check_zero(zero: dict[str, Any], where: str) -> None:
    """Raises UserError where DeepSpeed refuses a setting of ZeRO; it would do so much later, and with a traceback."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValueError as error:
        problems: list[Any] = getattr(error, "errors", list)()  # a pydantic error has a list of problems
        first = f"{'.'.join(map(str, problems[0]['loc']))}: {problems[0]['msg']}" if problems else error
        raise UserError(f"{where}: zero_optimization: {first}. Correct it there.") from error


def _fill_from_recipe(config: dict[str, Any], recipe: Recipe, num_processes: int, where: str) -> None:
    """Writes the recipe's numbers into `config`. Raises UserError where `config` has other numbers already."""
    if recipe.micro_batch_size == "auto":
        for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
            if config.get(key, "auto") != "auto":
                raise UserError(
                    f"{where} says {key}: {config[key]}, but the recipe's micro_batch_size is auto, which decides it. "
                    f"Remove {key} there, or give a number as --micro_batch_size."
                )
    recipe = in_numbers(recipe, num_processes)
    per_device, accumulation = recipe.rows_at_once, recipe.grad_accum_steps
    owned: dict[str, tuple[float, str]] = {
        "gradient_accumulation_steps": (accumulation, "grad_accum_steps"),
        "gradient_clipping": (recipe.optim.max_grad_norm, "optim.max_grad_norm"),
        "train_micro_batch_size_per_gpu": (per_device, "micro_batch_size"),
        "train_batch_size": (
            per_device * accumulation * num_processes,
            "micro_batch_size x grad_accum_steps x number of processes",
        ),
    }
    for key, (value, name) in owned.items():
        said = config.get(key, "auto")
        if said not in ("auto", value):
            raise UserError(
                f"{where} says {key}: {said}, but the recipe's {name} is {value:g}. "
                f"Remove {key} there (the recipe owns it) or make the two equal."
            )
        config[key] = value


def size_buckets_for_lora(zero: dict[str, Any], model: torch.nn.Module) -> None:
    """Replaces each "auto" in `zero` by a size in elements that suits LoRA.

    accelerate would choose sizes for full fine-tuning, from the model's hidden size. At stage 3 it would partition the
    larger LoRA matrices and fetch less than one matrix ahead. Here every adapter stays whole on every rank, one bucket
    holds all gradients, and what is fetched ahead is the next decoder layer, or the next matrix that has an adapter
    where layers are not fetched as a whole.
    """
    sizes = {name: numel_of(parameter) for name, parameter in model.named_parameters()}
    trainable = [sizes[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = [module for module in model.modules() if is_fetched_as_a_whole(module)]
    matrices = [size for name, size in sizes.items() if ".base_layer." in name]
    ahead = [sum(numel_of(p) for p in layer.parameters() if not p.requires_grad) for layer in layers] or matrices
    fitting = {
        "reduce_bucket_size": sum(trainable),
        "stage3_prefetch_bucket_size": max(ahead),
        "stage3_param_persistence_threshold": max(trainable),
    }
    zero.update({key: size for key, size in fitting.items() if zero.get(key) == "auto"})
