"""Reads alpaca rows (instruction, optional input, output) from a JSON array or a JSONL file."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.errors import UserError

SHOWN = 10  # bad rows shown in an error
BEHIND = tuple(" \t\r\n,]")  # a value in an array
CHUNK = 2**20  # characters of a JSON array read at once, at least


@dataclass(frozen=True)
class Row:
    """One example. `number` counts from 1: the element of a JSON array, the line of a JSONL file."""

    number: int
    instruction: str
    input: str
    output: str


class Problems:
    """What is wrong with the rows of a file: the first few, and how many there are."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = self.total = 0

    def add(self, problem: str | None) -> None:
        """Of one row; None where nothing is wrong with it."""
        self.total += 1
        if problem:
            self.count += 1
            if len(self.first) < SHOWN:
                self.first.append(problem)

    def fail(self, path: Path) -> None:
        """Raises UserError if there are any."""
        if self.count:
            shown = "\n".join(f"  {problem}" for problem in self.first)
            more = f"\n  … and {self.count - SHOWN} more" if self.count > SHOWN else ""
            raise UserError(
                f"{path}: {self.count} of {self.total} rows are bad; correct or remove them:\n{shown}{more}"
            )


def read_rows(path: Path) -> list[Row]:
    """All rows of the file at `path`, in file order; UserError as from `iter_rows`."""
    return list(iter_rows(path))


def count_rows(path: Path) -> int:
    """UserError as from `iter_rows`."""
    return sum(1 for _ in iter_rows(path))


def iter_rows(path: Path) -> Iterator[Row]:
    """The good rows of the file at `path`, in file order, read as they are asked for.

    Raises UserError naming file, row and fix: at once when the file cannot be read; after the last row when there is
    none, or one that is malformed, misses a field, or has one that is empty or no text.
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
    """(row number, decoded value, None) of each row; (row number, None, what is wrong) where it is no JSON."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may block for ever, and is read only once
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
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, UserError):
            raise
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(path)[:200]}: cannot be read ({said}). Give the path of a .json or .jsonl file."
        ) from error


def _first_bad_byte(path: Path) -> int:
    """Its place in the file, which a stream does not know."""
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def array_elements(file: IO[str], path: Path) -> Iterator[Any]:
    """Of the JSON array in `file`, one at a time. Raises UserError, with line and column, where it is none."""
    text = _Text(file)
    text.skip()
    text.at += 1  # the bracket
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
            except ValueError as error:  # a number of thousands of digits
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
    where = f", line {line} column {column}" if line else ""
    known = said == "nested too deeply"
    problem = said if known else f"not JSON ({said}{where})" if line else f"not JSON that can be read ({said})"
    return UserError(f"{path}: {problem}. The file starts with '[', so it has to be one JSON array.")


class _Text:
    """A file's text, of which only what is being decoded is in memory."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at = file, "", 0
        self.line, self.column = 1, 1  # where self.text begins
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Reads on, as much again as there is; False at the end of the file."""
        self._forget()
        read = self.file.read(max(CHUNK, len(self.text)))
        self.text += read
        return bool(read)

    def _forget(self) -> None:
        gone = self.text[: self.at]
        self.line, self.column = self.place(self.at)
        self.text, self.at = self.text[len(gone) :], 0

    def place(self, at: int) -> tuple[int, int]:
        """Line and column in the file, both from 1."""
        newlines = self.text.count("\n", 0, at)
        if not newlines:
            return self.line, self.column + at
        return self.line + newlines, at - self.text.rfind("\n", 0, at)

    def skip(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """The next one. A number could go on behind what has been read, anything else could be cut off there."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self.more():
                    return self.decoder.raw_decode(self.text, self.at)[0]  # raises, with the right place
                continue
            if self.text[end : end + 1] not in BEHIND:  # also at the end of what has been read
                rest = len(self.text) - end
                if self.more():
                    continue
                end = len(self.text) - rest
            self.at = end
            return value


def _decode(text: str, first_line: int) -> tuple[Any, str | None]:
    """(value, None), or (None, what is wrong with the JSON)."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg}, line {first_line + error.lineno - 1} column {error.colno})"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        return None, f"not JSON that can be read ({error})"


def _problem(value: Any) -> str | None:
    """What is wrong with a decoded row, or None."""
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
    for field in ("instruction", "input", "output"):
        if not _is_text(value.get(field) or ""):
            return f"the field {field!r} has half of a surrogate pair, which is no character; remove it"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
