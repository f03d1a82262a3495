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
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def measure_step(model: Any, rows: int, tokens: int, label_tokens: int, checkpointing: str) -> Activations:
    """Of a micro-batch of `rows` rows, all padded to `tokens`, on a PeftModel whose weights lie on the meta device.

    `checkpointing` is none, reentrant or non_reentrant.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    decoder = getattr(base, base.base_model_prefix)
    base.config.use_cache = False
    base.activation_checkpointing_disable()
    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            base.enable_input_require_grads()
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)
    live = _Live(model)
    events: list[Event] = []
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    labels = torch.zeros(label_tokens, dtype=torch.long, device="meta")
    attended = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")  # as if there is padding
    with warnings.catch_warnings(action="ignore"), _recorded(model, live, events), _fused_attention(), live:
        loss, before = _forward(decoder, head, ids, attended, labels, live)
        saved = live.now
        loss.backward()
    if checkpointing == "reentrant":
        base.disable_input_require_grads()
    vocabulary = head.weight.shape[0] * label_tokens
    return Activations(saved, live.peak, logits=max(saved - before, 2 * 4 * vocabulary), events=events)


def _forward(
    decoder: Any, head: Any, ids: Tensor, attended: Tensor, labels: Tensor, live: "_Live"
) -> tuple[Tensor, int]:
    """The loss as in loop/step.py, and what lived before the vocabulary was computed."""
    hidden = decoder(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    before = live.now
    logits = head(hidden.flatten(0, 1)[: len(labels)]).float()
    return cross_entropy(logits, labels, reduction="sum"), before


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
