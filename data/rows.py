"""Reads the rows of a file or a folder, whatever their format, and collects what is wrong with them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data.conversation import Row
from data.errors import UserError
from data.files import Record, sources
from data.formats import BadRow, read_row

SHOWN_PROBLEMS = 10  # an error shows this many bad rows


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

    def fail(self, path: Path | str) -> None:
        """Raises UserError if there is any problem."""
        if self.count:
            shown = "\n".join(f"  {problem}" for problem in self.first)
            more = f"\n  … and {self.count - SHOWN_PROBLEMS} more" if self.count > SHOWN_PROBLEMS else ""
            raise UserError(
                f"{path}: {self.count} of {self.total} rows are bad; correct or remove them:\n{shown}{more}"
            )

    def end(self, label: str) -> None:
        """Raises UserError, at the end of a file, if there is any problem or no row at all."""
        self.fail(label)
        if not self.total:
            raise UserError(f"{label}: no rows. Give at least one object with the fields instruction and output.")


def other_format(name: str, first: str | None) -> str:
    """Says that a row has another format than the first row of its file."""
    return f"is of the format {name}, and the rows before it are of {first}; use two files"


def read_rows(name: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Returns all rows of a file, a folder or a data set. Raises UserError as `iter_rows` does."""
    return [row for label, found in sources(str(name)) for row in iter_rows(label, found, columns)]


def count_rows(name: str | Path, columns: Mapping[str, str] | None = None) -> int:
    """Counts the rows of a file, a folder or a data set. Raises UserError as `iter_rows` does."""
    return sum(1 for label, found in sources(str(name)) for _ in iter_rows(label, found, columns))


def iter_rows(label: str, found: Iterator[Record], columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yields the good rows among the records of the file `label`, as the caller asks for them.

    `columns` gives columns of the file the names that a format has (data/formats.py). Raises UserError, which names the
    file, the row and the fix. It does so at once when the file cannot be read, and after the last row when there are no
    rows or bad ones: a bad row is malformed, has another format than the first, lacks a field, or has one that nothing
    reads.
    """
    problems, first = Problems(), ""
    for number, value, problem in found:
        row = None
        if not problem:
            try:
                name, row = read_row(number, value, columns)
                first = first or name
                if name != first:
                    problem = other_format(name, first)
            except BadRow as error:
                problem = str(error)
        problems.add(f"row {number}: {problem}" if problem else None)
        if row is not None and not problem:
            yield row
    problems.end(label)
