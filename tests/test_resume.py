"""A checkpoint knows its base model again, wherever that lies."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator

from data.errors import UserError
from loop.recipe import parse_recipe
from loop.saving.resume import SAMPLE, SAMPLES, check_resumable, fingerprint
from tests.hostile import TINY, flip_bit


def model_sha256(folder: Path, *arguments: str) -> str:
    recipe = parse_recipe(["--model.name_or_path", str(folder), *arguments])[1]
    return str(fingerprint(recipe, Accelerator(cpu=True))["model_sha256"])


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    (tmp_path / "copy" / "notes.md").write_text("no part of it")
    (tmp_path / "copy" / "consolidated.safetensors").write_text("the same weights, for other programs")
    (tmp_path / "copy" / "tokenizer_old").mkdir()
    assert model_sha256(tmp_path / "copy") == model_sha256(TINY)


@pytest.mark.parametrize("place", [0, 1_234_567, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_one_bit_makes_another_model(name: str, place: int, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    file = tmp_path / "copy" / name
    flip_bit(file, place if abs(place) < file.stat().st_size else file.stat().st_size // 2)
    assert model_sha256(tmp_path / "copy") != model_sha256(TINY)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "modeling_own.py"])
def test_what_transformers_also_reads(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text("{}")
    runs_code = ("--model.trust_remote_code", "true")
    assert model_sha256(tmp_path / "copy", *runs_code) != model_sha256(TINY, *runs_code)
    assert (model_sha256(tmp_path / "copy") == model_sha256(TINY)) == name.endswith(".py")


def test_not_every_rank_has_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.saving.resume.gather_object", lambda mine: [*mine, 8])
    with pytest.raises(UserError, match=r"their steps are \[None, 8\]"):
        check_resumable(None, parse_recipe([])[1], 10, Accelerator(cpu=True))


def test_of_large_files_samples_are_read(tmp_path: Path) -> None:
    """Other weights differ everywhere: the first bytes of each 64th part are enough."""
    shutil.copytree(TINY, tmp_path / "copy")
    size = 3 * SAMPLES * SAMPLE
    shards = {"a": "parts/1.safetensors", "b": "parts/2.safetensors", "c": "parts/1.safetensors"}
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "copy" / "parts").mkdir()
    for name in set(shards.values()):
        (tmp_path / "copy" / name).write_bytes(bytes(size))
    before = model_sha256(tmp_path / "copy")
    for part, name in ((0, shards["a"]), (SAMPLES - 1, shards["b"])):
        flip_bit(tmp_path / "copy" / name, part * (size // SAMPLES))
        after = model_sha256(tmp_path / "copy")
        assert after != before
        before = after
