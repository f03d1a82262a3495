"""loop/train.py, which also writes down what it ran on and what became of the base.

engine.json: dtypes and classes of the run. base_check.json: whether the frozen base is still what the checkpoint
holds, for which every rank gathers all weights (a tiny model's).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from safetensors.torch import load_file

import loop.train
from loop.engine.accelerator import prepare
from loop.guard.learned import check_learned
from loop.guard.process import end_process
from loop.recipe import parse_recipe


def base_differences(model: Any, checkpoint: Path) -> list[str]:
    """Names of base weights that differ by a bit from the checkpoint's, cast to the model's dtype."""
    stored = load_file(checkpoint / "model.safetensors")
    different, seen = [], set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        seen.add(plain)
        if not torch.equal(parameter.detach().cpu(), stored[plain].to(parameter.dtype)):
            different.append(plain)
    return different + sorted(stored.keys() - seen - {"lm_head.weight"})


def facts(model: Any, optimizer: Any) -> dict[str, str]:
    """What two runs have to share to be comparable."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    adapters = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    accumulation = model.get_data_types()[1] if hasattr(model, "get_data_types") else next(iter(adapters))
    return {
        "adapter": " ".join(sorted(adapters)).replace("torch.", ""),
        "optimizer": type(inner).__name__,
        "deepspeed_optimizer": type(optimizer.optimizer).__name__,
        "accumulation": str(accumulation).replace("torch.", ""),
    }


def main(argv: Sequence[str]) -> None:
    known: dict[str, str] = {}

    def prepare_and_look(*args: Any) -> Any:
        model, optimizer = prepare(*args)
        known.update(facts(model, optimizer))
        return model, optimizer

    def check_base_too(model: Any, accelerator: Any) -> None:
        check_learned(model, accelerator)
        recipe = parse_recipe(argv)[1]
        folder = Path(str(recipe.run_dir))
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            if accelerator.is_main_process:
                different = base_differences(model, Path(recipe.model.name_or_path))
                count = sum(not parameter.requires_grad for parameter in model.parameters())
                (folder / "engine.json").write_text(json.dumps(known))
                (folder / "base_check.json").write_text(json.dumps({"different": different, "compared": count}))

    with patch("loop.train.check_learned", check_base_too), patch("loop.train.prepare", prepare_and_look):
        loop.train.main(argv)


if __name__ == "__main__":
    end_process(main)
