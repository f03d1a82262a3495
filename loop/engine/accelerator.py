"""The Accelerator: one process's view of the launch, with the real DeepSpeed engine on GPUs and on CPUs."""

import contextlib
import os
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

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
from loop.engine.deepspeed_config import (
    deepspeed_config,
    gather_persistent_at_once,
    keep_grad_norm,
    size_buckets_for_lora,
)
from loop.engine.environment import set_up_environment
from loop.engine.extensions import announce_builds
from loop.engine.optimizer_state import set_update_count
from loop.guard.process import RunError
from loop.measure.phases import count_collectives, measured
from loop.recipe import ROOT, Recipe

NO_LAUNCHER_CONFIG = ROOT / "accel_configs" / "zero3.yaml"


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process; every rank enters. Before any model is loaded: zero.Init needs it.

    Raises UserError where the launcher's numbers contradict the recipe's, RuntimeError where the
    processes that were launched did not find each other.
    """
    set_up_environment()
    count_collectives()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        if "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun, mpirun: N single jobs
            raise UserError("started by another launcher. Use accelerate launch --config_file accel_configs/….yaml.")
        _act_as_one_launched_process()  # `python loop/train.py`, for the debugger
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
        # Without a GPU accelerate would start DeepSpeed's processes as so many one-process jobs, unless
        # it is told to use gloo; and it would not start plain DDP at all, unless it is told to use the CPU.
        cpu=not has_gpu and not use_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        deepspeed_plugin=deepspeed_plugin,
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


def _act_as_one_launched_process() -> None:
    """As `accelerate launch --num_processes 1 --config_file accel_configs/zero3.yaml`, but without a port."""
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
    config = deepspeed_config(recipe, num_processes)
    if os.environ.get("RANK", "0") == "0":
        announce_builds(config["zero_optimization"])
    return DeepSpeedPlugin(
        hf_ds_config=config,
        # Both stand in the configuration already, but accelerate would read them from the environment too.
        gradient_accumulation_steps=recipe.grad_accum_steps,
        gradient_clipping=recipe.optim.max_grad_norm,
    )


def mixed_precision(accelerator: Accelerator) -> str:
    """bf16, fp16 or no: the accelerate YAML's, or that of its deepspeed_config_file."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return str(accelerator.mixed_precision)
    config = accelerator.deepspeed_plugin.deepspeed_config
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True), "no")


def on_main_process(action: Callable[[], object], accelerator: Accelerator) -> None:
    """Rank 0 alone does `action`; every rank enters. What goes wrong in it is raised on every rank."""
    told: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (UserError, RunError) as error:
            told = [error]
        except Exception as error:  # not foreseen; the others would wait
            traceback.print_exc()
            told = [RunError(f"rank 0: {type(error).__name__}: {error}")]
    broadcast_object_list(told)  # collective: what goes wrong on rank 0 has to stop all
    if told[0] is not None:
        raise told[0]


def largest_of_ranks(value: int, accelerator: Accelerator) -> int:
    """Every rank enters with a value of its own, and gets the largest."""
    if accelerator.num_processes == 1:
        return value
    largest = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # collective
    return int(largest.item())


@measured("load")
def prepare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[Any, Any]:
    """accelerator.prepare, with DeepSpeed's "auto" sizes filled for LoRA; every rank enters."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return tuple(accelerator.prepare(model, optimizer))
    size_buckets_for_lora(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"], model)
    _import_muon_uncompiled()
    engine, wrapped = accelerator.prepare(model, optimizer)
    keep_grad_norm(engine)
    gather_persistent_at_once(engine)
    set_update_count(wrapped, 0)  # stage 0 in bf16 has taken a step of zeros by now, and would be one ahead for ever
    return engine, wrapped


def _import_muon_uncompiled() -> None:
    """DeepSpeed looks whether the optimizer is its Muon, whose module compiles functions as it is imported: that loads
    torch's inductor, two seconds of every start, for an optimizer that is not used here."""
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: lambda function: function), contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
