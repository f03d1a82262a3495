"""Builds the Accelerator, one process's view of the launch, with the real DeepSpeed engine on GPUs and on CPUs."""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from data.errors import UserError
from loop.engine.deepspeed_config import deepspeed_config, size_buckets_for_lora
from loop.engine.environment import set_up_environment
from loop.engine.extensions import announce_builds
from loop.engine.optimizer_state import set_update_count
from loop.guard.process import RunError
from loop.internals.deepspeed_internals import gather_persistent_at_once, import_muon_uncompiled, keep_grad_norm
from loop.measure.phases import count_collectives, measured
from loop.recipe import ROOT, Recipe

NO_LAUNCHER_CONFIG = ROOT / "accel_configs" / "zero3.yaml"


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Builds the Accelerator of this process; every rank enters. It comes before any model is loaded, because
    DeepSpeed's zero.Init needs it.

    Raises UserError where the launcher's numbers contradict the recipe's, and RuntimeError where the launched processes
    did not find each other.
    """
    set_up_environment()
    count_collectives()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        if "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun, mpirun
            raise UserError("started by another launcher. Use accelerate launch --config_file accel_configs/….yaml.")
        _act_as_one_launched_process()  # started as `python loop/train.py`, for the debugger
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if os.environ["ACCELERATE_MIXED_PRECISION"] == "fp8":
        raise UserError("mixed_precision: fp8 is not supported. Use bf16 in the accelerate YAML.")
    if os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: fp16 needs a GPU. Use bf16 in the accelerate YAML.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed_plugin = _deepspeed_plugin(recipe, launched) if use_deepspeed else None
    has_gpu = torch.cuda.is_available()
    backend = "gloo" if "LOCAL_RANK" in os.environ and not has_gpu else None
    accelerator = Accelerator(
        # Without a GPU accelerate would make each of DeepSpeed's processes a job of its own, unless it is told to
        # use gloo; and it would not start plain DDP at all, unless it is told to use the CPU.
        cpu=not has_gpu and not use_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        deepspeed_plugin=deepspeed_plugin,
        # The number is passed as a plugin, because the launcher's environment variable overrides the plain argument.
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


def _act_as_one_launched_process() -> None:
    """Makes this process what `accelerate launch --num_processes 1 --config_file accel_configs/zero3.yaml` would start,
    but without a TCP port."""
    launch = yaml.safe_load(NO_LAUNCHER_CONFIG.read_text())
    deepspeed = launch["deepspeed_config"]
    os.environ.update(
        ACCELERATE_MIXED_PRECISION=launch["mixed_precision"],
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE=str(deepspeed["zero_stage"]),
        ACCELERATE_DEEPSPEED_ZERO3_INIT=str(deepspeed["zero3_init_flag"]),
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    )
    # The store lies inside the process and needs no port, so any number of debuggers can run side by side.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, but unknown to type checkers
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def _deepspeed_plugin(recipe: Recipe, num_processes: int) -> DeepSpeedPlugin:
    """accelerate's plugin with our DeepSpeed configuration; rank 0 says which extensions will be built."""
    config = deepspeed_config(recipe, num_processes)
    if os.environ.get("RANK", "0") == "0":
        announce_builds(config["zero_optimization"])
    return DeepSpeedPlugin(
        hf_ds_config=config,
        # The configuration holds both numbers already; without these arguments accelerate would look for them in the
        # environment.
        gradient_accumulation_steps=recipe.grad_accum_steps,
        gradient_clipping=recipe.optim.max_grad_norm,
    )


def mixed_precision(accelerator: Accelerator) -> str:
    """The precision (bf16, fp16 or no) of the accelerate YAML, or of the deepspeed_config_file that it names."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return str(accelerator.mixed_precision)
    config = accelerator.deepspeed_plugin.deepspeed_config
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True), "no")


def zero_stage(accelerator: Accelerator) -> int | None:
    """The ZeRO stage of the launch; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def set_accumulation(rows_at_once: int, grad_accum_steps: int, accelerator: Accelerator) -> None:
    """Tells accelerate and DeepSpeed how a process's share of a step is cut up, before `prepare`."""
    accelerator.gradient_accumulation_steps = grad_accum_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=rows_at_once,
            gradient_accumulation_steps=grad_accum_steps,
            train_batch_size=rows_at_once * grad_accum_steps * accelerator.num_processes,
        )


def on_main_process(action: Callable[[], object], accelerator: Accelerator) -> None:
    """Rank 0 alone does `action`; every rank enters. An error in it is raised on every rank."""
    told: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (UserError, RunError) as error:
            told = [error]
        except Exception as error:  # an error that nobody foresaw; without this the other ranks would wait
            traceback.print_exc()
            told = [RunError(f"rank 0: {type(error).__name__}: {error}")]
    broadcast_object_list(told)  # collective: an error on rank 0 has to stop all ranks
    if told[0] is not None:
        raise told[0]


def largest_of_ranks(value: int, accelerator: Accelerator) -> int:
    """The largest of the values that the ranks enter with; every rank enters and gets it."""
    if accelerator.num_processes == 1:
        return value
    largest = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # collective
    return int(largest.item())


@measured("load")
def prepare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[Any, Any]:
    """Chooses those of DeepSpeed's sizes that are "auto", then calls accelerator.prepare. Every rank enters."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return tuple(accelerator.prepare(model, optimizer))
    size_buckets_for_lora(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"], model)
    import_muon_uncompiled()
    engine, wrapped = accelerator.prepare(model, optimizer)
    keep_grad_norm(engine)
    gather_persistent_at_once(engine)
    set_update_count(wrapped, 0)  # at stage 0 in bf16 DeepSpeed has taken a step with gradients of zero by now
    return engine, wrapped
