"""Names the phases of a run. This module imports nothing else, so that a report can read it without PyTorch."""

from typing import Literal, get_args

Phase = Literal["start", "load", "data", "forward", "backward", "update", "validate", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP_PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "update")  # the phases that each step goes through
