"""Rows of a step, steps, and warm-up, against numbers counted by hand."""

import math
import re
from dataclasses import replace

import pytest
import torch

from data.errors import UserError
from loop.batch_arithmetic import BatchArithmetic, cut_up, settle_accumulation
from loop.model.build import build_lr_scheduler
from loop.recipe import DEFAULT_RECIPE, parse_recipe

DEBUG = DEFAULT_RECIPE.with_name("debug.yaml")
QWEN = DEFAULT_RECIPE.with_name("qwen2.5-14b.yaml")


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("recipe", [DEFAULT_RECIPE, QWEN])
def test_the_reference_learns_32_rows_a_step_on_any_number_of_processes(
    recipe: object, processes: int, accumulation: int
) -> None:
    found = BatchArithmetic.of(parse_recipe(["--config", str(recipe)])[1], processes, 1798)
    assert (found.rows_per_step, found.grad_accum_steps) == (32, accumulation)
    assert found.steps_per_epoch == 57, "56 full windows of 32 rows, and one of 6"


def test_steps_and_warm_up() -> None:
    """The reference: 57 steps in its epoch, of which the warm-up takes 3 % rounded up."""
    qwen = parse_recipe(["--config", str(QWEN)])[1]
    found = BatchArithmetic.of(qwen, 2, 1798)
    assert (found.total_steps, found.warmup_steps) == (57, 2)
    three = BatchArithmetic.of(replace(qwen, epochs=3), 2, 1798)
    assert (three.total_steps, three.warmup_steps) == (171, 6)


def test_without_rows_per_step_the_batch_grows_with_the_processes() -> None:
    debug = parse_recipe(["--config", str(DEBUG)])[1]
    assert [BatchArithmetic.of(debug, processes, 7).rows_per_step for processes in (1, 2, 4)] == [4, 8, 16]
    assert settle_accumulation(debug, 4) is debug


@pytest.mark.parametrize(
    ("arguments", "processes", "said"),
    [
        ([], 3, "rows_per_step is 32, but micro_batch_size 16 x 3 processes = 48 rows, which does not divide it. "
         "Launch a number of processes that divides 32"),
        ([], 4, "micro_batch_size 16 x 4 processes = 64 rows, which does not divide it. Set --micro_batch_size 8"),
        (["--grad_accum_steps", "3"], 2, "16 x grad_accum_steps 3 x 2 processes = 96 rows. Leave grad_accum_steps out, "
         "or set --rows_per_step 96"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_shared(arguments: list[str], processes: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        settle_accumulation(parse_recipe(arguments)[1], processes)
    assert said in str(error.value)


def test_auto_shares_the_rows_out_on_any_number_of_processes_that_divides_them() -> None:
    auto = parse_recipe(["--micro_batch_size", "auto"])[1]
    found = [BatchArithmetic.of(auto, processes, 1798) for processes in (1, 2, 8)]
    assert [(one.micro_batch_size, one.rows_per_step) for one in found] == [(32, 32), (16, 32), (4, 32)]
    with pytest.raises(UserError, match=r"rows_per_step is 32, which 3 processes cannot share. Launch a number"):
        settle_accumulation(auto, 3)
    with pytest.raises(UserError, match="micro_batch_size is auto, but has to be a number where rows_per_step is null"):
        parse_recipe(["--config", str(DEBUG), "--micro_batch_size", "auto", "--grad_accum_steps", "1"])
    with pytest.raises(UserError, match="grad_accum_steps is 2, but has to be left out where micro_batch_size is auto"):
        parse_recipe(["--micro_batch_size", "auto", "--grad_accum_steps", "2"])


def test_the_fix_that_is_advised_is_one() -> None:
    for rows in range(1, 40):
        for processes in (1, 2, 3, 4):
            found = cut_up(rows, processes, 5)
            assert (found is None) == (rows % processes != 0)
            if found:
                assert found[0] * found[1] * processes == rows
                assert 1 <= found[0] <= 5


def schedule(rows: int, *arguments: str) -> BatchArithmetic:
    return BatchArithmetic.of(parse_recipe(["--config", str(DEBUG), *arguments])[1], 1, rows)


def test_a_run_that_is_nothing_but_warm_up_is_refused() -> None:
    """Four rows a step. In its one step the learning rate would be 0."""
    with pytest.raises(UserError) as error:
        schedule(3, "--epochs", "1").check_schedule()
    assert "optim.warmup_ratio is 0.03: 1 of the 1 steps would be warm-up" in str(error.value)
    assert "Give --epochs 2, fewer rows a step, or a smaller --optim.warmup_ratio" in str(error.value)
    for fixed in (("--epochs", "2"), ("--epochs", "1", "--optim.warmup_ratio", "0")):
        schedule(3, *fixed).check_schedule()
    schedule(3, "--epochs", "1", "--micro_batch_size", "1").check_schedule()


def test_max_steps_counts_steps_and_cuts_no_more_than_there_is() -> None:
    """Seven rows, four a step: two steps an epoch."""
    for most, total, cut_short in ((1, 1, True), (3, 3, True), (4, 4, False), (5, 4, False), (None, 4, False)):
        made = schedule(7, "--epochs", "2", *(("--max_steps", str(most)) if most else ()))
        assert (made.total_steps, made.cut_short) == (total, cut_short), most


def test_a_warm_up_that_max_steps_cuts_short_is_refused_with_the_number_that_helps() -> None:
    with pytest.raises(
        UserError, match=r"1 of the 1 steps .* 3 epochs \(max_steps 1\).\) Give --max_steps 2, or a smaller"
    ):
        schedule(7, "--epochs", "3", "--max_steps", "1").check_schedule()
    schedule(7, "--epochs", "3", "--max_steps", "2").check_schedule()
    with pytest.raises(UserError, match=r"Give --epochs 2 --max_steps 2, or a smaller"):
        schedule(3, "--epochs", "1", "--max_steps", "1").check_schedule()
    schedule(3, "--epochs", "2", "--max_steps", "2").check_schedule()


@pytest.mark.parametrize(("most", "warmup"), [(7, 3), (10, 4), (30, 4)])
def test_the_schedule_runs_over_max_steps(most: int, warmup: int) -> None:
    """The closed form: in a line to the peak, and half a cosine to 0 at the end."""
    ratio = ("--optim.warmup_ratio", "0.4") if most < 30 else ("--optim.warmup_ratio", "0.3")
    words = ["--config", str(DEBUG), "--epochs", "6", "--max_steps", str(most), *ratio]
    recipe = parse_recipe(words)[1]
    batch = BatchArithmetic.of(recipe, 1, 7)
    total = min(most, 12)
    assert (batch.total_steps, batch.warmup_steps) == (total, warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optim.lr)
    scheduler = build_lr_scheduler(recipe, optimizer, batch.total_steps)
    for step in range(total):
        falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        expected = recipe.optim.lr * (step / warmup if step < warmup else falling)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.34, 0.5, 0.8, 0.95])
def test_the_schedules_that_are_refused_are_those_that_never_reach_the_peak(ratio: float) -> None:
    """The judge is the schedule itself, as the run uses it."""
    recipe = parse_recipe(["--config", str(DEBUG), "--optim.warmup_ratio", str(ratio)])[1]
    for epochs in range(1, 30):
        batch = BatchArithmetic.of(replace(recipe, epochs=epochs), 1, 4)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optim.lr)
        scheduler = build_lr_scheduler(recipe, optimizer, batch.total_steps)
        rates = []
        for _ in range(batch.total_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        if max(rates) == recipe.optim.lr:
            batch.check_schedule()
            continue
        with pytest.raises(UserError) as error:
            batch.check_schedule()
        advised = re.search(r"--epochs (\d+)", str(error.value))
        assert advised
        BatchArithmetic.of(replace(recipe, epochs=int(advised[1])), 1, 4).check_schedule()
