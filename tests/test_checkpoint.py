"""An adapter file is believed only after it was read back."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.chat import encode_row, prompt_ids
from data.conversation import question
from data.errors import UserError
from data.template import ChatTemplate
from loop.guard.process import RunError
from loop.recipe import parse_recipe
from loop.saving.adapter import Choice, publish_adapter, write_asking
from loop.saving.checkpoint import (
    check_adapter,
    clear_up,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from loop.saving.publish import publish
from loop.saving.resume import find_checkpoint
from tests.hostile import EVIL, flip_bit

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
    publish_adapter(tmp_path, Choice(save(model, tmp_path, 1), "last", {}), lambda folder: None)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), str(tmp_path / "adapter"))
    ours = {name: p for name, p in model.named_parameters() if "lora" in name}
    theirs = {name: p for name, p in loaded.named_parameters() if "lora" in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoints"], "nothing is left beside it"


def test_the_adapter_folder_asks_as_the_run_did(model: PeftModel, tmp_path: Path) -> None:
    """A stranger who opens it has the prompts of the run and stops where its labels end, also with another template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    template = ChatTemplate(tokenizer, "Be short.")
    asking = partial(write_asking, template, getattr(model.get_base_model(), "generation_config", None))
    publish_adapter(tmp_path, Choice(save(model, tmp_path, 1), "last", {}), asking)
    opened = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    row = question(1, "5=", "2 + 3")
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "5="}]
    asked: Any = opened.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    (example,) = encode_row(row, template)
    assert asked["input_ids"] == example.prompt_ids == prompt_ids(row, template)
    stops = GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id
    assert example.label_ids[-1] == opened.convert_tokens_to_ids("<|endoftext|>")
    assert set(stops) == {example.label_ids[-1], tokenizer.eos_token_id}


RUN = {"recipe": {}, "model_sha256": "", "train_file_sha256": "", "rows_per_step": 1, "mixed_precision": "no"}


def state(step: int, losses: Mapping[int, float] | None = None) -> dict[str, object]:
    validations = [list(validation) for validation in (losses or {}).items()]
    return {"step": step, "updates": step, "interval": None, "validations": validations, "run": RUN}


def save(model: PeftModel, run_dir: Path, step: int, limit: int = 9, losses: Mapping[int, float] | None = None) -> Path:
    """A checkpoint after one real update of `model`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    return save_checkpoint(model, optimizer, run_dir, state(step, losses), limit, None, Accelerator(cpu=True))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_stay(model: PeftModel, tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save(model, tmp_path, step, 2)
    assert names(tmp_path) == ["step-000015", "step-000100"]
    for step in (999_999, 1_000_000):
        save(model, tmp_path, step, 1)
    assert names(tmp_path) == ["step-1000000"], "by number, not by text"


def test_the_best_and_the_one_resumed_from_stay(model: PeftModel, tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 4: 2.0}
    for step in (1, 2, 3, 4):
        save(model, tmp_path, step, 1, {at: loss for at, loss in losses.items() if at <= step})
    assert names(tmp_path) == ["step-000002", "step-000004"]
    resumed = load_checkpoint(tmp_path / "checkpoints" / "step-000004")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for step in (5, 6):
        now = state(step, losses | {5: 5.0})
        save_checkpoint(model, optimizer, tmp_path, now, 1, resumed.folder, Accelerator(cpu=True))
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000006"]


def test_later_checkpoints_are_set_aside(model: PeftModel, tmp_path: Path) -> None:
    """A run that goes on before them neither counts them nor deletes them, nor what it saves itself for their sake."""
    for step in (3, 100, 200):
        save(model, tmp_path, step)
    before = (tmp_path / "checkpoints" / "step-000200" / "optimizer.safetensors").read_bytes()
    clear_up(tmp_path, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003"]
    save(model, tmp_path, 4, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004"]
    (aside,) = (tmp_path / "checkpoints").glob("aside-step-000200-*")
    assert (aside / "optimizer.safetensors").read_bytes() == before


def test_what_a_kill_left_is_cleared_up(model: PeftModel, tmp_path: Path) -> None:
    """Between the two renames of a folder that is replaced, neither has its name."""
    folder = save(model, tmp_path, 3)
    folder.rename(folder.with_name(".step-000003.old"))
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    clear_up(tmp_path, 3)
    assert names(tmp_path) == ["step-000003"]
    assert load_checkpoint(folder).step == 3


def test_a_checkpoint_is_small_and_holds_no_base(model: PeftModel, tmp_path: Path) -> None:
    folder = save(model, tmp_path, 7)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 14 * trainable + 1_000_000
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".md"}
    checkpoint = load_checkpoint(folder)
    assert sum(tensor.numel() for tensor in checkpoint.adapter.values()) == trainable
    assert sum(tensor.numel() for tensor in checkpoint.optimizer.values()) == 2 * trainable


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no manifest": ("no manifest.json", lambda folder: (folder / "manifest.json").unlink()),
    "manifest is no JSON": ("no manifest.json that can be read", lambda f: (f / "manifest.json").write_text("{")),
    "manifest is a list": ("no manifest.json that can be read", lambda f: (f / "manifest.json").write_text("[]")),
    "manifest of numbers": ("no manifest.json that", lambda f: (f / "manifest.json").write_text('{"a": 5}')),
    "empty manifest": ("does not name adapter_model", lambda f: (f / "manifest.json").write_text("{}")),
    "truncated": ("bytes instead of", lambda f: os.truncate(f / "optimizer.safetensors", 100)),
    "emptied": ("has 0 bytes", lambda f: os.truncate(f / "adapter_model.safetensors", 0)),
    "one bit": ("SHA-256 differs", lambda f: flip_bit(f / "adapter_model.safetensors")),
    "edited state": ("SHA-256 differs", lambda f: replace(f / "trainer_state.json", '"step": 7', '"step": 3')),
    "file missing": ("optimizer.safetensors is missing", lambda f: (f / "optimizer.safetensors").unlink()),
    "a pickle beside": ("not written by this program: evil.pkl", lambda f: (f / "evil.pkl").write_bytes(EVIL)),
    "a pickle for it": (
        "not written by this program: adapter_model.bin",
        lambda f: (f / "adapter_model.bin").write_bytes(EVIL),
    ),
    "folder missing": ("there is no such folder", shutil.rmtree),
}


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_auto_passes_it_over(
    damage: str, model: PeftModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model, tmp_path, 6)
    folder = save(model, tmp_path, 7)
    said, damages = DAMAGES[damage]
    damages(folder)
    with pytest.raises(UserError, match=re.escape(said)):
        load_checkpoint(folder)
    recipe = parse_recipe(["--resume", "auto", "--run_dir", str(tmp_path)])[1]
    found = find_checkpoint("tiny", recipe)
    assert found is not None
    assert found.step == 6
    if folder.exists():
        assert capsys.readouterr().out.count("warning: passed over") == 1
    if folder.exists():
        shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
        with pytest.raises(UserError, match="has no whole checkpoint"):
            find_checkpoint("tiny", recipe)
    assert not Path("plainloop-was-here").exists()


def test_what_resume_means(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def found(*arguments: str) -> int | None:
        checkpoint = find_checkpoint("tiny", parse_recipe(arguments)[1])
        return checkpoint.step if checkpoint else None

    assert found() is None
    with pytest.raises(UserError, match=r"no run of tiny with a checkpoint under runs/\. Start without --resume"):
        found("--resume", "auto")
    assert found("--resume", "auto", "--run_dir", "runs/tiny-20260101-000000") is None
    assert "starting at step 0" in capsys.readouterr().out, "not silently"
    for name in ("tiny-20260101-000000", "other-1", "tiny-long-20260101-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    save(model, Path("runs/tiny-20260101-000000"), 3)
    save(model, Path("runs/tiny-20260101-000000"), 10)
    save(model, Path("runs/other-1"), 99)
    save(model, Path("runs/tiny-long-20260101-000000"), 98)
    (tmp_path / "runs" / "tiny-20260101-000000" / "checkpoints" / ".step-000011.partial").mkdir()
    assert found("--resume", "auto") == found("--resume", "runs/tiny-20260101-000000") == 10
    assert found("--resume", "runs/tiny-20260101-000000/checkpoints/step-000003") == 3
    with pytest.raises(UserError, match="a run goes on in its own folder"):
        found("--resume", "runs/tiny-20260101-000000/checkpoints/step-000003", "--run_dir", "elsewhere")
    with pytest.raises(UserError, match="there is no such folder"):
        found("--resume", "nowhere")
    with pytest.raises(UserError, match="a run goes on in its own folder"):
        found("--resume", "runs/tiny-20260101-000000", "--run_dir", "runs/other-1")
    (tmp_path / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="nothing has been saved there"):
        found("--resume", "runs/empty")
    monkeypatch.chdir("runs/tiny-20260101-000000/checkpoints")
    checkpoint = find_checkpoint("tiny", parse_recipe(["--resume", "step-000003"])[1])
    assert checkpoint is not None
    assert checkpoint.run_dir == tmp_path / "runs" / "tiny-20260101-000000", "wherever one stands"


def test_what_cannot_be_written_is_an_error(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/adapter could not be written"):
        publish(tmp_path / "file" / "adapter", lambda folder: None)


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
        save(model, tmp_path, 1)
    assert names(tmp_path) == []


def test_checkpoints_may_be_a_link_to_a_larger_disk(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save(model, tmp_path / "run", 3)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "large")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    for arguments in (["auto", "--run_dir", str(tmp_path / "run")], [str(tmp_path / "run")]):
        checkpoint = find_checkpoint("tiny", parse_recipe(["--resume", *arguments])[1])
        assert checkpoint is not None
        assert checkpoint.run_dir == tmp_path / "run"
