"""Attention over rows that stand behind one another in one: every row sees itself, and the prefix they share."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data.layout import Apart

BY_ROW = "sdpa_by_row"  # what transformers calls it in a model's configuration


def attention_by_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    apart: Apart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, for each group of rows by itself; [1, T, heads, head size], as it returns it.

    query is [1, heads, T, head size], key and value the same with as many heads as they have. A row's padding
    stands behind its tokens, and a query sees only what stands before it: padding needs no mask.
    """
    if apart is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    n = apart.prefix
    parts = []
    if n:
        prefix = sdpa_attention_forward(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None, **kwargs)[0]
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
        parts.append(sdpa_attention_forward(module, own_query, own_key, own_value, mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(parts).index_select(0, apart.back)[None], None


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """[1, heads, T, size] -> [R, heads, L, size]"""
    _, heads, _, size = tensor.shape
    taken = tensor[0].transpose(0, 1).index_select(0, places.flatten())  # [R x L, heads, size]
    return taken.view(*places.shape, heads, size).transpose(1, 2)


AttentionInterface.register(BY_ROW, attention_by_row)
