"""A checkpoint knows its base model again, wherever that lies."""

import json
import shutil
from contextlib import redirect_stdout
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from data.errors import UserError
from data.examples import Example
from loop.batch_arithmetic import BatchArithmetic
from loop.model.build import Data
from loop.recipe import DEFAULT_RECIPE, parse_recipe
from loop.saving.checkpoint import Checkpoint
from loop.saving.content import SAMPLE, SAMPLES, model_sha256
from loop.saving.resume import check_resumable, fingerprint, keep_decisions
from tests.hostile import TINY, flip_bit

DEBUG = DEFAULT_RECIPE.with_name("debug.yaml")
DATA = Data([Example.of(1, [1, 2], [3])], [], 0)


def hash_of(folder: Path, *arguments: str) -> str:
    return model_sha256(parse_recipe(["--model.name_or_path", str(folder), *arguments])[1])


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    (tmp_path / "copy" / "notes.md").write_text("no part of it")
    (tmp_path / "copy" / "consolidated.safetensors").write_text("the same weights, for other programs")
    (tmp_path / "copy" / "tokenizer_old").mkdir()
    assert hash_of(tmp_path / "copy") == hash_of(TINY)


@pytest.mark.parametrize("place", [0, 1_234_567, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_one_bit_makes_another_model(name: str, place: int, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    file = tmp_path / "copy" / name
    flip_bit(file, place if abs(place) < file.stat().st_size else file.stat().st_size // 2)
    assert hash_of(tmp_path / "copy") != hash_of(TINY)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "modeling_own.py"])
def test_what_transformers_also_reads(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text("{}")
    runs_code = ("--model.trust_remote_code", "true")
    assert hash_of(tmp_path / "copy", *runs_code) != hash_of(TINY, *runs_code)
    assert (hash_of(tmp_path / "copy") == hash_of(TINY)) == name.endswith(".py")


def test_not_every_rank_has_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.saving.resume.gather_object", lambda mine: [*mine, 8])
    recipe = parse_recipe([])[1]
    with pytest.raises(UserError, match=r"their steps are \[None, 8\]"):
        check_resumable(None, {}, recipe, DATA, BatchArithmetic.of(recipe, 1, 7), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        (("packed", "none"), (), ("packed", "none")),
        (("packed", "reentrant"), ("--batching", "padded"), ("padded", "reentrant")),
        (("packed", "none"), ("--gradient_checkpointing", "non_reentrant"), ("packed", "non_reentrant")),
        (("auto", "auto"), (), ("auto", "auto")),
    ],
)
def test_what_was_decided_is_kept_where_the_recipe_says_auto(
    then: tuple[str, str], now: tuple[str, ...], kept: tuple[str, str]
) -> None:
    """The last case is a checkpoint of an older version, which holds auto itself."""
    known = {"run": {"recipe": {"batching": then[0], "gradient_checkpointing": then[1]}}}
    recipe = keep_decisions(Checkpoint(Path("step-000001"), known, {}, {}), parse_recipe(now)[1], 1)
    assert (recipe.batching, recipe.gradient_checkpointing) == kept


def test_rank_0_alone_reads_the_training_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 gets what rank 0 has found, and reads nothing."""

    class Rank1:
        is_main_process = False
        distributed_type = DistributedType.MULTI_CPU
        mixed_precision = "no"

    told = {"model_sha256": "a", "train_file_sha256": "b"}
    monkeypatch.setattr("loop.engine.accelerator.broadcast_object_list", lambda values: values)
    monkeypatch.setattr("loop.saving.resume.broadcast_object_list", lambda values: values.__setitem__(0, told))
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was read"))
    recipe, accelerator = parse_recipe([])[1], cast(Any, Rank1())
    found = fingerprint(recipe, DATA, BatchArithmetic.of(recipe, 2, 7), accelerator)
    assert (found["model_sha256"], found["train_file_sha256"], found["rows_per_step"]) == ("a", "b", 32)


def test_of_large_files_samples_are_read(tmp_path: Path) -> None:
    """Other weights differ everywhere: the first bytes of each 64th part are enough."""
    shutil.copytree(TINY, tmp_path / "copy")
    size = 3 * SAMPLES * SAMPLE
    shards = {"a": "parts/1.safetensors", "b": "parts/2.safetensors", "c": "parts/1.safetensors"}
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "copy" / "parts").mkdir()
    for name in set(shards.values()):
        (tmp_path / "copy" / name).write_bytes(bytes(size))
    before = hash_of(tmp_path / "copy")
    for part, name in ((0, shards["a"]), (SAMPLES - 1, shards["b"])):
        flip_bit(tmp_path / "copy" / name, part * (size // SAMPLES))
        after = hash_of(tmp_path / "copy")
        assert after != before
        before = after


def resumed(
    then_rows: list[Example], now_rows: list[Example], *arguments: str, steps: int = 4, same_file: bool = False
) -> str:
    """What check_resumable says to a run of debug.yaml (two epochs, four rows a step) that goes on after `steps`."""
    recipe = parse_recipe(["--config", str(DEBUG)])[1]
    accelerator = Accelerator(cpu=True)
    then = fingerprint(recipe, Data(then_rows, [], 0), BatchArithmetic.of(recipe, 1, len(then_rows)), accelerator)
    checkpoint = Checkpoint(Path("step-000004"), {"step": steps, "run": then}, {}, {})
    recipe = parse_recipe(["--config", str(DEBUG), *arguments])[1]
    data, batch = Data(now_rows, [], 0), BatchArithmetic.of(recipe, 1, len(now_rows))
    now = fingerprint(recipe, data, batch, accelerator)
    if now_rows != then_rows and not same_file:
        now["train_file_sha256"] = "another"
    said = StringIO()
    with redirect_stdout(said):
        check_resumable(checkpoint, now, recipe, data, batch, accelerator)
    return said.getvalue()


SEVEN = [Example.of(number, [number], [number, 9]) for number in range(1, 8)]
EIGHTH = Example.of(8, [3, 4], [5])


def test_other_tokens_of_the_same_file_are_another_run() -> None:
    """The chat template may write today's date, or the labels may be made in another way by now."""
    with pytest.raises(UserError, match="its rows become other tokens than then"):
        resumed(SEVEN, [*SEVEN[:6], Example.of(7, [7], [8, 9])], same_file=True)


def test_more_epochs_or_rows_go_on_and_say_what_that_is() -> None:
    assert resumed(SEVEN, SEVEN) == ""
    said = resumed(SEVEN, SEVEN, "--epochs", "4")
    assert said.startswith(
        "note: until step 4 this was a run of 2 epochs. From here it goes on as one of 4 epochs and "
    )
    assert "7 rows: 8 steps" in said
    said = resumed(SEVEN, [*SEVEN, EIGHTH], "--epochs", "3")
    assert "this was a run of 2 epochs and 7 rows. From here it goes on as one of 3 epochs and 8 rows: 6 steps" in said
    assert "It is not the run that would have begun with them" in said


@pytest.mark.parametrize(
    ("arguments", "before", "now"),
    [
        (["--max_steps", "3"], "2 epochs", "2 epochs (max_steps 3) and 7 rows: 3 steps"),
        (["--epochs", "9", "--max_steps", "5"], "2 epochs", "9 epochs (max_steps 5) and 7 rows: 5 steps"),
    ],
)
def test_max_steps_is_another_length_as_epochs_are(arguments: list[str], before: str, now: str) -> None:
    said = resumed(SEVEN, SEVEN, *arguments, steps=3)
    assert f"until step 3 this was a run of {before}. From here it goes on as one of {now}" in said


def test_max_steps_that_changes_no_step_needs_no_note() -> None:
    for arguments in (["--max_steps", "4"], ["--max_steps", "99"], ["--epochs", "9", "--max_steps", "4"]):
        assert resumed(SEVEN, SEVEN, *arguments) == "", arguments


def test_rows_that_were_changed_are_refused() -> None:
    for changed in ([EIGHTH, *SEVEN], SEVEN[:6], [*SEVEN[:6], EIGHTH], [*SEVEN[:6], EIGHTH, EIGHTH], SEVEN[::-1]):
        with pytest.raises(UserError, match=r"data.train_file: .* is not that of the run's file. \(Rows may be added"):
            resumed(SEVEN, changed)


def test_the_same_rows_in_another_file_are_the_same_run() -> None:
    """The file was written in another way, with the same rows in it; that needs no note."""
    again = [Example.of(row.row + 100, row.prompt_ids, row.label_ids) for row in SEVEN]
    assert resumed(SEVEN, again) == ""


def test_a_run_is_not_made_shorter_than_it_is() -> None:
    with pytest.raises(UserError, match=r"4 steps are learned, and the run would have 2. Give more epochs"):
        resumed(SEVEN, SEVEN, "--epochs", "1")
    with pytest.raises(UserError, match=r"4 steps are learned, and the run would have 3. Give a larger max_steps"):
        resumed(SEVEN, SEVEN, "--max_steps", "3")
    assert "this was a run of 2 epochs" in resumed(SEVEN, SEVEN, "--epochs", "1", steps=2)


def test_a_run_keeps_its_day() -> None:
    """A new run begins on a day, and a resume goes on with it, whatever day it is by then."""
    recipe = parse_recipe(["--config", str(DEBUG)])[1]
    assert recipe.data.date is None
    assert keep_decisions(None, recipe, 1).data.date == date.today().isoformat()
    then = {"run": {"recipe": {"data": {"date": "2020-02-29"}}}}
    checkpoint = Checkpoint(Path("step-000004"), then, {}, {})
    assert keep_decisions(checkpoint, recipe, 1).data.date == "2020-02-29"
    given = parse_recipe(["--config", str(DEBUG), "--data.date", "2021-01-01"])[1]
    assert keep_decisions(checkpoint, given, 1).data.date == "2021-01-01", "which the resume then refuses"
