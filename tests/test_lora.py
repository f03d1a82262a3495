"""The fused LoRA layer against PEFT's own layer, and its dropout against what dropout has to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

from loop.model.lora import FusedLora, dropped_places, share_inputs, use_fused_lora


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


def adapted(dropout: float, fused: bool = True, **more: Any) -> Any:
    """The same weights whether fused or not; the adapters are no longer zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["one", "two"], **more)
    if fused:
        use_fused_lora(config)
    model = get_peft_model(Model().double(), config, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def result(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("training", [True, False])
def test_is_pefts(training: bool) -> None:
    dropout = 0.0 if training else 0.3
    model, fused = (adapted(dropout, fused).train(training) for fused in (False, True))
    assert type(fused.base_model.model.one) is FusedLora
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for ours, theirs in zip(result(fused, x), result(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_fp32_activation_under_autocast() -> None:
    """On a GPU norms return fp32 under autocast. LoRA then computes in the autocast dtype, in both directions."""
    model = adapted(0.3).float().train()
    x = torch.randn(2, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_are_computed_by_peft(more: dict[str, bool]) -> None:
    """DoRA scales by the weights' norms and lora_bias adds a bias: the fused formula would give another output."""
    x = torch.randn(3, 24, dtype=torch.float64)
    for ours, theirs in zip(result(adapted(0.0, **more), x), result(adapted(0.0, False, **more), x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_disabled_or_merged_adapter_is_not_added() -> None:
    model = adapted(0.0).eval()
    x = torch.randn(3, 24, dtype=torch.float64)
    with_adapter = model(x)
    one, two = model.base_model.model.one.base_layer, model.base_model.model.two.base_layer
    with model.disable_adapter():
        torch.testing.assert_close(model(x), two(torch.tanh(one(x))))
    model.merge_adapter()
    torch.testing.assert_close(model(x), with_adapter)


def test_files_are_pefts_and_load_without_us(tmp_path: Path) -> None:
    """The adapter's folder has what PEFT's own layers would write, and plain PEFT computes the same from it."""
    ours, theirs = adapted(0.0), adapted(0.0, fused=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0] == configs[1]
    torch.manual_seed(0)
    loaded: Any = PeftModel.from_pretrained(Model().double(), str(tmp_path / "ours")).double()
    assert type(loaded.base_model.model.one) is lora.Linear
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), ours(x))


def test_subclasses_of_linear_stay_with_peft() -> None:
    """Quantized layers are subclasses of nn.Linear, and PEFT has layers of its own for them."""

    class Special(nn.Linear):
        pass

    model = Model()
    model.one = Special(24, 40)
    config = use_fused_lora(LoraConfig(r=4, target_modules=["one", "two"]))
    adapted: Any = get_peft_model(model, config)
    layers = adapted.base_model.model
    assert (type(layers.one), type(layers.two)) == (lora.Linear, FusedLora)


@pytest.mark.parametrize("places", [True, False])
def test_gradient_of_dropout_is_that_of_what_was_dropped(places: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient agrees with finite differences, where each evaluation draws the same."""
    monkeypatch.setattr("loop.model.lora.drops_places", lambda _: places)
    model = adapted(0.4).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return model(x).square().sum()  # type: ignore[no-any-return]

    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, *parameters))


@pytest.mark.parametrize("places", [True, False])
def test_dropout_keeps_the_mean(places: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept elements are scaled by 1 / (1 - p), so the mean over many draws is the output without dropout."""
    monkeypatch.setattr("loop.model.lora.drops_places", lambda _: places)
    model = adapted(0.2)
    x = torch.randn(1, 24, dtype=torch.float64)
    expected = model.base_model.model.one.eval()(x)
    layer = model.base_model.model.one.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("p", [0.01, 0.5, 0.97])
def test_each_place_is_dropped_by_itself(p: float) -> None:
    """Each place is dropped as often as p says, and as often after a dropped one as after a kept one."""
    torch.manual_seed(1)
    count, draws = 50, 8000
    dropped = torch.zeros(draws, count)
    for i in range(draws):
        places = dropped_places(count, p)
        assert len(set(places.tolist())) == len(places)
        dropped[i, places] = 1
    error = (p * (1 - p) / draws) ** 0.5
    assert ((dropped.mean(0) - p).abs() < 5 * error).all()
    both = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(both - p * p) < 6 * (p * p * (1 - p * p) / (draws * count)) ** 0.5 + 1e-4


def test_draws_more_where_the_first_gaps_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usually enough places are drawn at once. Here too few are drawn at first, so the loop has to draw more."""
    monkeypatch.setattr("loop.model.lora.SPARE", -0.5)
    torch.manual_seed(2)
    places = dropped_places(10_000, 0.5)
    assert places.tolist() == sorted(set(places.tolist()))
    assert places[-1] > 9_900
    assert abs(len(places) - 5_000) < 6 * 50


class Attention(nn.Module):
    """Three projections of one input, one of them with a bias, and one of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 16), nn.Linear(24, 8, bias=False), nn.Linear(24, 8, bias=False)
        self.o = nn.Linear(16, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.tanh(q) * torch.cat([k, v], -1))  # type: ignore[no-any-return]


def attention(dropout: float, *groups: list[str], fused: bool = True) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["q", "k", "v", "o"])
    model = get_peft_model(
        Attention().double(), use_fused_lora(config) if fused else config, autocast_adapter_dtype=False
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(hash_of(name)))
    grouped = {name for names in groups for name in names}
    every = [*groups, *([name] for name in ("q", "k", "v", "o") if name not in grouped)]
    share_inputs(model.get_submodule("base_model.model"), every)
    return model


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def test_layers_that_share_an_input_compute_what_each_computes_alone() -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    theirs = result(attention(0.0, fused=False), x)
    for groups in ([], [["q", "k", "v"]], [["q", "k"]]):
        for ours, expected in zip(result(attention(0.0, *groups), x), theirs, strict=True):
            torch.testing.assert_close(ours, expected)


def test_layers_that_share_an_input_drop_the_same_of_it() -> None:
    """The gradient agrees with finite differences; and where all weights are alike, so are the outputs."""
    model = attention(0.4, ["q", "k", "v"]).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return model(x).square().sum()  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, (torch.randn(3, 24, dtype=torch.float64, requires_grad=True), *parameters))
    inner = model.base_model.model
    inner.v.load_state_dict(inner.k.state_dict())
    x = torch.randn(3, 24, dtype=torch.float64)
    inner.q(x)
    torch.testing.assert_close(inner.k(x), inner.v(x))
    assert inner.k.shared.input is None, "nothing is kept longer than it is needed"


def test_a_layer_that_gets_another_input_than_its_group_is_on_its_own() -> None:
    inner = attention(0.0, ["q", "k", "v"]).base_model.model
    alone = attention(0.0).base_model.model
    x, other = torch.randn(2, 3, 24, dtype=torch.float64)
    assert [
        layer(other if name == "k" else x).sum() for name, layer in (("q", inner.q), ("k", inner.k), ("v", inner.v))
    ] == [layer(other if name == "k" else x).sum() for name, layer in (("q", alone.q), ("k", alone.k), ("v", alone.v))]
    torch.testing.assert_close(inner.k(x), alone.k(x))  # out of order, and twice
    torch.testing.assert_close(inner.k(x), alone.k(x))
