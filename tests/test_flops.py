"""Counted operations against PyTorch's own counter, and against what the reference states of the 14B model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from data.batch import MicroBatch
from loop.flops import Batch, MatrixProducts, count, matrix_products
from tests.equality import TINY
from tests.reference_loop import TARGETS


def test_counts_real_tokens_only() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7]])
    micro_batch = MicroBatch(torch.zeros(2, 4, dtype=torch.long), mask, labels, rows=[1, 2])
    assert count(micro_batch) == Batch(rows=2, tokens=7, label_tokens=3, squared=9 + 16)
    stand_in = MicroBatch(micro_batch.input_ids[:1], mask[:1], torch.full((1, 4), -100), rows=[])
    assert count(stand_in) == Batch()


@pytest.mark.parametrize("recomputes", [False, True])
def test_is_what_pytorch_counts(recomputes: bool) -> None:
    """Of a whole step on the real model. The first layer's input needs no gradient, which the formula counts."""
    rows, tokens, labels = 3, 24, 10
    base = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager")
    if recomputes:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")).train()
    with FlopCounterMode(display=False) as counter:
        hidden = base.model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        logits = base.lm_head(hidden.flatten(0, 1)[: rows * labels])
        cross_entropy(logits, torch.zeros(rows * labels, dtype=torch.long)).backward()
    batch = Batch(rows, rows * tokens, rows * labels, rows * tokens**2)
    counted = matrix_products(model).computed_flops(batch, recomputes)
    hidden_size, kv = 128, 2 * 32  # of tiny_base: 4 heads, of which 2 have keys and values
    first_layer = 2 * rows * tokens * (hidden_size * (hidden_size + 2 * kv) + 3 * 8 * hidden_size)
    # How much of a last layer is recomputed is PyTorch's choice: it stops when it has what it needs.
    assert counter.get_total_flops() == pytest.approx(counted - first_layer, rel=0.02 if recomputes else 1e-12)


def test_reference_says_six_with_recomputation_and_four_without() -> None:
    """FLOPs for a frozen weight and token, and 7.6 PFLOP for an epoch of 1,798 rows of 51 tokens, logits everywhere."""
    weight, token = MatrixProducts(base=1, adapters=0, head=0, attention=0), Batch(tokens=1)
    assert weight.model_flops(token) == 4
    assert weight.computed_flops(token, recomputes=True) == 6
    layers, head = 48 * (2 * 5120**2 + 2 * 5120 * 1024 + 3 * 5120 * 13824), 5120 * 152064
    tokens = 1798 * 51
    epoch = MatrixProducts(layers, 34_406_400, head, 48 * 5120)
    batch = Batch(1798, tokens, tokens, 1798 * 51**2)
    assert epoch.computed_flops(batch, recomputes=True) == pytest.approx(7.6e15, rel=0.05)
