"""The Accelerator and its DeepSpeed configuration, from what the launcher and the recipe say.

Every number has one owner: stage, offload and precision come from the accelerate YAML, batch,
accumulation and clipping from the recipe. Where both name the same number they have to agree.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from loop.recipe import ROOT, Recipe, find_path

NO_LAUNCHER_CONFIG = ROOT / "accel_configs" / "zero3.yaml"


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process; every rank enters. Before any model is loaded: zero.Init needs it.

    Raises ValueError where the launcher's numbers contradict the recipe's, RuntimeError where the
    processes that were launched did not find each other.
    """
    _set_up_environment()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # `python loop/train.py`, for the debugger
        _act_as_one_launched_process()
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if os.environ["ACCELERATE_MIXED_PRECISION"] == "fp8":
        raise ValueError("mixed_precision: fp8 is not supported. Use bf16 in the accelerate YAML.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        # Without a GPU accelerate would start DeepSpeed's processes as so many one-process jobs, unless
        # it is told to use gloo; and it would not start plain DDP at all, unless it is told to use the CPU.
        cpu=not has_gpu and not use_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend=None if has_gpu else "gloo")],
        deepspeed_plugin=_deepspeed_plugin(recipe, launched) if use_deepspeed else None,
        # As a plugin, because the plain argument loses against the launcher's environment variable.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.grad_accum_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
    )
    got_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator.num_processes != launched or got_deepspeed != use_deepspeed:
        raise RuntimeError(
            f"{launched} processes were launched, DeepSpeed {use_deepspeed}, but accelerate sees "
            f"{accelerator.num_processes} with {accelerator.distributed_type}. Nothing would be shared; stopping."
        )
    return accelerator


def _set_up_environment() -> None:
    """Silences what repeats on every step or rank and tells a user nothing, and lets DeepSpeed find ninja."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # It stands beside this Python, but is on the PATH only when the virtual environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _act_as_one_launched_process() -> None:
    """Sets what `accelerate launch --num_processes 1 --config_file accel_configs/zero3.yaml` sets."""
    launch = yaml.safe_load(NO_LAUNCHER_CONFIG.read_text())
    deepspeed = launch["deepspeed_config"]
    os.environ.update(
        ACCELERATE_MIXED_PRECISION=launch["mixed_precision"],
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE=str(deepspeed["zero_stage"]),
        ACCELERATE_DEEPSPEED_ZERO3_INIT=str(deepspeed["zero3_init_flag"]),
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    )
    # A store inside the process instead of a TCP port: any number of debuggers can run side by side.
    from torch._C._distributed_c10d import HashStore

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _deepspeed_plugin(recipe: Recipe, num_processes: int) -> DeepSpeedPlugin:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = _read_json(find_path(file)) if file != "none" else _config_from_launcher()
    _fill_from_recipe(config, recipe, num_processes, file)
    if file == "none":  # these fields are in `config` now; accelerate would take them for a second opinion
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # accelerate reads both from the environment and lets them win over `config`; they agree by now.
    return DeepSpeedPlugin(
        hf_ds_config=config,
        gradient_accumulation_steps=recipe.grad_accum_steps,
        gradient_clipping=recipe.optim.max_grad_norm,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed_config_file {path} of the accelerate YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ValueError(f"deepspeed_config_file {path}: needs an object zero_optimization with the stage.")
    for block, owner in (("optimizer", "optim in the recipe"), ("scheduler", "optim.warmup_ratio in the recipe")):
        if block in config:
            raise ValueError(f"deepspeed_config_file {path}: remove the block {block!r}; {owner} owns it.")
    return config


def _config_from_launcher() -> dict[str, Any]:
    """The answers of `accelerate config`, as a DeepSpeed configuration."""

    def said(name: str, default: str) -> str:
        return os.environ.get(f"ACCELERATE_{name}", default)

    zero: dict[str, Any] = {"stage": int(said("DEEPSPEED_ZERO_STAGE", "2"))}
    for part, lowest_stage in (("OPTIMIZER", 1), ("PARAM", 3)):
        device = said(f"DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
        if device == "none":
            continue
        if zero["stage"] < lowest_stage:  # `accelerate config` lets people answer this
            if os.environ.get("RANK", "0") == "0":
                print(f"note: ZeRO-{zero['stage']} does not share out each {part.lower()}; offload to {device} ignored")
            continue
        if device == "nvme":
            raise ValueError(
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
    config: dict[str, Any] = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if (value := said(key.upper(), "auto")) != "auto":
            config[key] = float(value)
    return config


def _fill_from_recipe(config: dict[str, Any], recipe: Recipe, num_processes: int, file: str) -> None:
    """Writes the recipe's numbers into `config`; ValueError where it says others."""
    per_device, accumulation = recipe.micro_batch_size, recipe.grad_accum_steps
    owned: dict[str, tuple[float, str]] = {
        "gradient_accumulation_steps": (accumulation, "grad_accum_steps"),
        "gradient_clipping": (recipe.optim.max_grad_norm, "optim.max_grad_norm"),
        "train_micro_batch_size_per_gpu": (per_device, "micro_batch_size"),
        "train_batch_size": (
            per_device * accumulation * num_processes,
            "micro_batch_size x grad_accum_steps x number of processes",
        ),
    }
    where = "the accelerate YAML" if file == "none" else f"deepspeed_config_file {file}"
    for key, (value, name) in owned.items():
        said = config.get(key, "auto")
        if said not in ("auto", value):
            raise ValueError(
                f"{where} says {key}: {said:g}, but the recipe's {name} is {value:g}. "
                f"Remove {key} there (the recipe owns it) or make the two equal."
            )
        config[key] = value


def mixed_precision(accelerator: Accelerator) -> str:
    """bf16, fp16 or no: the accelerate YAML's, or that of its deepspeed_config_file."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return str(accelerator.mixed_precision)
    config = accelerator.deepspeed_plugin.deepspeed_config
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True), "no")


def prepare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[Any, Any]:
    """accelerator.prepare, with DeepSpeed's "auto" sizes filled for LoRA; every rank enters."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return tuple(accelerator.prepare(model, optimizer))
    _size_buckets_for_lora(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"], model)
    engine, wrapped = accelerator.prepare(model, optimizer)
    _keep_grad_norm(engine)
    return engine, wrapped


def _size_buckets_for_lora(zero: dict[str, Any], model: torch.nn.Module) -> None:
    """Replaces each "auto" in `zero`; all sizes in elements.

    accelerate would fill them from the hidden size, for full fine-tuning: at stage 3 it would partition the
    larger LoRA matrices and fetch less than a matrix ahead. Here every adapter stays whole on every
    rank, a prefetch holds the largest matrix and one bucket all gradients.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable = [size for size, trains in sizes if trains]
    fitting = {
        "reduce_bucket_size": sum(trainable),
        "stage3_prefetch_bucket_size": max(size for size, _ in sizes),
        "stage3_param_persistence_threshold": max(trainable),
    }
    zero.update({key: size for key, size in fitting.items() if zero.get(key) == "auto"})


def _keep_grad_norm(engine: Any) -> None:
    """Stage 0 in fp32 clips without remembering the norm, unlike every other stage; this adds it."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip_and_remember() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_and_remember


def build_extensions() -> None:
    """Builds now what DeepSpeed would build in the middle of a first run; a minute each, then cached."""
    from deepspeed.ops.op_builder import CPUAdamBuilder  # the optimizer's step in host memory
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder  # collectives between CPU processes

    for builder in [CPUAdamBuilder()] if torch.cuda.is_available() else [CPUAdamBuilder(), ShareMemCommBuilder()]:
        print(f"building {builder.absolute_name()} …", flush=True)
        builder.load(verbose=False)


if __name__ == "__main__":
    _set_up_environment()
    build_extensions()
