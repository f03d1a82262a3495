"""Tests on made-up metrics that each warning is given where it belongs, and none where all is well."""

import random
from typing import Any

import pytest

from eval.reporting.warning_signs import (
    cut_off_answers,
    loss_spikes,
    no_progress,
    not_finite,
    overfitting,
    rows_left_out,
    steps_of_an_epoch,
    unstable_answers,
    waiting_ranks,
    warning_signs,
)
from tests.sample_runs import run

Metrics = list[dict[str, float | None]]


def losses(*values: float | None, key: str = "train/loss") -> Metrics:
    """Returns metrics with these losses at the steps 10, 20, 30 …"""
    return [{"step": 10.0 * number, key: value} for number, value in enumerate(values, start=1)]


def noisy_fall(count: int, seed: int, noise: float = 0.05) -> list[float]:
    """Returns losses that fall from 10 to 0.5 with a relative noise."""
    draw = random.Random(seed)
    return [(0.5 + 9.5 * 0.9**number) * draw.gauss(1.0, noise) for number in range(count)]


def test_val_loss_that_rises_is_overfitting_after_its_lowest() -> None:
    rising = losses(2.0, 1.0, 1.1, 1.3, key="val/loss")
    (said,) = overfitting(rising)
    assert said.startswith("Overfitting after step 20: val/loss was 1 there and is 1.3 at step 40, 30 % higher.")
    assert overfitting(rising, steps_an_epoch=10.0)[0].startswith("Overfitting after epoch 2 (step 20):")


@pytest.mark.parametrize(
    "values",
    [(), (1.0,), (2.0, 1.0), (1.0, 1.0), (2.0, 1.0, 1.5, 0.9), (2.0, 1.0, 1.019), (2.0, None, 1.0)],
    ids=["none", "one", "falling", "flat", "a bump", "within noise", "one not finite"],
)
def test_val_loss_that_ends_low_is_no_overfitting(values: tuple[float | None, ...]) -> None:
    assert overfitting(losses(*values, key="val/loss")) == []


@pytest.mark.parametrize(
    ("usage", "epochs", "steps"),
    [({"last_step": 285}, 5, 57.0), ({}, 5, None), ({"last_step": 285}, None, None), ({"last_step": 0}, 5, None)],
)
def test_the_steps_of_an_epoch(usage: dict[str, Any], epochs: Any, steps: float | None) -> None:
    assert steps_of_an_epoch(usage, epochs) == steps


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_fall_has_no_spike(seed: int) -> None:
    assert loss_spikes(losses(*noisy_fall(80, seed))) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_spike_is_found_where_it_is(seed: int) -> None:
    values = noisy_fall(80, seed)
    values[50] *= 3
    (said,) = loss_spikes(losses(*values))
    assert said.startswith("train/loss has a spike at step 510: "), "the first value is that of step 10"
    values[70] *= 4
    (said,) = loss_spikes(losses(*values))
    assert said.startswith("train/loss has 2 spikes; the highest is ")
    assert said.endswith(" at step 710.")


def test_neighbours_are_one_spike() -> None:
    values = noisy_fall(80, seed=0)
    values[50:52] = [3.0, 2.5]
    assert loss_spikes(losses(*values))[0].startswith("train/loss has a spike at step 510: 3, after ")


def test_too_few_losses_have_no_spikes() -> None:
    assert loss_spikes(losses(1.0, 1.0, 1.0, 9.0, 1.0)) == []
    assert loss_spikes(losses(*[1.0] * 50)) == []


def test_a_loss_that_does_not_fall() -> None:
    assert no_progress(losses(*noisy_fall(20, seed=0))) == []
    assert no_progress(losses(*[2.0] * 20)) == ["train/loss has not fallen: 2 at first, 2 at the end."]
    assert no_progress(losses(*[2.0] * 5)) == [], "too few"


def test_a_loss_that_is_not_finite() -> None:
    assert not_finite(losses(1.0, None, None)) == ["train/loss is not finite at step 20."]
    assert not_finite(losses(1.0, key="val/loss")) == []


def test_rows_that_were_left_out() -> None:
    tallies = {
        "a.jsonl": {"rows": 100.0, "examples": 97.0, "dropped": 3.0, "cut": 2.0, "unlabelled": 0.0},
        "b.jsonl": {"rows": 10.0, "examples": 10.0, "dropped": 0.0, "cut": 0.0, "unlabelled": 0.0},
    }
    assert rows_left_out(tallies) == [
        "a.jsonl: 3 of 100 rows were too long and dropped.",
        "a.jsonl: 2 of 100 rows were cut.",
    ]


def ranks(*seconds: tuple[float, float]) -> list[dict[str, Any]]:
    """Returns ranks with so many seconds in forward and backward."""
    return [
        {"rank": rank, "phases": {"forward": {"seconds": forward}, "backward": {"seconds": backward}}}
        for rank, (forward, backward) in enumerate(seconds)
    ]


def test_ranks_that_wait() -> None:
    assert waiting_ranks(ranks((30.0, 70.0), (50.0, 50.0))) == [
        "Ranks wait for each other: in forward rank 1 takes 50.0 s and rank 0 30.0 s, a difference of 20 % of the "
        "steps' time."
    ]
    assert waiting_ranks(ranks((46.0, 48.0), (47.0, 48.0))) == []
    assert waiting_ranks(ranks((30.0, 70.0))) == []
    assert waiting_ranks([]) == []


def test_answers_that_are_not_the_same_alone() -> None:
    scores = {"base": {"verified": 20.0, "different": 0.0}, "tuned": {"verified": 20.0, "different": 2.0}}
    assert unstable_answers(scores) == ["tuned: 2 of 20 answers differ when their questions are asked one at a time."]


def test_answers_that_were_cut_off() -> None:
    assert cut_off_answers({"base": {"cut_off": 9.0}, "tuned": {"cut_off": 0.0}}) == []
    (said,) = cut_off_answers({"tuned": {"cut_off": 3.0}})
    assert said == "3 answers of the tuned model were cut off; --max-new-tokens gives them more."


def test_a_run_without_any_sign() -> None:
    assert warning_signs(run("mine")) == []
