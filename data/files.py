"""Reads the records of a file: JSON array, JSON lines, CSV, Parquet or Arrow, each also compressed.

Memory holds a piece of a file at a time, however long it is. Nothing here knows what a record means.
"""

import codecs
import csv
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import ijson
import zstandard

from data.errors import UserError

HUB = "hub:"  # how the name of a data set of the model hub begins
CHUNK = 2**20  # characters that are looked at to find the first that is no blank
BATCH = 1000  # records of a Parquet or Arrow file that are in memory at a time
DEEPEST = 500  # values of an array that may stand in one another
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
TABLES = {".csv": ",", ".tsv": "\t"}  # with the character between two columns
JSON = (".json", ".jsonl", ".ndjson")
COLUMNAR = (".parquet", ".arrow", ".feather")
Record = tuple[int, Any, str | None]  # its number in the file, its value, and what is wrong with it

csv.field_size_limit(2**31 - 1)


def sources(name: str) -> list[tuple[str, Iterator[Record]]]:
    """Returns the files behind a name, each with its records: a file, those of a folder, or a data set of the hub.

    Raises UserError where there are none; a file that cannot be read raises it once its records are asked for.
    """
    if name.startswith(HUB):
        return [(name, _hub(name))]
    return [(str(path), records(path)) for path in files_of(Path(name))]


def _hub(name: str) -> Iterator[Record]:
    """Yields the rows of a data set, for example hub:org/name@main:train[:1000]. It is downloaded as it is read."""
    found = re.fullmatch(r"hub:([^@:]+)(?:@([^:]+))?(?::(.+))?", name)
    if found is None:
        raise UserError(f"{name}: is no data set. Give hub:NAME, hub:NAME@REVISION or hub:NAME@REVISION:SPLIT.")
    from datasets import load_dataset  # here, because the import takes a second

    number = 0
    try:
        rows = load_dataset(found[1], revision=found[2], split=found[3] or "train", streaming=True)
        for number, value in enumerate(rows, start=1):
            yield number, _without_nulls(value), None
    except Exception as error:  # many libraries read data sets, and each has errors of its own
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(
            f"{name}: cannot be read ({said}), behind row {number}. Check name, revision and split."
        ) from error


def files_of(path: Path) -> list[Path]:
    """Returns the file, or all files of a folder that this module can read, in alphabetical order.

    Raises UserError for a folder without any, and for what is neither a file nor a folder.
    """
    try:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _kind(file) is not None and file.is_file())
            if not found:
                kinds = ", ".join((*JSON, *TABLES, *COLUMNAR))
                raise UserError(f"{path}: no file in this folder can be read. Give one of {kinds}.")
            return found
        if path.exists() and not path.is_file():  # reading a pipe may block for ever, and works only once
            raise UserError(f"{path}: is not a file. Give the path of a file, or of a folder of files.")
    except (OSError, ValueError) as error:  # ValueError says that the path has a zero byte
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from error
    return [path]


def records(path: Path) -> Iterator[Record]:
    """Yields the records of the file at `path`; a line that cannot be decoded yields what is wrong with it.

    Raises UserError, which names the file, the place and the fix, where the file as a whole cannot be read.
    """
    try:
        kind = _kind(path)
        if kind in COLUMNAR:
            yield from _columnar(path, kind)
        elif kind in TABLES:
            yield from _table(path, TABLES[kind])
        else:
            yield from _json(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: byte {_first_bad_byte(path)} is not UTF-8. Save the file as UTF-8.") from None
    except UserError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{str(path)[:200]}: cannot be read ({said[:300]}). Give the path of a file that is whole.")


def _kind(path: Path) -> str | None:
    """The ending of a file's name that says its format, without that of its compression; None for an unknown one."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    kind = name.suffix.lower()
    return kind if kind in JSON or kind in TABLES or kind in COLUMNAR else None


@contextmanager
def _opened(path: Path, mode: str = "rb", **options: Any) -> Iterator[IO[Any]]:
    """Opens a file; what is compressed is read as if it were not."""
    with fsspec.open(os.path.abspath(path), mode, compression=COMPRESSED.get(path.suffix.lower()), **options) as file:
        yield file


def _first_bad_byte(path: Path) -> int:
    """Returns the place of the first byte that is not UTF-8. Decoding a stream does not tell it."""
    with _opened(path) as file:
        try:
            file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return error.start
    return 0


def _json(path: Path) -> Iterator[Record]:
    with _opened(path, "r", encoding="utf-8-sig") as file:
        begins = ""
        while not begins and (read := file.read(CHUNK)):
            begins = read.lstrip()[:1]
    if begins == "[":
        yield from _array(path)
        return
    with _opened(path, "r", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                value, problem = _decode(line, number)
                yield number, value, f"{problem}; give one object a line" if problem else None


def _array(path: Path) -> Iterator[Record]:
    """Yields the elements of a JSON array, one at a time."""
    with _opened(path) as file:
        mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    number = 0
    try:
        _check_depth(path, mark)
        with _opened(path) as file:
            file.read(mark)
            for number, value in enumerate(ijson.items(file, "item", use_float=True), start=1):
                yield number, value, None
    except (ijson.JSONError, RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError | UserError):
            raise
        raise UserError(f"{path}: {_why_no_array(path, error, number)}") from None


def _check_depth(path: Path, mark: int) -> None:
    """Raises RecursionError for values that stand deeper in one another than Python's own parser goes.

    The file begins with a byte-order mark of `mark` bytes. ijson would need memory that grows with the square of the
    depth.
    """
    depth = 0
    with _opened(path) as file:
        file.read(mark)
        for event, _ in ijson.basic_parse(file, use_float=True):
            if event in ("start_array", "start_map"):
                depth += 1
                if depth > DEEPEST:
                    raise RecursionError
            elif event in ("end_array", "end_map"):
                depth -= 1


def _why_no_array(path: Path, error: Exception, read: int) -> str:
    """Says what is wrong with an array, with line and column where Python's own parser finds the same fault."""
    with _opened(path, "r", encoding="utf-8-sig") as file:
        _, problem = _decode(file.read(), 1)
    said = str(error).split("\n")[0] or "nested too deeply"
    problem = problem or f"not JSON that can be read ({said}, behind element {read})"
    return f"{problem}. The file starts with '[', so it has to be one JSON array."


def _decode(text: str, first_line: int) -> tuple[Any, str | None]:
    """Returns (value, None), or (None, problem) when `text` is no JSON."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg}, line {first_line + error.lineno - 1} column {error.colno})"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:  # Python refuses a number of thousands of digits
        return None, f"not JSON that can be read ({error})"


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    """Yields the records of a file of comma-separated values, whose first line names the columns."""
    with _opened(path, "r", encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            columns = next(lines, [])
            if len(set(columns)) < len(columns):
                raise UserError(f"{path}: two columns have the same name. Give each column a name of its own.")
            for number, cells in enumerate(filter(None, lines), start=1):
                wrong = len(cells) != len(columns)
                problem = f"has {len(cells)} cells, but there are {len(columns)} columns" if wrong else None
                yield number, dict(zip(columns, cells, strict=False)), problem
        except csv.Error as error:
            raise UserError(
                f"{path}: line {lines.line_num} is not CSV ({error}). Close each quote, and write a quote in a cell "
                "twice."
            ) from None


def _columnar(path: Path, kind: str) -> Iterator[Record]:
    import pyarrow as pa  # here, because most files need none of it and the import takes time
    import pyarrow.ipc
    import pyarrow.parquet

    number = 0
    with _opened(path) as opened, tempfile.TemporaryFile() as whole:
        file = opened
        if path.suffix.lower() in COMPRESSED:  # these formats are not read from their beginning to their end
            shutil.copyfileobj(opened, whole)
            whole.seek(0)
            file = whole
        try:
            if kind == ".parquet":
                batches: Any = pyarrow.parquet.ParquetFile(file).iter_batches(BATCH)
            else:
                batches = _arrow_batches(file)
            for batch in batches:
                for value in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(value), None
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: cannot be read ({str(error)[:300]}), behind row {number}. Copy the file anew."
            ) from None


def _arrow_batches(file: IO[bytes]) -> Iterator[Any]:
    """Yields the record batches of an Arrow file or stream; a data set's own cache holds streams."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from pa.ipc.open_stream(file)
    else:
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _without_nulls(value: Any) -> Any:
    """Leaves out the keys without a value: a column of objects has every key of any of them in each."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
