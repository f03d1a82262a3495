"""Keeps tokenized rows on disk: memory holds only a few numbers for each row, however many rows there are."""

import hashlib
import mmap
import os
import struct
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

T = TypeVar("T")
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


class Packed(NamedTuple):
    """Holds examples in a few arrays, which travel fast from a worker process to another process."""

    rows: "array[int]"  # for each example: the number of its row, of its tokens, of its labels and of its spans
    lengths: "array[int]"
    labels: "array[int]"
    num_spans: "array[int]"
    spans: "array[float]"  # three numbers for each span
    tokens: "array[int]"
    digests: bytes  # one after the other, see _digest

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Packed":
        """Packs `examples`."""
        digests = bytearray()
        rows, lengths, labels, num_spans = (array(NUMBERS) for _ in range(4))
        packed = cls(rows, lengths, labels, num_spans, array(WEIGHTS), array(TOKEN), b"")
        for example in examples:
            packed.rows.append(example.row)
            packed.lengths.append(example.length)
            packed.labels.append(example.num_labels)
            digests += _digest(example)
            packed.num_spans.append(len(example.spans))
            packed.spans.extend(number for span in example.spans for number in span)
            packed.tokens.extend(example.ids)
        return packed._replace(digests=bytes(digests))


class OnDisk(Sequence[Example]):
    """A sequence whose subclass reads one example at a time."""

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._read(i % len(self))

    def _read(self, i: int) -> Example:
        """The example at the place 0 <= i < len(self)."""
        raise NotImplementedError


class Examples(OnDisk):
    """Keeps examples in a temporary file, which disappears with the process; each access reads one example.

    The tokens are read by position and not mapped into memory, so that an example that was read does not stay in this
    process's memory. A few numbers for each example are mapped, and all processes of a machine share them.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        """Raises UserError when the file cannot be written."""
        self._write(Packed.of(batch) for batch in in_batches(iter(examples)))

    @classmethod
    def of_packed(cls, packed: Iterable[Packed]) -> "Examples":
        """Keeps the examples of each of `packed`. Raises UserError when the file cannot be written."""
        examples = cls.__new__(cls)
        examples._write(packed)
        return examples

    def _write(self, packed: Iterable[Packed]) -> None:
        arrays = {name: array(NUMBERS) for name in ("rows", "lengths", "num_spans", "labels")}
        arrays["spans"] = array(WEIGHTS)
        content, largest, size = hashlib.sha256(), 0, 0  # the largest token id of all examples
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
            for part in packed:
                part.tokens.tofile(file)
                size += len(part.tokens) * part.tokens.itemsize
                largest = max(largest, max(part.tokens, default=0))
                content.update(part.digests)
                for name, values in arrays.items():
                    values.extend(getattr(part, name))
            places = {}
            file.write(bytes(-size % 8))
            at = size + -size % 8
            for name, values in arrays.items():
                places[name] = (at, len(values))
                values.tofile(file)
                at += len(values) * values.itemsize
            file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: the tokenized rows cannot be written ({error.strerror}). Make room, or set "
                "TMPDIR to a folder on a disk that has some."
            ) from error
        self._attach(os.dup(file.fileno()), {"places": places, "sha256": content.hexdigest(), "largest": largest})
        file.close()

    @classmethod
    def attach(cls, fd: int, description: dict[str, Any]) -> "Examples":
        """Opens the examples of another process, given an open descriptor of its file and `description`."""
        examples = cls.__new__(cls)
        examples._attach(fd, description)
        return examples

    def _attach(self, fd: int, description: dict[str, Any]) -> None:
        self.fd, self.description = fd, description
        weakref.finalize(self, os.close, fd)
        self.sha256, self.largest_id = str(description["sha256"]), int(description["largest"])
        mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ) if os.fstat(fd).st_size else b""

        def mapped_array(name: str, kind: type[Any]) -> NDArray[Any]:
            at, count = description["places"][name]
            return np.frombuffer(mapped, kind, count, at)

        self._rows, self._spans = mapped_array("rows", np.int64), mapped_array("spans", np.float64).reshape(-1, 3)
        self.lengths: NDArray[np.int64] = mapped_array("lengths", np.int64)  # tokens of each example
        self.label_lengths: NDArray[np.int64] = mapped_array("labels", np.int64)  # labels of each example
        self._ends, self._span_ends = self.lengths.cumsum(), mapped_array("num_spans", np.int64).cumsum()

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, i: int) -> Example:
        end, count = int(self._ends[i]), int(self.lengths[i])
        tokens = array(TOKEN)
        tokens.frombytes(os.pread(self.fd, count * tokens.itemsize, (end - count) * tokens.itemsize))
        before = self._span_ends[i - 1] if i else 0
        spans = self._spans[before : self._span_ends[i]].tolist()
        return Example(int(self._rows[i]), tokens.tolist(), tuple(Span(int(a), int(b), w) for a, b, w in spans))


class Selected(OnDisk):
    """Stands for chosen examples of `examples`, in a given order; an example may stand there several times."""

    def __init__(self, examples: Examples, order: NDArray[np.int64]) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def _read(self, i: int) -> Example:
        return self.examples[int(self.order[i])]


def in_batches(items: Iterator[T], size: int = 1000) -> Iterator[list[T]]:
    """Yields the items in lists of `size`; the last list may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def sha256_of(examples: Sequence[Example], first: int | None = None) -> str:
    """Returns a hash of the tokens and labels of the `first` examples, or of all; row numbers do not change it."""
    if isinstance(examples, Examples) and (first is None or first == len(examples)):
        return examples.sha256
    content = hashlib.sha256()
    for i in range(len(examples) if first is None else first):
        content.update(_digest(examples[i]))
    return content.hexdigest()


def _digest(example: Example) -> bytes:
    """A hash of the tokens and the spans; the two numbers before them keep them apart."""
    spans = [number for span in example.spans for number in span]
    head = struct.pack(f"qq{len(spans)}d", example.length, len(example.spans), *spans)
    return hashlib.sha256(head + array(TOKEN, example.ids).tobytes()).digest()


def largest_id_of(examples: Sequence[Example]) -> int:
    """Returns the largest token id in the examples."""
    if isinstance(examples, Selected):
        examples = examples.examples
    if isinstance(examples, Examples):
        return examples.largest_id
    return max(max(example.ids) for example in examples)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of tokens of each example."""
    if isinstance(examples, Selected):
        return examples.examples.lengths[examples.order]
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([example.length for example in examples], np.int64)


def label_lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of labels of each example."""
    if isinstance(examples, Selected):
        return examples.examples.label_lengths[examples.order]
    if isinstance(examples, Examples):
        return examples.label_lengths
    return np.array([example.num_labels for example in examples], np.int64)
