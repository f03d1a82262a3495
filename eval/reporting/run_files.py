"""The files of runs, checked: what is missing is empty, and damage is a UserError that names the file.

Half a last line in a file of lines is what a kill leaves behind, and is left out.
"""

import contextlib
import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError

BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error)

Columns = dict[str, list[float | None]]


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever is wrong with the content of `file` becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}. Make it readable.") from error
    except (*BROKEN, yaml.YAMLError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{file}: is damaged: {said}. Restore it, or move it away.") from error


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def read_object(file: Path) -> dict[str, Any]:
    """Keys and values of a JSON or YAML file."""
    with reading(file):
        if not file.exists():
            return {}
        text = file.read_text(encoding="utf-8")
        return _checked_object(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))


def _checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it has no keys and values")
    return value


def lines_of(file: Path) -> tuple[list[str], str]:
    """The whole lines, and what is left of one that was cut off."""
    with reading(file):
        data = file.read_bytes() if file.exists() else b""
        end = data.rfind(b"\n") + 1
        return data[:end].decode("utf-8").split("\n")[:-1], data[end:].decode("utf-8", errors="replace")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    whole, rest = lines_of(file)
    values = []
    with reading(file):
        for position, line in enumerate(whole, start=1):
            try:
                values.append(_checked_object(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"line {position}: {error}") from error
    with contextlib.suppress(ValueError):
        values += [_checked_object(json.loads(rest))]
    return values


def read_metrics(file: Path) -> list[dict[str, float | None]]:
    """None stands for infinity and the like, which JSON does not have."""
    lines = read_jsonl(file)
    with reading(file):
        for line in lines:
            number(line["step"])
        return [{key: None if value is None else number(value) for key, value in line.items()} for line in lines]


def read_columns(file: Path) -> Columns:
    """Of samples.csv, by the names of the header; None for an empty cell."""
    with reading(file):
        names, *rows = csv.reader(lines_of(file)[0] or ["seconds"])
        cells = [[number(float(cell)) if cell else None for cell in row] for row in rows]
        if not cells:
            return {}
        columns = dict(zip(names, map(list, zip(*cells, strict=True)), strict=True))
        columns["seconds"] = [number(seconds) for seconds in columns["seconds"]]
        return columns
