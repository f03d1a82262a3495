"""What README and docs/ show of the code is the code, and what they link to is there."""

import re
import textwrap
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # to a file of this project


def test_the_step_in_readme_is_the_step() -> None:
    shown = re.search(r"<!-- step -->\n```python\n(.*?)```\n<!-- /step -->", README.read_text(), re.DOTALL)
    assert shown is not None
    source = (ROOT / "loop" / "step.py").read_text()
    start, end = source.index("    for micro_batch in window.micro_batches:"), source.index("    return StepResult(")
    assert shown[1] == textwrap.dedent(source[start:end])


def test_the_breakpoint_in_readme_is_where_backward_begins() -> None:
    lines = (ROOT / "loop" / "step.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if 'measured("backward")' in text)
    assert f"break step.py:{line}'" in README.read_text()


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []
