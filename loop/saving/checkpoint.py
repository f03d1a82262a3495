"""Checkpoints that belong to no ZeRO stage and no number of ranks, and that exist whole or not at all.

A checkpoint holds the adapter in PEFT's format, AdamW's state (optimizer.safetensors), where the run stands
(trainer_state.json) and last manifest.json with the size and SHA-256 of every file. No pickle, no base weights.
It is written beside, synced, and appears by one rename.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from data.errors import UserError
from data.template import ChatTemplate
from loop.engine.accelerator import on_main_process
from loop.engine.optimizer_state import MOMENTS, gather_optimizer, shape_of, trainable_parameters
from loop.guard.process import RunError
from loop.measure.phases import measured
from loop.saving.publish import OLD, PARTIAL, damage, publish, write_manifest

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
WRITTEN = {ADAPTER, OPTIMIZER, STATE, "adapter_config.json", "README.md"}  # the last two by PEFT


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    The adapter's tensors have the names that PEFT gives them in files; those of the optimizer have the names of
    gather_optimizer (loop/engine/optimizer_state.py).
    """

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


@measured("save")
def save_adapter(model: PeftModel, template: ChatTemplate | None, folder: Path, accelerator: Accelerator) -> None:
    """Writes the adapter to `folder` in PEFT's format, and beside it what asks the model as it was trained: tokenizer,
    chat template, and a generation_config.json with the tokens at which an answer ends. Every rank enters.

    Raises RunError when it cannot be written.
    """
    tensors = gather_adapter(model, accelerator)

    def write(beside: Path) -> None:
        write_adapter(model, tensors, beside)
        if template is not None:
            write_template(template, getattr(model.get_base_model(), "generation_config", None), beside)

    on_main_process(lambda: publish(folder, write), accelerator)


def write_template(template: ChatTemplate, config: GenerationConfig | None, folder: Path) -> None:
    """Writes the tokenizer with its chat template, and the model's generation `config` with the trained stop tokens."""
    template.tokenizer.save_pretrained(folder)
    config = deepcopy(config) or GenerationConfig()
    config.eos_token_id = sorted(template.stop_tokens(config))
    config.to_json_file(folder / GENERATION_CONFIG_NAME)  # save_pretrained refuses what some models come with


@measured("save")
def save_checkpoint(
    model: PeftModel,
    optimizer: Any,
    run_dir: Path,
    state: dict[str, Any],
    save_total_limit: int,
    resumed_from: Path | None,
    accelerator: Accelerator,
) -> Path:
    """Writes checkpoints/step-<state["step"]> and then deletes old ones; every rank enters.

    The newest `save_total_limit` checkpoints stay, that of the lowest val_loss, and that of the folder `resumed_from`.
    Raises RunError on every rank when it cannot be written.
    """
    adapter = gather_adapter(model, accelerator)
    moments = gather_optimizer(model, optimizer, accelerator)
    folder = run_dir / CHECKPOINTS / f"step-{state['step']:06d}"

    def write(beside: Path) -> None:
        write_adapter(model, adapter, beside)
        save_file(moments, beside / OPTIMIZER)
        (beside / STATE).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_manifest(beside)

    def write_and_delete() -> None:
        publish(folder, write)
        delete_old(folder, save_total_limit, resumed_from)

    on_main_process(write_and_delete, accelerator)
    return folder


def gather_adapter(model: PeftModel, accelerator: Accelerator) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, under the model's names. Every rank enters; only rank 0 gets the tensors.

    The base model is never gathered.
    """
    trainable = trainable_parameters(model)
    with gathered(list(trainable.values()), accelerator):
        if not accelerator.is_main_process:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in trainable.items()}


def gathered(parameters: list[Any], accelerator: Accelerator, modifier_rank: int | None = None) -> Any:
    """A context in which ZeRO-3's parameters are whole. Entering it is collective at stage 3, and nothing elsewhere."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def names_in_files(model: PeftModel, tensors: Mapping[str, T]) -> dict[str, T]:
    """The values of `tensors`, which have the model's names for its adapter, under the names that files give them.

    A file drops the adapter's name, because a reader gives it one of its own. It holds the adapter and nothing else:
    without save_embedding_layers=False PEFT would add the whole embedding layers where one of them has an adapter.
    """
    found: dict[str, T] = get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    return found


def write_adapter(model: PeftModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes the adapter into `folder` and reads it back. Raises RuntimeError unless it holds what was written."""
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    check_adapter(folder / ADAPTER, names_in_files(model, tensors))


def check_adapter(file: Path, expected: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless `file` holds exactly the tensors `expected`, all finite and none empty."""
    written = load_file(file)
    if not expected or written.keys() != expected.keys():
        raise RuntimeError(f"{file}: holds {len(written)} tensors instead of {len(expected)}")
    for name, tensor in expected.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all() or not torch.equal(written[name], tensor):
            raise RuntimeError(f"{file}: {name} {tuple(tensor.shape)} is empty, not finite or not what was written")


def clear_up(run_dir: Path, step: int) -> None:
    """Brings the folder of a run that goes on after `step` back to what it was after that step.

    Half-written folders are removed, and a whole folder that was about to be replaced gets its name back. Checkpoints
    of later steps are set aside under another name, because this run does not go on from them: nothing counts them
    and nothing deletes them.
    """
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for old in folder.glob(f".*{OLD}"):
            whole = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
            if not whole.exists():
                old.rename(whole)
        for leftover in (*folder.glob(f".*{PARTIAL}"), *folder.glob(f".*{OLD}")):
            shutil.rmtree(leftover)
    for folder in list_checkpoints(run_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"aside-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            print(f"note: {folder} is of a later step; it is kept as {aside.name}", flush=True)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    folders = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def delete_old(newest: Path, save_total_limit: int, resumed_from: Path | None) -> None:
    """Deletes the checkpoints that save_checkpoint does not keep."""
    folders = list_checkpoints(newest.parent.parent)
    keep = {newest, *folders[-save_total_limit:]} | ({resumed_from} if resumed_from else set())
    losses = {folder: loss for folder in folders if (loss := _val_loss(folder)) is not None}
    if losses:
        keep.add(min(losses, key=lambda folder: losses[folder]))
    for folder in folders:
        if folder.resolve() not in {kept.resolve() for kept in keep}:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that a kill leaves no half of it under its own name."""
    nameless = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        folder.rename(nameless)
        shutil.rmtree(nameless)
    except OSError as error:
        raise RunError(f"{folder} is old and could not be deleted: {error}. Make it writable.") from error


def _val_loss(folder: Path) -> float | None:
    """The validation loss that a checkpoint holds; None where there is none or the folder is damaged."""
    try:
        loss = json.loads((folder / STATE).read_text(encoding="utf-8"))["val_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Raises UserError unless `folder` holds exactly what was written there."""
    folder = Path(os.path.abspath(folder))
    wrong = damage(folder, {ADAPTER, OPTIMIZER, STATE}, WRITTEN)
    if wrong:
        raise UserError(f"checkpoint {folder}: {wrong}. Resume from another one, or start a new run.")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        checkpoint = Checkpoint(folder, state, load_file(folder / ADAPTER), load_file(folder / OPTIMIZER))
    except Exception as error:  # the manifest was made elsewhere; safetensors has exceptions of its own
        raise UserError(f"checkpoint {folder}: its files cannot be read: {error}. Resume from another one.") from error
    wrong = _nonsense(checkpoint)
    if wrong:
        raise UserError(f"checkpoint {folder}: {wrong}. Resume from another one.")
    return checkpoint


def _nonsense(checkpoint: Checkpoint) -> str | None:
    """What stands in the files that this program never writes, although the manifest vouches for it; or None."""
    state = checkpoint.state
    for name, tensors in ((ADAPTER, checkpoint.adapter), (OPTIMIZER, checkpoint.optimizer)):
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                return f"{name}: {key} is not finite"
    try:
        interval = state["interval"] or {"nlls": [0.0], "label_weight": 0.0}
        nlls, weight = interval["nlls"], interval["label_weight"]
        run = state["run"]
        ok = (
            all(type(count) is int for count in (state["step"], state["updates"], run["rows_per_step"]))
            and 0 <= state["updates"] <= state["step"]
            and run["rows_per_step"] > 0
            and type(weight) is float
            and 0 <= weight < math.inf
            and len(nlls) > 0
            and all(type(nll) is float and math.isfinite(nll) for nll in nlls)
            and isinstance(state["val_loss"], float | None)
            and isinstance(run["recipe"], dict)
            and isinstance(run["model_sha256"], str)
            and isinstance(run["train_file_sha256"], str)
            and isinstance(run["mixed_precision"], str)
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        ok = False
    return None if ok else f"{STATE} is not one of this program's"


def first_difference(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    """The first name in alphabetical order that only one side has, or that has another value on each; or None."""
    return min((name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)), default=None)


def restore_adapter(checkpoint: Checkpoint | None, model: PeftModel, accelerator: Accelerator) -> None:
    """Copies the checkpoint's adapter into `model`; every rank enters.

    Raises UserError when the adapter or the optimizer state belongs to another model.
    """
    if checkpoint is None:
        return
    trainable = trainable_parameters(model)
    parameters = names_in_files(model, trainable)
    has_masters = any(name.startswith("master.") for name in checkpoint.optimizer)
    keys = (*MOMENTS, "master") if has_masters else MOMENTS
    states = {f"{key}.{name}": parameter for key in keys for name, parameter in trainable.items()}
    for file, here, there in (
        (ADAPTER, parameters, checkpoint.adapter),
        (OPTIMIZER, states, checkpoint.optimizer),
    ):
        shapes = {name: tuple(shape_of(parameter)) for name, parameter in here.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in there.items()}
        if other := first_difference(shapes, saved):
            raise UserError(
                f"checkpoint {checkpoint.folder}: {file} belongs to another model: {other} is "
                f"{saved.get(other, 'absent')} there and {shapes.get(other, 'absent')} here. "
                "Give the model and lora of its run."
            )
    with gathered(list(parameters.values()), accelerator, modifier_rank=0), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.adapter[name])
