"""Keeps tokenized rows on disk: memory holds only a few numbers for each row, however many rows there are."""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

TOKEN = "I"  # the type code of 4 bytes, because vocabularies have more than 65,536 tokens
NUMBERS, WEIGHTS = "q", "d"  # the type codes of 8 bytes, for integers and for real numbers


class Span(NamedTuple):
    """Says that the tokens of the places `start` to `end` - 1 are labels, and what each of them weighs in the loss."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """Holds one tokenized row: the model reads all of it, and learns to write the tokens of the spans.

    The spans stand in the order of their places and share none.
    """

    row: int  # the row's number in its file
    ids: list[int]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, row: int, prompt_ids: list[int], answer_ids: list[int]) -> "Example":
        """Makes the example of one prompt and one answer, which is its only span."""
        return cls(row, prompt_ids + answer_ids, (Span(len(prompt_ids), len(prompt_ids) + len(answer_ids)),))

    @property
    def length(self) -> int:
        """Counts all tokens."""
        return len(self.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first label."""
        return self.ids[: self.spans[0].start]

    @property
    def label_ids(self) -> list[int]:
        """The tokens that are labels, span after span."""
        return [token for start, end, _ in self.spans for token in self.ids[start:end]]

    @property
    def num_labels(self) -> int:
        """Counts the tokens that are labels."""
        return sum(end - start for start, end, _ in self.spans)


class Examples(Sequence[Example]):
    """Keeps examples in a temporary file, which disappears with the process; each access reads one example.

    The file is read by position and not mapped into memory, so that an example that was read does not stay in this
    process's memory. The constructor raises UserError when the file cannot be written.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        rows, ends, labels = array(NUMBERS), array(NUMBERS, [0]), array(NUMBERS)
        spans: array[float] = array(WEIGHTS)  # three numbers for each span
        span_ends = array(NUMBERS, [0])
        content, self.largest_id = hashlib.sha256(), 0  # the largest token id of all examples
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
            for example in examples:
                tokens = array(TOKEN, example.ids)
                tokens.tofile(self._file)
                _add(example, content)
                self.largest_id = max(self.largest_id, max(tokens))
                rows.append(example.row)
                ends.append(ends[-1] + len(tokens))
                labels.append(example.num_labels)
                spans.extend(number for span in example.spans for number in span)
                span_ends.append(len(spans) // 3)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: the tokenized rows cannot be written ({error.strerror}). Make room, or set "
                "TMPDIR to a folder on a disk that has some."
            ) from error
        self.sha256 = content.hexdigest()  # of all examples, in their order
        self._rows, self._ends = np.array(rows, np.int64), np.array(ends, np.int64)
        self._spans, self._span_ends = np.array(spans, np.float64).reshape(-1, 3), np.array(span_ends, np.int64)
        self.label_lengths: NDArray[np.int64] = np.array(labels, np.int64)  # labels of each example

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Counts the tokens of each example."""
        return np.diff(self._ends)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start, end = int(self._ends[i]), int(self._ends[i + 1])
        tokens = array(TOKEN)
        tokens.frombytes(os.pread(self._file.fileno(), (end - start) * tokens.itemsize, start * tokens.itemsize))
        spans = self._spans[self._span_ends[i] : self._span_ends[i + 1]].tolist()
        return Example(int(self._rows[i]), tokens.tolist(), tuple(Span(int(a), int(b), w) for a, b, w in spans))


def sha256_of(examples: Sequence[Example], first: int | None = None) -> str:
    """Returns a hash of the tokens and labels of the `first` examples, or of all; row numbers do not change it."""
    if isinstance(examples, Examples) and (first is None or first == len(examples)):
        return examples.sha256
    content = hashlib.sha256()
    for i in range(len(examples) if first is None else first):
        _add(examples[i], content)
    return content.hexdigest()


def _add(example: Example, content: "hashlib._Hash") -> None:
    """Adds tokens and spans to a hash; the two numbers before them keep this example apart from the next."""
    content.update(array(NUMBERS, [example.length, len(example.spans)]))
    content.update(array(WEIGHTS, [number for span in example.spans for number in span]))
    content.update(array(TOKEN, example.ids))


def largest_id_of(examples: Sequence[Example]) -> int:
    """Returns the largest token id in the examples."""
    if isinstance(examples, Examples):
        return examples.largest_id
    return max(max(example.ids) for example in examples)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of tokens of each example."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([example.length for example in examples], np.int64)


def label_lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of labels of each example."""
    if isinstance(examples, Examples):
        return examples.label_lengths
    return np.array([example.num_labels for example in examples], np.int64)
