"""What a model can take is read before the start: positions, token ids with an embedding, layers that a row reaches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, OPTConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from data.errors import UserError
from data.examples import Example, Examples, sha256_of
from loop.model.build import adapt, adapters_of, add_adapters
from loop.model.limits import check_limits, positions_of
from loop.model.lora import shared_inputs
from loop.model.reach import Reach
from loop.recipe import parse_recipe
from tests.test_neighbours import DYNAMIC, LONG, SMALL, random_model

TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def row(length: int, token: int = 5) -> Example:
    return Example.of(7, [token] * (length - 1), [token])


LEARNED = {
    "GPT-2": GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=2),
    "OPT, with two spare rows": OPTConfig(
        **TEXT, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1
    ),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_row_beyond_learned_positions_is_refused(kind: str) -> None:
    """The model itself, asked with one token more, is the judge: it fails."""
    config = LEARNED[kind]
    assert check_limits(on_meta(config), [[row(64)]]) is None
    with pytest.raises(UserError, match="longest row has 65 tokens, but the model was made for 64, and it has no"):
        check_limits(on_meta(config), [[row(3)], [row(65)]])
    model = AutoModelForCausalLM.from_config(config)
    model(input_ids=torch.tensor([row(64).prompt_ids + row(64).label_ids]))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 65), 5), position_ids=torch.arange(65)[None])


def test_a_row_beyond_rope_is_a_warning() -> None:
    base = random_model("llama").to("meta")
    assert check_limits(base, [[row(128)]]) is None
    said = check_limits(base, [[row(129)], []])
    assert said == "the longest row has 129 tokens, but the model was made for 128: it may be weak beyond them, and " \
        "nothing here checks that"  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "positions"),
    [
        ("llama", {}, 128),
        ("llama", {"rope_parameters": DYNAMIC | {"factor": 4.0}}, 512),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 256),
        # Llama 3.1 writes the longer number into max_position_embeddings itself.
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 1e4,
                }
            },
            128,
        ),
        # Qwen2.5's advice for long texts adds YaRN and leaves max_position_embeddings as it was.
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "rope_theta": 1e4,
                }
            },
            512,
        ),
        ("phi3", {"rope_parameters": LONG | {"original_max_position_embeddings": 16}}, 128),
    ],
)
def test_positions_count_the_scaling_of_rope(kind: str, more: dict[str, Any], positions: int) -> None:
    assert positions_of(AutoConfig.for_model(kind, **(SMALL | more))) == positions


def test_a_model_that_names_no_limit_has_none() -> None:
    assert positions_of(AutoConfig.for_model("mamba2")) is None
    assert positions_of(AutoConfig.for_model("bloom")) is None


def test_a_token_without_an_embedding_is_refused_and_others_are_not() -> None:
    base = random_model("llama").to("meta")
    assert check_limits(base, [[row(5, token=99)]]) is None
    for rows in ([row(5), Example.of(12, [1, 100], [3])], Examples([row(5), Example.of(12, [1], [3, 100])])):
        with pytest.raises(UserError, match=r"row 12 has a token with the id 100, but .* has embeddings for 100"):
            check_limits(base, [rows])


def vision_config() -> Any:
    """Gemma 3 with a vision tower, whose layers have the same names as those of the text model."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoConfig.for_model(
        "gemma3",
        text_config=TEXT | {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 64},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=99,
    )


def test_a_vision_tower_gets_no_adapters() -> None:
    """What learns is what the text path calls: the judge is a real backward pass."""
    recipe = parse_recipe(["--lora.target_modules", "[q_proj, o_proj]"])[1]
    model = add_adapters(on_meta(vision_config()), recipe)
    names = {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert not [name for name in names if "vision" in name]
    left_out = list(adapters_of(model).exclude_modules or [])
    assert len(left_out) == 2, "each of two layers of the tower has a q_proj, but no o_proj"
    assert all("vision" in name for name in left_out)

    torch.manual_seed(0)
    real = adapt(AutoModelForCausalLM.from_config(vision_config()), adapters_of(model), autocast_adapter_dtype=True)
    for parameter in real.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    real.get_base_model()(input_ids=torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in real.parameters() if p.requires_grad)


def test_a_target_that_no_row_reaches_is_refused() -> None:
    recipe = parse_recipe(["--lora.target_modules", "[q_proj, out_proj]"])[1]
    with pytest.raises(UserError, match=r"lora.target_modules: no row of text reaches the layers of .* named out_proj"):
        add_adapters(on_meta(vision_config()), recipe)


def test_where_every_layer_is_reached_none_is_left_out() -> None:
    for kind in ("llama", "qwen2", "nemotron_h"):
        model = random_model(kind).to("meta")
        assert Reach(model).unreached(["q_proj", "up_proj", "lm_head"]) == []


class Layers(nn.Module):
    """Embeddings and layers, which `passes` calls."""

    def __init__(self, passes: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embeddings, self.passes = nn.Embedding(10, 4), passes
        self.layers = nn.ModuleList(Layer(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.passes(self, self.embeddings(input_ids))


class Layer(GradientCheckpointingLayer):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden)
        return result


@pytest.mark.parametrize(
    ("passes", "whole"),
    [
        (lambda self, hidden: self.layers[1](self.layers[0](hidden)), [0, 1]),
        (lambda self, hidden: self.layers[1](self.layers[0](self.layers[0](hidden))), [1]),  # shared, as in ALBERT
        (lambda self, hidden: self.layers[1](hidden=self.layers[0](hidden)), [0]),
        (lambda self, hidden: self.layers[1](hidden), [1]),
        (lambda self, hidden: self.layers[int(hidden.sum())](hidden), []),  # looks at the contents, as some experts do
    ],
)
def test_zero3_fetches_a_layer_as_a_whole_where_a_row_passes_it_once(passes: Any, whole: list[int]) -> None:
    with torch.device("meta"):
        model = Layers(passes)
    assert Reach(model).passed_once() == [model.layers[i] for i in whole]


def test_projections_of_one_input_share_their_work() -> None:
    """Found by calling the model; the head stands in no decoder layer, and PEFT computes its adapter."""
    recipe = parse_recipe(["--lora.target_modules", "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, lm_head]"])[1]
    model = add_adapters(random_model("llama").to("meta"), recipe)
    groups = shared_inputs(model)
    layers = [f"base_model.model.model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    assert groups == [
        [f"{layer}.{name}" for name in names]
        for layer in layers
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        )
    ]
    assert model.get_submodule("base_model.model.lm_head").shared is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "nemotron_h"])
def test_the_layers_of_a_model_are_fetched_as_a_whole(kind: str) -> None:
    model = random_model(kind).to("meta")
    assert len(Reach(model).passed_once()) == model.config.get_text_config().num_hidden_layers


def test_the_hash_of_rows_is_that_of_their_tokens() -> None:
    """Independent of where the rows lie; row numbers do not change it, and any token does."""
    rows = [Example.of(1, [1, 2], [3]), Example.of(2, [4], [5, 6]), Example.of(3, [7], [8])]
    kept = Examples(rows)
    assert sha256_of(kept) == sha256_of(rows)
    assert sha256_of(kept, 2) == sha256_of(rows[:2]) == sha256_of(Examples(rows[:2]))
    assert sha256_of([Example.of(9, *([e.prompt_ids, e.label_ids])) for e in rows]) == sha256_of(rows)
    others = [
        rows[::-1],
        rows[:2],
        [Example.of(1, [1], [2, 3]), *rows[1:]],
        [Example.of(1, [1, 2, 3], [4]), Example.of(2, [5, 6], [7]), rows[2]],
    ]
    assert len({sha256_of(rows), *map(sha256_of, others)}) == 1 + len(others)
    assert Examples(rows).largest_id == 8
