"""Opens what an export is made of: a finished run, the files of its base model, its adapter and its chat template."""

import json
import math
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from data.errors import UserError, user_error
from data.template import ChatTemplate
from loop.engine.optimizer_state import trainable_parameters
from loop.model.build import build_template, build_tokenizer, check_model
from loop.model.opening import open_tokenizer
from loop.recipe import Recipe
from loop.saving.checkpoint import ADAPTER, first_difference, names_in_files
from loop.saving.content import model_folder
from loop.saving.finished import check_adapter, check_content, finished_recipe

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses old names of transformers
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


@dataclass(frozen=True)
class Source:
    """A finished run, whose base model and adapter have been found to belong together."""

    run: Path
    recipe: Recipe
    base: Path  # folder of the base model's files
    config: dict[str, Any]  # the base model's config.json
    model: PeftModel  # base and adapter on the meta device, as PEFT builds them from adapter_config.json
    template: ChatTemplate

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, as the header of its file describes it."""

    file: str
    dtype: torch.dtype | None  # None for integers and other types that no adapter changes
    shape: list[int]
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


def open_source(run: Path, name_or_path: str | None) -> Source:
    """Opens a run without reading weights. Raises UserError where something is missing, damaged or of another run."""
    recipe = finished_recipe(run, name_or_path)
    adapted = check_model(recipe)
    check_content(run, recipe)
    check_adapter(run / "adapter", adapted)
    base = model_folder(recipe)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return Source(run, recipe, base, config, _as_peft_reads_it(run, adapted.unload()), _template(run, recipe))


def _as_peft_reads_it(run: Path, base: Any) -> PeftModel:
    """The base model with the adapter that adapter_config.json describes, which is what a reader of the files gets."""
    file = run / "adapter" / "adapter_config.json"
    with user_error(f"{file}: cannot be read", "Copy it anew.", (Exception,)):
        config = PeftConfig.from_pretrained(str(file.parent))
    if not isinstance(config, LoraConfig):
        raise UserError(f"{file}: peft_type {config.peft_type} is not exported. Only LoRA is.")
    config.inference_mode = False  # so that the adapter's parameters are those that train
    with user_error(f"{file}: does not fit the base model", "Copy it anew.", (Exception,)):
        model = PeftModel(base, config, autocast_adapter_dtype=False)
    expected = set(names_in_files(model, trainable_parameters(model)))
    with safe_open(run / "adapter" / ADAPTER, "pt") as opened:
        found = set(opened.keys())
    if other := first_difference(dict.fromkeys(found, 1), dict.fromkeys(expected, 1)):
        raise UserError(f"{file}: does not describe the adapter beside it, first in {other}. Copy both anew.")
    return model


def _template(run: Path, recipe: Recipe) -> ChatTemplate:
    """The chat template and the tokenizer with which the run was trained: its own copies, where it has some."""
    if not (run / "adapter" / "tokenizer_config.json").is_file():  # a run of an older version
        return build_template(recipe, build_tokenizer(recipe))
    with user_error(f"{run / 'adapter'}: no tokenizer could be opened", "Copy it anew.", (Exception,)):
        tokenizer = open_tokenizer(str(run / "adapter"), recipe.model.trust_remote_code)
    today = date.fromisoformat(recipe.data.date) if recipe.data.date else None
    return ChatTemplate(tokenizer, recipe.data.system_prompt, recipe.data.assistant_markup == "parse", today)


def stored_tensors(source: Source) -> dict[str, Stored]:
    """The tensors of the base model's files, by name; it reads the files' headers only.

    Raises UserError for a checkpoint that is quantized or not in safetensors.
    """
    name = source.recipe.model.name_or_path
    if method := (source.config.get("quantization_config") or {}).get("quant_method", ""):
        raise UserError(
            f"model.name_or_path {name}: its weights are quantized ({method}), so no adapter can be added to them. "
            "Export the adapter alone with --adapter, or name the same model unquantized."
        )
    index = source.base / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (source.base / SAFE_WEIGHTS_NAME).is_file():
        files = [SAFE_WEIGHTS_NAME]
    else:
        raise UserError(
            f"model.name_or_path {name}: has no {SAFE_WEIGHTS_NAME}. Save it as safetensors: open it with transformers "
            "and call save_pretrained."
        )
    found: dict[str, Stored] = {}
    for file in files:
        with safe_open(source.base / file, "pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118
                part = opened.get_slice(tensor)
                kind, shape = part.get_dtype(), list(part.get_shape())
                found[tensor] = Stored(file, DTYPES.get(kind), shape, math.prod(shape) * _bytes_of(kind))
    return found


def _bytes_of(kind: str) -> int:
    """The size of an element of one of safetensors' types, whose names end with their bits: F32, I64, F8_E4M3."""
    digits = "".join(filter(str.isdigit, kind.split("_")[0]))
    return max(1, int(digits or 8) // 8)


def main_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The dtype of most of a checkpoint's weights."""
    sizes = {dtype: sum(one.numel for one in stored.values() if one.dtype == dtype) for dtype in DTYPES.values()}
    return max(sizes, key=lambda dtype: sizes[dtype])


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as options and config.json have it."""
    return str(dtype).removeprefix("torch.")
