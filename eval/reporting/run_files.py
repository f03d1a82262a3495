"""Reads the files of runs and checks them. A missing file reads as empty; a damaged one is a UserError that names it.

When a run is killed, the last line of a file can be half written. Such a half line is left out.
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

from data.errors import DAMAGE, user_error

Columns = dict[str, list[float | None]]


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns an error from the content of `file` into a UserError that names the file."""
    with (
        user_error(f"{file}: cannot be read", "Make it readable.", (OSError,)),
        user_error(f"{file}: is damaged", "Restore it, or move it away.", DAMAGE),
    ):
        yield


def number(value: Any) -> float:
    """Returns `value` as a float. Raises ValueError when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def read_object(file: Path) -> dict[str, Any]:
    """Returns the keys and values of a JSON or YAML file, or an empty dictionary when there is no file."""
    with reading(file):
        if not file.exists():
            return {}
        text = file.read_text(encoding="utf-8")
        return _checked_object(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))


def _checked_object(value: Any) -> dict[str, Any]:
    """Returns `value`. Raises ValueError when it is no dictionary."""
    if not isinstance(value, dict):
        raise ValueError("it has no keys and values")
    return value


def lines_of(file: Path) -> tuple[list[str], str]:
    """Returns the whole lines of a file, and the text after the last of them."""
    with reading(file):
        data = file.read_bytes() if file.exists() else b""
        end = data.rfind(b"\n") + 1
        return data[:end].decode("utf-8").split("\n")[:-1], data[end:].decode("utf-8", errors="replace")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object on each line."""
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
    """Returns the lines of metrics.jsonl. None stands for infinity and NaN, which JSON does not have."""
    lines = read_jsonl(file)
    with reading(file):
        for line in lines:
            number(line["step"])
        return [{key: None if value is None else number(value) for key, value in line.items()} for line in lines]


def read_columns(file: Path) -> Columns:
    """Returns the columns of samples.csv by the names in its header. None stands for an empty cell."""
    with reading(file):
        names, *rows = csv.reader(lines_of(file)[0] or ["seconds"])
        cells = [[number(float(cell)) if cell else None for cell in row] for row in rows]
        if not cells:
            return {}
        columns = dict(zip(names, map(list, zip(*cells, strict=True)), strict=True))
        columns["seconds"] = [number(seconds) for seconds in columns["seconds"]]
        return columns
