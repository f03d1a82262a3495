"""LoRA's computation y + scale * B A dropout(x), in fewer kernels and fewer passes over memory than PEFT's own layer.

Projections that get the same input, such as q, k and v, share one dropout and one product with their matrices A. The
scale and the frozen layer's bias are part of the products, and what was dropped is kept as places (on a CPU, where a
random number for every element costs more than the products) or as a mask.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from loop.internals.peft_internals import use_layer

ADAPTER = "default"  # PEFT's name for the first adapter of a model
SPARE = 8.0  # dropped_places draws this many standard deviations more places than it expects to need


def use_fused_lora(config: LoraConfig) -> LoraConfig:
    """Makes PEFT use FusedLora for every nn.Linear that `config` gives an adapter to. Returns `config`."""
    use_layer(config, nn.Linear, FusedLora)
    return config


class FusedLora(lora.Linear):
    """PEFT's LoRA layer with another forward pass where it has one plain adapter, and PEFT's own in all other cases:
    DoRA and other variants, a bias in B, several adapters, a merged or disabled one, and where `shared` is None.

    The other forward pass reads the weights without calling the modules that own them, so under ZeRO-3 it needs them
    gathered already.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT calls this when it adds an adapter."""
        super().update_layer(adapter_name, *args, **kwargs)
        one = list(self.lora_A) == [ADAPTER]
        self.is_plain = one and not self.lora_variant and self.lora_B[ADAPTER].bias is None
        self.shared = SharedInput([self]) if self.is_plain else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, d_in] -> […, d_out]"""
        if args or kwargs or self.shared is None or self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # then adapters are fp32, and x may be fp32 too
            lower = x.to(torch.get_autocast_dtype(x.device.type))
        else:
            lower = x
        up = self.shared.up(self, x, lower)
        # The frozen product comes last: recomputation stops as soon as it has all that the backward pass needs, and the
        # backward pass does not need this product.
        weight: Any = self.base_layer.weight
        return torch.addmm(up, lower.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)

    @property
    def dropout(self) -> float:
        """The probability to drop an element of the input now."""
        return getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0


class SharedInput:
    """The layers that get one input. The first of them that is called computes LoRA's part of all."""

    def __init__(self, layers: Sequence[FusedLora]) -> None:
        self.layers = list(layers)
        self.input: Tensor | None = None
        self.ups: dict[FusedLora, Tensor] = {}  # what later layers will ask for

    def up(self, layer: FusedLora, x: Tensor, lower: Tensor) -> Tensor:
        """scale * B A dropout(x) + bias of `layer`, as [tokens, d_out]. `lower` is x in the dtype to compute in."""
        if x is not self.input or layer not in self.ups:
            # A layer that gets another input than the first one is on its own.
            together = self.layers if layer is self.layers[0] else [layer]
            self.input, self.ups = x, dict(zip(together, _ups(together, lower), strict=True))
        up = self.ups.pop(layer)
        if not self.ups:
            self.input = None
        return up


def share_inputs(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Tells the layers of `model` which of them get the same input; each group has the names of its layers in the order
    in which the model calls them. What is in no group is left to PEFT."""
    for module in model.modules():
        if isinstance(module, FusedLora):
            module.shared = None
    for names in groups:
        layers = [model.get_submodule(name) for name in names]
        plain = [layer for layer in layers if isinstance(layer, FusedLora) and layer.is_plain]
        shared = SharedInput(plain)
        for layer in plain:
            layer.shared = shared


def shared_inputs(model: nn.Module) -> list[list[str]]:
    """The groups that share_inputs has told the layers of `model`."""
    groups: dict[SharedInput, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, FusedLora) and module.shared is not None:
            groups[module.shared].append(name)
    order: dict[nn.Module, int] = {layer: i for shared in groups for i, layer in enumerate(shared.layers)}
    return [sorted(names, key=lambda name: order[model.get_submodule(name)]) for names in groups.values()]


def _ups(layers: Sequence[FusedLora], x: Tensor) -> tuple[Tensor, ...]:
    """LoRA's part of each layer's output, with the layer's frozen bias, as [tokens, d_out]."""
    first = layers[0]
    biases = [layer.base_layer.bias for layer in layers]
    matrices = [each[ADAPTER].weight for layer in layers for each in (layer.lora_A, layer.lora_B)]
    ups: tuple[Tensor, ...] = _Up.apply(x, first.dropout, first.scaling[ADAPTER], biases, *matrices)  # type: ignore[no-untyped-call]
    return ups


class _Up(torch.autograd.Function):
    """dropout(x) A.T B.T * scale + bias for several pairs of A [rank, d_in] and B [d_out, rank], with one dropout."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, scale: float, biases: list[Tensor | None], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        kept, dropped, factor = drop(x.flatten(0, -2), p) if p else (x.flatten(0, -2), None, 1.0)
        a = torch.cat(matrices[::2]) if len(matrices) > 2 else matrices[0]
        a, bs = a.to(x.dtype), [b.to(x.dtype) for b in matrices[1::2]]
        down = kept @ a.t()  # [tokens, all ranks]
        ctx.alpha, ctx.p, ctx.shape, ctx.dtype = scale * factor, p, x.shape, matrices[0].dtype
        ups = []
        for bias, b, own in zip(biases, bs, _columns(down, bs), strict=True):
            start = down.new_empty(b.shape[0]) if bias is None else bias.to(x.dtype)  # beta 0 ignores what it holds
            ups.append(torch.addmm(start, own, b.t(), beta=int(bias is not None), alpha=ctx.alpha))
        ctx.save_for_backward(kept, dropped, down, a, *bs)
        return tuple(ups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept, dropped, down, a, *bs = ctx.saved_tensors
        of_down = torch.empty_like(down)
        of_bs = []
        for gradient, b, own, of_own in zip(gradients, bs, _columns(down, bs), _columns(of_down, bs), strict=True):
            torch.addmm(of_own, gradient, b, beta=0, alpha=ctx.alpha, out=of_own)
            of_b = torch.empty_like(b)
            of_bs.append(of_b.addmm_(gradient.t(), own, beta=0, alpha=ctx.alpha).to(ctx.dtype))
        of_as = (of_down.t() @ kept).to(ctx.dtype).split([b.shape[1] for b in bs])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_down @ a
            if dropped is not None:
                of_x = drop_again(of_x, dropped, ctx.p)
            of_x = of_x.view(ctx.shape)
        pairs = [matrix for pair in zip(of_as, of_bs, strict=True) for matrix in pair]
        return of_x, None, None, None, *pairs


def _columns(down: Tensor, bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of `down` [tokens, all ranks] that belong to each B [d_out, rank]."""
    return down.split([b.shape[1] for b in bs], dim=1) if len(bs) > 1 else [down]


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Drops elements of x, each with probability p > 0 and independent of the others.

    Returns x with zeros in their places, what drop_again needs, and the factor that still has to be multiplied so that
    the mean stays.
    """
    if drops_places(x):
        places = dropped_places(x.numel(), p)
        return _without(x, places), places, 1 / (1 - p)
    kept, mask = torch.native_dropout(x, p, True)
    return kept, mask, 1.0


def drop_again(gradient: Tensor, dropped: Tensor, p: float) -> Tensor:
    """Drops the elements of the gradient that `drop` has dropped of x, and scales the others as it has."""
    if drops_places(gradient):
        return _without(gradient, dropped)
    scaled: Tensor = torch.ops.aten.native_dropout_backward(gradient, dropped, 1 / (1 - p))
    return scaled


def drops_places(x: Tensor) -> bool:
    """Whether the places of dropped elements are drawn, instead of a mask."""
    return x.is_cpu


def dropped_places(count: int, p: float) -> Tensor:
    """Draws the places of dropped elements among `count`: the gaps between them have a geometric distribution."""
    expected = count * p
    enough = max(1, int(expected + SPARE * (math.sqrt(expected) + 2)))
    places = torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0) - 1
    while places[-1] < count:  # this happens hardly ever
        places = torch.cat([places, places[-1] + torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0)])
    return places[: int(torch.searchsorted(places, count))]


def _without(x: Tensor, places: Tensor) -> Tensor:
    """x with zeros in these places."""
    return x.reshape(-1).index_fill(0, places, 0).view_as(x)
