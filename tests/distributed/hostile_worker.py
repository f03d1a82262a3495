"""Calls loop/train.py's main once for each hostile case, and writes down how each ended.

cases.json in the folder given: [name, arguments, environment] each. outcomes-<rank>.json: [exit code, what it said].
The cases share their processes, because starting some for each would take half an hour.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
from accelerate.state import AcceleratorState

import loop.guard.process
import loop.train
from loop.guard.process import end_process


def attempt(arguments: Sequence[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            loop.train.main(arguments)
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except Exception:
            traceback.print_exc(file=said)
            code = 1
    return code, said.getvalue()


def forget() -> None:
    """Makes the process as good as new. Launched ones stay one group, which their launcher brought together."""
    launched = "RANK" in os.environ
    AcceleratorState._reset_state(reset_partial_state=not launched)
    if not launched and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def main(argv: Sequence[str]) -> None:
    folder, rank = Path(argv[argv.index("--run_dir") + 1]), os.environ.get("RANK", "0")
    # Nobody leaves here: as if the launcher ended this rank at once, as it does when rank 0 is gone.
    loop.guard.process.wait_for_the_launcher = lambda code, seconds: sys.exit(code)
    outcomes: dict[str, tuple[int, str]] = {}
    for name, arguments, env in json.loads((folder / "cases.json").read_text()):
        print(f"rank {rank}: {name}", flush=True)  # the last one, where it hangs
        with patch.dict(os.environ, {**os.environ, **env}):
            outcomes[name] = attempt(arguments)
        forget()
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    end_process(main)
