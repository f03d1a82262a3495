"""Saves adapters in PEFT's format, whole under every ZeRO stage, and checks what was written."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from data.errors import RunError

CHECKPOINTS = "checkpoints"


def unwrap(model: torch.nn.Module, accelerator: Accelerator) -> PeftModel:
    """The PEFT model inside what accelerate, DeepSpeed, DDP and torch.compile have wrapped around it."""
    inner: PeftModel = accelerator.unwrap_model(model, keep_torch_compile=False)
    return inner


def gather_adapter(model: PeftModel, accelerator: Accelerator) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, under the model's names; every rank enters, rank 0 gets them.

    Only the adapters are gathered, never the base.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gathered: Any = nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(trainable.values()))  # collective at stage 3, else nothing
    with gathered:
        if not accelerator.is_main_process:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in trainable.items()}


def save_adapter(model: PeftModel, folder: Path, accelerator: Accelerator, extra: dict[str, Any] | None = None) -> None:
    """Writes the adapter to `folder`, which appears only once it is complete; every rank enters.

    `extra` goes beside it as trainer_state.json. Raises RunError on every rank when writing fails or
    when what is on the disk afterwards is not what was written.
    """
    tensors = gather_adapter(model, accelerator)
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            _write(model, tensors, folder, extra)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            failure = [f"the adapter could not be saved to {folder}: {error}"]
    broadcast_object_list(failure)  # collective: a disk that is full on rank 0 has to stop all
    if failure[0] is not None:
        raise RunError(failure[0])


def _write(model: PeftModel, tensors: dict[str, Tensor], folder: Path, extra: dict[str, Any] | None) -> None:
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.save_pretrained(str(beside), state_dict=tensors, save_embedding_layers=False)
    # A file drops the adapter's name from the tensors' names, because a reader gives it one of its own.
    check_adapter(beside / "adapter_model.safetensors", get_peft_model_state_dict(model, state_dict=tensors))
    if extra is not None:
        (beside / "trainer_state.json").write_text(json.dumps(extra, indent=2) + "\n")
    beside.rename(folder)


def check_adapter(file: Path, expected: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless `file` holds exactly the tensors `expected`, all finite and none empty."""
    written = load_file(file)
    if not expected or written.keys() != expected.keys():
        raise RuntimeError(f"{file}: holds {len(written)} tensors instead of {len(expected)}")
    for name, tensor in expected.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all() or not torch.equal(written[name], tensor):
            raise RuntimeError(f"{file}: {name} {tuple(tensor.shape)} is empty, not finite or not what was written")


def save_checkpoint(
    model: PeftModel, run_dir: Path, step: int, epoch: int, save_total_limit: int, accelerator: Accelerator
) -> None:
    """Writes checkpoints/step-<step>, then deletes the oldest beyond `save_total_limit`; every rank enters."""
    folder = run_dir / CHECKPOINTS / f"step-{step:06d}"
    save_adapter(model, folder, accelerator, {"step": step, "epoch": epoch})
    if accelerator.is_main_process:
        by_step = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in by_step[:-save_total_limit]:
            shutil.rmtree(old)
