"""A row's loss alone and among others, in kinds of models whose rows are not independent, each for another reason."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import UserError
from data.examples import Example
from data.layout import Layout
from loop.model.build import Data, add_adapters, set_layout
from loop.model.neighbours import TOLERANCES, largest_gap, losses_alone, losses_among_others, rows_to_try
from loop.planning.decisions import Decided, keep_rows_apart
from loop.recipe import Recipe, parse_recipe
from tests.equality import TINY

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# Lengths of prompts and answers; six tokens stand before every prompt.
LENGTHS = [(1, 1), (3, 40), (2, 5), (30, 2), (1, 9), (4, 20)]


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 95, (count,), generator=generator).tolist()

    shared = ids(6)
    return [Example.of(i + 1, shared + ids(prompt), ids(answer)) for i, (prompt, answer) in enumerate(LENGTHS)]


def random_model(kind: str, **more: Any) -> Any:
    """A small model of one of transformers' kinds, with weights so large that its attention is not almost uniform."""
    config = AutoConfig.for_model(kind, **(SMALL | more))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in base.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(std=1.5 / math.sqrt(layer.in_features))
    return base.eval()


class WithLoss(nn.Module):
    """Returns the summed loss of a model, from the logits that the model makes by itself."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, labels: Tensor, predicts: Tensor, **inputs: Any) -> Tensor:
        logits = self.base(**inputs, use_cache=False).logits.flatten(0, -2).index_select(0, predicts)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def gap(base: Any, layout: Layout) -> float:
    model, batch = WithLoss(base), rows_to_try(rows(), len(LENGTHS))
    alone = losses_alone(model, batch, 0, CPU)
    set_layout(base, layout)
    return largest_gap(alone, losses_among_others(model, batch, layout, 0, CPU))


DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
# Why the rows are not independent, a kind of model of which that is true, and the layout in which it is seen.
NOT_INDEPENDENT: dict[str, tuple[str, dict[str, Any], Layout]] = {
    "a state space": (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention"] * 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
        "packed",
    ),
    "a recurrence": ("rwkv", {"attention_hidden_size": 64}, "packed"),
    "a delta rule": ("qwen3_5_text", {"layer_types": ["linear_attention"] * 4}, "packed"),
    "a short convolution": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "packed"),
    "lightning attention": ("minimax", {"layer_types": ["linear_attention"] * 4, "num_local_experts": 2}, "packed"),
    "attention of its own, with ALiBi": ("bloom", {}, "packed"),
    "places counted through all rows": ("xglm", {"d_model": 64, "num_layers": 2, "ffn_dim": 64}, "packed"),
    "RoPE that the longest row stretches": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
        "padded",
    ),
    "RoPE with other factors for long rows": (
        "phi3",
        {"rope_parameters": LONG | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 16},
        "padded",
    ),
}


@pytest.mark.parametrize("reason", NOT_INDEPENDENT)
def test_rows_that_are_not_independent_are_found(reason: str) -> None:
    kind, more, layout = NOT_INDEPENDENT[reason]
    assert gap(random_model(kind, **more), layout) > 5 * TOLERANCES["no"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text", "olmo2", "mistral", "phi3", "smollm3", "glm4"])
def test_rows_that_are_independent_are_not_suspected(kind: str, layout: Layout) -> None:
    assert gap(random_model(kind), layout) < TOLERANCES["no"] / 30


def test_the_rows_that_are_tried() -> None:
    """The longest and the shortest are among them, whatever their place in the file."""
    lengths = [row.length for row in rows_to_try(rows(), 4)]
    assert lengths == sorted(lengths, reverse=True)
    assert (len(lengths), lengths[0], lengths[-1]) == (4, 6 + 43, 6 + 2)
    assert len(rows_to_try(rows()[:1], 4)) == 1
    assert len(rows_to_try(rows()[:3], 16)) == 3


class Shifted(nn.Module):
    """A layer that nobody has foreseen: it adds to each token a part of the token before it in the batch's row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        out: Tensor = self.layer(hidden) + before
        return out


def adapted(base: Any) -> Any:
    model = add_adapters(base, parse_recipe(["--lora.target_modules", "[q_proj]"])[1])
    return model.train()


def decided(recipe: Recipe, model: Any, layout: Layout, auto: bool) -> Decided:
    set_layout(model.get_base_model(), layout)
    told = Decided(layout, "none", recipe.rows_at_once, auto, {"batching": layout})
    return keep_rows_apart(told, recipe, Data(rows(), [], 0), model, Accelerator(cpu=True))


def test_auto_gives_way_to_a_layout_that_is_right() -> None:
    base = random_model("qwen2")
    base.model.layers[1].mlp = Shifted(base.model.layers[1].mlp)
    model, recipe = adapted(base), parse_recipe(["--micro_batch_size", "4"])[1]
    found = decided(recipe, model, "packed", auto=True)
    assert found.layout == "padded"
    assert "padded (auto), because a row's loss depends on the rows beside it: in packed by" in found.said["batching"]
    assert base.config._attn_implementation == "sdpa"
    assert model.training
    with pytest.raises(UserError, match=r"in packed by .* Give --micro_batch_size 1 .* or another --batching"):
        decided(recipe, model, "packed", auto=False)


def test_a_run_that_no_layout_makes_right_is_refused() -> None:
    kind, more, _ = NOT_INDEPENDENT["RoPE that the longest row stretches"]
    model, recipe = adapted(random_model(kind, **more)), parse_recipe(["--micro_batch_size", "4"])[1]
    with pytest.raises(UserError, match=r"in shared_prefix .*, in packed .*, in padded .* --micro_batch_size 1"):
        decided(recipe, model, "shared_prefix", auto=True)
    one = replace(recipe, micro_batch_size=1)
    assert decided(one, model, "padded", auto=True).layout == "padded", "a row that is alone has no neighbours"


def test_rounding_is_no_reason() -> None:
    """The embedded model in bf16, whose loss on random rows is as large as 10 nats."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    for layout in LAYOUTS:
        base.set_attn_implementation("sdpa")
        assert gap(base, layout) < TOLERANCES["bf16"] / 3


def test_a_loss_that_is_not_finite() -> None:
    """Alone it tells nothing of the neighbours, which did not cause it; among others only, they did."""
    nan, inf = float("nan"), float("inf")
    assert largest_gap([nan, 2.0], [nan, 2.5]) == 0.25
    assert largest_gap([nan, inf], [nan, 3.0]) == 0
    assert largest_gap([1.0, 2.0], [1.0, nan]) == inf
    assert largest_gap([1.0], [inf]) == inf
