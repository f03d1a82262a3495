"""What a recipe leaves to `auto`: how rows share a micro-batch, and whether activations are recomputed."""

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from data.errors import UserError
from data.examples import lengths_of
from data.layout import Layout
from loop.engine.accelerator import largest_of_ranks, mixed_precision
from loop.engine.deepspeed_config import size_buckets_for_lora
from loop.model.build import WEIGHT_DTYPES, Data, set_layout
from loop.planning.batching import choose_layout
from loop.planning.estimate import COMFORT, CUDA_CONTEXT, Subject, Work, peak_of_step
from loop.planning.launch_file import WEIGHT_BYTES
from loop.planning.zero_memory import Layout as ZeroLayout
from loop.planning.zero_memory import held
from loop.recipe import Recipe


@dataclass(frozen=True)
class Decided:
    layout: Layout
    checkpointing: str  # none, non_reentrant or reentrant
    said: dict[str, str]  # for the page before the first step


def decide(recipe: Recipe, data: Data, model: Any, accelerator: Accelerator) -> Decided:
    """Both, where the recipe does not say; every rank enters. `model` is the adapted one on the meta device.

    Raises UserError when the recipe says what cannot be.
    """
    base = model.get_base_model()
    layout, why = choose_layout(recipe, data.train, base, accelerator.num_processes, data.validation)
    checkpointing: str = recipe.gradient_checkpointing
    reason = checkpointing
    if checkpointing == "auto":
        # validation needs less than training with rows as long, but its rows may be longer
        longer = max(filter(None, (data.train, data.validation)), key=lambda rows: lengths_of(rows).max())
        work = Work(longer, layout, real=True)
        checkpointing, reason = _choose_checkpointing(recipe, model, work, accelerator)
    return Decided(layout, checkpointing, {"batching": why, "gradient checkpointing": reason})


def _choose_checkpointing(recipe: Recipe, model: Any, work: Work, accelerator: Accelerator) -> tuple[str, str]:
    """none where a step without it leaves a tenth of the memory free on every rank's device, by the plan's estimate."""
    precision = mixed_precision(accelerator)
    set_layout(model.get_base_model(), work.layout)
    subject = Subject(recipe, model.to(WEIGHT_DTYPES[precision]), work)
    layout = _zero_layout(recipe, model, precision, accelerator)
    try:
        need = peak_of_step(subject, layout, recomputes=False).device
    except UserError as error:  # on all ranks alike
        return subject.recomputation(layout), f"{subject.recomputation(layout)} (auto): {error}"
    if accelerator.device.type == "cuda":
        has = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        need += held(layout, subject.base, subject.adapters)[1].total - int(CUDA_CONTEXT)
        has = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    short = largest_of_ranks(int(need > COMFORT * has), accelerator)  # collective
    chosen = subject.recomputation(layout) if short else "none"
    return chosen, f"{chosen} (auto): a step without would take {need / 1e9:.3g} of {has / 1e9:.3g} GB on a device"


def _zero_layout(recipe: Recipe, model: Any, precision: str, accelerator: Accelerator) -> ZeroLayout:
    zero: dict[str, Any] = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = deepcopy(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"])
        size_buckets_for_lora(zero, model)
    accumulates = recipe.grad_accum_steps > 1
    return ZeroLayout(zero.get("stage"), accelerator.num_processes, WEIGHT_BYTES[precision], zero, accumulates)
