"""LoRA's computation in fewer passes over memory than PEFT's: y + scale * B A dropout(x).

The few numbers of the inner dimension are scaled, not the many of the output. Of dropout the backward pass keeps what
was dropped, not another copy of x; and on a CPU, where a random number for every element costs more than the matrix
products, the places of what is dropped are drawn.
"""

import math
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

ADAPTER = "default"  # PEFT's name of the only one
SPARE = 8.0  # standard deviations of places drawn beyond those expected


def fuse_lora(model: nn.Module) -> None:
    """In every LoRA layer that has one plain adapter on an nn.Linear; others stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            # Each stays a module that is called, because ZeRO-3 gathers a module's weights when it is.
            a: Any = layer.lora_A[ADAPTER]
            a.forward = partial(_down, a)
            layer.forward = partial(_adapted, layer)  # type: ignore[method-assign]


def _is_plain(layer: LoraLayer) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
    )


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """[…, d_in] -> […, d_out]"""
    p = getattr(layer.lora_dropout[ADAPTER], "p", 0.0) if layer.training else 0.0
    down = layer.lora_A[ADAPTER](x, p)  # […, rank], not yet divided by 1 - p
    up = layer.lora_B[ADAPTER](down * (layer.scaling[ADAPTER] / (1 - p)))
    # Last, because recomputation stops where it has all that the backward pass needs, which is not this product.
    y: Tensor = layer.base_layer(x) + up
    return y


def _down(a: nn.Linear, x: Tensor, p: float) -> Tensor:
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # then adapters are fp32, and x may be
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = a.weight.to(x.dtype)
    if p == 0:
        return linear(x, weight)
    down: Tensor = _DropAndDown.apply(x, weight, draw_dropped(x, p))  # type: ignore[no-untyped-call]
    return down


def draw_dropped(x: Tensor, p: float) -> Tensor:
    """Which elements are dropped, each with probability p by itself: their places, or on a GPU a mask."""
    return dropped_places(x.numel(), p) if x.is_cpu else torch.empty_like(x, dtype=torch.bool).bernoulli_(p)


def dropped_places(count: int, p: float) -> Tensor:
    """Places among `count`: the gaps between them have a geometric distribution."""
    expected = count * p
    enough = max(1, int(expected + SPARE * (math.sqrt(expected) + 2)))
    places = torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0) - 1
    while places[-1] < count:  # hardly ever
        places = torch.cat([places, places[-1] + torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0)])
    return places[: int(torch.searchsorted(places, count))]


class _DropAndDown(torch.autograd.Function):
    """x […, d_in] without what is `dropped`, times weight [rank, d_in] transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropped: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, dropped)
        return linear(_without(x, dropped), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, dropped = ctx.saved_tensors
        gradient = gradients[0]
        of_x = _without(gradient @ weight, dropped) if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ _without(x, dropped).flatten(0, -2)
        return of_x, of_weight, None


def _without(x: Tensor, dropped: Tensor) -> Tensor:
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped, 0)
    return x.reshape(-1).index_fill(0, dropped, 0).view_as(x)
