"""The same rows read from every kind of file, and what is said of a file that is damaged."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data.errors import UserError
from data.files import files_of, records
from data.rows import read_rows

ROWS = [
    {"instruction": '1 "one"', "input": "", "output": "a,\nb"},
    {"instruction": "2", "input": "zwei", "output": "数"},
    {"instruction": "3", "input": "", "output": "c"},
]
SQUEEZE: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def table(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def columnar(write: Callable[[Any, Any], object]) -> bytes:
    sink = io.BytesIO()
    write(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def stream(rows: Any, sink: Any) -> None:
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


def arrow_file(rows: Any, sink: Any) -> None:
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


CONTENTS = {
    "array.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "lines.json": "\n".join(map(json.dumps, ROWS)).encode(),
    "lines.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode(),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.ndjson": "\n".join(map(json.dumps, ROWS)).encode(),
    "table.csv": table(),
    "mark.csv": b"\xef\xbb\xbf" + table(),
    "table.tsv": table("\t"),
    "rows.parquet": columnar(lambda rows, sink: pa.parquet.write_table(rows, sink, row_group_size=2)),
    "stream.arrow": columnar(stream),
    "file.arrow": columnar(arrow_file),
    "rows.feather": columnar(pa.feather.write_feather),
    "no_ending": json.dumps(ROWS).encode(),
}


@pytest.mark.parametrize("squeezed", SQUEEZE)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_has_the_same_rows(name: str, squeezed: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{squeezed}"
    path.write_bytes(SQUEEZE[squeezed](CONTENTS[name]))
    assert [(value, problem) for _, value, problem in records(path)] == [(row, None) for row in ROWS]
    assert [row.answer for row in read_rows(path)] == ["a,\nb", "数", "c"]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/second.csv", "a.json", "c.parquet.gz"):
        kind = {"csv": "table.csv", "json": "array.json"}.get(name.rpartition(".")[2], "rows.parquet")
        content = CONTENTS[kind]
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "README.md").write_text("not data")
    assert [str(file.relative_to(tmp_path)) for file in files_of(tmp_path)] == [
        "a.json",
        "b/second.csv",
        "c.parquet.gz",
    ]
    assert len(read_rows(tmp_path)) == 9


def test_nested_values_of_a_table_are_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(turns)]])
    assert [row.answer for row in read_rows(tmp_path / "rows.csv")] == ["a"]


def test_a_column_of_objects_gives_no_object_a_key_that_it_has_not(tmp_path: Path) -> None:
    """Arrow gives each object of a column every key of any of them, with no value."""

    def messages(*arguments: dict[str, int]) -> dict[str, Any]:
        calls = [{"function": {"name": "f", "arguments": each}} for each in arguments]
        return {
            "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "tool_calls": calls}]
        }

    rows = [{**messages({"x": 1}), "tools": [{"name": "f"}]}, {**messages({"y": 2}), "tools": [{"name": "f"}]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = read_rows(tmp_path / "rows.parquet")
    assert [row.turns[1].tool_calls[0]["arguments"] for row in read] == [{"x": 1}, {"y": 2}]


CUT = len(CONTENTS["rows.parquet"]) // 2
DAMAGED = {
    "parquet cut short": ("a.parquet", CONTENTS["rows.parquet"][:CUT], "cannot be read"),
    "parquet that is none": ("a.parquet", b"hello", "cannot be read"),
    "arrow cut short": ("a.arrow", CONTENTS["stream.arrow"][:-300], "cannot be read"),
    "arrow that is none": ("a.arrow", b"hello" * 20, "cannot be read"),
    "empty parquet": ("a.parquet", b"", "cannot be read"),
    "a quote that never ends": ("a.csv", b'instruction,output\n1,"2\n3,4\n', "line 3 is not CSV"),
    "a cell too many": ("a.csv", b"instruction,output\n1,2\n3,4,5\n", "row 2: has 3 cells, but there are 2 columns"),
    "a cell too few": ("a.csv", b"instruction,output\n1\n", "row 1: has 1 cells, but there are 2 columns"),
    "a column twice": ("a.csv", b"output,output\n1,2\n", "two columns have the same name"),
    "no column that is known": ("a.csv", b"x,y\n1,2\n", "row 1: the field 'instruction' is missing"),
    "a table without rows": ("a.csv", b"instruction,output\n", "no rows"),
    "no table": ("a.csv", b"", "no rows"),
    "gzip cut short": ("a.json.gz", gzip.compress(CONTENTS["array.json"])[:-9], "cannot be read"),
    "gzip that is none": ("a.json.gz", CONTENTS["array.json"], "cannot be read"),
    "bz2 that is none": ("a.json.bz2", CONTENTS["array.json"], "cannot be read"),
    "xz that is none": ("a.json.xz", CONTENTS["array.json"], "cannot be read"),
    "zst that is none": ("a.json.zst", CONTENTS["array.json"], "cannot be read"),
    "not UTF-8": ("a.csv", "instruction,output\nä,b\n".encode("latin-1"), "byte 19 is not UTF-8"),
    "deep": ("a.json", b"[" * 100_000, "nested too deeply"),
    "deep and closed": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "two formats": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b"}\n{"text": "c"}\n',
        "row 2: is of the format text, and the rows before it are of alpaca; use two files",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_with_a_file_is_one_message(case: str, tmp_path: Path) -> None:
    name, content, said = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / name)
    assert said in str(error.value)
    assert str(tmp_path / name) in str(error.value)
