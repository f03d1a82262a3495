"""Which checkpoint becomes adapter/, and that it does so to the bit, with or without a training around it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from data.errors import UserError
from loop.guard.process import RunError
from loop.saving.adapter import CHOSEN, Choice, choose, publish_adapter
from loop.saving.checkpoint import OF_ADAPTER, OPTIMIZER, STATE
from loop.saving.publish import write_manifest


def checkpoint(run_dir: Path, step: int) -> Path:
    """The files of a checkpoint, with contents of their own."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for name in (*OF_ADAPTER, OPTIMIZER, STATE):
        (folder / name).write_text(f"{name} of step {step}")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("choose_by", "losses", "step", "by", "said"),
    [
        ("last", {2: 0.1, 4: 0.5, 6: 0.9}, 6, "last", ""),
        ("val/loss", {2: 0.5, 4: 0.1, 6: 0.9}, 4, "val/loss", ""),
        ("val/loss", {2: 0.5, 4: 0.1, 6: 0.1}, 4, "val/loss", ""),
        ("val/loss", {1: 0.5, 2: 0.4, 5: 0.4, 6: 0.6}, 2, "val/loss", ""),
        ("val/loss", {1: 0.3, 2: 0.4, 6: 0.6}, 2, "val/loss", "note: val/loss was lower, 0.3000, after step 1"),
        ("val/loss", {1: 0.3}, 6, "last", "note: no checkpoint was validated"),
        ("val/loss", {}, 6, "last", "note: no checkpoint was validated"),
    ],
)
def test_the_choice(
    choose_by: str,
    losses: Mapping[int, float],
    step: int,
    by: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There are checkpoints of the steps 2, 4 and 6."""
    folders = {each: checkpoint(tmp_path, each) for each in (2, 4, 6)}
    choice = choose(tmp_path, choose_by, list(losses.items()))
    assert (choice.checkpoint, choice.step, choice.by) == (folders[step], step, by)
    assert choice.value == (losses[step] if by == "val/loss" else None)
    assert set(choice.values) == ({2, 4, 6} & losses.keys() if by == "val/loss" else set())
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == bool(printed)


def test_a_judge_puts_another_checkpoint_into_a_finished_run(tmp_path: Path) -> None:
    """No model is there: what lies beside the adapter stays, and so does what publish_adapter knows nothing of."""
    first, last = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    publish_adapter(tmp_path, Choice(last, "last", {}), lambda folder: (folder / "tokenizer.json").touch())
    adapter = tmp_path / "adapter"
    assert json.loads((adapter / CHOSEN).read_text()) == {"step": 4, "by": "last", "value": None, "of": {}}
    (adapter / "chat_template.jinja").write_text("the user's own")
    publish_adapter(tmp_path, Choice(first, "exact", {2: 0.75, 4: 0.5}))
    told = json.loads((adapter / CHOSEN).read_text())
    assert told == {"step": 2, "by": "exact", "value": 0.75, "of": {"2": 0.75, "4": 0.5}}
    for name in OF_ADAPTER:
        assert (adapter / name).read_bytes() == (first / name).read_bytes()
    others = {path.name for path in adapter.iterdir()} - {*OF_ADAPTER, CHOSEN}
    assert others == {"tokenizer.json", "chat_template.jinja"}
    assert (adapter / "chat_template.jinja").read_text() == "the user's own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoints"]


def test_a_damaged_checkpoint_does_not_become_the_adapter(tmp_path: Path) -> None:
    first, last = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    publish_adapter(tmp_path, Choice(last, "last", {}), lambda folder: None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    os.truncate(first / OF_ADAPTER[0], 3)
    with pytest.raises(RunError, match=r"step-000002: adapter_model.safetensors has 3 bytes instead of"):
        publish_adapter(tmp_path, Choice(first, "exact", {2: 1.0}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_without_an_adapter_there_is_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no adapter yet. Let the run come to its end"):
        publish_adapter(tmp_path, Choice(checkpoint(tmp_path, 2), "exact", {2: 1.0}))
    assert not (tmp_path / "adapter").exists()
