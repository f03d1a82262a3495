"""batching: auto takes what computes the fewest tokens, and no model is given what it cannot do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, MistralConfig, StableLmConfig

from data.batch import windows
from data.errors import UserError
from data.examples import Example
from loop.batch_arithmetic import BatchArithmetic
from loop.planning.batching import COUNTED, LAYOUTS, choose_layout, count_tokens
from loop.recipe import Recipe, parse_recipe
from tests.equality import TINY
from tests.test_head import SIZES

RECIPE = parse_recipe(["--micro_batch_size", "4", "--grad_accum_steps", "2", "--rows_per_step", "null"])[1]


def base(**more: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY, **more))


def rows(shared: int, lengths: list[int]) -> list[Example]:
    return [Example.of(i + 1, [1] * shared + [2 + i], [3] * length) for i, length in enumerate(lengths)]


EQUAL = rows(0, [5] * 40)
UNEQUAL = rows(0, [1, 50, 3, 20] * 10)
SHARED = rows(20, [8, 9] * 20)


@pytest.mark.parametrize(
    ("examples", "layout"), [(EQUAL, "padded"), (UNEQUAL, "packed"), (SHARED, "shared_prefix"), (SHARED[:1], "padded")]
)
def test_auto_takes_the_fewest_tokens(examples: list[Example], layout: str) -> None:
    chosen, why = choose_layout(RECIPE, examples, base(), num_processes=2)
    assert chosen == layout
    assert why.startswith(f"{layout} (auto): ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_said_is_done(layout: Any) -> None:
    assert choose_layout(replace(RECIPE, batching=layout), SHARED, base(), 1)[0] == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples", [EQUAL, UNEQUAL, SHARED, SHARED[:7]])
def test_counts_what_the_micro_batches_hold(layout: Any, examples: list[Example]) -> None:
    order = list(range(len(examples)))
    counted = count_tokens(BatchArithmetic.of(RECIPE, 2, len(examples)), examples, order, layout)
    made = [
        batch
        for rank in range(2)
        for window in windows(examples, order, 4, 2, 2, rank, layout, 0)
        for batch in window.micro_batches
        if batch.rows
    ]
    assert counted.computed == sum(batch.input_ids.numel() for batch in made)
    assert counted.real == sum(len(example.prompt_ids + example.label_ids) for example in examples)


def test_says_what_is_saved() -> None:
    """Forty rows of 21 + 8 or 9 tokens in ten micro-batches of four: the arithmetic by hand."""
    real = 40 * 21 + 20 * 8 + 20 * 9
    shared = (40 - 10) * 20
    why = choose_layout(RECIPE, SHARED, base(), num_processes=1)[1]
    assert f"{real - shared:,} tokens to compute ({real:,} real + 0 padding - {shared:,} shared), 5" in why


def test_counts_the_first_steps_of_many() -> None:
    many = rows(3, [2] * (COUNTED + 5))
    recipe = replace(RECIPE, micro_batch_size=1, grad_accum_steps=1)
    assert f"in the first {COUNTED:,} steps" in choose_layout(recipe, many, base(), 1)[1]


def gemma2() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Gemma2Config(**SIZES))


def short_sighted() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=16))


def deaf() -> Any:
    """Its decoder layers do not pass keyword arguments on to their attention."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(StableLmConfig(**{**SIZES, "use_cache": False}))


REFUSALS: dict[str, tuple[Recipe, Any, str]] = {
    "another kernel": (replace(RECIPE, model=replace(RECIPE.model, attn_implementation="eager")), base, "is eager"),
    "logits are capped": (RECIPE, gemma2, "does not let its attention be replaced"),
    "keeps it to itself": (RECIPE, deaf, "does not tell its attention which rows to keep apart"),
    "looks back less": (RECIPE, short_sighted, "looks 16 tokens back, and the longest row has 30"),
    "has a state": (RECIPE, lambda: base(layer_types=["linear_attention"] * 4), "carry a state from row to row"),
}


def test_validation_rows_count_too() -> None:
    """Shorter training rows than the window are packed, but not beside validation rows that are longer."""
    assert choose_layout(RECIPE, SHARED, short_sighted(), 1, rows(1, [40]))[0] == "padded"
    short = rows(3, [2] * 8)
    assert choose_layout(RECIPE, short, short_sighted(), 1)[0] == "shared_prefix"
    assert choose_layout(RECIPE, short, short_sighted(), 1, rows(1, [40]))[0] == "padded"


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_model_cannot_do(case: str) -> None:
    recipe, model, said = REFUSALS[case]
    chosen, why = choose_layout(recipe, SHARED, model(), 1)
    assert chosen == "padded"
    assert said in why
    with pytest.raises(UserError, match=f"batching: packed does not work here, because .*{said}"):
        choose_layout(replace(recipe, batching="packed"), SHARED, model(), 1)
