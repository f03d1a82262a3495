"""Rows of a step, steps, and warm-up, against numbers counted by hand."""

from dataclasses import replace

import pytest

from data.errors import UserError
from loop.batch_arithmetic import BatchArithmetic, cut_up, settle_accumulation
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


def test_the_fix_that_is_advised_is_one() -> None:
    for rows in range(1, 40):
        for processes in (1, 2, 3, 4):
            found = cut_up(rows, processes, 5)
            assert (found is None) == (rows % processes != 0)
            if found:
                assert found[0] * found[1] * processes == rows
                assert 1 <= found[0] <= 5
