"""`python -m tests.launch_table` writes the tables of docs/launching.md from loop/engine/launch_settings.py."""

import re

from loop.engine.launch_settings import tables
from loop.recipe import ROOT

PAGE = ROOT / "docs" / "launching.md"
TITLE = "## Every setting of a launch"


def main() -> None:
    said = "Each setting is obeyed, or the run does not start and the message names it. This section is written by\n"
    said += "`python -m tests.launch_table` from the lists in `loop/engine/launch_settings.py`, which the loop checks."
    section = f"{TITLE}\n\n{said}\n\n{tables()}\n"
    page = PAGE.read_text(encoding="utf-8")
    old = re.search(rf"^{TITLE}$.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    page = page[: old.start()] + section + page[old.end() :] if old else f"{page.rstrip()}\n\n{section}"
    PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
