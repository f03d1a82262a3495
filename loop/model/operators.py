"""Replaces operators that transformers writes out in many kernels by fused ones: on a GPU each kernel costs time.

A model's own code is kept where a replacement does not compute the same, which is tried and not looked up by name.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

TRIED = 8  # the hidden size of a trial
GAP = 1e-5  # the largest difference of a trial: RMSNorm computes in fp32


def use_fused_operators(base: nn.Module) -> None:
    """Gives the RMSNorms of `base` torch's own kernel, and its attention RoPE in four kernels."""
    for module in base.modules():
        kind: Any = type(module)
        if is_rms_norm(kind):
            module.__class__ = _fused_norm(kind)
        home = sys.modules[kind.__module__]
        written_out = getattr(home, "apply_rotary_pos_emb", None)
        if is_rope(written_out):
            home.apply_rotary_pos_emb = _rope_instead_of(written_out)  # type: ignore[attr-defined]


@cache
def is_rms_norm(kind: Any) -> bool:
    """Whether modules of this class compute weight * x / sqrt(mean(x²) + variance_epsilon)."""
    if not kind.__name__.endswith("RMSNorm") or issubclass(kind, _FusedNorm):
        return False
    tried: Any = kind.__new__(kind)
    nn.Module.__init__(tried)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, TRIED, generator=generator), torch.randn(TRIED, generator=generator)
    tried.weight, tried.variance_epsilon = nn.Parameter(weight), 0.25
    try:
        with torch.no_grad():
            found = tried(x)
    except Exception:  # a class that needs more than this is another kind of norm
        return False
    return _alike(found, rms_norm(x, (TRIED,), weight, 0.25))


class _FusedNorm(nn.Module):
    """A mark of the classes that _fused_norm makes."""


@cache
def _fused_norm(kind: Any) -> Any:
    """A class like `kind` whose forward pass is torch's rms_norm."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:  # then the result has the wider of the two
            written_out: Tensor = kind.forward(self, x)
            return written_out
        return rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    return type(kind.__name__, (kind, _FusedNorm), {"forward": forward, "__module__": kind.__module__})


@cache
def is_rope(function: Any) -> bool:
    """Whether this function rotates queries and keys as `rope` does."""
    if function is None or hasattr(function, "written_out"):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, TRIED, generator=generator), torch.randn(1, 2, 3, TRIED, generator=generator)
    half = torch.randn(1, 3, TRIED // 2, generator=generator)
    cos, sin = (torch.cat([part, part], -1) for part in (half.cos(), half.sin()))
    try:
        found = function(q, k, cos, sin)
        return all(map(_alike, found, rope(q, k, cos, sin)))
    except Exception:  # a function with other arguments
        return False


def _rope_instead_of(written_out: Any) -> Any:
    """`rope` where all of a head is rotated; `written_out`, which does the same, where a model rotates a part of it."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        whole = cos.dim() == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        rotated: tuple[Tensor, Tensor] = (rope if whole else written_out)(q, k, cos, sin, unsqueeze_dim)
        return rotated

    function.written_out = written_out  # type: ignore[attr-defined]
    return function


def _alike(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and bool((one - other).abs().max() < GAP)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotates the halves of each head of q [B, heads, T, size] and k [B, key heads, T, size] by angles.

    cos and sin [B, T, size] are those of the angles, the same for both halves. Returns q and k of the same shapes.
    `unsqueeze_dim` is the dimension in which q and k have their heads.
    """
    by_head = unsqueeze_dim == 1  # they are turned, so that a token's heads lie beside one another, as attention wants
    q, k = (x.transpose(1, 2) if by_head else x for x in (q, k))
    rotated: Tensor = _Rotate.apply(torch.cat([q, k], 2), cos.unsqueeze(2), sin.unsqueeze(2))  # type: ignore[no-untyped-call]
    of_q, of_k = (x.transpose(1, 2) if by_head else x for x in rotated.split([q.shape[2], k.shape[2]], 2))
    return of_q, of_k


class _Rotate(torch.autograd.Function):
    """x cos + rotate_half(x) sin, whose gradient is the same rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotates the first half of the last dimension against the second; backwards for the direction -1."""
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return rotated
