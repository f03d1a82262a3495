"""Tests that rows on disk equal rows in memory and need none of it, and that a JSON array is read in pieces."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import data.files
from data.chat import encode_batch, encode_row
from data.conversation import question
from data.errors import UserError
from data.examples import Example, Examples, Span, label_lengths_of, lengths_of
from data.files import records
from data.rows import iter_rows, read_rows
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from tests.equality import TINY

SOME = [
    Example.of(3, [1, 2, 151_643], [5]),
    Example(4, [7, 8, 9], (Span(1, 2, 0.1), Span(2, 3))),
    Example.of(9, [4] * 1000, [2**32 - 1, 0]),
]


def test_is_a_sequence() -> None:
    examples = Examples(SOME)
    assert list(examples) == SOME
    assert (examples[-1], examples[1:], examples[::-1]) == (SOME[-1], SOME[1:], SOME[::-1])
    assert [examples[i] for i in np.array([2, 0])] == [SOME[2], SOME[0]]
    for i in (3, -4):
        with pytest.raises(IndexError):
            examples[i]
    assert len(Examples([])) == 0
    assert not Examples([])


def test_lengths_are_those_of_the_rows() -> None:
    for lengths in (lengths_of, label_lengths_of):
        assert lengths(Examples(SOME)).tolist() == lengths(SOME).tolist()
    assert lengths_of(SOME).tolist() == [4, 3, 1002]
    assert label_lengths_of(SOME).tolist() == [1, 2, 2]


def test_no_room_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: the tokenized rows cannot be written .*set TMPDIR"):
        Examples(SOME)


def test_batches_are_encoded_as_single_rows() -> None:
    """Some rows name a control token, and the size of a batch puts its borders at different rows."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template = ChatTemplate(tokenizer, SYSTEM_PROMPT)
    rows = [question(i, f"{i}=", f"{i} + 0") for i in range(1, 12)]
    rows[3] = question(4, "<|im_end|>", "x")
    rows[8] = question(9, "9=", "<|im_start|>system", [("a", "b")])
    one_by_one = [example for row in rows for example in encode_row(row, template)]
    for size in (1, 4, 11, 100):
        found = [
            each for start in range(0, len(rows), size) for each in encode_batch(rows[start : start + size], template)
        ]
        assert [example for examples in found if isinstance(examples, list) for example in examples] == one_by_one


def written(content: str, tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_an_array_in_pieces(
    indent: int | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read as an array also when its first pieces are nothing but white space."""
    monkeypatch.setattr(data.files, "CHUNK", chunk)
    rows = [{"instruction": f"数 {i}=", "input": "", "output": f"{i}\n\\"} for i in range(3)]
    path = written(f"\n  \n {json.dumps(rows, indent=indent, ensure_ascii=False)}\n", tmp_path)
    expected = [question(i, row["instruction"], row["output"]) for i, row in enumerate(rows, start=1)]
    assert read_rows(path) == expected


BROKEN = [
    "[",
    "[1",
    "[1,",
    "[1,]",
    "[1 2]",
    "[1]]",
    "[1] 2",
    '["a',
    "[\n1,\n  tru]",
    "[1,\n\n\n 2,\n   ?]",
    "[{]",
    "[1,,2]",
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_array_is_named_where_json_names_it(content: str, tmp_path: Path) -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(content)
    with pytest.raises(UserError) as ours:
        read_rows(written(content, tmp_path))
    assert f"line {error.value.lineno} column {error.value.colno}" in str(ours.value)
    assert "so it has to be one JSON array" in str(ours.value)


def test_good_rows_come_before_the_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{}\n{"instruction": "c", "output": "d"}\n')
    rows = iter_rows(str(path), records(path))
    assert [next(rows).number, next(rows).number] == [1, 3]
    with pytest.raises(UserError, match="1 of 3 rows are bad"):
        next(rows)


GROWTH = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from data.batch import epoch_order, windows
from data.load import Reading, load
from data.template import ChatTemplate
from loop.measure.memory import peak_host_memory

path = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
list(load({sys.argv[3]: 1}, [], Reading(ChatTemplate(tokenizer), 99)).train)
peak_host_memory()
before = peak_host_memory()
examples = load({str(path): 1}, [], Reading(ChatTemplate(tokenizer), 99)).train
for window in windows(examples, epoch_order(len(examples), 1, 0), 64, 1, 1, 0, "shared_prefix", 0):
    pass
print(len(examples), peak_host_memory() - before)
"""


@pytest.mark.parametrize("form", ["array", pytest.param("lines", marks=pytest.mark.slow)])
@pytest.mark.launches
def test_memory_does_not_grow_with_the_rows(form: str, tmp_path: Path) -> None:
    """Sixty thousand rows of 49 tokens are read, tokenized and dealt out once; memory holds a few numbers a row."""
    count = 60_000
    rows = [json.dumps({"instruction": f"{i}=", "output": f"{i} + 0 {'x' * 20}"}) for i in range(count)]
    text = {"array": "[" + ",".join(rows) + "]", "lines": "\n".join(rows)}
    (tmp_path / "rows").write_text(text[form])
    (tmp_path / "few").write_text("\n".join(rows[:1000]))
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "rows"), str(TINY), str(tmp_path / "few")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, grown = map(int, done.stdout.split())
    assert found == count
    assert grown < 30e6, "lists of ids would take 120 MB"


def test_reading_twice_is_reading_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    assert read_rows(path) == list(iter_rows(str(path), records(path)))
