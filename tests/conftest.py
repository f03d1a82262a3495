"""Marks every test of tests/distributed/ as one that launches something."""

from pathlib import Path

import pytest

DISTRIBUTED = Path(__file__).parent / "distributed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(DISTRIBUTED):
            item.add_marker("launches")
