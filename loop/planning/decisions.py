"""Decides what a recipe leaves to `auto`: how rows share a micro-batch, and whether activations are recomputed."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from data.errors import UserError
from data.examples import lengths_of
from data.layout import Layout
from loop.engine.accelerator import largest_of_ranks, mixed_precision
from loop.engine.deepspeed_config import size_buckets_for_lora
from loop.internals.deepspeed_internals import order_of_modules_forgotten
from loop.measure.memory import free_host_memory
from loop.model.attention import attention_for
from loop.model.build import WEIGHT_DTYPES, Data, set_layout
from loop.model.limits import check_limits
from loop.model.neighbours import TOLERANCES, largest_gap, losses_alone, losses_among_others, rows_to_try
from loop.model.operators import use_fused_operators
from loop.planning.batching import LAYOUTS, choose_layout
from loop.planning.estimate import COMFORT, CUDA_CONTEXT, Subject, Work, peak_of_step
from loop.planning.launch_file import WEIGHT_BYTES
from loop.planning.zero_memory import Sharding, held
from loop.recipe import Recipe

Checkpointing = Literal["none", "non_reentrant", "reentrant"]


@dataclass(frozen=True)
class Decided:
    layout: Layout
    checkpointing: Checkpointing
    auto: bool  # whether the layout was chosen here, because the recipe says auto
    said: dict[str, str]  # the lines for the page before the first step

    def write_into(self, recipe: Recipe) -> Recipe:
        """The recipe that is run: auto gives way to what was decided. Run folder and checkpoints hold this recipe."""
        return replace(recipe, batching=self.layout, gradient_checkpointing=self.checkpointing)


def decide(recipe: Recipe, data: Data, model: Any, accelerator: Accelerator) -> Decided:
    """Decides both where the recipe says auto; every rank enters. `model` has adapters, lies on the meta device, and
    stays as it is.

    Raises UserError when the model cannot do what the recipe says.
    """
    base = model.get_base_model()
    layout, why = choose_layout(recipe, data.train, base, accelerator.num_processes, data.validation)
    checkpointing = reason = str(recipe.gradient_checkpointing)
    if checkpointing == "auto":
        # Validation needs less memory than training for rows of the same length, but its rows may be longer.
        longer = max(filter(None, (data.train, data.validation)), key=lambda rows: lengths_of(rows).max())
        work = Work(longer, layout, real=True)
        checkpointing, reason = _choose_checkpointing(recipe, model, work, accelerator)
    said = {"batching": why, "gradient checkpointing": reason}
    if warning := check_limits(base, [data.train, data.validation]):
        said["positions"] = f"warning: {warning}"
    return Decided(layout, cast(Checkpointing, checkpointing), recipe.batching == "auto", said)


def keep_rows_apart(
    decided: Decided, recipe: Recipe, data: Data, model: torch.nn.Module, accelerator: Accelerator
) -> Decided:
    """Tries out on the real model, wrapped by the engine, that the rows of a micro-batch do not change one another's
    loss; every rank enters.

    Where they do, and the layout was chosen for `auto`, the next layout in which they do not is taken. Raises UserError
    where the user has named the layout, and where no layout is right.
    """
    if recipe.micro_batch_size == 1 or len(data.train) == 1:
        return decided
    candidates = LAYOUTS[LAYOUTS.index(decided.layout) :: -1] if decided.auto else (decided.layout,)
    model.eval()
    with order_of_modules_forgotten(model):
        found, right = _try_layouts(candidates, recipe, data, model, accelerator)
    model.train()
    if right is None:
        other = ", or another --batching." if not decided.auto and decided.layout != "padded" else "."
        raise UserError(
            f"batching: a row's loss in this model depends on the rows beside it in a micro-batch: {_gaps(found)}. "
            f"Give --micro_batch_size 1 and more --grad_accum_steps{other}"
        )
    if right == decided.layout:
        return decided
    why = f"{right} (auto), because a row's loss depends on the rows beside it: {_gaps(found, right)}"
    return replace(decided, layout=right, said=decided.said | {"batching": why})


def _try_layouts(
    candidates: Sequence[Layout], recipe: Recipe, data: Data, model: torch.nn.Module, accelerator: Accelerator
) -> tuple[dict[Layout, float], Layout | None]:
    """Returns the largest gap of each layout that was tried, and the first layout without one, which the model has now.

    Collective. `model` is in evaluation mode and has the attention of the first candidate.
    """
    rows = rows_to_try(data.train, recipe.micro_batch_size)
    base = accelerator.unwrap_model(model, keep_torch_compile=False).get_base_model()
    most, pad, device = TOLERANCES[mixed_precision(accelerator)], data.pad_token_id, accelerator.device
    own = recipe.model.attn_implementation
    if candidates[0] != "padded":
        base.set_attn_implementation(own)
    alone = losses_alone(model, rows, pad, device)
    found: dict[Layout, float] = {}
    for layout in candidates:
        if layout != candidates[0]:
            base.set_attn_implementation(own)
        set_layout(base, layout, attention_for(base, device))
        found[layout] = largest_gap(alone, losses_among_others(model, rows, layout, pad, device))
        if not largest_of_ranks(int(found[layout] > most), accelerator):
            return found, layout
    return found, None


def _gaps(found: dict[Layout, float], right: Layout | None = None) -> str:
    """Says by how much the losses differ in the layouts that are not `right`."""
    return ", ".join(f"in {layout} by {gap:.2g} nats a token" for layout, gap in found.items() if layout != right)


def _choose_checkpointing(recipe: Recipe, model: Any, work: Work, accelerator: Accelerator) -> tuple[str, str]:
    """Chooses none where a step without recomputation would leave a tenth of the memory free on every rank's device.

    The plan's estimate says what a step needs. Returns the choice and the reason.
    """
    precision = mixed_precision(accelerator)
    model = deepcopy(model)  # on the meta device, so the copy holds no weights
    base = model.get_base_model()
    set_layout(base, work.layout, attention_for(base, accelerator.device))
    if accelerator.device.type == "cuda":
        use_fused_operators(base)
    subject = Subject(recipe, model.to(WEIGHT_DTYPES[precision]), work)
    sharding = _sharding(recipe, model, precision, accelerator)
    try:
        need = peak_of_step(subject, sharding, recomputes=False).device
    except UserError as error:  # the same error on all ranks
        return subject.recomputation(sharding), f"{subject.recomputation(sharding)} (auto): {error}"
    if accelerator.device.type == "cuda":
        has = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        need += held(sharding, subject.base, subject.adapters)[1].total - int(CUDA_CONTEXT)
        has = free_host_memory()
    short = largest_of_ranks(int(need > COMFORT * has), accelerator)  # collective
    chosen = subject.recomputation(sharding) if short else "none"
    return chosen, f"{chosen} (auto): a step without would take {need / 1e9:.3g} of {has / 1e9:.3g} GB on a device"


def _sharding(recipe: Recipe, model: Any, precision: str, accelerator: Accelerator) -> Sharding:
    zero: dict[str, Any] = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = deepcopy(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"])
        size_buckets_for_lora(zero, model)
    accumulates = recipe.grad_accum_steps > 1
    return Sharding(zero.get("stage"), accelerator.num_processes, WEIGHT_BYTES[precision], zero, accumulates)
