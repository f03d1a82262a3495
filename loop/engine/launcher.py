"""Finds out how this process was launched, and makes the launch what was asked for, or refuses it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from data.errors import UserError
from loop.engine.launch_settings import check_settings, check_variables
from loop.internals.accelerate_internals import Asked, resolve_launch

MODULES = ("accelerate.commands.accelerate_cli", "accelerate.commands.launch")  # python -m …, with and without "launch"
SECRETS = ".deepspeed_env"  # where accelerate writes the whole environment for DeepSpeed's own launchers


def obey_launcher() -> None:
    """Checks what the launcher was asked for against what it has started; every process calls it first.

    For MULTI_CPU accelerate starts a single process; that one becomes torchrun, which starts them all. Raises UserError
    where something is asked for that would not be done, and where this process is one of fewer than were asked for.
    """
    if Path(SECRETS).exists() and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {Path(SECRETS).absolute()} holds the environment of a launch, passwords included, in plain text; "
            "nothing here reads it. Delete it.",
            flush=True,
        )
    words = launcher_words() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    if words is not None:
        asked = resolve_launch(words)
        check_settings(asked)
        if asked.distributed_type == "MULTI_CPU" and asked.num_processes > 1 and "RANK" not in os.environ:
            become_torchrun(asked)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != asked.num_processes:
            raise UserError(
                f"the launch says num_processes: {asked.num_processes}, but {started} were started. Nothing would be "
                "shared with the others."
            )
    check_variables(os.environ)


def launcher_words() -> Sequence[str] | None:
    """The words behind the `accelerate launch` that has started this process; None where there was none."""
    for ancestor in psutil.Process().parents():
        try:
            words = ancestor.cmdline()
        except psutil.Error:  # it has just ended
            continue
        for i, word in enumerate(words[:4]):
            name = Path(word).name
            if name == "accelerate" or word == MODULES[0]:
                return words[i + 2 :] if words[i + 1 : i + 2] == ["launch"] else None
            if name == "accelerate-launch" or word == MODULES[1]:
                return words[i + 1 :]
    return None


def become_torchrun(asked: Asked) -> NoReturn:
    """Goes on as torchrun, which starts this command once for each process of this machine, on CPUs."""
    machines, options = int(asked.options["num_machines"]), asked.options
    command = ["--nproc_per_node", str(asked.num_processes // machines)]
    if machines == 1:
        command += ["--standalone"]
    else:
        command += ["--nnodes", str(machines), "--node_rank", str(options["machine_rank"])]
        command += [
            "--master_addr",
            str(options["main_process_ip"]),
            "--master_port",
            str(options["main_process_port"]),
        ]
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT")}
    sys.stdout.flush()
    words = [sys.executable, "-m", "torch.distributed.run", *command, *sys.argv]
    os.execve(sys.executable, words, environment | {"CUDA_VISIBLE_DEVICES": ""})
