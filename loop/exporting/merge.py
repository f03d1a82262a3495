"""Merges a LoRA adapter into the files of a checkpoint, one file after the other: W + scale * B A, computed in fp32."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from data.errors import UserError
from loop.exporting.source import Source, Stored, main_dtype, name_of
from loop.internals.transformers_internals import name_in_file
from loop.model.lora import ADAPTER as NAME
from loop.saving.checkpoint import ADAPTER

ROWS = 256  # rows of a weight that are merged at once, so that fp32 copies stay small
INSTEAD = "Export the adapter alone with --adapter."


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight: scale * left @ right, with left [rows, rank] and right [rank, columns]."""

    read: str  # the tensor of the checkpoint that it is added to
    write: str  # the tensor that gets the sum; another one than `read` where a tied weight becomes two
    left: Tensor
    right: Tensor
    scale: float
    unties: bool = False  # whether another layer shares the weight, and goes on without an adapter


@dataclass
class Rounding:
    """Sums over merged weights that tell what rounding left of the adapter's change."""

    changed: float = 0.0  # of change²
    kept: float = 0.0  # of (rounded sum - weight) * change
    lost: float = 0.0  # of (rounded sum - sum)²
    worst: tuple[float, str] = (1.0, "")  # the smallest share that a single weight kept, and its name
    weights: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The part of the adapter's change to the weights that is still there after rounding: 1 for all of it."""
        return self.kept / self.changed if self.changed else 1.0

    @property
    def error(self) -> float:
        """The norm of the rounding error, relative to that of the adapter's change."""
        return float((self.lost / self.changed) ** 0.5) if self.changed else 0.0

    def add(self, name: str, other: "Rounding") -> None:
        """Adds the sums of one weight."""
        self.changed += other.changed
        self.kept += other.kept
        self.lost += other.lost
        self.worst = min(self.worst, (other.share, name)) if self.weights else (other.share, name)
        self.weights.append(name)


def find_updates(source: Source, stored: Mapping[str, Stored]) -> list[Update]:
    """What the adapter adds to which tensors of the checkpoint.

    Raises UserError, with the layer's name, for an adapter that is no plain pair of matrices, and for a layer whose
    weight the checkpoint does not hold as a tensor of its own.
    """
    tensors = load_file(source.adapter / ADAPTER)
    uses = _uses(source)
    updates = []
    for path, layer in source.model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        a, b = (tensors.pop(f"{path}.lora_{matrix}.weight", None) for matrix in "AB")
        if not isinstance(layer, Linear) or layer.lora_variant or a is None or b is None:
            raise UserError(
                f"{path}: its adapter ({type(layer).__name__}) is no plain LoRA, so it is not merged. {INSTEAD}"
            )
        weight: Any = layer.get_base_layer().weight
        name = path.removeprefix("base_model.model.") + ".weight"
        read, write = _places(source, name, weight, uses[id(weight)], stored)
        left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
        shared = len(uses[id(weight)]) > 1
        updates.append(Update(read, write, left.float(), right.float(), float(layer.scaling[NAME]), shared))
    if tensors:
        raise UserError(f"{min(tensors)}: is more than a pair of LoRA matrices, so it is not merged. {INSTEAD}")
    return updates


def _uses(source: Source) -> dict[int, list[str]]:
    """The names of each parameter of the base model, by its id: more than one where layers share it."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in source.model.get_base_model().named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name.replace(".base_layer.", "."))
    return found


def _places(
    source: Source, name: str, weight: Tensor, names: list[str], stored: Mapping[str, Stored]
) -> tuple[str, str]:
    """The tensor of the checkpoint that holds a parameter, and the tensor that gets the parameter with its adapter.

    `names` are all that the model has for the parameter. Raises UserError where there is no such tensor.
    """
    found = {each: _stored_name(source, each, weight, stored) for each in names}
    read = found[name] or next(filter(None, found.values()), None)
    if read is None or list(weight.shape) != stored[read].shape:
        raise UserError(
            f"{name}: the checkpoint does not hold this weight as a tensor of its own, so its adapter is not merged. "
            f"{INSTEAD}"
        )
    return read, read if len(names) == 1 else _untied(source, name, weight, names)


def _stored_name(source: Source, name: str, weight: Tensor, stored: Mapping[str, Stored]) -> str | None:
    """The checkpoint's name for a parameter; None where it holds no such tensor."""
    if name in stored:
        return name
    renamed = name_in_file(source.model.get_base_model(), name, weight)
    return renamed if renamed in stored else None


def _untied(source: Source, name: str, weight: Tensor, names: list[str]) -> str:
    """The tensor that gets an adapted weight which other layers use without an adapter. Raises UserError unless it is
    the head, which a config.json can untie from the embedding."""
    model: Any = source.model.get_base_model()
    head = model.get_output_embeddings()
    is_head = isinstance(head, BaseTunerLayer) and head.get_base_layer().weight is weight
    if not is_head or len(names) != 2 or not source.config.get("tie_word_embeddings", True) or _nested(source):
        others = ", ".join(other for other in names if other != name)
        raise UserError(f"{name}: {others} shares this weight and has no adapter, so it is not merged. {INSTEAD}")
    return name_in_file(model, name, weight) or name


def _nested(source: Source) -> bool:
    return "text_config" in source.config  # which part then says whether they are tied differs by model


def merge(
    source: Source, stored: Mapping[str, Stored], updates: list[Update], dtype: torch.dtype, folder: Path
) -> Rounding:
    """Writes the checkpoint's files into `folder` with the adapter in their weights, and says what rounding has lost.

    Weights of the checkpoint's main dtype become `dtype`, and those of other types, which it keeps so on purpose, stay.
    Memory: one file as it is read, and one as it is written. Raises UserError for a number that `dtype` cannot hold.
    """
    main = main_dtype(dict(stored))
    by_tensor = defaultdict(list)
    for update in updates:
        by_tensor[update.read].append(update)
    weight_map: dict[str, str] = {}
    total, size = Rounding(), 0
    for file in dict.fromkeys(one.file for one in stored.values()):
        tensors: dict[str, Tensor] = {}
        with safe_open(source.base / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                target = dtype if tensor.dtype == main else tensor.dtype
                for update in by_tensor[name]:
                    tensors[update.write], lost = merged(tensor, update, target)
                    total.add(update.write, lost)
                if name not in tensors:
                    tensors[name] = tensor.to(target)
                    _check_finite(name, tensors[name], tensor, target)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def merged(weight: Tensor, update: Update, dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    """The weight with the update in it, rounded once to `dtype`, and what that rounding has lost."""
    result = torch.empty(weight.shape, dtype=dtype)
    lost = Rounding()
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        old = weight[rows].float()
        change = update.scale * (update.left[rows] @ update.right)
        result[rows] = old + change
        new = result[rows].float()
        lost.changed += float(change.square().sum())
        lost.kept += float(((new - old) * change).sum())
        lost.lost += float((new - old - change).square().sum())
    _check_finite(update.write, result, weight, dtype)
    return result, lost


def _check_finite(name: str, result: Tensor, before: Tensor, dtype: torch.dtype) -> None:
    if result.is_floating_point() and not torch.isfinite(result).all() and torch.isfinite(before).all():
        raise UserError(f"{name}: has a number that {name_of(dtype)} cannot hold. Use --dtype float32.")


def bytes_needed(stored: Mapping[str, Stored], updates: list[Update], dtype: torch.dtype) -> int:
    """The size of the files that `merge` writes."""
    main = main_dtype(dict(stored))
    sizes = {name: one.numel * dtype.itemsize if one.dtype == main else one.nbytes for name, one in stored.items()}
    return sum(sizes.values()) + sum(sizes[one.read] for one in updates if one.write not in stored)
