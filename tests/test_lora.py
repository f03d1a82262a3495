"""LoRA in fewer passes against PEFT's own layer, and dropout against what it has to do."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loop.model.lora import draw_dropped, dropped_places, fuse_lora


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


def adapted(dropout: float, **more: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["one", "two"], **more)
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
    model = adapted(0.0 if training else 0.3).train(training)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for ours, theirs in zip(result(fused, x), result(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_fp32_activation_under_autocast() -> None:
    """Norms give them on a GPU; LoRA computes in the autocast dtype then, both ways."""
    model = adapted(0.3).float().train()
    fuse_lora(model)
    x = torch.randn(2, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_stay_pefts(more: dict[str, bool]) -> None:
    model = adapted(0.0, **more)
    before = model(torch.ones(1, 24, dtype=torch.float64))
    fuse_lora(model)
    assert torch.equal(model(torch.ones(1, 24, dtype=torch.float64)), before)
    assert not any("forward" in vars(module) for module in model.modules())


def mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """As on a GPU."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(p)


@pytest.mark.parametrize("draw", [draw_dropped, mask])
def test_gradient_of_dropout_is_that_of_what_was_dropped(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences, with the same draw each time."""
    monkeypatch.setattr("loop.model.lora.draw_dropped", draw)
    model = adapted(0.4).train()
    fuse_lora(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return model(x).square().sum()  # type: ignore[no-any-return]

    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, *parameters))


@pytest.mark.parametrize("draw", [draw_dropped, mask])
def test_dropout_keeps_the_mean(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is scaled by 1 / (1 - p): over many draws the mean is the output without dropout."""
    monkeypatch.setattr("loop.model.lora.draw_dropped", draw)
    model = adapted(0.2)
    fuse_lora(model)
    x = torch.randn(1, 24, dtype=torch.float64)
    expected = model.base_model.model.one.eval()(x)
    layer = model.base_model.model.one.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("p", [0.01, 0.5, 0.97])
def test_each_place_is_dropped_by_itself(p: float) -> None:
    """As often as p says, wherever it is, and whether the one before it was dropped or not."""
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
    """Eight standard deviations of places are drawn; with none of them to spare the rest is drawn later."""
    monkeypatch.setattr("loop.model.lora.SPARE", -0.5)
    torch.manual_seed(2)
    places = dropped_places(10_000, 0.5)
    assert places.tolist() == sorted(set(places.tolist()))
    assert places[-1] > 9_900
    assert abs(len(places) - 5_000) < 6 * 50
