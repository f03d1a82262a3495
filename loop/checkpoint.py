"""Checkpoints that belong to no ZeRO stage and no number of ranks, and that exist whole or not at all.

A checkpoint holds the adapter in PEFT's format, AdamW's state (optimizer.safetensors), where the run stands
(trainer_state.json) and last manifest.json with the size and SHA-256 of every file. No pickle, no base weights.
It is written beside, synced, and appears by one rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import RunError, UserError
from loop.optimizer_state import gather_optimizer, shape_of, trainable_parameters

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole. adapter: under PEFT's names of files; optimizer: see loop/optimizer_state.py."""

    folder: Path
    state: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent

    @property
    def step(self) -> int:
        """Steps learned."""
        return int(self.state["step"])

    @property
    def updates(self) -> int:
        """Steps learned, without those that fp16 skipped."""
        return int(self.state["updates"])


def unwrap(model: torch.nn.Module, accelerator: Accelerator) -> PeftModel:
    """The PEFT model inside what accelerate, DeepSpeed, DDP and torch.compile have wrapped around it."""
    inner: PeftModel = accelerator.unwrap_model(model, keep_torch_compile=False)
    return inner


def save_adapter(model: PeftModel, folder: Path, accelerator: Accelerator) -> None:
    """Writes the adapter to `folder` in PEFT's format; every rank enters. Raises RunError when it cannot be written."""
    tensors = gather_adapter(model, accelerator)
    _publish(folder, lambda beside: _write_adapter(model, tensors, beside), accelerator)


def save_checkpoint(
    model: PeftModel,
    optimizer: Any,
    run_dir: Path,
    state: dict[str, Any],
    save_total_limit: int,
    resumed_from: Checkpoint | None,
    accelerator: Accelerator,
) -> Path:
    """Writes checkpoints/step-<state["step"]> and then deletes old ones; every rank enters.

    The newest `save_total_limit` stay, the one of the lowest val_loss, and the one that was resumed from.
    Raises RunError on every rank when it cannot be written.
    """
    adapter = gather_adapter(model, accelerator)
    moments = gather_optimizer(model, optimizer, accelerator)
    folder = run_dir / CHECKPOINTS / f"step-{state['step']:06d}"

    def write(beside: Path) -> None:
        _write_adapter(model, adapter, beside)
        save_file(moments, beside / OPTIMIZER)
        (beside / STATE).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        manifest = {path.name: _fingerprint(path) for path in sorted(beside.iterdir())}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    _publish(folder, write, accelerator)
    if accelerator.is_main_process:
        _delete_old(run_dir, save_total_limit, resumed_from)
    return folder


def gather_adapter(model: PeftModel, accelerator: Accelerator) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, under the model's names; every rank enters, rank 0 gets them.

    Only the adapters are gathered, never the base.
    """
    trainable = trainable_parameters(model)
    with gathered(list(trainable.values()), accelerator):
        if not accelerator.is_main_process:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in trainable.items()}


def gathered(parameters: list[Any], accelerator: Accelerator, modifier_rank: int | None = None) -> Any:
    """A context in which ZeRO-3's parameters are whole; collective at stage 3, nothing elsewhere."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def _write_adapter(model: PeftModel, tensors: dict[str, Tensor], folder: Path) -> None:
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    # A file drops the adapter's name from the tensors' names, because a reader gives it one of its own.
    check_adapter(folder / ADAPTER, get_peft_model_state_dict(model, state_dict=tensors))


def check_adapter(file: Path, expected: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless `file` holds exactly the tensors `expected`, all finite and none empty."""
    written = load_file(file)
    if not expected or written.keys() != expected.keys():
        raise RuntimeError(f"{file}: holds {len(written)} tensors instead of {len(expected)}")
    for name, tensor in expected.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all() or not torch.equal(written[name], tensor):
            raise RuntimeError(f"{file}: {name} {tuple(tensor.shape)} is empty, not finite or not what was written")


def _publish(folder: Path, write: Callable[[Path], None], accelerator: Accelerator) -> None:
    """Rank 0 writes a folder beside, syncs it to the disk and renames it to `folder`; every rank enters."""
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        beside = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)  # but not its parents: a run folder that has vanished is an error
            beside.mkdir()
            write(beside)
            for path in (*beside.iterdir(), beside):
                _sync(path)
            old = folder.with_name(f".{folder.name}.old.partial")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():  # a step that was learned again after resuming from an earlier one
                folder.rename(old)
            beside.rename(folder)
            _sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            shutil.rmtree(beside, ignore_errors=True)
            free = f"{shutil.disk_usage(_existing(folder)).free / 1e6:,.0f} MB are free there"
            failure = [f"{folder} could not be written: {error}. Earlier checkpoints are intact; {free}."]
    broadcast_object_list(failure)  # collective: a disk that is full on rank 0 has to stop all
    if failure[0] is not None:
        raise RunError(failure[0])


def delete_leftovers(run_dir: Path) -> None:
    """What a killed run was about to write."""
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for leftover in folder.glob(".*.partial"):
            shutil.rmtree(leftover)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Of a run folder, oldest first."""
    folders = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _delete_old(run_dir: Path, save_total_limit: int, resumed_from: Checkpoint | None) -> None:
    folders = list_checkpoints(run_dir)
    keep = {*folders[-save_total_limit:]} | ({resumed_from.folder} if resumed_from else set())
    losses = {folder: loss for folder in folders if (loss := _val_loss(folder)) is not None}
    if losses:
        keep.add(min(losses, key=lambda folder: losses[folder]))
    for folder in folders:
        if folder not in keep:
            shutil.rmtree(folder)


def _val_loss(folder: Path) -> float | None:
    loss: float | None = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
    return loss


def load_checkpoint(folder: Path) -> Checkpoint:
    """Raises UserError unless `folder` holds exactly what was written there."""
    wrong = _damage(folder)
    if wrong:
        raise UserError(f"checkpoint {folder}: {wrong}. Resume from another one, or start a new run.")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, state, load_file(folder / ADAPTER), load_file(folder / OPTIMIZER))


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Nothing is opened that the manifest does not vouch for."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (said["bytes"], said["sha256"]) for name, said in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"no {MANIFEST} that can be read ({error})"
    missing = {ADAPTER, OPTIMIZER, STATE} - expected.keys()
    if missing:
        return f"{MANIFEST} does not name {', '.join(sorted(missing))}"
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found - expected.keys():
        return f"holds files that were not written by this program: {', '.join(sorted(found - expected.keys()))}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _fingerprint(path)["sha256"] != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def restore_adapter(checkpoint: Checkpoint | None, model: PeftModel, accelerator: Accelerator) -> None:
    """Copies the checkpoint's adapter into `model`; every rank enters. Raises UserError when it is another model's."""
    if checkpoint is None:
        return
    parameters = get_peft_model_state_dict(model, state_dict=trainable_parameters(model))
    shapes = {name: tuple(shape_of(parameter)) for name, parameter in parameters.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in checkpoint.adapter.items()}
    if shapes != saved:
        other = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))[0]
        raise UserError(
            f"checkpoint {checkpoint.folder}: belongs to another model: {other} is {saved.get(other, 'absent')} "
            f"there and {shapes.get(other, 'absent')} here. Give the model and lora of its run."
        )
    with gathered(list(parameters.values()), accelerator, modifier_rank=0), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.adapter[name])
