"""Reads alpaca rows (instruction, optional input, output) from a JSON array or a JSONL file."""

import json
import os
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
    for number, value, problem in _values(path):
        total += 1
        problem = problem or _problem(value)
        if problem:
            problems.append(f"row {number}: {problem}")
        else:
            rows.append(Row(number, value["instruction"], value.get("input") or "", value["output"]))
    fail_on_bad_rows(path, problems, total)
    if not rows:
        raise UserError(f"{path}: no rows. Give at least one object with the fields instruction and output.")
    return rows


def _values(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(row number, decoded value, None) of each row; (row number, None, what is wrong) where it is no JSON."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may block for ever, and is read only once
        raise UserError(f"{path}: is not a file. Give the path of a .json or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(path)[:200]}: cannot be read ({said}). Give the path of a .json or .jsonl file."
        ) from error
    if text.lstrip().startswith("["):
        values, problem = _decode(text, 1)
        if problem:
            raise UserError(f"{path}: {problem}. The file starts with '[', so it has to be one JSON array.")
        yield from ((number, value, None) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, problem = _decode(line, number)
            yield number, value, f"{problem}; give one object a line" if problem else None


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
