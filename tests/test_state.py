"""What is due after a step, which windows are left, and what a checkpoint holds of where a run stands."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from data.batch import Window, epoch_order
from data.examples import Example
from loop.batch_arithmetic import BatchArithmetic
from loop.measure.phases import measured
from loop.model.build import Data
from loop.recipe import DEFAULT_RECIPE, parse_recipe
from loop.saving.checkpoint import VALIDATION_ROWS, Checkpoint
from loop.state import Due, Interval, Job, TrainState, Validation
from loop.step import StepResult

DEBUG = ("--config", str(DEFAULT_RECIPE.with_name("debug.yaml")), "--epochs", "3")
ROWS = [Example.of(number, [number], [number]) for number in range(1, 8)]
STEPS = 2  # of an epoch: seven rows, four of them in a step


def job(*arguments: str, validation: int = 5) -> Job:
    recipe = parse_recipe([*DEBUG, *arguments])[1]
    data = Data(ROWS, ROWS[:validation], 0)
    batch = BatchArithmetic.of(recipe, 1, len(ROWS))
    return Job(recipe, data, batch, Path("run"), None, Accelerator(cpu=True))


def due(made: Job, *, stop_at: int = 0) -> dict[int, str]:
    """The first letters of what is due after each step."""
    found = {step: made.due(step, 15 if step == stop_at else 0) for step in range(1, 3 * STEPS + 1)}
    return {step: "l" * each.log + "v" * each.validate + "s" * each.save for step, each in found.items()}


def test_the_end_of_an_epoch_is_logged_validated_and_saved() -> None:
    assert due(job("--log_every", "100")) == {1: "", 2: "lvs", 3: "", 4: "lvs", 5: "", 6: "lvs"}


def test_everything_has_its_own_interval() -> None:
    often = job("--log_every", "1", "--eval_every", "3", "--save_every", "5")
    assert due(often) == {1: "l", 2: "ls", 3: "lv", 4: "ls", 5: "ls", 6: "lvs"}


def test_nothing_is_validated_without_rows_for_it() -> None:
    assert due(job("--eval_every", "1", "--log_every", "100", validation=0))[1] == ""


def test_a_run_that_is_stopped_is_saved_first() -> None:
    assert due(job("--log_every", "100"), stop_at=3)[3] == "s"
    assert job().due(1, stop=2) == Due(log=True, validate=False, save=True)


@pytest.mark.parametrize("after", range(3 * STEPS + 1))
def test_the_windows_that_are_left(after: int) -> None:
    """Against the order of rows, cut into fours by hand."""
    expected = []
    for epoch in range(3):
        numbers = [int(place) + 1 for place in epoch_order(7, 42, epoch)]
        expected += [sorted(numbers[:4]), sorted(numbers[4:])]
    assert rows_of_windows(job(), after) == expected[after:]
    for most in range(max(after, 1), 3 * STEPS + 2):
        cut_short = job("--max_steps", str(most))
        assert rows_of_windows(cut_short, after) == expected[after:most], "the first of them, in the same order"


def rows_of_windows(made: Job, after: int) -> list[list[int]]:
    """The rows of each window that is left after so many steps, while the run learns them."""
    state, found = TrainState(after, after, Interval(torch.device("cpu")), [], {}), []
    for window in made.windows(state):
        found.append(sorted(row for batch in window.micro_batches for row in batch.rows))
        state.advance(window, result(1.0))
    return found


def result(nll: float, skipped: bool = False) -> StepResult:
    return StepResult(torch.tensor([nll]), grad_norm=2.0, lr=0.5, skipped=skipped)


def saved(contents: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("run/checkpoints/step-000001"), contents, {}, {})


def test_what_is_not_logged_yet_goes_through_a_checkpoint() -> None:
    accelerator = Accelerator(cpu=True)
    state = TrainState.begin(None, {"rows_per_step": 4}, accelerator)
    state.advance(Window([], label_weight=2, num_tokens=9), result(3.0))
    state.validated(0.5)
    state.advance(Window([], label_weight=2, num_tokens=9), result(5.0, skipped=True))
    contents = state.as_json()
    assert contents == {
        **{"step": 2, "updates": 1, "validations": [[1, 0.5]], "run": {"rows_per_step": 4}},
        "interval": {"nlls": [8.0], "label_weight": 4},
    }
    again = TrainState.begin(saved(contents), contents["run"], accelerator)
    assert again.as_json() == contents
    again.advance(Window([], label_weight=6, num_tokens=9), result(2.0))
    with measured("forward"):
        pass
    metrics = again.interval.metrics(result(2.0), accelerator)
    assert (metrics["train/loss"], metrics["train/lr"], metrics["train/grad_norm"]) == (1.0, 0.5, 2.0)
    assert metrics["train/peak_bytes"] > 10**8, "a process that has imported torch takes more"
    assert again.as_json()["interval"] is None, "a log line has told it"
    fresh = TrainState.begin(saved(again.as_json()), {}, accelerator)
    assert (fresh.interval.nll.item(), fresh.interval.label_weight) == (0.0, 0)


@pytest.mark.parametrize(
    ("rank", "ranks", "expected"), [(0, 3, 1.0), (2, 3, 4.0), (0, 2, 7.0), (1, 2, 0.0), (0, 1, 7.0)]
)
def test_another_number_of_ranks_loses_no_loss(rank: int, ranks: int, expected: float) -> None:
    class Rank:
        device = torch.device("cpu")
        process_index = rank
        num_processes = ranks

    contents: dict[str, Any] = {"step": 1, "updates": 1, "validations": [], "run": {}}
    contents["interval"] = {"nlls": [1.0, 2.0, 4.0], "label_weight": 3}
    accelerator: Any = Rank()
    assert TrainState.begin(saved(contents), {}, accelerator).interval.nll.item() == expected


@pytest.mark.parametrize(("loss", "known"), [(1.5, [(2, 1.5)]), (None, [])])
def test_a_checkpoint_of_an_older_version_knows_its_own_validation(loss: float | None, known: object) -> None:
    contents: dict[str, Any] = {
        "step": 2,
        "updates": 2,
        "interval": None,
        "val_loss": loss,
        "run": {"rows_per_step": 4},
    }
    assert TrainState.begin(saved(contents), contents["run"], Accelerator(cpu=True)).validations == known


def test_losses_on_other_rows_are_not_compared() -> None:
    run = {VALIDATION_ROWS: "these"}
    contents: dict[str, Any] = {
        "step": 2,
        "updates": 2,
        "interval": None,
        "validations": [[1, 0.5], [2, 0.4]],
        "run": run,
    }
    accelerator = Accelerator(cpu=True)
    assert TrainState.begin(saved(contents), run, accelerator).validations == [(1, 0.5), (2, 0.4)]
    assert TrainState.begin(saved(contents), {VALIDATION_ROWS: "others"}, accelerator).validations == []


def test_the_last_step_is_as_the_end_of_an_epoch() -> None:
    cut_short = job("--log_every", "100", "--max_steps", "5")
    assert [cut_short.due(step, 0) for step in (4, 5)] == [Due(True, True, True)] * 2
    assert job("--eval_every", "5", "--log_every", "100").due(6, 0) == Due(True, True, True)


def test_with_patience_each_validation_is_logged() -> None:
    seldom = ("--log_every", "100", "--eval_every", "1")
    assert [job(*seldom).due(1, 0).log, job(*seldom, "--patience", "2").due(1, 0).log] == [False, True]


def brute_force(losses: Sequence[float], patience: int) -> int | None:
    """The number of the validation after which a run ends, or None."""
    for number in range(1, len(losses) + 1):
        best = min(losses[:number])
        if number - 1 - losses.index(best) >= patience:
            return number
    return None


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_against_brute_force(patience: int) -> None:
    """All courses of four validations with three losses, through a checkpoint after each."""
    waits = job("--patience", str(patience), "--eval_every", "1")
    for losses in product((1.0, 2.0, 3.0), repeat=4):
        state = TrainState(0, 0, Interval(torch.device("cpu")), [], {})
        ended = None
        for number, loss in enumerate(losses, start=1):
            state.advance(Window([], label_weight=2, num_tokens=9), result(3.0))
            state.validated(loss)
            state = TrainState.begin(saved(state.as_json()), {}, Accelerator(cpu=True))
            if waits.is_over(state):
                ended = number
                break
        assert ended == brute_force(losses, patience), losses
        if ended:
            said = f"ended after step {ended}: val/loss has not been lower than {min(losses[:ended]):.4f} "
            assert str(waits.out_of_patience(state)).startswith(said)


def test_the_last_step_is_no_lack_of_patience() -> None:
    waits, state = job("--patience", "1"), TrainState(6, 6, Interval(torch.device("cpu")), [], {})
    state.validations = [Validation(4, 1.0), Validation(6, 2.0)]
    assert waits.is_over(state)
    assert waits.out_of_patience(state) is None


def test_the_lowest_stays_where_it_is_chosen() -> None:
    """Equal is not lower: then the first of them is the best."""
    state, kept = TrainState(0, 0, Interval(torch.device("cpu")), [], {}), []
    for loss in (3.0, 2.0, 2.0, 4.0, 1.0):
        state.advance(Window([], label_weight=2, num_tokens=9), result(3.0))
        state.validated(loss)
        kept.append([job(*by).has_to_stay(state) for by in ((), ("--choose_by", "val/loss"))])
    assert kept == [[False, True], [False, True], [False, False], [False, False], [False, True]]
