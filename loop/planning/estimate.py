"""What one configuration will need and take: bytes on each GPU and in the host's memory, traffic, time at least."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from data.batch import epoch_order, num_windows, windows
from data.errors import UserError
from data.examples import Example, answer_lengths_of, lengths_of
from data.layout import Layout as BatchLayout
from data.layout import MicroBatch, collate
from loop.measure.flops import Batch, MatrixProducts, count_computed, matrix_products
from loop.planning.activations import Activations, measure_step
from loop.planning.launch_file import Launch
from loop.planning.zero_memory import PERSISTENT, Gathered, Held, Layout, Traffic, gathered, held, traffic
from loop.recipe import Recipe

CUDA_CONTEXT = 0.6e9  # bytes a process takes on its GPU for CUDA and NCCL; an assumption
HOST_PROCESS = 2.4e9  # bytes of host memory a process with CUDA takes; the reference's smallest process
COMFORT = 0.9  # share of a memory that a plan may fill: allocators leave gaps, and other data has longer rows


@dataclass(frozen=True)
class Hardware:
    """None where nothing was said."""

    gpu_memory: float | None = None  # bytes of one
    host_memory: float | None = None  # bytes of the machine
    flops: float | None = None  # a second and GPU, dense bf16
    interconnect: float | None = None  # bytes a second and GPU, one way
    host_bus: float | None = None  # likewise


@dataclass(frozen=True)
class Work:
    """The rows of one epoch, and how micro-batches are made of them."""

    examples: Sequence[Example]
    layout: BatchLayout
    real: bool  # False without a tokenizer: each row is taken for as long as max_length

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(lengths_of(self.examples).max())

    @property
    def longest_answer(self) -> int:
        return int(answer_lengths_of(self.examples).max())

    def largest(self, rows: int) -> MicroBatch:
        """The micro-batch of at most `rows` that needs most memory: its rows are the longest."""
        longest = lengths_of(self.examples).argsort(stable=True)[-rows:]
        return collate([self.examples[i] for i in longest], self.layout, pad_token_id=0)


class Subject:
    """A recipe's model, on the meta device, and what its steps need: found once for all configurations."""

    def __init__(self, recipe: Recipe, model: Any, work: Work) -> None:
        self.recipe, self.model, self.work = recipe, model, work
        self.base = [p.numel() for p in model.parameters() if not p.requires_grad]
        self.adapters = [p.numel() for p in model.parameters() if p.requires_grad]
        self._gathered: dict[tuple[object, ...], Gathered] = {}

    @cached_property
    def products(self) -> MatrixProducts:
        return matrix_products(self.model)

    @cache  # noqa: B019  # a plan has one subject, or a few
    def activations(self, checkpointing: str) -> Activations:
        """Raises UserError where a step of the model cannot be done without weights."""
        try:
            return measure_step(self.model, self.work.largest(self.recipe.micro_batch_size), checkpointing)
        except Exception as error:  # a model's own code, on a device that few authors think of
            name = type(self.model.get_base_model()).__name__
            raise UserError(
                f"what a step of {name} needs cannot be found without its weights ({type(error).__name__}: "
                f"{str(error)[:200]})"
            ) from error

    def recomputation(self, layout: Layout) -> str:
        """The kind of gradient checkpointing, where there is any.

        Where the recipe does not say: at stage 3 reentrant, which gathers every weight once less (docs/zero.md);
        elsewhere the kind that PyTorch advises.
        """
        said = self.recipe.gradient_checkpointing
        if said in ("reentrant", "non_reentrant"):
            return said
        return "reentrant" if layout.stage == 3 and layout.processes > 1 else "non_reentrant"

    def gathered(self, layout: Layout, activations: Activations) -> Gathered:
        sizes = [layout.size(key) for key in SIZES]
        key = (layout.weight_bytes, id(activations), *sizes)
        if key not in self._gathered:
            self._gathered[key] = gathered(layout, self.model, activations.events)
        return self._gathered[key]

    @cache  # noqa: B019  # a plan has one subject, or a few
    def epoch(self, processes: int) -> tuple[int, int, Batch]:
        """Steps; tokens as the rows have them; what is computed, with padding, and shared tokens once."""
        recipe, work = self.recipe, self.work
        steps = num_windows(len(work.examples), recipe.micro_batch_size * recipe.grad_accum_steps * processes)
        if not work.real:
            n, t = len(work.examples), work.longest
            return steps, n * t, Batch(n, n * t, n * work.longest_answer, n * t * t)
        computed, tokens = Batch(), 0
        order = epoch_order(len(work.examples), recipe.seed, 0)
        for rank in range(processes):
            share = windows(
                work.examples,
                order,
                recipe.micro_batch_size,
                recipe.grad_accum_steps,
                processes,
                rank,
                work.layout,
                pad_token_id=0,
            )
            for window in share:
                computed = sum(map(count_computed, window.micro_batches), computed)
                tokens += window.num_tokens if rank == 0 else 0
        return steps, tokens, computed


SIZES = (
    PERSISTENT,
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@dataclass(frozen=True)
class Estimate:
    """Bytes; `device` and what goes with it of one rank, `host` of all ranks on one machine."""

    launch: Launch
    device: Held
    on_host: Held  # of one rank
    recomputes: bool  # gradient checkpointing, as the recipe says; for auto, where memory asks for it or is not known
    activations: int  # at their highest, with what ZeRO-3 has gathered by then
    activations_recomputing: int  # with gradient checkpointing
    activations_keeping: int  # without
    logits: int  # part of the activations
    gathered: int  # weights gathered by ZeRO-3, at most; part of `activations`
    gathered_bytes: int  # in the forward and backward passes of a step, all together
    device_peak: int
    host_load: int
    host_steady: int
    traffic: Traffic  # of one rank and step
    flops: float  # of all ranks, a step, recomputation and padding included
    steps: int
    epochs: int
    tokens: int  # of one epoch, without padding
    seconds: dict[str, float] | None  # a step, at least: compute, interconnect, host_bus; None without speeds

    @property
    def step_seconds(self) -> float | None:
        """At least, as if everything overlapped."""
        return max(self.seconds.values()) if self.seconds else None

    def fit(self, hardware: Hardware) -> str:
        """ "yes", "tight" (less than a tenth left), "no", or "" where nothing is said of the memories."""
        shares = [
            need / has
            for need, has in (
                (self.device_peak, hardware.gpu_memory),
                (max(self.host_load, self.host_steady), hardware.host_memory),
            )
            if has
        ]
        return ("yes" if max(shares) <= COMFORT else "tight" if max(shares) <= 1 else "no") if shares else ""


def estimate(subject: Subject, launch: Launch, hardware: Hardware) -> Estimate:
    layout, n = launch.layout, launch.processes
    device, on_host = held(layout, subject.base, subject.adapters)
    peaks = {recomputes: peak_of_step(subject, layout, recomputes) for recomputes in (True, False)}
    recomputes = subject.recipe.gradient_checkpointing != "none"
    if subject.recipe.gradient_checkpointing == "auto" and hardware.gpu_memory:
        recomputes = peaks[False].device > COMFORT * hardware.gpu_memory
    peak = peaks[recomputes]
    host_load, host_steady = _host(layout, subject.base, on_host)
    steps, tokens, computed = subject.epoch(n)
    sent = traffic(layout, subject.adapters, subject.recipe.grad_accum_steps, peak.gathers)
    flops = subject.products.computed_flops(computed, recomputes) / steps
    return Estimate(
        launch=launch,
        device=device,
        on_host=on_host,
        recomputes=recomputes,
        activations=peak.activations,
        activations_recomputing=peaks[True].activations,
        activations_keeping=peaks[False].activations,
        logits=peak.logits,
        gathered=peak.gathered,
        gathered_bytes=layout.weight_bytes * peak.gathers * subject.recipe.grad_accum_steps,
        device_peak=peak.device,
        host_load=host_load,
        host_steady=host_steady,
        traffic=sent,
        flops=flops,
        steps=steps * subject.recipe.epochs,
        epochs=subject.recipe.epochs,
        tokens=tokens,
        seconds=_seconds(flops / n, sent, hardware),
    )


@dataclass(frozen=True)
class Peak:
    """Of one rank and step, in bytes."""

    device: int
    activations: int  # at their highest, with what ZeRO-3 has gathered by then
    logits: int  # of the activations
    gathered: int = 0  # weights gathered by ZeRO-3, at most
    gathers: int = 0  # elements, in a micro-batch's forward and backward pass


def peak_of_step(subject: Subject, layout: Layout, recomputes: bool) -> Peak:
    """What a rank's device needs, with gradient checkpointing or without."""
    activations = subject.activations(subject.recomputation(layout) if recomputes else "none")
    device = held(layout, subject.base, subject.adapters)[0]
    peak, live, gathers = activations.peak, 0, 0
    if layout.stage == 3 and (layout.processes > 1 or layout.offloads("param")):
        found = subject.gathered(layout, activations)
        peak, live, gathers = found.peak, found.live, found.gathers
    in_backward = layout.weight_bytes * sum(subject.adapters) + peak
    rest = device.total - device.gradients
    most = CUDA_CONTEXT + rest + max(device.gradients + device.temporary, in_backward)
    return Peak(int(most), peak, activations.logits, live, gathers)


def _host(layout: Layout, base: Sequence[int], on_host: Held) -> tuple[int, int]:
    """At most while loading, and from then on, of all ranks.

    Up to stage 2 weights are mapped from their file, and pass through the page cache alone; at stage 3 rank 0 reads
    all of them. PyTorch rounds each pinned tensor up to a power of two (ATen/core/CachingHostAllocator.h).
    """
    n, each = layout.processes, on_host.total
    offload = layout.zero.get("offload_param") or {}
    if offload.get("device") == "cpu" and offload.get("pin_memory"):
        shares = [layout.weight_bytes * math.ceil(size / n) for size in base]
        each += sum(2 ** math.ceil(math.log2(share)) - share for share in shares)
    elif offload.get("device") == "nvme":
        each -= on_host.base
    steady = int(n * (HOST_PROCESS + each))
    return steady + (layout.weight_bytes * sum(base) if layout.stage == 3 else 0), steady


def _seconds(flops: float, sent: Traffic, hardware: Hardware) -> dict[str, float] | None:
    if not hardware.flops or not hardware.interconnect or not hardware.host_bus:
        return None
    return {
        "compute": flops / hardware.flops,
        "interconnect": sent.interconnect / hardware.interconnect,
        "host_bus": sent.host_bus / hardware.host_bus,
    }


def recommend(estimates: Sequence[Estimate], hardware: Hardware) -> Estimate | None:
    """The fastest of those that fit in comfort, else of those that are tight; None if none fits, or none can be said.

    Without speeds: what crosses the host bus least, then the interconnect least, then what needs least memory.
    """
    for verdict in ("yes", "tight"):
        fitting = [one for one in estimates if one.fit(hardware) == verdict]
        if fitting:
            return min(fitting, key=_cost)
    return None


def _cost(one: Estimate) -> tuple[float, ...]:
    run = one.steps * (one.step_seconds or 0.0)
    # Of two that differ by less than a hundredth the one that needs less memory is better.
    rounded = round(math.log(run) * 100) if run else 0
    return rounded, one.traffic.host_bus > 0, round(one.device_peak / 1e8), one.traffic.interconnect
