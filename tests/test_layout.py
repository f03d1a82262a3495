"""The layouts of a micro-batch: by hand, and by what a real model makes of them, against each row by itself."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from data.examples import Example, Span
from data.layout import IGNORE_INDEX, Layout, collate, shared_prefix, stand_in
from loop.model.build import add_adapters, set_checkpointing, set_layout
from loop.recipe import parse_recipe
from loop.step import summed_nll
from tests.equality import TINY

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
SYSTEM = [11, 12, 13, 14, 15, 16, 17]
# Own prompts and answers of very unequal lengths; one answer follows the shared tokens at once but for one token.
LENGTHS = [(1, 1), (3, 40), (2, 5), (30, 2), (1, 9), (2, 1), (4, 120)]


def unequal_rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(20, 150, (count,), generator=generator).tolist()

    return [Example.of(i + 1, SYSTEM + ids(prompt), ids(answer)) for i, (prompt, answer) in enumerate(LENGTHS)]


def adapted(layout: Layout, checkpointing: str = "none") -> Any:
    """A Qwen2 of random weights whose adapters are no longer zero; the same every time."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32)
    base.config.use_cache = False
    model = add_adapters(base, parse_recipe(["--lora.dropout", "0"])[1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    set_layout(base, layout)
    set_checkpointing(base, checkpointing)
    return model.train()


def loss_and_gradients(model: Any, examples: list[Example], layout: Layout) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    nll = summed_nll(model, collate(examples, layout, pad_token_id=0))
    nll.backward()
    return nll.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def by_itself(examples: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """Each row alone, without our layouts, our attention and our loss: the model's own logits, in float64."""
    model = adapted("padded").double()
    base = model.get_base_model()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([example.ids])
        hidden = base.model(input_ids=ids).last_hidden_state
        logits = hidden @ base.lm_head.weight.T
        log_probabilities = logits.log_softmax(-1)[0]
        for start, end, weight in example.spans:
            for place in range(start, end):
                total = total - weight * log_probabilities[place - 1, ids[0, place]]
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_each_row_by_itself(layout: Layout, checkpointing: str) -> None:
    examples = unequal_rows()
    expected, expected_gradients = by_itself(examples)
    found, gradients = loss_and_gradients(adapted(layout, checkpointing), examples, layout)
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient.double() - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("weights", [(1.0,) * 5, (1.0, 0.5, 2.0, 0.125, 3.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_turns_of_a_row_are_five_rows(layout: Layout, weights: tuple[float, ...]) -> None:
    """A conversation with five spans of labels, against a row for each turn that ends with this turn's labels.

    Another row stands beside the conversation, so that there is something to keep apart.
    """
    ids = unequal_rows()[-1].ids
    ends = [20, 37, 41, 90, len(ids)]
    spans = [Span(end - length, end, w) for end, length, w in zip(ends, (9, 3, 1, 30, 20), weights, strict=True)]
    other = Example.of(2, [*SYSTEM, 99, 98], [97, 96, 95])
    expected, expected_gradients = by_itself([Example(1, ids[: span.end], (span,)) for span in spans] + [other])
    found, gradients = loss_and_gradients(adapted(layout), [Example(1, ids, tuple(spans)), other], layout)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        difference = (gradient.double() - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks(layout: Layout) -> None:
    """Row i's answer and own prompt changed: not a bit of any other row's loss may change."""
    examples = unequal_rows()
    model = adapted(layout)

    def losses(rows: list[Example]) -> list[float]:
        """The loss of each row, in a batch of all rows of which only that row has labels."""
        batch = collate(rows, layout, pad_token_id=0)
        result = []
        bounds = torch.tensor([0] + [len(example.label_ids) for example in rows]).cumsum(0)
        for start, end in pairwise(bounds):
            only = replace(batch, predicts=batch.predicts[start:end], label_ids=batch.label_ids[start:end])
            result.append(summed_nll(model, only).item())
        return result

    before = losses(examples)
    for changed in range(len(examples)):
        planted = list(examples)
        old = examples[changed]
        prompt = SYSTEM + [(token + 1) % 150 for token in old.prompt_ids[len(SYSTEM) :]]
        planted[changed] = Example.of(old.row, prompt, [(token + 3) % 150 for token in old.label_ids])
        after = losses(planted)
        assert after[changed] != before[changed]
        assert [a for i, a in enumerate(after) if i != changed] == [b for i, b in enumerate(before) if i != changed]


def test_a_leak_would_be_seen() -> None:
    """The same packed rows without what keeps them apart."""
    examples = unequal_rows()
    batch = collate(examples, "packed", pad_token_id=0)
    model = adapted("packed")
    everything = collate([Example.of(1, batch.input_ids[0].tolist()[:-1], [1])], "packed", pad_token_id=0)
    leaking = summed_nll(model, replace(batch, apart=everything.apart)).item()
    assert abs(leaking / summed_nll(model, batch).item() - 1) > 1e-3


def test_a_model_that_is_not_told_is_stopped() -> None:
    batch = collate(unequal_rows(), "packed", pad_token_id=0)
    with pytest.raises(RuntimeError, match="Qwen2Attention was not told which rows to keep apart"):
        summed_nll(adapted("packed"), replace(batch, apart=None))


def test_padded_by_hand() -> None:
    batch = collate([Example.of(1, [5, 6], [7, 8]), Example.of(2, [9], [3])], "padded", pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]
    assert batch.predicts.tolist() == [1, 2, 4]
    assert batch.label_ids.tolist() == [7, 8, 3]
    assert batch.rows == [1, 2]
    assert batch.input_ids.dtype == torch.int64


def test_packed_by_hand() -> None:
    batch = collate([Example.of(1, [5, 6], [7, 8]), Example.of(2, [9], [3])], "packed", pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch.position_ids is not None
    assert batch.apart is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8, -100, 3]]
    assert batch.predicts.tolist() == [1, 2, 4]
    assert [group.tolist() for group in batch.apart.groups] == [[[0, 1, 2, 3], [4, 5, 5, 5]]]
    assert batch.apart.back.tolist() == [0, 1, 2, 3, 4, 5]


def test_shared_prefix_by_hand() -> None:
    rows = [Example.of(1, [5, 6, 1, 2], [7]), Example.of(2, [5, 6, 1], [8, 9])]
    batch = collate(rows, "shared_prefix", pad_token_id=0)
    assert batch.prefix == 2, "the second row's last prompt token is its own: it predicts its answer"
    assert batch.input_ids.tolist() == [[5, 6, 1, 2, 7, 1, 8, 9]]
    assert batch.position_ids is not None
    assert batch.apart is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert batch.labels.tolist() == [[-100, -100, -100, -100, 7, -100, 8, 9]]
    assert [group.tolist() for group in batch.apart.groups] == [[[2, 3, 4], [5, 6, 7]]]
    assert batch.own == [3, 3]


def test_prefix_is_found_in_the_tokens() -> None:
    assert shared_prefix([Example.of(1, [1, 2, 3, 4], [5]), Example.of(2, [1, 2, 9, 4], [5])]) == 2
    assert shared_prefix([Example.of(1, [1, 2, 3], [5]), Example.of(2, [7, 2, 3], [5])]) == 0
    assert shared_prefix([Example.of(1, [1, 2, 3], [5])] * 2) == 2
    assert shared_prefix([Example.of(1, [1, 2, 3], [5])]) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stand_in_has_neither_loss_nor_gradient(layout: Layout) -> None:
    model = adapted(layout)
    batch = stand_in(unequal_rows()[1], layout, pad_token_id=0)
    assert (batch.labels == IGNORE_INDEX).all()
    assert not batch.rows
    nll = summed_nll(model, batch)
    nll.backward()
    assert nll.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)
