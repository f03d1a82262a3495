"""Counted operations against PyTorch's own counter, and against what the reference states of the 14B model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from data.examples import Example
from data.layout import collate, stand_in
from loop.measure.flops import Batch, MatrixProducts, count, count_computed, matrix_products
from loop.model.build import set_checkpointing
from tests.equality import TINY
from tests.reference_loop import TARGETS

ROWS = [Example.of(1, [1, 2, 3], [4, 5]), Example.of(2, [1, 2, 9, 9], [5]), Example.of(3, [1, 2, 9], [7, 7, 7])]


def test_counts_real_tokens_only() -> None:
    for layout in ("padded", "packed"):
        assert count(collate(ROWS, layout, 0)) == Batch(3, tokens=16, label_tokens=6, squared=25 + 25 + 36)
    # two tokens are shared; the rows have 3, 3 and 4 of their own, which see both
    shared = Batch(3, tokens=12, label_tokens=6, squared=4 + 3 * 5 + 3 * 5 + 4 * 6)
    assert count(collate(ROWS, "shared_prefix", 0)) == shared
    assert count(stand_in(ROWS[0], "padded", 0)) == Batch()


def test_counts_what_is_computed() -> None:
    assert count_computed(collate(ROWS, "padded", 0)) == Batch(3, tokens=18, label_tokens=6, squared=3 * 36)
    assert count_computed(collate(ROWS, "packed", 0)) == Batch(3, tokens=16, label_tokens=6, squared=3 * 36)
    assert count_computed(collate(ROWS, "shared_prefix", 0)) == Batch(3, 12, label_tokens=6, squared=4 + 3 * 4 * 6)


@pytest.mark.parametrize("recomputes", [False, True])
def test_is_what_pytorch_counts(recomputes: bool) -> None:
    """Counts a whole step of the real model. The first layer's input needs no gradient, but the formula counts it."""
    rows, tokens, labels = 3, 24, 10
    base = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")).train()
    set_checkpointing(base, "non_reentrant" if recomputes else "none")
    with FlopCounterMode(display=False) as counter:
        hidden = base.model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        logits = base.lm_head(hidden.flatten(0, 1)[: rows * labels])
        cross_entropy(logits, torch.zeros(rows * labels, dtype=torch.long)).backward()
    batch = Batch(rows, rows * tokens, rows * labels, rows * tokens**2)
    counted = matrix_products(model).computed_flops(batch, recomputes)
    hidden_size, kv = 128, 2 * 32  # tiny_base has 4 heads, of which 2 have keys and values
    first_layer = 2 * rows * tokens * (hidden_size * (hidden_size + 2 * kv) + 3 * 8 * hidden_size)
    # How much of a last layer is recomputed is PyTorch's choice: it stops when it has what it needs.
    assert counter.get_total_flops() == pytest.approx(counted - first_layer, rel=0.02 if recomputes else 1e-12)


def test_reference_says_six_with_recomputation_and_four_without() -> None:
    """FLOPs for a frozen weight and token, and 7.6 PFLOP for an epoch of 1,798 rows of 51 tokens, logits everywhere."""
    weights, token = MatrixProducts(base=48, adapters=0, head=0, attention=0, layers=48), Batch(tokens=1)
    assert weights.model_flops(token) == 48 * 4
    assert weights.computed_flops(token, recomputes=True) == 47 * 6 + 4, "the last layer is not recomputed"
    layers, head = 48 * (2 * 5120**2 + 2 * 5120 * 1024 + 3 * 5120 * 13824), 5120 * 152064
    tokens = 1798 * 51
    epoch = MatrixProducts(layers, 34_406_400, head, 48 * 5120, layers=48)
    batch = Batch(1798, tokens, tokens, 1798 * 51**2)
    assert epoch.computed_flops(batch, recomputes=True) == pytest.approx(7.6e15, rel=0.05)
