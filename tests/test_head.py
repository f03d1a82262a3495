"""The loss inside the model: it is PyTorch's cross entropy, makes few logits, and keeps each model's own way."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)

from data.examples import Example
from data.layout import Layout, collate
from loop.internals.torch_internals import TorchDispatchMode, tree_leaves
from loop.model import head
from loop.model.head import HeadWithLoss, LinearNLL, PeftModelWithLoss, has_plain_head
from loop.step import summed_nll

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": None,
    "use_cache": False,
}
ROWS = [Example.of(1, [1, 2, 3, 4], [5, 6]), Example.of(2, [1, 2, 9], [7] * 30), Example.of(3, [1, 2, 8, 8, 8, 8], [9])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_is_cross_entropy(bias: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS", at_once)
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(30, (11,))
    b = torch.randn(30, dtype=torch.float64) if bias else None
    expected = cross_entropy(torch.nn.functional.linear(hidden, weight, b), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(3 * expected, hidden)
    found = LinearNLL.apply(hidden, weight, b, labels, None)  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(3 * found, hidden)[0], gradient, rtol=1e-5, atol=1e-6)


def test_small_probabilities_survive_fp16() -> None:
    """Each of 60,000 tokens has a probability of about 1.7e-5, below the smallest normal number of fp16."""
    torch.manual_seed(0)
    hidden, weight = 0.01 * torch.randn(4, 16), torch.randn(60_000, 16)
    labels = torch.tensor([1, 2, 3, 4])
    exact = hidden.clone().requires_grad_()
    cross_entropy(exact @ weight.half().float().T, labels, reduction="sum").backward()
    half = hidden.half().requires_grad_()
    LinearNLL.apply(half, weight.half(), None, labels, None).backward()  # type: ignore[no-untyped-call]
    assert half.grad is not None
    torch.testing.assert_close(half.grad.float(), exact.grad, rtol=5e-3, atol=5e-3)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def adapted(base: Any, target: str = "q_proj") -> Any:
    base.config.use_cache = False
    return PeftModelWithLoss(base, LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")).train()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_no_logits_but_where_a_label_is(layout: Layout) -> None:
    """A step makes a tensor [labels, vocab] and none of [B, T, vocab]; in chunks not even the first one exists."""
    vocab = 200_000
    model = adapted(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"vocab_size": vocab}), dtype=torch.float32))
    batch = collate(ROWS, layout, 0)
    largest = Largest()
    with largest:
        summed_nll(model, batch).backward()
    labels, everything = len(batch.predicts), batch.input_ids.numel()
    assert labels < everything
    weight = vocab * SIZES["hidden_size"]
    assert largest.elements <= max(labels * vocab, weight)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head, "LOGITS", 4 * vocab)
        largest.elements = 0
        with largest:
            summed_nll(model, batch).backward()
    assert largest.elements <= max(4 * vocab, weight) < labels * vocab


PLAIN = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
OTHER = {"granite": GraniteConfig, "gemma2": Gemma2Config, "cohere": CohereConfig}  # scaled, capped, scaled
MORE: dict[str, Any] = {"granite": {"logits_scaling": 8.0}}


def build(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | MORE.get(name, {})), dtype=torch.float32)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0, 1.0]])
@pytest.mark.parametrize("name", PLAIN | OTHER)
def test_any_model_keeps_its_own_loss(name: str, weights: list[float] | None) -> None:
    """Loss and gradients are those of the logits that the model itself gives, whatever it makes of lm_head's output."""
    base = build(name, (PLAIN | OTHER)[name])
    assert has_plain_head(base) == (name in PLAIN)
    model = adapted(base).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = collate(ROWS, "padded", 0)
    if weights is not None:  # repeated, so that each label has one
        label_weights = torch.tensor(weights).repeat(len(batch.label_ids))[: len(batch.label_ids)]
        batch = replace(batch, label_weights=label_weights)
    logits = model.get_base_model()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    nlls = cross_entropy(logits.flatten(0, 1)[batch.predicts], batch.label_ids, reduction="none")
    expected = nlls.sum() if weights is None else (nlls * label_weights).sum()
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    found = summed_nll(model, batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, parameter in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_lm_head_is_trained() -> None:
    base = build("llama", LlamaConfig)
    model = adapted(base, "lm_head")
    summed_nll(model, collate(ROWS, "padded", 0)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_looking_at_the_head_leaves_the_model_as_it_was() -> None:
    base = build("llama", LlamaConfig)
    parts = base.model, base.lm_head
    has_plain_head(base)
    assert (base.model, base.lm_head) == parts
    assert [name for name, _ in base.named_children()] == ["model", "lm_head"]


def test_a_bias_of_lm_head_counts() -> None:
    """Phi is an architecture whose lm_head has a bias."""
    base = AutoModelForCausalLM.from_config(PhiConfig(**SIZES), dtype=torch.float32)
    torch.nn.init.normal_(base.lm_head.bias)
    assert has_plain_head(base)
    model = adapted(base)
    batch = collate(ROWS, "padded", 0)
    hidden = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    by_hand = (hidden @ base.lm_head.weight.T + base.lm_head.bias).flatten(0, 1)[batch.predicts]
    expected = cross_entropy(by_hand, batch.label_ids, reduction="sum")
    assert summed_nll(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_names_and_tied_weights_stay() -> None:
    """The head owns the same parameter as before, under the same name, also where the embeddings share it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True), dtype=torch.float32)
    names = list(base.state_dict())
    weight = base.lm_head.weight
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = adapted(base)
    assert isinstance(base.lm_head, HeadWithLoss)
    assert base.lm_head.weight is weight is base.model.embed_tokens.weight
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(names) == len([name for name in model.state_dict() if "lora_" not in name])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    summed_nll(model, collate(ROWS, "padded", 0)).backward()
    assert weight.grad is None


def test_the_base_still_gives_logits_and_generates() -> None:
    model = adapted(build("llama", LlamaConfig)).eval()
    ids = torch.tensor([[1, 2, 3]])
    logits = model.get_base_model()(input_ids=ids).logits
    assert logits.shape == (1, 3, SIZES["vocab_size"])
    generated = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    assert generated[0, -1] == logits[0, -1].argmax()
