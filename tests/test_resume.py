"""A checkpoint knows its base model again, wherever that lies."""

import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator

from loop.recipe import ROOT, parse_recipe
from loop.resume import SAMPLE, SAMPLES, fingerprint

TINY = ROOT / "data" / "tiny_base"


def model_sha256(folder: Path) -> str:
    recipe = parse_recipe(["--model.name_or_path", str(folder)])[1]
    return str(fingerprint(recipe, Accelerator(cpu=True))["model_sha256"])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    (tmp_path / "copy" / "notes.md").write_text("no part of it")
    assert model_sha256(tmp_path / "copy") == model_sha256(TINY)


@pytest.mark.parametrize("place", [0, 1_234_567, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_one_bit_makes_another_model(name: str, place: int, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    file = tmp_path / "copy" / name
    flip(file, place if abs(place) < file.stat().st_size else file.stat().st_size // 2)
    assert model_sha256(tmp_path / "copy") != model_sha256(TINY)


def test_of_large_files_samples_are_read(tmp_path: Path) -> None:
    """Other weights differ everywhere: the first bytes of each 64th part are enough."""
    shutil.copytree(TINY, tmp_path / "copy")
    size = 3 * SAMPLES * SAMPLE
    for byte in (b"\0", b"\1"):
        (tmp_path / "copy" / f"more-{byte.hex()}.safetensors").write_bytes(byte * size)
    before = model_sha256(tmp_path / "copy")
    for part in (0, SAMPLES - 1):
        flip(tmp_path / "copy" / "more-00.safetensors", part * (size // SAMPLES))
        after = model_sha256(tmp_path / "copy")
        assert after != before
        before = after
    shutil.move(tmp_path / "copy" / "more-01.safetensors", tmp_path / "copy" / "other.safetensors")
    assert model_sha256(tmp_path / "copy") != before
