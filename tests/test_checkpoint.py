"""An adapter file is believed only after it was read back."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import RunError
from loop.checkpoint import check_adapter, save_adapter, save_checkpoint

TINY = str(Path(__file__).parents[1] / "data" / "tiny_base")


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora)
    assert isinstance(made, PeftModel)
    return made


def test_saved_adapter_is_the_models(model: PeftModel, tmp_path: Path) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", Accelerator(cpu=True))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), str(tmp_path / "adapter"))
    ours = {name: p for name, p in model.named_parameters() if "lora" in name}
    theirs = {name: p for name, p in loaded.named_parameters() if "lora" in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing is left beside it"


def test_only_the_newest_checkpoints_stay(model: PeftModel, tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save_checkpoint(model, tmp_path, step, 0, 2, Accelerator(cpu=True))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000015", "step-000100"]
    for step in (999_999, 1_000_000):
        save_checkpoint(model, tmp_path, step, 0, 1, Accelerator(cpu=True))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1000000"], "by number, not by text"


def test_what_cannot_be_written_is_an_error(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"could not be saved to .*/file/adapter"):
        save_adapter(model, tmp_path / "file" / "adapter", Accelerator(cpu=True))


@pytest.mark.parametrize("damage", ["missing", "extra", "empty", "changed", "nan"])
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    expected = {"a": torch.ones(2, 3), "b": torch.zeros(3)}
    file = tmp_path / "adapter.safetensors"
    save_file(expected, file)
    check_adapter(file, expected)
    written = load_file(file)
    if damage == "missing":
        del written["b"]
    elif damage == "extra":
        written["c"] = torch.ones(1)
    elif damage == "empty":  # what a plain save under ZeRO-3 leaves
        written["a"] = expected["a"] = torch.ones(0)
    elif damage == "changed":
        written["a"][0, 0] = 1 + 1e-6
    else:
        written["a"][0, 0] = expected["a"][0, 0] = torch.nan
    save_file(written, file)
    with pytest.raises(RuntimeError, match=r"adapter\.safetensors"):
        check_adapter(file, expected)


def test_a_full_disk_is_one_error(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors then raises what is neither an OSError nor a RuntimeError."""

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_adapter(model, tmp_path / "adapter", Accelerator(cpu=True))
    assert not (tmp_path / "adapter").exists()
