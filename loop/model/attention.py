"""Attention for several rows that stand one after another in one: each row sees itself and the prefix they share.

There are two of them. `sdpa_by_row` takes rows of similar length together and works everywhere. `in_line` is one call
of a flash kernel for sequences of different lengths, for GPUs that have it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from data.examples import Example
from data.layout import Apart, collate
from loop.internals.transformers_internals import carries_state
from loop.measure.flops import head_size_of

BY_ROW = "sdpa_by_row"  # the name of this attention in transformers and in a model's configuration
IN_LINE = "in_line"  # the same
SHORT = 256  # tokens; rows up to this length are computed without the fused kernel on a CPU in bf16
ALIKE = 0.02  # the largest difference of works_in_line, relative: rounding in bf16 makes 0.004


def attention_by_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    apart: Apart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes transformers' SDPA for each group of rows by itself. Returns [1, T, heads, head size], as SDPA does.

    query is [1, heads, T, head size]; key and value have the same shape with their own number of heads. Padding needs
    no mask: it stands behind a row's tokens, and a query sees only the tokens before it.

    Raises RuntimeError where a model does not pass `apart` on to its attention.
    """
    if apart is None:  # without it rows would see each other
        raise RuntimeError(f"{type(module).__name__} was not told which rows to keep apart")
    n = apart.prefix
    parts = []
    if n:
        prefix = _attend(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None, **kwargs)
        parts.append(prefix[0])
    for places, mask in zip(apart.groups, apart.masks, strict=True):
        rows = len(places)
        own_query, own_key, own_value = (_rows(tensor, places) for tensor in (query, key, value))
        if n:
            own_key, own_value = (
                torch.cat([whole[:, :, :n].expand(rows, -1, -1, -1), own], dim=2)
                for whole, own in ((key, own_key), (value, own_value))
            )
        parts.append(_attend(module, own_query, own_key, own_value, mask, **kwargs).flatten(0, 1))
    return torch.cat(parts).index_select(0, apart.back)[None], None


def in_line(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    apart: Apart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes what attention_by_row computes in one call of a kernel, for all sequences of `apart.in_line`.

    Raises RuntimeError where a model does not pass `apart` on to its attention, or drops attention weights.
    """
    if apart is None or kwargs.get("dropout"):
        raise RuntimeError(f"{type(module).__name__} was not told which rows to keep apart, or it drops attention")
    line = apart.in_line
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, head size]
    if line.keys is not None:
        key, value = key.index_select(0, line.keys), value.index_select(0, line.keys)
    output: Any = varlen_attn(
        query,
        key,
        value,
        line.query_ends,
        line.key_ends,
        line.most_queries,
        line.most_keys,
        scale=kwargs.get("scaling"),
        window_size=(-1, 0),  # causal, and aligned at the ends of queries and keys
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def attention_for(base: Any, device: torch.device) -> str:
    """The name of the attention that keeps rows apart for `base` on `device`: in_line where it works, which is tried
    with the model's numbers of heads, their size and its dtype."""
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    works = device.type == "cuda" and works_in_line(heads, key_heads, head_size_of(config), base.dtype, device)
    return IN_LINE if works else BY_ROW


@cache
def works_in_line(heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether in_line computes on `device` what attention_by_row computes, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    apart = collate([Example.of(i, [1, 2, 3, 4 + i], [9] * (3 + i)) for i in range(3)], "shared_prefix", 0).apart
    assert apart is not None
    tokens = len(apart.back)
    given = [torch.randn(1, many, tokens, size, generator=generator) for many in (heads, key_heads, key_heads)]
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    found: list[list[Tensor]] = []
    for attention in (attention_by_row, in_line):
        q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in given)
        try:
            output = attention(module, q, k, v, None, apart.to(device), scaling=size**-0.5)[0]
            output.float().square().sum().backward()
        except (RuntimeError, NotImplementedError, ValueError):  # an old card, or a size that the kernel does not take
            return False
        gradients = [tensor.grad for tensor in (q, k, v) if tensor.grad is not None]
        found.append([tensor.detach().float().flatten() for tensor in (output, *gradients)])
    return all(bool((one - other).norm() <= ALIKE * one.norm()) for one, other in zip(*found, strict=True))


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Calls transformers' SDPA; for short rows on a CPU in bf16 the products are written out, because the backward pass
    of the fused kernel is slow there. `mask` is None, or [1, 1, queries, keys] and causal."""
    if not query.is_cpu or query.dtype != torch.bfloat16 or key.shape[2] > SHORT or kwargs.get("dropout"):
        square = query.shape[2] == key.shape[2]  # then the kernel needs no mask to be causal
        return sdpa_attention_forward(module, query, key, value, None if square else mask, **kwargs)[0]
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = torch.matmul(query * kwargs["scaling"], key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2)


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """Takes the tokens at `places` [R, L] out of a tensor: [1, heads, T, size] -> [R, heads, L, size]"""
    _, heads, _, size = tensor.shape
    taken = tensor[0].transpose(0, 1).index_select(0, places.flatten())  # [R x L, heads, size]
    return taken.view(*places.shape, heads, size).transpose(1, 2)


def why_not_plain_attention(model: Any, longest: int) -> str | None:
    """The reason why a token's place in its row changes what this model computes, in rows of at most `longest` tokens;
    None when it changes nothing."""
    config = model.config.get_text_config()
    # Where the configuration does not name the layers' kinds, they may be of the kind that looks back least.
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"} or carries_state(model):
        return f"{type(model).__name__} has layers that carry a state from row to row"
    window = getattr(config, "sliding_window", None)
    if window and longest > window and kinds != {"full_attention"}:
        return f"its attention looks {window} tokens back, and the longest row has {longest}"
    return None


AttentionInterface.register(BY_ROW, attention_by_row)
AttentionInterface.register(IN_LINE, in_line)
