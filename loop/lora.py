"""LoRA's computation in fewer passes over memory than PEFT's: y + scale * B A dropout(x).

Scaling and adding happen within B's matrix product. On a CPU, where a random number for every element costs more than the
matrix products, dropout draws the places that it drops, and the backward pass keeps those instead of what was left.
"""

import math
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

ADAPTER = "default"  # PEFT's name of the only one


def fuse_lora(model: nn.Module) -> None:
    """In every LoRA layer that has one plain adapter on an nn.Linear; others stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            # Each stays a module that is called, because ZeRO-3 gathers a module's weights when it is.
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            a.forward, b.forward, layer.forward = partial(_down, a), partial(_up, b), partial(_adapted, layer)


def _is_plain(layer: LoraLayer) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
    )


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """[…, d_in] -> […, d_out]"""
    y = layer.base_layer(x)
    p = getattr(layer.lora_dropout[ADAPTER], "p", 0.0) if layer.training else 0.0
    down = layer.lora_A[ADAPTER](x, p)  # […, rank], not yet divided by 1 - p
    up: Tensor = layer.lora_B[ADAPTER](down, y, layer.scaling[ADAPTER] / (1 - p))
    return up


def _down(a: nn.Linear, x: Tensor, p: float) -> Tensor:
    weight = a.weight.to(x.dtype)  # fp32 without DeepSpeed, where autocast computes in bf16
    if p == 0:
        return linear(x, weight)
    if x.is_cpu:
        down: Tensor = _DropAndDown.apply(x, weight, dropped_places(x.numel(), p))  # type: ignore[no-untyped-call]
        return down
    return linear(dropout(x, p), weight) * (1 - p)


def _up(b: nn.Linear, down: Tensor, y: Tensor, scale: float) -> Tensor:
    weight = b.weight.to(y.dtype)
    return torch.addmm(y.flatten(0, -2), down.flatten(0, -2), weight.T, alpha=scale).view_as(y)


def dropped_places(count: int, p: float) -> Tensor:
    """Places of `count` elements, each of them chosen with probability p by itself: gaps between them are geometric."""
    expected = count * p
    enough = int(expected + 8 * math.sqrt(expected) + 16)
    places = torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0) - 1
    while places[-1] < count:  # one time in 10^15
        places = torch.cat([places, places[-1] + torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0)])
    return places[: int(torch.searchsorted(places, count))]


class _DropAndDown(torch.autograd.Function):
    """x […, d_in] without what stands at `dropped`, times weight [rank, d_in] transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropped: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, dropped)
        return linear(_without(x, dropped), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, dropped = ctx.saved_tensors
        gradient = gradients[0]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            of_x.view(-1).index_fill_(0, dropped, 0)
        of_weight = gradient.flatten(0, -2).T @ _without(x, dropped).flatten(0, -2)
        return of_x, of_weight, None


def _without(x: Tensor, dropped: Tensor) -> Tensor:
    return x.reshape(-1).index_fill(0, dropped, 0).view_as(x)
