"""What every process of this project sets in its environment before DeepSpeed and gloo look at it."""

import os
import sys
import warnings
from pathlib import Path

import torch

LOOPBACK = Path("/sys/class/net/lo")  # the loopback interface, on Linux


def set_up_environment() -> None:
    """Silences what tells a user nothing, lets DeepSpeed find ninja, keeps gloo on one machine where all ranks are."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1") and LOOPBACK.exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK.name)  # or it listens wherever the host's name leads
    # It stands beside this Python, but is on the PATH only when the virtual environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
