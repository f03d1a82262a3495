"""A run whose adapters did not move ends as a failure that names them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, launch

ZEROED = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_base, but nothing of its second layer's attention reaches the output."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(ROOT / "data" / "tiny_base", folder)
    weights = load_file(folder / "model.safetensors")
    weights[ZEROED] = torch.zeros_like(weights[ZEROED])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_adapters_that_never_moved(config: str, model: Path, tmp_path: Path) -> None:
    """A closed form: whatever the attention gives is multiplied by zero, so its query gets a gradient of zero."""
    words = ["--model.name_or_path", str(model), "--lora.target_modules", "[q_proj, up_proj]"]
    run = launch(CONFIGS / f"{config}.yaml", *DEBUG, *words, folder=tmp_path / "run")
    assert run.code == 1, run.output
    assert run.output.count("error: ") == 1
    assert "1 of its 8 adapters are as they were at its start" in run.output
    assert "They are model.layers.1.self_attn.q_proj.lora_B" in run.output
    assert (run.folder / "adapter" / "adapter_model.safetensors").exists(), "what was learned is saved"
