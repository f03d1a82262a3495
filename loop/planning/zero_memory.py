"""Computes what each ZeRO stage keeps on a rank and sends between ranks, in bytes.

The rules were read in the sources of DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py,
partitioned_param_coordinator.py and runtime/fp16/unfused_optimizer.py); `python -m tests.plan_measured` compares the
results with the real engine.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loop.internals.deepspeed_internals import is_fetched_as_a_whole
from loop.planning.activations import Event

FP32 = 4
PERSISTENT = "stage3_param_persistence_threshold"
DEFAULTS = {  # the sizes that DeepSpeed takes where a configuration does not name them
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Sharding:
    """How a launch shares a model out over its processes."""

    stage: int | None  # None without DeepSpeed, for the plain loop or DDP
    processes: int
    weight_bytes: int  # 2 in bf16 and fp16, 4 in fp32
    zero: Mapping[str, Any]  # DeepSpeed's zero_optimization, without "auto"; empty without DeepSpeed
    accumulates: bool = False  # whether several micro-batches come before an update

    def size(self, key: str) -> int:
        """The size in elements that the configuration has under `key`, or DeepSpeed's default."""
        return int(self.zero.get(key, DEFAULTS[key]))

    def offloads(self, what: str) -> bool:
        """Whether `what` (optimizer or param) lies in the host's memory or on its disks."""
        return str((self.zero.get(f"offload_{what}") or {}).get("device", "none")) != "none"

    @property
    def gathers(self) -> bool:
        """Whether each micro-batch brings the weights together from elsewhere."""
        return self.stage == 3 and (self.processes > 1 or self.offloads("param"))

    @property
    def overlaps(self) -> bool:
        """Whether gradients are sent while the backward pass goes on, which takes a second bucket."""
        return bool(self.zero.get("overlap_comm", self.stage == 3))


@dataclass(frozen=True)
class Held:
    """The bytes that one rank holds while the optimizer makes its update."""

    base: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0  # both moments of AdamW, and fp32 masters where there are any
    buffers: int = 0  # buckets for sending gradients, and whole copies of persistent parameters
    temporary: int = 0  # the root of the second moment, which AdamW holds for a moment; `total` leaves it out

    @property
    def total(self) -> int:
        """All bytes that stay for the whole update."""
        return self.base + self.adapters + self.gradients + self.optimizer + self.buffers


def held(sharding: Sharding, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    """What one rank holds on its device and on the host. `base` and `adapters` are the sizes in elements of the model's
    frozen and trainable tensors."""
    w, n, every = sharding.weight_bytes, sharding.processes, sum(adapters)
    halves = w < FP32  # weights of two bytes have fp32 masters beside them, and their gradients are cast for the update
    if sharding.stage is None:  # there are no masters, because the adapters themselves are fp32
        bucket = FP32 * every if n > 1 else 0  # DDP copies gradients into a bucket
        return Held(w * sum(base), FP32 * every, FP32 * every, 2 * FP32 * every, bucket, FP32 * every), Held()
    if sharding.stage == 0:
        masters = FP32 * every if halves else 0
        gradients = (w if halves else 0) * every + FP32 * every
        return Held(w * sum(base), w * every, gradients, masters + 2 * FP32 * every, 0, FP32 * every), Held()
    if sharding.stage < 3:
        return _held_1_and_2(sharding, base, adapters)
    return _held_3(sharding, base, adapters)


def _held_1_and_2(sharding: Sharding, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    """What `held` returns for the stages 1 and 2."""
    w, n = sharding.weight_bytes, sharding.processes
    every = sum(adapters)
    share = math.ceil(every / (2 * n)) * 2  # the flat buffer is padded to a multiple of two for each rank
    buffers = w * sharding.size("reduce_bucket_size") * (2 if sharding.overlaps else 1)
    weights = {"base": w * sum(base), "adapters": w * share * n}
    state = {"gradients": FP32 * share, "optimizer": 3 * FP32 * share}
    if not sharding.offloads("optimizer"):
        return Held(**weights, **state, buffers=buffers, temporary=FP32 * share), Held()
    # On the host gradients are accumulated in the precision of the weights, and the updated weights come back in it.
    largest = w * max(adapters)
    state["gradients"] += w * share if sharding.accumulates else 0
    return Held(**weights, buffers=buffers + largest), Held(**state, buffers=w * share + largest)


def _held_3(sharding: Sharding, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    """What `held` returns for stage 3."""
    w, n = sharding.weight_bytes, sharding.processes
    share = sum(math.ceil(size / n) for size in adapters)
    weights = {"base": w * sum(math.ceil(size / n) for size in base), "adapters": w * share}
    state = {"gradients": FP32 * share + w * share, "optimizer": 3 * FP32 * share}
    bucket = w * sharding.size("reduce_bucket_size")
    persistent = w * sum(size for size in [*base, *adapters] if size <= sharding.size(PERSISTENT)) if n > 1 else 0
    on_device: dict[str, int] = {"buffers": bucket + persistent}
    on_host: dict[str, int] = {}
    (on_host if sharding.offloads("param") else on_device).update(weights)
    if sharding.offloads("optimizer"):  # DeepSpeedCPUAdam makes the update and needs no temporary
        on_host.update(state)
    else:
        on_device.update(state, temporary=FP32 * share)
    return Held(**on_device), Held(**on_host)


@dataclass(frozen=True)
class Gathering:
    """What ZeRO-3 gathers in one micro-batch, after the first two have shown DeepSpeed the order of the modules."""

    peak: int  # the highest sum of activations and gathered weights, in bytes
    live: int  # the highest number of bytes in gathered weights
    gathers: int  # all elements that are gathered, a parameter as often as it is gathered
    count: int  # how many times a parameter is gathered


def simulate_gathering(sharding: Sharding, model: Any, events: Sequence[Event]) -> Gathering:
    """Follows `events`, the modules of a step in their order, by DeepSpeed's rules of fetching ahead and releasing."""
    simulation = _Coordinator(sharding, model, events)
    peak = live = 0
    for event in events:
        peak = max(peak, event.peak + simulation.bytes())
        if event.kind == "fetch":
            simulation.fetch(event.module, event.backward)
        else:
            simulation.release(event.module, event.backward)
        live = max(live, simulation.bytes())
    return Gathering(peak, live, simulation.gathered_elements, simulation.count)


class _Coordinator:
    """Does what DeepSpeed's PartitionedParameterCoordinator does once it knows the order of the modules. Sizes are in
    elements; persistent parameters are left out."""

    def __init__(self, sharding: Sharding, model: Any, events: Sequence[Event]) -> None:
        self.sharding = sharding
        most_persistent = sharding.size(PERSISTENT)
        self.sizes: dict[torch.nn.Parameter, int] = {p: p.numel() for p in model.parameters()}
        own = {
            name: list(module.parameters(recurse=is_fetched_as_a_whole(module)))
            for name, module in model.named_modules()
        }
        self.parameters = {name: [p for p in every if p.numel() > most_persistent] for name, every in own.items()}
        self.all_sizes = {name: sum(p.numel() for p in every) for name, every in own.items()}
        self.order = [event.module for event in events if event.kind == "fetch"]
        self.queue = deque((p, step) for step, module in enumerate(self.order) for p in self.parameters[module])
        self.fetched_for: dict[torch.nn.Parameter, int] = {}
        self.users: dict[torch.nn.Parameter, set[str]] = {p: set() for p in self.sizes}
        self.available: set[torch.nn.Parameter] = set()
        # For each module that is at its backward pass, the parameters that were recomputed for it.
        self.in_backward: dict[str, list[torch.nn.Parameter]] = {}
        self.backward_begun = False
        self.elements = self.gathered_elements = self.count = self.step = 0

    def bytes(self) -> int:
        """The bytes of the weights that are gathered now."""
        return self.sharding.weight_bytes * self.elements

    def fetch(self, module: str, backward: bool) -> None:
        """A module begins: gathers its parameters, and then those of later modules as far as there is room."""
        wanted = self.parameters[module]
        if backward:
            self.backward_begun = True
            self.in_backward.setdefault(module, [])
        elif self.backward_begun and self.in_backward:  # a recomputation for the module that came last
            owner = next(reversed(self.in_backward))
            for parameter in wanted:
                if not parameter.requires_grad:
                    self.in_backward[owner].append(parameter)
                    self.users[parameter].add(owner)
        for parameter in wanted:
            self.users[parameter].add(module)
            self._gather(parameter)
        new = {p for p in wanted if self.fetched_for.get(p, -1) < self.step}
        found: set[torch.nn.Parameter] = set()
        while self.queue and len(found) < len(new):
            parameter, step = self.queue.popleft()
            self.fetched_for[parameter] = step
            found.add(parameter)
        room = self.sharding.size("stage3_max_live_parameters") - self.elements
        ahead = min(room, self.sharding.size("stage3_prefetch_bucket_size"))
        prefetched = 0
        while self.queue and prefetched < ahead:
            parameter, step = self.queue.popleft()
            self.fetched_for[parameter] = max(self.fetched_for.get(parameter, -1), step)
            if parameter not in self.available:
                prefetched += self.sizes[parameter]
                self._gather(parameter)
        self.step += 1

    def _gather(self, parameter: torch.nn.Parameter) -> None:
        """Gathers a parameter that is not there yet, and counts it."""
        if parameter not in self.available:
            self.available.add(parameter)
            self.elements += self.sizes[parameter]
            self.gathered_elements += self.sizes[parameter]
            self.count += 1

    def release(self, module: str, backward: bool) -> None:
        """A module ends: lets its parameters go, unless a later module needs them within the reuse distance."""
        let_go = {p for p in self.parameters[module] if self.fetched_for.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :]:
            if passed >= self.sharding.size("stage3_max_reuse_distance") or not let_go:
                break
            let_go.difference_update(self.parameters[later])
            passed += self.all_sizes[later]
        recomputed = self.in_backward.pop(module, []) if backward else []
        let_go.update(recomputed)  # DeepSpeed releases these even where they are used again soon
        for parameter in dict.fromkeys([*self.parameters[module], *recomputed]):
            self.users[parameter].discard(module)
            if parameter in let_go and parameter in self.available and not self.users[parameter]:
                self.available.discard(parameter)
                self.elements -= self.sizes[parameter]


@dataclass(frozen=True)
class LinkTraffic:
    """The bytes that a rank sends in one step; it receives as many."""

    interconnect: float = 0.0
    host_bus: float = 0.0  # to and from the host's memory, both directions together


def link_traffic(sharding: Sharding, adapters: Sequence[int], micro_batches: int, gathers: int) -> LinkTraffic:
    """What a rank sends in one step. Collectives go round a ring: an all-reduce moves 2 (n - 1) / n of its tensor, the
    others half of that. `gathers` are the elements that ZeRO-3 gathers in a micro-batch (Gathering.gathers)."""
    w, n, every = sharding.weight_bytes, sharding.processes, sum(adapters)
    part = (n - 1) / n
    gradient = w if sharding.stage is not None else FP32
    if sharding.stage in (None, 0):
        return LinkTraffic(2 * part * gradient * every)
    # Stage 1 reduces gradients once a step, the others in every micro-batch; the new weights go round once a step.
    reductions = 1 if sharding.stage == 1 else micro_batches
    over_host = 0.0
    if sharding.offloads("optimizer"):  # gradients go to the host, new weights come back
        over_host += w * every / n * (reductions + 1)
    if sharding.stage < 3:
        return LinkTraffic(part * w * every * (2 * reductions + 1), over_host)
    between = part * w * (every * reductions + every + gathers * micro_batches)
    if sharding.offloads("param"):  # each rank fetches its share from the host
        over_host += w * gathers * micro_batches / n
    return LinkTraffic(between, over_host)
