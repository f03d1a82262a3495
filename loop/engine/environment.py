"""Sets the environment of every process of this project, before DeepSpeed and gloo read it."""

import os
import sys
import warnings
from pathlib import Path

import torch

LOOPBACK = Path("/sys/class/net/lo")  # the loopback interface on Linux


def set_up_environment() -> None:
    """Silences warnings that tell a user nothing, lets DeepSpeed find ninja, and keeps gloo's traffic on this machine
    where all ranks run on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1") and LOOPBACK.exists():
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", LOOPBACK.name
        )  # otherwise gloo listens on the interface of the host's name
    # ninja stands beside this Python, but is on the PATH only when the virtual environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
