"""Writes the page that is printed before the first step: what is about to happen, in numbers."""

import os
import platform

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel

from data.shown import summary
from loop.engine.accelerator import mixed_precision
from loop.internals.deepspeed_internals import numel_of
from loop.model.build import adapters_of
from loop.planning.decisions import Decided
from loop.state import Job


def device_name(accelerator: Accelerator) -> str:
    """Names the device of this process, for example "cuda:0 NVIDIA H100 80GB HBM3"."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.device} {torch.cuda.get_device_name(accelerator.device)}"
    return f"{accelerator.device} {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def overview(job: Job, decided: Decided, model: PeftModel) -> str:
    """The page's text; every rank enters."""
    recipe, data, batch, accelerator = job.recipe, job.data, job.batch, job.accelerator
    devices = gather_object(
        [f"{accelerator.process_index}: {device_name(accelerator)}, pid {os.getpid()}"]
    )  # collective
    sizes = [(numel_of(p), p) for p in model.parameters()]
    trainable = sum(size for size, p in sizes if p.requires_grad)
    everything = sum(size for size, _ in sizes)
    about = summary(data.train, data.tallies)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for _, p in sizes if p.requires_grad})
    lines = {
        "run folder": job.run_dir,
        "processes": f"{accelerator.num_processes}  ({'; '.join(devices)})",
        "engine": engine(accelerator),
        "precision": f"{mixed_precision(accelerator)}, adapters {' and '.join(dtypes)}",
        "model": f"{recipe.model.name_or_path}: {trainable:,} of {everything:,} parameters train "
        f"({100 * trainable / everything:.2f} %)",
        **_left_out(model),
        **decided.said,
        "data": f"{about[0]}; {len(data.validation):,} validation rows",
        **{f"data, {number}": line for number, line in enumerate(about[1:], start=2)},
        "effective batch": f"{batch.micro_batch_size} rows x {batch.grad_accum_steps} accumulated x "
        f"{batch.num_processes} processes = {batch.rows_per_step} rows",
        "steps": f"{batch.total_steps} ({batch.epochs} epochs of {batch.steps_per_epoch}"
        f"{', cut short by max_steps' if batch.cut_short else ''}), "
        f"{batch.warmup_steps} of them warm-up to lr {recipe.optim.lr:g}"
        f"{f'; fewer after {recipe.patience} validations without a lower val/loss' if recipe.patience else ''}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _left_out(model: PeftModel) -> dict[str, str]:
    """The line about layers that got no adapter, if there are any."""
    layers = sorted(adapters_of(model).exclude_modules or [])
    if not layers:
        return {}
    return {"adapters": f"{len(layers):,} layers get none, because no row of text reaches them, first {layers[0]}"}


def engine(accelerator: Accelerator) -> str:
    """Names the engine, for example "DeepSpeed ZeRO-3, param offloaded to cpu", "PyTorch DDP" or "plain PyTorch"."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "plain PyTorch" if accelerator.distributed_type == DistributedType.NO else "PyTorch DDP"
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    parts = [f"DeepSpeed ZeRO-{zero['stage']}"]
    for part in ("optimizer", "param"):
        device = (zero.get(f"offload_{part}") or {}).get("device", "none")
        if device != "none":
            parts.append(f"{part} offloaded to {device}")
    numbers = [
        f"{key} {zero[key]:,}"
        for key in sorted(zero)
        if isinstance(zero[key], int) and key.endswith(("size", "threshold"))
    ]
    return ", ".join(parts + numbers)
