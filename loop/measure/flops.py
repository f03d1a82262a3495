"""Floating-point operations of a step, counted from the model's matrix products."""

from dataclasses import dataclass
from typing import Any

import torch

from data.layout import MicroBatch
from loop.internals.deepspeed_internals import numel_of


@dataclass(frozen=True)
class Batch:
    """Rows computed together or one after the other."""

    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    squared: int = 0  # sum over tokens of those they attend to, the later ones included: what attention grows with

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.label_tokens + other.label_tokens,
            self.squared + other.squared,
        )


def count(micro_batch: MicroBatch) -> Batch:
    """Of the real rows, without padding, and with what they share once; a stand-in counts nothing."""
    if not micro_batch.rows:
        return Batch()
    n = micro_batch.prefix
    return Batch(
        rows=len(micro_batch.rows),
        tokens=n + sum(micro_batch.own),
        label_tokens=len(micro_batch.label_ids),
        squared=n * n + sum(own * (n + own) for own in micro_batch.own),
    )


def count_computed(micro_batch: MicroBatch) -> Batch:
    """With all padding; a stand-in counts as well."""
    b, t = micro_batch.input_ids.shape
    label_tokens, n = len(micro_batch.label_ids), micro_batch.prefix
    squared = b * t * t
    if micro_batch.apart is not None:
        squared = n * n + sum(group.numel() * (n + group.shape[1]) for group in micro_batch.apart.groups)
    return Batch(len(micro_batch.own), b * t, label_tokens, squared)


@dataclass(frozen=True)
class MatrixProducts:
    """Sizes of a model's matrix products, in weights (elements)."""

    base: int  # of all frozen linear layers but the output embedding
    adapters: int  # LoRA's, trainable
    head: int  # of the output embedding, which only label positions go through
    attention: int  # layers x heads x head size: the width of all attention together
    layers: int = 1

    def forward_flops(self, batch: Batch) -> int:
        """Two for each weight and token; attention multiplies queries with keys, and weights with values."""
        per_token = 2 * (self.base + self.adapters) * batch.tokens
        return per_token + 2 * self.head * batch.label_tokens + 4 * self.attention * batch.squared

    def model_flops(self, batch: Batch) -> int:
        """Forward and backward, without recomputation.

        A frozen weight has an input gradient only, an adapter's a weight gradient too: 4 and 6 for each weight and
        token. Attention's backward is twice its forward, its causal half not subtracted (PaLM, arXiv 2204.02311, B).
        """
        per_token = (4 * self.base + 6 * self.adapters) * batch.tokens
        return per_token + 4 * self.head * batch.label_tokens + 12 * self.attention * batch.squared

    def computed_flops(self, batch: Batch, recomputes: bool) -> int:
        """Of a step on `batch`; with gradient checkpointing every layer's forward but the last's is done once more."""
        all_layers = MatrixProducts(self.base, self.adapters, 0, self.attention).forward_flops(batch)
        return self.model_flops(batch) + recomputes * all_layers * (self.layers - 1) // self.layers


def matrix_products(model: Any) -> MatrixProducts:
    """Of a PeftModel; its weights may lie on the meta device, or be partitioned by ZeRO-3."""
    head = model.get_output_embeddings()
    sizes = {True: 0, False: 0}  # by whether it trains
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            sizes[module.weight.requires_grad] += numel_of(module.weight)
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return MatrixProducts(
        base=sizes[False],
        adapters=sizes[True],
        head=numel_of(head.weight),
        attention=config.num_hidden_layers * config.num_attention_heads * head_size,
        layers=config.num_hidden_layers,
    )
