"""Writes what stands beside the weights of an exported model: its configuration, tokenizer, stop tokens and licence."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from loop.exporting.source import Source, name_of
from loop.saving.adapter import write_asking

# Files of a checkpoint that others need and that are not written anew. llama.cpp reads tokenizer.model.
KEPT = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "tokenizer.model", "*processor_config.json")


def write_beside_weights(source: Source, dtype: torch.dtype, untied: bool, folder: Path) -> None:
    """Writes every file that a reader of the model needs besides its weights and the model card.

    `untied` says that the head got a weight of its own, which it shared with the embedding before.
    """
    patterns = (*KEPT, "*.py") if source.recipe.model.trust_remote_code else KEPT
    for file in {file for pattern in patterns for file in source.base.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
    config = dict(source.config)
    for part in (config, config.get("text_config") or {}):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = name_of(dtype)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name_of(dtype)
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_asking(source.template, generation_config(source), folder)


def generation_config(source: Source) -> GenerationConfig | None:
    """The generation_config.json of the base model; None where it has none."""
    if not (source.base / GENERATION_CONFIG_NAME).is_file():
        return None
    return GenerationConfig.from_pretrained(source.base)


def stop_tokens(source: Source) -> list[int]:
    """The ids of the tokens at which an answer ends, in training and evaluation."""
    return sorted(source.template.stop_tokens(generation_config(source)))
