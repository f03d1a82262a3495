"""The operators of a GPU, computed on a CPU, against what transformers writes out; and what a step dispatches."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.dispatches import CONTENDERS, count_layer
from data.layout import Layout
from loop.model.attention import BY_ROW, IN_LINE, attention_for, works_in_line
from loop.model.build import set_layout
from loop.model.operators import is_rms_norm, is_rope, use_fused_operators
from tests.test_layout import adapted, loss_and_gradients, unequal_rows


def code_of(kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


@pytest.fixture(autouse=True)
def rope_is_put_back() -> Iterator[None]:
    """use_fused_operators replaces a function of transformers for the whole process."""
    modules = [code_of(kind) for kind in ("qwen2", "phi3")]
    # A test of the plan may have replaced it in this process too.
    before = [getattr(module.apply_rotary_pos_emb, "written_out", module.apply_rotary_pos_emb) for module in modules]
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = function
    yield
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = function


def varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *_: int, enable_gqa: bool, **more: Any
) -> Tensor:
    """What the kernel computes, a sequence at a time: causal, and aligned at the ends of queries and keys."""
    assert more["window_size"] == (-1, 0)
    outputs = []
    for i in range(len(queries) - 1):
        q = query[queries[i] : queries[i + 1]].transpose(0, 1)
        k, v = (whole[keys[i] : keys[i + 1]].transpose(0, 1) for whole in (key, value))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(scaled_dot_product_attention(q, k, v, sees, scale=more["scale"], enable_gqa=enable_gqa))
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_a_step_with_them_is_a_step_without(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, in float64; RMSNorm of transformers computes in fp32 even there."""
    monkeypatch.setattr("loop.model.attention.varlen_attn", varlen)
    rows = unequal_rows()
    expected, gradients = loss_and_gradients(adapted(layout).double(), rows, layout)
    model = adapted(layout).double()
    set_layout(model.get_base_model(), layout, IN_LINE)
    use_fused_operators(model.get_base_model())
    assert any(type(module).__mro__[1].__name__ == "Qwen2RMSNorm" for module in model.modules())
    assert hasattr(code_of("qwen2").apply_rotary_pos_emb, "written_out")
    found, others = loss_and_gradients(model, rows, layout)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-6)


def classes_of(kind: str) -> dict[str, Any]:
    return dict(inspect.getmembers(code_of(kind), inspect.isclass))


def test_a_norm_of_another_kind_is_left_alone() -> None:
    """All norms of these models, found by trying: those with 1 + weight, with a mean, or of more than a weight."""
    kinds = {
        kind: {name for name, found in classes_of(kind).items() if is_rms_norm(found)}
        for kind in ("qwen2", "llama", "gemma2", "cohere2", "nemotron", "gpt_oss", "glm4")
    }
    assert kinds == {
        "qwen2": {"Qwen2RMSNorm"},
        "llama": {"LlamaRMSNorm"},
        "gemma2": set(),
        "cohere2": set(),
        "nemotron": set(),
        "gpt_oss": {"GptOssRMSNorm"},
        "glm4": {"Glm4RMSNorm"},
    }


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    """Cohere and GLM rotate pairs of neighbours, GPT-OSS has halves of cos and sin."""
    told = {
        kind: is_rope(code_of(kind).apply_rotary_pos_emb) for kind in ("qwen2", "llama", "cohere2", "glm4", "gpt_oss")
    }
    assert told == {"qwen2": True, "llama": True, "cohere2": False, "glm4": False, "gpt_oss": False}


def test_a_head_of_which_a_part_is_rotated_is_left_to_the_model() -> None:
    """Phi-3's function is the same where all of a head is rotated, and does more."""
    written_out = code_of("phi3").apply_rotary_pos_emb
    holder = nn.Module()
    holder.__class__ = type("Phi3Holder", (nn.Module,), {"__module__": code_of("phi3").__name__})
    use_fused_operators(holder)
    fused = code_of("phi3").apply_rotary_pos_emb
    assert fused is not written_out
    q, k, half = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 2)
    angles = torch.cat([half, half], -1)
    for found, expected in zip(
        fused(q, k, angles.cos(), angles.sin()), written_out(q, k, angles.cos(), angles.sin()), strict=True
    ):
        assert torch.equal(found, expected)


def test_norms_of_another_dtype_than_their_input_are_written_out() -> None:
    """An fp32 weight makes the result of a bf16 input fp32."""
    norm = code_of("qwen2").Qwen2RMSNorm(8)
    use_fused_operators(norm)
    assert norm(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def misaligned(*arguments: Any, **more: Any) -> Tensor:
    """A kernel whose causal mask is aligned at the beginnings, as SDPA's own is."""
    query, key, value, queries, keys, *_ = arguments
    outputs = []
    for i in range(len(queries) - 1):
        q = query[queries[i] : queries[i + 1]].transpose(0, 1)
        k, v = (whole[keys[i] : keys[i + 1]].transpose(0, 1) for whole in (key, value))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        outputs.append(scaled_dot_product_attention(q, k, v, sees, enable_gqa=True))
    return torch.cat(outputs, 1).transpose(0, 1)


def test_the_kernel_is_used_only_where_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    tried = (4, 2, 16, torch.bfloat16, cpu)
    works_in_line.cache_clear()
    assert not works_in_line(*tried), "PyTorch has no such kernel for a CPU"
    for kernel, works in ((varlen, True), (misaligned, False)):
        works_in_line.cache_clear()
        monkeypatch.setattr("loop.model.attention.varlen_attn", kernel)
        assert works_in_line(*tried) == works
    works_in_line.cache_clear()
    assert attention_for(adapted("padded").get_base_model(), cpu) == BY_ROW


def test_what_a_layer_dispatches() -> None:
    """At most 110 kernels a layer, forward and backward (237 before, 200 for PEFT as it comes)."""
    kernels: dict[Any, int] = {}
    for one in CONTENDERS:
        kernels[one.ours, one.layout, one.checkpointing] = sum(count_layer(one).kernels.values())
    assert kernels[True, "shared_prefix", "none"] <= 110
    assert kernels[True, "packed", "none"] <= 110
    for checkpointing in ("none", "non_reentrant"):
        layout = "padded" if checkpointing == "none" else "shared_prefix"
        assert kernels[True, layout, checkpointing] < 0.6 * kernels[False, "padded", checkpointing]
