"""Reads alpaca rows (instruction, optional input, output) from a JSON array or a JSONL file."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.errors import UserError

SHOWN_PROBLEMS = 10  # an error shows this many bad rows
BEHIND = tuple(" \t\r\n,]")  # one of these characters follows a value in an array
FIELDS = ("instruction", "input", "output")  # all that a row may say
CHUNK = 2**20  # at least this many characters of a JSON array are read at once


@dataclass(frozen=True)
class Row:
    """Holds one row of a file. `number` counts from 1 the elements of a JSON array or the lines of a JSONL file."""

    number: int
    instruction: str
    input: str
    output: str


class Problems:
    """Collects what is wrong with the rows of a file: it keeps the first few problems and counts all of them."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = self.total = 0

    def add(self, problem: str | None) -> None:
        """Counts one more row, with its problem; None says that nothing is wrong with the row."""
        self.total += 1
        if problem:
            self.count += 1
            if len(self.first) < SHOWN_PROBLEMS:
                self.first.append(problem)

    def fail(self, path: Path) -> None:
        """Raises UserError if there is any problem."""
        if self.count:
            shown = "\n".join(f"  {problem}" for problem in self.first)
            more = f"\n  … and {self.count - SHOWN_PROBLEMS} more" if self.count > SHOWN_PROBLEMS else ""
            raise UserError(
                f"{path}: {self.count} of {self.total} rows are bad; correct or remove them:\n{shown}{more}"
            )


def read_rows(path: Path) -> list[Row]:
    """Returns all rows of the file at `path`, in file order. Raises UserError as `iter_rows` does."""
    return list(iter_rows(path))


def count_rows(path: Path) -> int:
    """Counts the rows of the file at `path`. Raises UserError as `iter_rows` does."""
    return sum(1 for _ in iter_rows(path))


def iter_rows(path: Path) -> Iterator[Row]:
    """Yields the good rows of the file at `path`, in file order, and reads the file on as the caller asks for rows.

    Raises UserError, which names the file, the row and the fix. It does so at once when the file cannot be read, and
    after the last row when there are no rows or bad ones: a bad row is malformed, lacks a field, has one that is empty
    or no text, or has another field, which would be left out of the training without a word.
    """
    problems = Problems()
    for number, value, problem in _values(path):
        problem = problem or _problem(value)
        problems.add(f"row {number}: {problem}" if problem else None)
        if not problem:
            yield Row(number, value["instruction"], value.get("input") or "", value["output"])
    problems.fail(path)
    if not problems.total:
        raise UserError(f"{path}: no rows. Give at least one object with the fields instruction and output.")


def _values(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (row number, decoded value, None) for a row, or (row number, None, problem) for a line that is no JSON."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe may block for ever, and works only once
        raise UserError(f"{path}: is not a file. Give the path of a .json or .jsonl file.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            begins = ""
            while not begins and (read := file.read(CHUNK)):
                begins = read.lstrip()[:1]
            file.seek(0)
            if begins == "[":
                for number, value in enumerate(array_elements(file, path), start=1):
                    yield number, value, None
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    value, problem = _decode(line, number)
                    yield number, value, f"{problem}; give one object a line" if problem else None
    except UnicodeDecodeError:
        raise UserError(f"{path}: byte {_first_bad_byte(path)} is not UTF-8. Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:  # ValueError says that the path has a zero byte
        if isinstance(error, UserError):
            raise
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(path)[:200]}: cannot be read ({said}). Give the path of a .json or .jsonl file."
        ) from error


def _first_bad_byte(path: Path) -> int:
    """Returns the place of the first byte that is not UTF-8. Decoding a stream does not tell it."""
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def array_elements(file: IO[str], path: Path) -> Iterator[Any]:
    """Yields the elements of the JSON array in `file`, one at a time.

    Raises UserError, with line and column, when `file` has no JSON array.
    """
    text = _Text(file)
    text.skip()
    text.at += 1  # skip the bracket that opens the array
    if text.skip() == "]":
        text.at += 1
    else:
        while True:
            try:
                yield text.value()
            except json.JSONDecodeError as error:
                raise _no_array(path, error.msg, *text.place(error.pos)) from error
            except RecursionError:
                raise _no_array(path, "nested too deeply") from None
            except ValueError as error:  # Python refuses a number of thousands of digits
                raise _no_array(path, str(error)) from error
            mark = text.skip()
            if mark not in (",", "]"):
                raise _no_array(path, "Expecting ',' delimiter", *text.place(text.at))
            text.at += 1
            if mark == "]":
                break
            text.skip()
    if text.skip():
        raise _no_array(path, "Extra data", *text.place(text.at))


def _no_array(path: Path, said: str, line: int = 0, column: int = 0) -> UserError:
    """Makes the error for a file that begins like a JSON array and is none; a `line` of 0 means that it is unknown."""
    where = f", line {line} column {column}" if line else ""
    known = said == "nested too deeply"
    problem = said if known else f"not JSON ({said}{where})" if line else f"not JSON that can be read ({said})"
    return UserError(f"{path}: {problem}. The file starts with '[', so it has to be one JSON array.")


class _Text:
    """Reads the text of a file; only the part that is being decoded is in memory."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at = file, "", 0
        self.line, self.column = 1, 1  # the place in the file at which self.text begins
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Reads at least as much text again as is in memory; returns False at the end of the file."""
        self._forget()
        read = self.file.read(max(CHUNK, len(self.text)))
        self.text += read
        return bool(read)

    def _forget(self) -> None:
        """Drops the text that has been decoded."""
        gone = self.text[: self.at]
        self.line, self.column = self.place(self.at)
        self.text, self.at = self.text[len(gone) :], 0

    def place(self, at: int) -> tuple[int, int]:
        """Returns line and column in the file, both counted from 1, for the index `at` of self.text."""
        newlines = self.text.count("\n", 0, at)
        if not newlines:
            return self.line, self.column + at
        return self.line + newlines, at - self.text.rfind("\n", 0, at)

    def skip(self) -> str:
        """Moves on to the next character that is no white space and returns it; returns '' at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decodes the next value of the file.

        A value can reach beyond the text that has been read. A number then looks complete and any other value looks
        broken, so this method reads on before it trusts either.
        """
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self.more():
                    return self.decoder.raw_decode(self.text, self.at)[0]  # raises the error at its right place
                continue
            if self.text[end : end + 1] not in BEHIND:  # this is also true at the end of the text read so far
                rest = len(self.text) - end
                if self.more():
                    continue
                end = len(self.text) - rest
            self.at = end
            return value


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


def _problem(value: Any) -> str | None:
    """Returns what is wrong with a decoded row, or None."""
    if not isinstance(value, dict):
        return f"is of type {type(value).__name__}; give an object with the fields instruction and output"
    for field in ("instruction", "output"):
        if field not in value:
            return f"the field {field!r} is missing; add it"
        if not isinstance(value[field], str):
            return f"the field {field!r} is of type {type(value[field]).__name__}; make it text"
        if not value[field].strip():
            return f"the field {field!r} is empty; fill it or remove the row"
    if not isinstance(value.get("input", ""), str | None):
        return f"the field 'input' is of type {type(value['input']).__name__}; make it text"
    unknown = sorted(str(field) for field in value if field not in FIELDS and value[field] not in (None, "", []))
    if unknown:
        names = ", ".join(map(repr, unknown))[:200]
        return f"nothing reads {names}; remove it, or put what it says into 'instruction' or 'input'"
    for field in FIELDS:
        if not _is_text(value.get(field) or ""):
            return f"the field {field!r} has half of a surrogate pair, which is no character; remove it"
    return None


def _is_text(value: str) -> bool:
    """Says whether `value` can be encoded; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
