"""Every hostile case on one process, and six of each kind on two, end in one message and exit code 2, nothing written.

`python -m tests.hostile_matrix` runs every case on both.
"""

import pytest

from tests.hostile import CASES
from tests.hostile_matrix import Outcomes, run_cases, some_of_each_kind, what_is_wrong


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(1, tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(2, tmp_path_factory.mktemp("hostile"), some_of_each_kind())


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_message(name: str, on_one: Outcomes) -> None:
    assert what_is_wrong(CASES[name], on_one[name]) is None


@pytest.mark.parametrize("name", some_of_each_kind())
def test_it_is_one_message_of_all_ranks(name: str, on_two: Outcomes) -> None:
    assert what_is_wrong(CASES[name], on_two[name]) is None


def test_there_are_enough() -> None:
    assert len(CASES) >= 80
    assert len(some_of_each_kind()) >= 25
