"""Attention for several rows that stand one after another in one: each row sees itself and the prefix they share."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from data.layout import Apart
from loop.internals.transformers_internals import carries_state

BY_ROW = "sdpa_by_row"  # the name of this attention in transformers and in a model's configuration
SHORT = 256  # tokens; rows up to this length are computed without the fused kernel on a CPU in bf16


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
    for places in apart.groups:
        rows, length = places.shape
        own_query, own_key, own_value = (_rows(tensor, places) for tensor in (query, key, value))
        mask = None
        if n:
            own_key, own_value = (
                torch.cat([whole[:, :, :n].expand(rows, -1, -1, -1), own], dim=2)
                for whole, own in ((key, own_key), (value, own_value))
            )
            mask = torch.ones(length, n + length, dtype=torch.bool, device=query.device).tril(n)[None, None]
        parts.append(_attend(module, own_query, own_key, own_value, mask, **kwargs).flatten(0, 1))
    return torch.cat(parts).index_select(0, apart.back)[None], None


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Calls transformers' SDPA; for short rows on a CPU in bf16 the products are written out, because the backward pass
    of the fused kernel is slow there."""
    if not query.is_cpu or query.dtype != torch.bfloat16 or key.shape[2] > SHORT or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
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
