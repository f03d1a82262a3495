"""Counts the floating-point operations of a step from the sizes of the model's matrix products."""

from dataclasses import dataclass
from typing import Any

import torch

from data.layout import MicroBatch
from loop.internals.deepspeed_internals import numel_of


@dataclass(frozen=True)
class Batch:
    """The sizes of some rows from which operations are counted."""

    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    squared: int = 0  # pairs of tokens that attention computes, those with a later token included

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.label_tokens + other.label_tokens,
            self.squared + other.squared,
        )


def count(micro_batch: MicroBatch) -> Batch:
    """Counts the real rows without padding; a prefix that they share counts once, and a stand-in counts nothing."""
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
    """Counts what is computed: padding counts, and so does a stand-in."""
    b, t = micro_batch.input_ids.shape
    label_tokens, n = len(micro_batch.label_ids), micro_batch.prefix
    squared = b * t * t
    if micro_batch.apart is not None:
        squared = n * n + sum(group.numel() * (n + group.shape[1]) for group in micro_batch.apart.groups)
    return Batch(len(micro_batch.own), b * t, label_tokens, squared)


@dataclass(frozen=True)
class MatrixProducts:
    """The sizes of a model's matrix products, in weights (elements)."""

    base: int  # all frozen linear layers except the output embedding
    adapters: int  # LoRA's trainable matrices
    head: int  # the output embedding, which is computed for label positions only
    attention: int  # layers x heads x head size: the width of the attention of all layers together
    layers: int = 1

    def forward_flops(self, batch: Batch) -> int:
        """Counts two operations a weight and token. Attention multiplies queries by keys and weights by values."""
        per_token = 2 * (self.base + self.adapters) * batch.tokens
        return per_token + 2 * self.head * batch.label_tokens + 4 * self.attention * batch.squared

    def model_flops(self, batch: Batch) -> int:
        """Counts a forward and a backward pass without recomputation.

        A frozen weight takes 4 operations a token, because it has an input gradient only; a weight of an adapter takes
        6, because it has a weight gradient too. The backward pass of attention takes twice its forward pass, and the
        half that the causal mask hides is not subtracted (PaLM, arXiv 2204.02311, appendix B).
        """
        per_token = (4 * self.base + 6 * self.adapters) * batch.tokens
        return per_token + 4 * self.head * batch.label_tokens + 12 * self.attention * batch.squared

    def computed_flops(self, batch: Batch, recomputes: bool) -> int:
        """Counts a step. Gradient checkpointing repeats the forward pass of all layers except the last."""
        all_layers = MatrixProducts(self.base, self.adapters, 0, self.attention).forward_flops(batch)
        return self.model_flops(batch) + recomputes * all_layers * (self.layers - 1) // self.layers


def head_size_of(config: Any) -> int:
    """The size of an attention head; not every text configuration names it."""
    named: int | None = getattr(config, "head_dim", None)
    return named or config.hidden_size // config.num_attention_heads


def matrix_products(model: Any) -> MatrixProducts:
    """The sizes of a PeftModel, whose weights may lie on the meta device or be partitioned by ZeRO-3."""
    head = model.get_output_embeddings()
    sizes = {True: 0, False: 0}  # by whether it trains
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            sizes[module.weight.requires_grad] += numel_of(module.weight)
    config = model.config.get_text_config()
    return MatrixProducts(
        base=sizes[False],
        adapters=sizes[True],
        head=numel_of(head.weight),
        attention=config.num_hidden_layers * config.num_attention_heads * head_size_of(config),
        layers=config.num_hidden_layers,
    )
