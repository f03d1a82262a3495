"""Files become the examples of a run: several at once, with shares, repeats and rows that are too long."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

import data.load
from data.chat import encode_row
from data.conversation import question
from data.errors import UserError
from data.examples import Example, sha256_of
from data.load import Loaded, Reading, Tally, load, repeated
from data.template import ChatTemplate
from loop.recipe import ROOT
from tests.chat_templates import TINY, tokenizer_of

TEMPLATE = ChatTemplate(AutoTokenizer.from_pretrained(TINY))
READING = Reading(TEMPLATE, max_length=200)


def written(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def sums(numbers: range) -> list[dict[str, str]]:
    return [{"instruction": f"{x}=", "output": f"{x} + 0"} for x in numbers]


def expected(numbers: range) -> list[list[int]]:
    return [encode_row(question(1, f"{x}=", f"{x} + 0"), TEMPLATE)[0].ids for x in numbers]


def ids(examples: Sequence[Example]) -> list[list[int]]:
    return [example.ids for example in examples]


def test_several_files_stand_behind_one_another(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.jsonl", sums(range(3))), written(tmp_path / "two.jsonl", sums(range(3, 5)))
    loaded = load({one: 1, two: 3}, [], READING)
    assert ids(loaded.train) == expected(range(5))
    assert [example.row for example in loaded.train] == [1, 2, 3, 1, 2]
    rows = repeated(loaded.train, loaded.times)
    assert ids(rows) == expected(range(3)) + 3 * expected(range(3, 5))
    assert ids(rows[-2:]) == expected(range(3, 5))
    assert loaded.tallies == {one: Tally(3, 3), two: Tally(2, 2)}
    assert len(loaded.validation) == 0
    assert sha256_of(rows) == sha256_of(list(rows))


def test_each_validation_file_has_its_name(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", sums(range(3)))
    (tmp_path / "b").mkdir()
    files = [written(tmp_path / name, sums(range(k, k + 2))) for name, k in (("x.jsonl", 10), ("y.a.jsonl", 20))]
    files.append(written(tmp_path / "b" / "x.jsonl", sums(range(30, 31))))
    loaded = load({train: 1}, files, READING)
    assert loaded.parts == {files[0]: 2, "y": 2, files[2]: 1}
    assert ids(loaded.validation) == expected(range(10, 12)) + expected(range(20, 22)) + expected(range(30, 31))


def test_a_share_is_held_out_by_what_rows_say(tmp_path: Path) -> None:
    """Rows that are added, and rows in another order, move none of the others to the other side."""
    file = written(tmp_path / "rows.jsonl", sums(range(1000)))
    share = Reading(TEMPLATE, 200, validation_share=0.2)
    first = load({file: 1}, [], share)
    held_out = set(map(tuple, ids(first.validation)))
    assert 150 < len(held_out) < 250
    assert first.parts == {"held_out": len(held_out)}
    assert len(first.train) + len(held_out) == 1000
    more = load({written(tmp_path / "more.jsonl", sums(range(1999, -1, -1))): 1}, [], share)
    assert set(map(tuple, ids(more.validation))) & set(map(tuple, expected(range(1000)))) == held_out
    other = written(tmp_path / "other.jsonl", sums(range(5000, 5003)))
    assert load({file: 1}, [other], share).parts == {"held_out": len(held_out), "other": 3}
    with pytest.raises(UserError, match="takes none of 3 rows"):
        load({other: 1}, [], Reading(TEMPLATE, 200, validation_share=1e-9))


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    """They are refused by default, dropped, or cut; a row whose cut leaves no label is never learned."""
    rows = sums(range(2))
    rows += [{"instruction": "a", "output": "b" * 40}, {"instruction": "c" * 40, "output": "d"}]
    rows += [{"instruction": "e" * 100_000, "output": "f"}]
    file = written(tmp_path / "rows.jsonl", rows)
    short = max(map(len, expected(range(2)))) + 2
    with pytest.raises(UserError) as error:
        load({file: 1}, [], Reading(TEMPLATE, short))
    assert "3 of 5 rows are bad" in str(error.value)
    assert "row 5: 100,001 characters; shorten it" in str(error.value)
    dropped = load({file: 1}, [], Reading(TEMPLATE, short, "drop"))
    assert ids(dropped.train) == expected(range(2))
    assert dropped.tallies[file] == Tally(rows=5, examples=2, dropped=3)
    assert dropped.tallies[file].told() == "3 too long and dropped"
    cut = load({file: 1}, [], Reading(TEMPLATE, short, "cut"))
    (whole,) = encode_row(question(3, "a", "b" * 40), TEMPLATE)
    assert ids(cut.train) == [*expected(range(2)), whole.ids[:short]]
    assert cut.train[2].spans[-1].end == short
    assert cut.train[2].label_ids == whole.ids[whole.spans[0].start : short]
    assert cut.tallies[file] == Tally(rows=5, examples=3, cut=1, unlabelled=2)
    with pytest.raises(UserError, match="no row is left to learn"):
        load({file: 1}, [], Reading(TEMPLATE, 3, "drop"))


def test_a_row_of_several_examples(tmp_path: Path) -> None:
    """Under a template that drops thoughts of earlier turns a row becomes one example for each answer."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    file = written(tmp_path / "rows.jsonl", [{"messages": turns}] * 3)
    loaded = load({file: 1}, [], Reading(ChatTemplate(tokenizer_of("qwen3")), 200))
    assert [example.row for example in loaded.train] == [1, 1, 2, 2, 3, 3]
    assert loaded.tallies[file].told() == "3 rows became 6 examples"


def test_columns_are_renamed(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [{"q": "1=", "a": "1 + 0", "id": 7}])
    columns = {"q": "instruction", "a": "output", "id": "ignore"}
    assert ids(load({file: 1}, [], Reading(TEMPLATE, 200, columns=columns)).train) == expected(range(1, 2))


@pytest.mark.parametrize("bad", [False, True])
def test_several_processes_do_what_one_does(bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = sums(range(100))
    if bad:
        rows[50]["output"] = ""
        rows[97] = {"text": "another format"}
    file = written(tmp_path / "rows.jsonl", rows)
    found = []
    for inline, cores in ((1000, [0]), (2, [0, 1])):
        monkeypatch.setattr(data.load, "BATCH", 7)
        monkeypatch.setattr(data.load, "INLINE", inline)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        try:
            loaded = load({file: 1}, [], READING)
            found.append((ids(loaded.train), loaded.tallies, loaded.train.sha256))
        except UserError as error:
            found.append(str(error))  # type: ignore[arg-type]
    assert found[0] == found[1]
    if bad:
        assert "2 of 100 rows are bad" in str(found[0])
        assert "row 98: is of the format text, and the rows before it are of alpaca" in str(found[0])
    else:
        assert found[0][0] == expected(range(100))


def test_another_process_opens_the_same_examples(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", sums(range(20)))
    first = load({file: 2}, [file], READING)
    said, fds = first.shared()
    second = Loaded.opened(json.loads(json.dumps(said)), fds)
    del first
    assert ids(second.train) == expected(range(20))
    assert ids(second.validation) == expected(range(20))
    assert (second.times, second.parts, second.tallies) == ([(20, 2)], {"rows": 20}, {file: Tally(40, 40)})


def test_a_data_set_is_read_by_its_name(tmp_path: Path) -> None:
    """The library reads a folder like a data set of the hub; no network is needed for that."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    written(folder / "train.jsonl", sums(range(4)))
    written(folder / "test.jsonl", sums(range(4, 6)))
    loaded = load({f"hub:{folder}": 1}, [f"hub:{folder}:test"], READING)
    assert ids(loaded.train) == expected(range(4))
    assert ids(loaded.validation) == expected(range(4, 6))
    with pytest.raises(UserError, match=r"hub:.*cannot be read .* Check name, revision and split"):
        load({f"hub:{folder}:nothing": 1}, [], READING)
    with pytest.raises(UserError, match="is no data set"):
        load({"hub::": 1}, [], READING)


KILLED = """
import os, sys, time
import data.load
from data.load import Reading, load
from data.template import ChatTemplate
from transformers import AutoTokenizer

def work(batch, reading):
    if batch[0][0] > 1:  # in a process of its own
        os.write(1, f"{os.getpid()}\\n".encode())  # one write: print may write the end of the line by itself
        time.sleep(600)
    return real(batch, reading)

real, data.load.encode_records, data.load.BATCH, data.load.INLINE = data.load.encode_records, work, 2, 1
os.sched_getaffinity = lambda pid: [0, 1]
load({sys.argv[1]: 1}, [], Reading(ChatTemplate(AutoTokenizer.from_pretrained(sys.argv[2])), 200))
"""


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_a_kill_leaves_no_process_behind(victim: str, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", sums(range(20)))
    command = [sys.executable, "-c", KILLED, file, str(TINY)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            workers = [int(process.stdout.readline()) for _ in range(2)]
            os.kill(process.pid if victim == "parent" else workers[0], signal.SIGKILL)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()  # a test that fails does not wait for a process that sleeps
    if victim == "worker":
        assert "a process that tokenizes rows was ended from outside" in said
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)


ONCE = """
import os, sys, time
from pathlib import Path
from data.errors import UserError
from loop.engine.once import once_per_machine

def make():
    print("made", flush=True)
    if sys.argv[1] == "mistake":
        raise UserError("row 1 is bad")
    if sys.argv[1] == "death":
        while len(list(here.parent.glob("came-*"))) < 3:
            time.sleep(0.05)
        time.sleep(1)  # for the others to connect
        os._exit(3)
    with open(sys.argv[2], "rb") as file:
        return {"rows": [1, 2]}, [os.dup(file.fileno())]

here = Path(sys.argv[2])
here.with_name(f"came-{os.environ['RANK']}").touch()
try:
    said, (fd,) = once_per_machine(make)
    print("got", said, os.pread(fd, 5, 0).decode(), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.mark.parametrize("case", ["good", "mistake", "death"])
def test_one_process_of_a_machine_does_it(case: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    shared = {"LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONCE, case, str(tmp_path / "file")],
            env=os.environ | shared | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (2, 1, 0)
    ]
    said = [process.communicate(timeout=120)[0].split("\n")[:-1] for process in started]
    assert sum(line == "made" for lines in said for line in lines) == 1
    results = [[line for line in lines if line != "made"] for lines in said]
    got = ["got {'rows': [1, 2]} hello"]
    lost = ["RunError the process that reads the rows of this machine has ended; its message says why"]
    assert results == {"good": [got] * 3, "mistake": [["UserError row 1 is bad"]] * 3, "death": [lost, lost, []]}[case]
