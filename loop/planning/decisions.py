"""Decides what a recipe leaves to `auto`: how rows share a micro-batch, how many they are, and whether activations are
recomputed."""

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
from loop.batch_arithmetic import BatchArithmetic, in_numbers
from loop.engine.accelerator import largest_of_ranks, mixed_precision, set_accumulation
from loop.engine.deepspeed_config import size_buckets_for_lora
from loop.internals.deepspeed_internals import order_of_modules_forgotten
from loop.measure.memory import free_host_memory
from loop.model.attention import attention_for
from loop.model.build import WEIGHT_DTYPES, Data, set_layout, suit_device
from loop.model.limits import check_limits
from loop.model.neighbours import TOLERANCES, largest_gap, losses_alone, losses_among_others, rows_to_try
from loop.planning.batching import LAYOUTS, choose_layout
from loop.planning.cutting import RECOMPUTING, choose_cut, possible_sizes
from loop.planning.estimate import COMFORT, CUDA_CONTEXT, Subject, Work, peak_of_step
from loop.planning.launch_file import WEIGHT_BYTES
from loop.planning.zero_memory import Sharding, held
from loop.recipe import Recipe

Checkpointing = Literal["none", "non_reentrant", "reentrant"]


@dataclass(frozen=True)
class Decided:
    layout: Layout
    checkpointing: Checkpointing
    rows_at_once: int  # micro_batch_size
    auto: bool  # whether the layout was chosen here, because the recipe says auto
    said: dict[str, str]  # the lines for the page before the first step

    def write_into(self, recipe: Recipe, batch: BatchArithmetic) -> tuple[Recipe, BatchArithmetic]:
        """The recipe and the batch that are run: auto gives way to what was decided. Run folder and checkpoints hold
        this recipe."""
        rows, accumulation = self.rows_at_once, batch.micro_batch_size * batch.grad_accum_steps // self.rows_at_once
        cut = replace(recipe, micro_batch_size=rows, grad_accum_steps=accumulation)
        decided = replace(cut, batching=self.layout, gradient_checkpointing=self.checkpointing)
        return decided, replace(batch, micro_batch_size=rows, grad_accum_steps=accumulation)


def decide(recipe: Recipe, data: Data, model: Any, accelerator: Accelerator) -> Decided:
    """Decides all three where the recipe says auto; every rank enters, and accelerate and DeepSpeed learn how the batch
    is cut up. `model` has adapters, lies on the meta device, and stays as it is.

    Raises UserError when the model cannot do what the recipe says.
    """
    base = model.get_base_model()
    processes = accelerator.num_processes
    layout, why = choose_layout(recipe, data.train, base, processes, data.validation)
    whole = in_numbers(recipe, processes)  # a process's whole share at once, where the recipe says auto
    rows, checkpointing, reason = whole.rows_at_once, str(recipe.gradient_checkpointing), ""
    if "auto" in (checkpointing, recipe.micro_batch_size):
        # Validation needs less memory than training for rows of the same length, but its rows may be longer.
        longer = max(filter(None, (data.train, data.validation)), key=lambda rows: lengths_of(rows).max())
        work = Work(longer, layout, real=True)
        rows, checkpointing, reason = _cut_up(recipe, model, work, float(lengths_of(data.train).mean()), accelerator)
    set_accumulation(rows, whole.rows_at_once * whole.grad_accum_steps // rows, accelerator)
    said = {"batching": why, "gradient checkpointing": checkpointing + reason}
    if warning := check_limits(base, [data.train, data.validation]):
        said["positions"] = f"warning: {warning}"
    return Decided(layout, cast(Checkpointing, checkpointing), rows, recipe.batching == "auto", said)


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
    rows = rows_to_try(data.train, recipe.rows_at_once)
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


def _cut_up(recipe: Recipe, model: Any, work: Work, tokens: float, accelerator: Accelerator) -> tuple[int, str, str]:
    """Chooses the micro-batch size and whether to recompute, for rows of `tokens` tokens on average; every rank enters.

    A tenth of the memory has to stay free on every rank's device by the plan's estimate. Returns the size, the kind of
    checkpointing and the reason.
    """
    precision, whole = mixed_precision(accelerator), in_numbers(recipe, accelerator.num_processes)
    model = deepcopy(model).to(WEIGHT_DTYPES[precision])  # on the meta device, so the copy holds no weights
    suit_device(model.get_base_model(), work.layout, accelerator.device)
    on_gpu = accelerator.device.type == "cuda"
    sharding = _sharding(recipe, model, precision, accelerator)
    subject = Subject(whole, model, work)

    def need(rows: int, recomputes: bool) -> float:
        """The bytes that a step needs where this rank's memory is counted."""
        device = peak_of_step(subject.with_rows(rows), sharding, recomputes).device
        if on_gpu:
            return device
        return device + held(sharding, subject.base, subject.adapters)[1].total - int(CUDA_CONTEXT)

    def fits(rows: int, recomputes: bool) -> bool:
        return not largest_of_ranks(int(need(rows, recomputes) > COMFORT * has), accelerator)  # collective

    has = torch.cuda.get_device_properties(accelerator.device).total_memory if on_gpu else free_host_memory()
    said, auto = recipe.gradient_checkpointing, recipe.micro_batch_size == "auto"
    sizes = possible_sizes(whole.rows_at_once, tokens) if auto else [whole.rows_at_once]
    kind = subject.recomputation(sharding)
    try:
        rows, recomputes = choose_cut(sizes, tokens, RECOMPUTING.get(said, (True,)), fits, sharding.gathers)
        taken = need(rows, False) if said == "auto" else need(rows, recomputes)
    except UserError as error:  # the same error on all ranks
        return sizes[-1], kind if said == "auto" else said, f" (auto): {error}"
    chosen = kind if recomputes else "none"
    cut = f"{rows} rows at once (auto), " if auto else ""
    what = "a step without would take" if said == "auto" else "a step takes"
    why = f"{what} {taken / 1e9:.3g} of {has / 1e9:.3g} GB on a device"
    return rows, chosen, f"{' (auto)' if said == 'auto' else ''}: {cut}{why}"


def _sharding(recipe: Recipe, model: Any, precision: str, accelerator: Accelerator) -> Sharding:
    zero: dict[str, Any] = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = deepcopy(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"])
        size_buckets_for_lora(zero, model)
    accumulates = recipe.grad_accum_steps > 1
    return Sharding(zero.get("stage"), accelerator.num_processes, WEIGHT_BYTES[precision], zero, accumulates)
