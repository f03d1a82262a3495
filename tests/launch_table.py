"""`python -m tests.launch_table` writes the tables of docs/launching.md from loop/engine/launch_settings.py."""

from benchmarks.docs_section import replace_section
from loop.engine.launch_settings import tables

TITLE = "Every setting of a launch"
SAID = """Each setting is obeyed, or the run does not start and the message names it. This section is written by
`python -m tests.launch_table` from the lists in `loop/engine/launch_settings.py`, which the loop checks."""

if __name__ == "__main__":
    replace_section(TITLE, f"{SAID}\n\n{tables()}", "launching.md")
