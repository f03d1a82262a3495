"""LoRA's computation y + scale * B A dropout(x), in fewer passes over memory than PEFT's own layer makes.

PEFT scales the output, which has many numbers; here the inner dimension is scaled, which has few. For the backward pass
of dropout this layer keeps what was dropped, where PyTorch keeps a second copy of x. On a CPU a random number for every
element costs more than the matrix products, so there the places of the dropped elements are drawn instead.
"""

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear

from loop.internals.peft_internals import use_layer

ADAPTER = "default"  # PEFT's name for the first adapter of a model
SPARE = 8.0  # dropped_places draws this many standard deviations more places than it expects to need


def use_fused_lora(config: LoraConfig) -> LoraConfig:
    """Makes PEFT use FusedLora for every nn.Linear that `config` gives an adapter to. Returns `config`."""
    use_layer(config, nn.Linear, FusedLora)
    return config


class FusedLora(lora.Linear):
    """PEFT's LoRA layer with another forward pass where it has one plain adapter, and PEFT's own in all other cases:
    DoRA and other variants, a bias in B, several adapters, a merged or disabled one."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT calls this when it adds an adapter."""
        super().update_layer(adapter_name, *args, **kwargs)
        a: Any = self.lora_A[adapter_name]
        self.lora_A[adapter_name] = DropAndProject(a)
        self.has_one_plain_adapter = (
            list(self.lora_A) == [ADAPTER] and not self.lora_variant and self.lora_B[ADAPTER].bias is None
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, d_in] -> […, d_out]"""
        if args or kwargs or not self.has_one_plain_adapter or self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        p = getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0
        # lora_A, lora_B and base_layer are called as modules: ZeRO-3 gathers a module's weight when it is called.
        down = self.lora_A[ADAPTER](x, p)  # […, rank], not yet divided by 1 - p
        up = self.lora_B[ADAPTER](down * (self.scaling[ADAPTER] / (1 - p)))
        # The base's product comes last: recomputation stops as soon as it has all that the backward pass needs, and
        # the backward pass does not need this product.
        y: Tensor = self.base_layer(x) + up
        return y


class DropAndProject(nn.Linear):
    """LoRA's matrix A, which can apply dropout to its input in the same pass. It takes over the weight of `a`."""

    def __init__(self, a: nn.Linear) -> None:
        super().__init__(a.in_features, a.out_features, bias=False, device="meta")  # which draws no random numbers
        self.weight = a.weight

    def forward(self, x: Tensor, p: float = 0.0) -> Tensor:
        """dropout(x) @ A.T without the factor 1 / (1 - p); `p` is the probability to drop an element."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # then adapters are fp32, and x may be fp32 too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = self.weight.to(x.dtype)
        if p == 0:
            return linear(x, weight)
        down: Tensor = _ProductWithoutDropped.apply(x, weight, draw_dropped(x, p))  # type: ignore[no-untyped-call]
        return down


def draw_dropped(x: Tensor, p: float) -> Tensor:
    """Draws the elements of x that are dropped, each with probability p and independent of the others.

    Returns their places on a CPU and a boolean mask on other devices.
    """
    return dropped_places(x.numel(), p) if x.is_cpu else torch.empty_like(x, dtype=torch.bool).bernoulli_(p)


def dropped_places(count: int, p: float) -> Tensor:
    """Draws the places of dropped elements among `count`: the gaps between them have a geometric distribution."""
    expected = count * p
    enough = max(1, int(expected + SPARE * (math.sqrt(expected) + 2)))
    places = torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0) - 1
    while places[-1] < count:  # this happens hardly ever
        places = torch.cat([places, places[-1] + torch.empty(enough, dtype=torch.int64).geometric_(p).cumsum(0)])
    return places[: int(torch.searchsorted(places, count))]


class _ProductWithoutDropped(torch.autograd.Function):
    """The product of x […, d_in], with zeros in place of the `dropped` elements, and weight [rank, d_in] transposed."""

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
    """x with zeros in place of the dropped elements, which are a mask or places."""
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped, 0)
    return x.reshape(-1).index_fill(0, dropped, 0).view_as(x)
