"""Finds the memory of a step's activations by doing the step on the meta device, where tensors have no bytes.

The model's real code runs, forward and backward, with or without gradient checkpointing, and every tensor is counted
from when it is made until it is gone. So any architecture can be measured. The result also says which module was at
work at each moment: the plan adds the weights that ZeRO-3 has gathered by then.
"""

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from data.layout import MicroBatch
from loop.internals.deepspeed_internals import is_fetched_as_a_whole
from loop.internals.torch_internals import TorchDispatchMode, attention_replaced_by, tree_leaves
from loop.model.build import set_checkpointing
from loop.model.head import PeftModelWithLoss, logits_at_once


@dataclass(frozen=True)
class Event:
    """A module begins its work ("fetch", because ZeRO-3 fetches its weights then) or ends it ("release")."""

    kind: Literal["fetch", "release"]
    backward: bool  # whether this is the module's backward pass; a forward pass after a backward one is a recomputation
    module: str
    peak: int  # the highest number of activation bytes since the event before


@dataclass(frozen=True)
class Activations:
    """The bytes that a step holds beyond parameters, their gradients and the optimizer."""

    saved: int  # what the forward pass keeps for the backward pass
    peak: int  # the highest number of bytes at any moment
    logits: int  # the part of `peak` that logits and their gradient take, at most
    events: list[Event]


def measure_step(model: PeftModelWithLoss, micro_batch: MicroBatch, checkpointing: str) -> Activations:
    """Measures a step of `model`, whose weights lie on the meta device, on one micro-batch.

    `checkpointing` is none, reentrant or non_reentrant. The step is made by a copy, which has no bytes either, so
    `model` stays as it was.
    """
    model = copy.deepcopy(model)
    base: Any = model.get_base_model()
    base.config.use_cache = False
    set_checkpointing(base, checkpointing)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)
    live = _Live(model)
    events: list[Event] = []
    _record(model, live, events)
    batch = micro_batch.to(torch.device("meta"))
    rows, tokens = batch.input_ids.shape
    inputs = batch.inputs
    if batch.attention_mask is not None:  # transformers would make this mask of the other, but cannot on this device
        inputs["attention_mask"] = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    with warnings.catch_warnings(action="ignore"), as_fused_kernels(), live:
        loss = model(labels=batch.label_ids, predicts=batch.predicts, **inputs)
        saved = live.now
        loss.backward()
    return Activations(saved, live.peak, logits=2 * logits_at_once(base, len(batch.predicts)), events=events)


def _let_go(parameter: Tensor) -> None:
    """Drops a parameter's gradient, which does not count as an activation."""
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while this mode is entered, until they are gone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Keys are the ids of storages: as long as a storage lives, PyTorch gives the same Python object for it.
        self.known = {id(p.untyped_storage()): 0 for p in model.parameters()}  # parameters are no activations
        self.known |= {id(b.untyped_storage()): 0 for b in model.buffers()}
        self.now = self.peak = self.recent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.recent = max(self.recent, self.now)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def peak_since(self) -> int:
        """The highest number of bytes since this method was called last."""
        recent, self.recent = self.recent, self.now
        return recent


def _record(model: torch.nn.Module, live: _Live, events: list[Event]) -> None:
    """Makes each module write into `events` when it begins and ends, in both directions, as ZeRO-3's hooks see it.

    Those inside a layer that is fetched as a whole have no such hooks. Here they must not have any: PyTorch gives
    a module with a hook on its backward pass a tensor of its own, and LoRA's layers share the work of a common one.
    """
    inside = {
        inner
        for layer in model.modules()
        if is_fetched_as_a_whole(layer)
        for inner in layer.modules()
        if inner is not layer
    }
    for name, module in model.named_modules():
        if module in inside:
            continue

        def note(kind: Literal["fetch", "release"], backward: bool, name: str = name) -> Any:
            def hook(*_: object) -> None:
                events.append(Event(kind, backward, name, live.peak_since()))

            return hook

        module.register_forward_pre_hook(note("fetch", False))
        module.register_forward_hook(note("release", False))
        module.register_full_backward_pre_hook(note("fetch", True))
        module.register_full_backward_hook(note("release", True))


@contextmanager
def as_fused_kernels() -> Iterator[None]:
    """Within this context attention and RMSNorm on the meta device make and keep what fused kernels do on a GPU, where
    PyTorch would write them out."""
    with (
        attention_replaced_by(_fused_attention),
        patch("loop.model.operators.rms_norm", _fused_norm),
    ):
        yield


class _Norm(torch.autograd.Function):
    """Keeps what a fused kernel keeps: the input, and one number for each vector. The weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.clone(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.clone(gradients[0]), None


def _fused_norm(x: Tensor, _: object, weight: Tensor, __: float) -> Tensor:
    """Stands in for torch's rms_norm."""
    normed: Tensor = _Norm.apply(x, weight)  # type: ignore[no-untyped-call]
    return normed


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values, the output and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])  # one kernel, as the next zeros
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Stands in for torch's scaled_dot_product_attention."""
    return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
