"""Writes usage.json: what a run has cost. The report shows it, and tests compare the plan with it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from loop.engine.accelerator import mixed_precision
from loop.internals.deepspeed_internals import numel_of
from loop.measure.flops import Batch, matrix_products
from loop.measure.phases import ACCOUNT
from loop.saving.run_folder import write_json
from loop.telling.first_page import device_name, engine


def write_usage(run_dir: Path, model: torch.nn.Module, last_step: int, accelerator: Accelerator) -> None:
    """Writes the costs of the steps that this process made, up to `last_step`; every rank enters.

    On a disk that is full by now it warns and goes on: the run has lost no more than this file.
    """
    account = usage(model, last_step, accelerator)
    if accelerator.is_main_process:
        try:
            write_json(run_dir / "usage.json", account)
        except OSError as error:
            print(f"warning: {run_dir / 'usage.json'} could not be written: {error.strerror}", flush=True)


def usage(model: torch.nn.Module, last_step: int, accelerator: Accelerator) -> dict[str, Any]:
    """The costs of the run. Counts and sizes are sums over all ranks, except those in `ranks`; seconds are rank 0's."""
    ACCOUNT.enter(ACCOUNT.phase)
    ACCOUNT.settle(wait=True)
    process = psutil.Process()
    mine = {
        "rank": accelerator.process_index,
        "pid": process.pid,
        "device": device_name(accelerator),
        "phases": {phase: asdict(cost) for phase, cost in ACCOUNT.costs.items()},
        "batch": ACCOUNT.batch,
    }
    ranks: list[dict[str, Any]] = gather_object([mine])  # collective
    batch = sum((rank.pop("batch") for rank in ranks), Batch())
    parameters = list(model.parameters())
    return {
        "engine": engine(accelerator),
        "precision": mixed_precision(accelerator),
        "device_type": accelerator.device.type,
        "memory_of": "CUDA allocator" if accelerator.device.type == "cuda" else "resident host memory",
        "first_step": last_step - len(ACCOUNT.step_seconds),
        "last_step": last_step,
        "wall_seconds": time.time() - process.create_time(),
        "step_seconds": ACCOUNT.step_seconds,
        "rows": batch.rows,
        "tokens": batch.tokens,
        "label_tokens": batch.label_tokens,
        "model_flops": matrix_products(model).model_flops(batch),
        "parameters": sum(map(numel_of, parameters)),
        "trainable": sum(numel_of(parameter) for parameter in parameters if parameter.requires_grad),
        "ranks": ranks,
    }
