"""Reads alpaca rows (instruction, optional input, output) from a JSON array or a JSONL file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError

SHOWN = 10  # bad rows shown in an error


@dataclass(frozen=True)
class Row:
    """One example. `number` counts from 1: the element of a JSON array, the line of a JSONL file."""

    number: int
    instruction: str
    input: str
    output: str


def fail_on_bad_rows(path: Path, problems: list[str], total: int) -> None:
    """Raises UserError with the count of bad rows and the first ten, if there are any."""
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{path}: {len(problems)} of {total} rows are bad; correct or remove them:\n{shown}{more}")


def read_rows(path: Path) -> list[Row]:
    """All rows of the file at `path`, in file order.

    Raises UserError naming file, row and fix when the file cannot be read, holds no rows, or has a row
    that is malformed, misses a field, or has one that is empty or no text.
    """
    rows, problems, total = [], [], 0
    for number, value in _values(path):
        total += 1
        problem = value if isinstance(value, str) else _problem(value)
        if problem:
            problems.append(f"row {number}: {problem}")
        else:
            rows.append(Row(number, value["instruction"], value.get("input") or "", value["output"]))
    fail_on_bad_rows(path, problems, total)
    if not rows:
        raise UserError(f"{path}: no rows. Give at least one object with the fields instruction and output.")
    return rows


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number, decoded value) of each row; a row that is no JSON gives a str that says why."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a .json or .jsonl file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {error.lineno} column {error.colno}: {error.msg}. "
                "The file starts with '[', so it has to be one JSON array."
            ) from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"not JSON ({error.msg} at column {error.colno}); give one object a line"


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
    if not isinstance(value.get("input") or "", str):
        return f"the field 'input' is of type {type(value['input']).__name__}; make it text"
    return None
