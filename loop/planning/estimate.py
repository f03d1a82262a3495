"""Estimates what one configuration needs: bytes on each GPU and in the host's memory, traffic, and the least time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data.batch import epoch_order, windows
from data.errors import UserError
from data.examples import Example, label_lengths_of, lengths_of
from data.layout import Layout, MicroBatch, collate
from loop.batch_arithmetic import BatchArithmetic, in_numbers, num_steps
from loop.internals.deepspeed_internals import is_fetched_as_a_whole
from loop.measure.flops import Batch, MatrixProducts, count_computed, matrix_products
from loop.planning.activations import Activations, measure_step
from loop.planning.cutting import RECOMPUTING, choose_cut, possible_sizes
from loop.planning.launch_file import Launch
from loop.planning.zero_memory import (
    PERSISTENT,
    Gathering,
    Held,
    LinkTraffic,
    Sharding,
    held,
    link_traffic,
    simulate_gathering,
)
from loop.recipe import Recipe

CUDA_CONTEXT = 0.6e9  # bytes a process takes on its GPU for CUDA and NCCL; an assumption
HOST_PROCESS = 2.4e9  # bytes of host memory that a process with CUDA takes; so much took the reference's smallest one
COMFORT = 0.9  # share of a memory that a plan may fill: allocators leave gaps, and other data has longer rows


@dataclass(frozen=True)
class Hardware:
    """The machine that a plan is made for; a value is None where the user did not give it."""

    gpu_memory: float | None = None  # bytes of one GPU
    host_memory: float | None = None  # bytes of the machine
    flops: float | None = None  # FLOP/s of one GPU, dense bf16
    interconnect: float | None = None  # bytes a second that one GPU sends to others
    host_bus: float | None = None  # bytes a second between one GPU and the host, one way


@dataclass(frozen=True)
class Work:
    """The rows of one epoch, and how micro-batches are made of them."""

    examples: Sequence[Example]
    layout: Layout
    real: bool  # False without a tokenizer, when each row is assumed to be as long as max_length

    @property
    def longest(self) -> int:
        """The number of tokens in the longest row."""
        return int(lengths_of(self.examples).max())

    @property
    def most_labels(self) -> int:
        """The largest number of labels of a row."""
        return int(label_lengths_of(self.examples).max())

    def largest(self, rows: int) -> MicroBatch:
        """The micro-batch of at most `rows` rows that needs most memory, which is that of the longest rows."""
        longest = lengths_of(self.examples).argsort(stable=True)[-rows:]
        return collate([self.examples[i] for i in longest], self.layout, pad_token_id=0)


class Subject:
    """A recipe's model on the meta device, and what its steps need. Each result is found once and kept for all
    configurations."""

    def __init__(self, recipe: Recipe, model: Any, work: Work) -> None:
        self.recipe, self.model, self.work = recipe, model, work
        self.base = [p.numel() for p in model.parameters() if not p.requires_grad]
        self.adapters = [p.numel() for p in model.parameters() if p.requires_grad]
        self._activations: dict[str, Activations] = {}  # by the kind of checkpointing
        self._gathering: dict[tuple[object, ...], Gathering] = {}  # by that kind and the sizes that matter
        self._with_rows: dict[int, Subject] = {}  # by micro_batch_size
        self._epochs: dict[int, tuple[int, int, Batch]] = {}  # by the number of processes

    def with_rows(self, rows_at_once: int) -> "Subject":
        """The same with another micro_batch_size."""
        if rows_at_once not in self._with_rows:
            recipe = replace(self.recipe, micro_batch_size=rows_at_once)
            self._with_rows[rows_at_once] = Subject(recipe, self.model, self.work)
        return self._with_rows[rows_at_once]

    @cached_property
    def products(self) -> MatrixProducts:
        """The sizes of the model's matrix products."""
        return matrix_products(self.model)

    def activations(self, checkpointing: str) -> Activations:
        """The memory of a step's activations with this kind of checkpointing, or "none".

        Raises UserError where a step of the model cannot be done without weights.
        """
        if checkpointing not in self._activations:
            self._activations[checkpointing] = self._measure(checkpointing)
        return self._activations[checkpointing]

    def _measure(self, checkpointing: str) -> Activations:
        """Measures the step that needs most memory."""
        try:
            return measure_step(self.model, self.work.largest(self.recipe.rows_at_once), checkpointing)
        except Exception as error:  # a model's own code, on a device that few authors think of
            name = type(self.model.get_base_model()).__name__
            raise UserError(
                f"what a step of {name} needs cannot be found without its weights ({type(error).__name__}: "
                f"{str(error)[:200]})"
            ) from error

    def recomputation(self, sharding: Sharding) -> str:
        """The kind of gradient checkpointing that is used where activations have to be recomputed.

        Where the recipe does not name one, it is the kind that PyTorch advises. The other kind is for stage 3 where
        layers are not fetched as a whole, because there it gathers every weight one time less.
        """
        said = self.recipe.gradient_checkpointing
        if said in ("reentrant", "non_reentrant"):
            return said
        whole = any(map(is_fetched_as_a_whole, self.model.modules()))
        return "reentrant" if sharding.stage == 3 and sharding.processes > 1 and not whole else "non_reentrant"

    def gathering(self, sharding: Sharding, checkpointing: str) -> Gathering:
        """What ZeRO-3 gathers in a micro-batch with this kind of checkpointing."""
        key = (sharding.weight_bytes, checkpointing, *(sharding.size(name) for name in SIZES))
        if key not in self._gathering:
            self._gathering[key] = simulate_gathering(sharding, self.model, self.activations(checkpointing).events)
        return self._gathering[key]

    def epoch(self, processes: int) -> tuple[int, int, Batch]:
        """An epoch's steps, its tokens as the rows have them, and what is computed: padding included, and tokens that
        rows share counted once."""
        if processes not in self._epochs:
            self._epochs[processes] = self._count_epoch(processes)
        return self._epochs[processes]

    def _count_epoch(self, processes: int) -> tuple[int, int, Batch]:
        """Counts what `epoch` returns."""
        work, batch = self.work, BatchArithmetic.of(self.recipe, processes, len(self.work.examples))
        if not work.real:
            n, t = len(work.examples), work.longest
            return batch.steps_per_epoch, n * t, Batch(n, n * t, n * work.most_labels, n * t * t)
        computed, tokens = Batch(), 0
        order = epoch_order(len(work.examples), self.recipe.seed, 0)
        for rank in range(processes):
            share = windows(
                work.examples,
                order,
                batch.micro_batch_size,
                batch.grad_accum_steps,
                processes,
                rank,
                work.layout,
                pad_token_id=0,
            )
            for window in share:
                computed = sum(map(count_computed, window.micro_batches), computed)
                tokens += window.num_tokens if rank == 0 else 0
        return batch.steps_per_epoch, tokens, computed


SIZES = (  # the settings that decide when ZeRO-3 gathers and releases a weight
    PERSISTENT,
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@dataclass(frozen=True)
class Estimate:
    """What one configuration needs, in bytes: `host_…` of all ranks on one machine, everything else of one rank."""

    launch: Launch
    device: Held
    on_host: Held
    recomputes: bool  # whether the recipe asks for checkpointing; for auto, whether memory is short or not known
    activations: int  # the highest sum of activations and of weights that ZeRO-3 has gathered
    activations_recomputing: int  # the same with gradient checkpointing
    activations_keeping: int  # the same without gradient checkpointing
    logits: int  # the part of `activations` that logits take
    gathered: int  # the part of `activations` that gathered weights take, at most
    gathered_bytes: int  # all weights that are gathered in the forward and backward passes of a step
    device_peak: int
    host_load: int
    host_steady: int
    traffic: LinkTraffic  # in one step
    flops: float  # of all ranks in one step, recomputation and padding included
    steps: int
    epochs: int
    tokens: int  # of one epoch, without padding
    seconds: dict[str, float] | None  # the least time of a step by compute, interconnect, host_bus; None without speeds

    @property
    def step_seconds(self) -> float | None:
        """The least time of a step, as if everything overlapped."""
        return max(self.seconds.values()) if self.seconds else None

    def fit(self, hardware: Hardware) -> str:
        """ "yes", "tight" where less than a tenth is left, "no", or "" where no size of a memory is given."""
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
    """Estimates what `launch` needs for the subject's model and rows. The micro_batch_size auto is decided for it."""
    if subject.recipe.micro_batch_size == "auto":
        subject, launch = _cut_up(subject, launch, hardware)
    sharding, n = launch.sharding, launch.processes
    device, on_host = held(sharding, subject.base, subject.adapters)
    peaks = {recomputes: peak_of_step(subject, sharding, recomputes) for recomputes in (True, False)}
    recomputes = subject.recipe.gradient_checkpointing != "none"
    if subject.recipe.gradient_checkpointing == "auto" and hardware.gpu_memory:
        recomputes = peaks[False].device > COMFORT * hardware.gpu_memory
    peak = peaks[recomputes]
    host_load, host_steady = _host(sharding, subject.base, on_host)
    steps, tokens, computed = subject.epoch(n)
    sent = link_traffic(sharding, subject.adapters, launch.grad_accum_steps, peak.gathers)
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
        gathered_bytes=sharding.weight_bytes * peak.gathers * launch.grad_accum_steps,
        device_peak=peak.device,
        host_load=host_load,
        host_steady=host_steady,
        traffic=sent,
        flops=flops,
        steps=num_steps(steps, subject.recipe.epochs, subject.recipe.max_steps),
        epochs=subject.recipe.epochs,
        tokens=tokens,
        seconds=_seconds(flops / n, sent, hardware),
    )


def _cut_up(subject: Subject, launch: Launch, hardware: Hardware) -> tuple[Subject, Launch]:
    """The subject and the launch with the micro-batch size that a run would choose on this hardware."""
    whole = in_numbers(subject.recipe, launch.processes)
    said, tokens = whole.gradient_checkpointing, float(lengths_of(subject.work.examples).mean())

    def fits(rows: int, recomputes: bool) -> bool:
        peak = peak_of_step(subject.with_rows(rows), launch.sharding, recomputes)
        return not hardware.gpu_memory or peak.device <= COMFORT * hardware.gpu_memory

    sizes, sharding = possible_sizes(whole.rows_at_once, tokens), launch.sharding
    rows, _ = choose_cut(sizes, tokens, RECOMPUTING.get(said, (True,)), fits, sharding.gathers)
    return subject.with_rows(rows), launch.cut_up(rows, whole.rows_at_once // rows)


@dataclass(frozen=True)
class Peak:
    """The memory of one rank in a step, at its highest, in bytes."""

    device: int  # everything on the device
    activations: int  # the highest sum of activations and of weights that ZeRO-3 has gathered
    logits: int  # the part of `activations` that logits take
    gathered: int = 0  # the part of `activations` that gathered weights take, at most
    gathers: int = 0  # elements that are gathered in a micro-batch's forward and backward pass


def peak_of_step(subject: Subject, sharding: Sharding, recomputes: bool) -> Peak:
    """What a rank's device needs at its highest, with gradient checkpointing or without."""
    checkpointing = subject.recomputation(sharding) if recomputes else "none"
    activations = subject.activations(checkpointing)
    device = held(sharding, subject.base, subject.adapters)[0]
    peak, live, gathers = activations.peak, 0, 0
    if sharding.gathers:
        found = subject.gathering(sharding, checkpointing)
        peak, live, gathers = found.peak, found.live, found.gathers
    in_backward = sharding.weight_bytes * sum(subject.adapters) + peak
    rest = device.total - device.gradients
    most = CUDA_CONTEXT + rest + max(device.gradients + device.temporary, in_backward)
    return Peak(int(most), peak, activations.logits, live, gathers)


def _host(sharding: Sharding, base: Sequence[int], on_host: Held) -> tuple[int, int]:
    """The host's memory for all ranks: the most while loading, and what is taken from then on.

    Up to stage 2 weights are mapped from their file and pass through the page cache only; at stage 3 rank 0 reads
    all of them. PyTorch rounds each pinned tensor up to a power of two (ATen/core/CachingHostAllocator.h).
    """
    n, each = sharding.processes, on_host.total
    offload = sharding.zero.get("offload_param") or {}
    if offload.get("device") == "cpu" and offload.get("pin_memory"):
        shares = [sharding.weight_bytes * math.ceil(size / n) for size in base]
        each += sum(2 ** math.ceil(math.log2(share)) - share for share in shares)
    elif offload.get("device") == "nvme":
        each -= on_host.base
    steady = int(n * (HOST_PROCESS + each))
    return steady + (sharding.weight_bytes * sum(base) if sharding.stage == 3 else 0), steady


def _seconds(flops: float, sent: LinkTraffic, hardware: Hardware) -> dict[str, float] | None:
    """The seconds that each part of a step takes at least on one GPU; None where a speed is not given."""
    if not hardware.flops or not hardware.interconnect or not hardware.host_bus:
        return None
    return {
        "compute": flops / hardware.flops,
        "interconnect": sent.interconnect / hardware.interconnect,
        "host_bus": sent.host_bus / hardware.host_bus,
    }


def recommend(estimates: Sequence[Estimate], hardware: Hardware) -> Estimate | None:
    """The fastest estimate of those that fit; those that are tight count only where no other fits. None where none
    fits, or where no size of a memory is given.

    Without speeds, the best is the one that sends least over the host bus, then over the interconnect, and then the one
    that needs least memory.
    """
    for verdict in ("yes", "tight"):
        fitting = [one for one in estimates if one.fit(hardware) == verdict]
        if fitting:
            return min(fitting, key=_cost)
    return None


def _cost(one: Estimate) -> tuple[float, ...]:
    """What `recommend` compares: the smaller, the better."""
    run = one.steps * (one.step_seconds or 0.0)
    # Where two differ by less than a hundredth, the one that needs less memory is better.
    rounded = round(math.log(run) * 100) if run else 0
    return rounded, one.traffic.host_bus > 0, round(one.device_peak / 1e8), one.traffic.interconnect
