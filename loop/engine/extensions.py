"""Builds DeepSpeed's C++ extensions ahead of a first run: python -m loop.engine.extensions"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root

from loop.engine.environment import set_up_environment

LOCK_AGE = 10.0  # seconds after which a lock on an extension's folder cannot belong to another rank of this run


def announce_builds(zero: dict[str, Any]) -> None:
    """Tells the user why nothing happens for a while: DeepSpeed builds an extension, which takes minutes, or torch
    waits for a lock that a killed build left behind."""
    wanted = {} if torch.cuda.is_available() else {"deepspeed_shm_comm": "about a minute"}
    devices = [(zero.get(block) or {}).get("device", "none") for block in ("offload_optimizer", "offload_param")]
    if devices[0] != "none":
        wanted["cpu_adam"] = "about a minute"
    if "nvme" in devices:
        wanted["async_io"] = "three to ten minutes"
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    for name, time_it_takes in wanted.items():
        for lock in built.glob(f"**/{name}/lock"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > LOCK_AGE:
                    print(f"waiting for {lock}: if no other process builds {name}, delete that file", flush=True)
        if not list(built.glob(f"**/{name}/*.so")):
            print(f"DeepSpeed builds its C++ extension {name} now: {time_it_takes}, once for this user", flush=True)


def build_extensions() -> None:
    """Builds the extensions that DeepSpeed would otherwise build in the middle of a first run. Each takes about a
    minute and is kept afterwards."""
    from deepspeed.ops.op_builder import CPUAdamBuilder  # the optimizer's step in host memory
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder  # collectives between CPU processes

    for builder in [CPUAdamBuilder()] if torch.cuda.is_available() else [CPUAdamBuilder(), ShareMemCommBuilder()]:
        print(f"building {builder.absolute_name()} …", flush=True)
        try:
            builder.load(verbose=False)
        except (OSError, RuntimeError, ImportError) as error:
            print(f"warning: {builder.name} cannot be built, and what needs it will not run: {error}", flush=True)


if __name__ == "__main__":
    set_up_environment()
    build_extensions()
