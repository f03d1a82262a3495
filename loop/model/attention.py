"""Attention over rows that stand behind one another in one: every row sees itself, and the prefix they share."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from data.layout import Apart

BY_ROW = "sdpa_by_row"  # what transformers calls it in a model's configuration
SHORT = 256  # tokens of a row


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

    Raises RuntimeError where a model does not pass `apart` on to its attention.
    """
    if apart is None:  # then rows would see each other
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
    """transformers' SDPA; on a CPU in bf16 written out for short rows, where the fused kernel's backward is slow."""
    if not query.is_cpu or query.dtype != torch.bfloat16 or key.shape[2] > SHORT or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = torch.matmul(query * kwargs["scaling"], key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2)


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """[1, heads, T, size] -> [R, heads, L, size]"""
    _, heads, _, size = tensor.shape
    taken = tensor[0].transpose(0, 1).index_select(0, places.flatten())  # [R x L, heads, size]
    return taken.view(*places.shape, heads, size).transpose(1, 2)


def why_not_plain_attention(model: Any, longest: int) -> str | None:
    """Why tokens in another place of the row would count in rows of `longest` tokens at most; None: they do not."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # not said: those that look back least
    if kinds - {"full_attention", "sliding_attention"} or model._is_stateful:
        return f"{type(model).__name__} has layers that carry a state from row to row"
    window = getattr(config, "sliding_window", None)
    if window and longest > window and kinds != {"full_attention"}:
        return f"its attention looks {window} tokens back, and the longest row has {longest}"
    return None


AttentionInterface.register(BY_ROW, attention_by_row)
