"""Memory of a step's activations, found by doing the step on the meta device, where tensors have shapes and no bytes.

The model's real code runs, forward and backward, with or without gradient checkpointing; every tensor that comes into
being and goes is counted. That knows any architecture, and which layer is at work when the memory is fullest, which
ZeRO-3's gathering adds to.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.layout import MicroBatch
from loop.model.build import set_checkpointing
from loop.model.head import logits_at_once, put_loss_inside
from loop.model.lora import fuse_lora


@dataclass(frozen=True)
class Event:
    """A module is about to be used, or has been."""

    kind: Literal["fetch", "release"]
    backward: bool  # of the module's backward pass; a forward pass after that is a recomputation
    module: str
    peak: int  # activation bytes at their highest since the event before


@dataclass(frozen=True)
class Activations:
    """Bytes of what a step holds beyond parameters and optimizer; gradients of the parameters are not in it."""

    saved: int  # kept from the forward pass for the backward pass
    peak: int  # at the highest
    logits: int  # of `peak`, at most: the vocabulary at the label positions, and its gradient
    events: list[Event]


def measure_step(model: Any, micro_batch: MicroBatch, checkpointing: str) -> Activations:
    """Of a micro-batch on a PeftModel whose weights lie on the meta device.

    `checkpointing` is none, reentrant or non_reentrant.
    """
    base = model.get_base_model()
    base.config.use_cache = False
    set_checkpointing(base, checkpointing)
    fuse_lora(model)
    put_loss_inside(model)
    model.train()
    hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in model.parameters() if p.requires_grad]
    live = _Live(model)
    events: list[Event] = []
    batch = micro_batch.to(torch.device("meta"))
    rows, tokens = batch.input_ids.shape
    inputs = batch.inputs
    if batch.attention_mask is not None:  # as transformers makes it of one, which it cannot on this device
        inputs["attention_mask"] = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    with warnings.catch_warnings(action="ignore"), _recorded(model, live, events), _fused_attention(), live:
        loss = model(labels=batch.label_ids, predicts=batch.predicts, **inputs)
        saved = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    set_checkpointing(base, "none")
    return Activations(saved, live.peak, logits=2 * logits_at_once(base, len(batch.predicts)), events=events)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is entered, until they are gone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {p.untyped_storage()._cdata: 0 for p in model.parameters()}  # not activations
        self.known |= {b.untyped_storage()._cdata: 0 for b in model.buffers()}
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
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def peak_since(self) -> int:
        """Since it was last asked."""
        recent, self.recent = self.recent, self.now
        return recent


@contextmanager
def _recorded(model: torch.nn.Module, live: _Live, events: list[Event]) -> Iterator[None]:
    """Writes into `events` when each module begins and ends, in both directions, as ZeRO-3's hooks see it."""
    handles = []
    for name, module in model.named_modules():

        def note(kind: Literal["fetch", "release"], backward: bool, name: str = name) -> Any:
            def hook(*_: object) -> None:
                events.append(Event(kind, backward, name, live.peak_since()))

            return hook

        handles += [
            module.register_forward_pre_hook(note("fetch", False)),
            module.register_forward_hook(note("release", False)),
            module.register_full_backward_pre_hook(note("fetch", True)),
            module.register_full_backward_hook(note("release", True)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, the output and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device PyTorch would write the attention weights out, which no kernel of use does."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    with patch("torch.nn.functional.scaled_dot_product_attention", attention):
        yield
