"""Marks every test of tests/distributed/ as one that launches something, and lets these files begin first.

Each of two workers takes the next file when it has done one (`--dist loadfile --no-loadscope-reorder`). The long files
come first, so that the many short ones fill up whatever time is left at the end.
"""

from pathlib import Path

import pytest

DISTRIBUTED = Path(__file__).parent / "distributed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(DISTRIBUTED):
            item.add_marker("launches")
    items.sort(key=lambda item: not item.path.is_relative_to(DISTRIBUTED))  # stable: the order stays otherwise
