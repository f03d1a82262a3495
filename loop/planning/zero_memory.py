"""What each ZeRO stage keeps on a rank and sends between ranks, in bytes.

Read from DeepSpeed 0.19's sources and held against its engine (python -m tests.plan_measured): runtime/zero/
stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py, runtime/fp16/unfused_optimizer.py.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loop.planning.activations import Event

FP32 = 4
PERSISTENT = "stage3_param_persistence_threshold"
DEFAULTS = {  # DeepSpeed's, where a configuration does not name them
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Layout:
    """How a model is spread: what a launch decides."""

    stage: int | None  # None: without DeepSpeed, the plain loop or DDP
    processes: int
    weight_bytes: int  # 2 in bf16 and fp16, 4 in fp32
    zero: Mapping[str, Any]  # DeepSpeed's zero_optimization, without "auto"; empty without DeepSpeed
    accumulates: bool = False  # several micro-batches before an update

    def size(self, key: str) -> int:
        """A size of the configuration, in elements."""
        return int(self.zero.get(key, DEFAULTS[key]))

    def offloads(self, what: str) -> bool:
        """`what`: optimizer or param; to the host's memory or on to its disks."""
        return str((self.zero.get(f"offload_{what}") or {}).get("device", "none")) != "none"

    @property
    def overlaps(self) -> bool:
        return bool(self.zero.get("overlap_comm", self.stage == 3))


@dataclass(frozen=True)
class Held:
    """Bytes on one rank while the optimizer makes its update."""

    base: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0  # fp32 masters, where there are any, and both moments of AdamW
    buffers: int = 0  # buckets that gradients are sent in, whole copies of persistent parameters
    temporary: int = 0  # AdamW's, for a moment only and not in `total`: the root of the second moment

    @property
    def total(self) -> int:
        return self.base + self.adapters + self.gradients + self.optimizer + self.buffers


def held(layout: Layout, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    """On the device and on the host, of a model whose frozen and trainable tensors have these sizes (elements)."""
    w, n, every = layout.weight_bytes, layout.processes, sum(adapters)
    halves = w < FP32  # then masters exist beside the weights, and gradients are cast for the update
    if layout.stage is None:  # no masters: the adapters themselves are fp32
        bucket = FP32 * every if n > 1 else 0  # of DDP
        return Held(w * sum(base), FP32 * every, FP32 * every, 2 * FP32 * every, bucket, FP32 * every), Held()
    if layout.stage == 0:
        masters = FP32 * every if halves else 0
        gradients = (w if halves else 0) * every + FP32 * every
        return Held(w * sum(base), w * every, gradients, masters + 2 * FP32 * every, 0, FP32 * every), Held()
    if layout.stage < 3:
        return _held_1_and_2(layout, base, adapters)
    return _held_3(layout, base, adapters)


def _held_1_and_2(layout: Layout, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    w, n = layout.weight_bytes, layout.processes
    every = sum(adapters)
    share = math.ceil(every / (2 * n)) * 2  # the flat buffer is padded to a multiple of two for each rank
    buffers = w * layout.size("reduce_bucket_size") * (2 if layout.overlaps else 1)
    weights = {"base": w * sum(base), "adapters": w * share * n}
    state = {"gradients": FP32 * share, "optimizer": 3 * FP32 * share}
    if not layout.offloads("optimizer"):
        return Held(**weights, **state, buffers=buffers, temporary=FP32 * share), Held()
    # On the host gradients are accumulated in the weights' precision, and the update comes back in it.
    largest = w * max(adapters)
    state["gradients"] += w * share if layout.accumulates else 0
    return Held(**weights, buffers=buffers + largest), Held(**state, buffers=w * share + largest)


def _held_3(layout: Layout, base: Sequence[int], adapters: Sequence[int]) -> tuple[Held, Held]:
    w, n = layout.weight_bytes, layout.processes
    share = sum(math.ceil(size / n) for size in adapters)
    weights = {"base": w * sum(math.ceil(size / n) for size in base), "adapters": w * share}
    state = {"gradients": FP32 * share + w * share, "optimizer": 3 * FP32 * share}
    bucket = w * layout.size("reduce_bucket_size")
    persistent = w * sum(size for size in [*base, *adapters] if size <= layout.size(PERSISTENT)) if n > 1 else 0
    on_device: dict[str, int] = {"buffers": bucket + persistent}
    on_host: dict[str, int] = {}
    (on_host if layout.offloads("param") else on_device).update(weights)
    if layout.offloads("optimizer"):  # DeepSpeedCPUAdam, which needs no temporary
        on_host.update(state)
    else:
        on_device.update(state, temporary=FP32 * share)
    return Held(**on_device), Held(**on_host)


@dataclass(frozen=True)
class Gathered:
    """Of one micro-batch under ZeRO-3, once the first two have shown DeepSpeed the order of the modules."""

    peak: int  # bytes: weights gathered and activations, together at their highest
    live: int  # bytes of weights gathered, at their highest
    gathers: int  # elements gathered, all together
    count: int  # parameters gathered, one by one


def gathered(layout: Layout, model: Any, events: Sequence[Event]) -> Gathered:
    """What the weights of whole layers add on a device, by DeepSpeed's own rules of fetching ahead and releasing."""
    simulation = _Coordinator(layout, model, events)
    peak = live = 0
    for event in events:
        peak = max(peak, event.peak + simulation.bytes())
        if event.kind == "fetch":
            simulation.fetch(event.module, event.backward)
        else:
            simulation.release(event.module, event.backward)
        live = max(live, simulation.bytes())
    return Gathered(peak, live, simulation.gathered, simulation.count)


class _Coordinator:
    """PartitionedParameterCoordinator with a complete trace; sizes in elements, persistent parameters left out."""

    def __init__(self, layout: Layout, model: Any, events: Sequence[Event]) -> None:
        self.layout = layout
        most_persistent = layout.size(PERSISTENT)
        self.sizes: dict[torch.nn.Parameter, int] = {p: p.numel() for p in model.parameters()}
        self.parameters = {
            name: [p for p in module.parameters(recurse=False) if p.numel() > most_persistent]
            for name, module in model.named_modules()
        }
        self.all_sizes = {
            name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in model.named_modules()
        }
        self.order = [event.module for event in events if event.kind == "fetch"]
        self.queue = deque((p, step) for step, module in enumerate(self.order) for p in self.parameters[module])
        self.fetched_for: dict[torch.nn.Parameter, int] = {}
        self.users: dict[torch.nn.Parameter, set[str]] = {p: set() for p in self.sizes}
        self.available: set[torch.nn.Parameter] = set()
        self.in_backward: dict[str, list[torch.nn.Parameter]] = {}  # modules, and what was recomputed for each
        self.backward_begun = False
        self.elements = self.gathered = self.count = self.step = 0

    def bytes(self) -> int:
        return self.layout.weight_bytes * self.elements

    def fetch(self, module: str, backward: bool) -> None:
        wanted = self.parameters[module]
        if backward:
            self.backward_begun = True
            self.in_backward.setdefault(module, [])
        elif self.backward_begun and self.in_backward:  # a recomputation, for the module that came last
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
        room = self.layout.size("stage3_max_live_parameters") - self.elements
        ahead = min(room, self.layout.size("stage3_prefetch_bucket_size"))
        prefetched = 0
        while self.queue and prefetched < ahead:
            parameter, step = self.queue.popleft()
            self.fetched_for[parameter] = max(self.fetched_for.get(parameter, -1), step)
            if parameter not in self.available:
                prefetched += self.sizes[parameter]
                self._gather(parameter)
        self.step += 1

    def _gather(self, parameter: torch.nn.Parameter) -> None:
        if parameter not in self.available:
            self.available.add(parameter)
            self.elements += self.sizes[parameter]
            self.gathered += self.sizes[parameter]
            self.count += 1

    def release(self, module: str, backward: bool) -> None:
        let_go = {p for p in self.parameters[module] if self.fetched_for.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :]:
            if passed >= self.layout.size("stage3_max_reuse_distance") or not let_go:
                break
            let_go.difference_update(self.parameters[later])
            passed += self.all_sizes[later]
        recomputed = self.in_backward.pop(module, []) if backward else []
        let_go.update(recomputed)  # whether they are used again soon or not
        for parameter in dict.fromkeys([*self.parameters[module], *recomputed]):
            self.users[parameter].discard(module)
            if parameter in let_go and parameter in self.available and not self.users[parameter]:
                self.available.discard(parameter)
                self.elements -= self.sizes[parameter]


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends (and receives as many) in one step."""

    interconnect: float = 0.0
    host_bus: float = 0.0  # from and to the host's memory, both directions together


def traffic(layout: Layout, adapters: Sequence[int], micro_batches: int, gathers: int) -> Traffic:
    """Of one step; collectives as rings: an all-reduce moves 2 (n - 1) / n of its tensor, the others half of that.

    `gathers`: elements gathered in a micro-batch (Gathered.gathers), of ZeRO-3.
    """
    w, n, every = layout.weight_bytes, layout.processes, sum(adapters)
    part = (n - 1) / n
    gradient = w if layout.stage is not None else FP32
    if layout.stage in (None, 0):
        return Traffic(2 * part * gradient * every)
    # Stage 1 reduces once a step, the others every micro-batch; the new weights go round once.
    reductions = 1 if layout.stage == 1 else micro_batches
    over_host = 0.0
    if layout.offloads("optimizer"):  # gradients there, new weights back
        over_host += w * every / n * (reductions + 1)
    if layout.stage < 3:
        return Traffic(part * w * every * (2 * reductions + 1), over_host)
    between = part * w * (every * reductions + every + gathers * micro_batches)
    if layout.offloads("param"):  # each rank fetches its share
        over_host += w * gathers * micro_batches / n
    return Traffic(between, over_host)
