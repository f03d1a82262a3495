"""Every hostile case, on one process and on two: one message that names it, exit code 2, and nothing written."""

import pytest

from tests.hostile import CASES
from tests.hostile_matrix import Outcomes, run_cases, what_is_wrong


@pytest.fixture(scope="module", params=[1, 2])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(request.param, tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_message(name: str, outcomes: Outcomes) -> None:
    assert what_is_wrong(CASES[name], outcomes[name]) is None


def test_there_are_enough() -> None:
    assert len(CASES) >= 80
