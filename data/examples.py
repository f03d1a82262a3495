"""Keeps tokenized rows on disk: memory holds only a few numbers for each row, however many rows there are."""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

TOKEN = "I"  # the type code of 4 bytes, because vocabularies have more than 65,536 tokens
NUMBERS = "q"  # the type code of 8 bytes


@dataclass(frozen=True)
class Example:
    """Holds one tokenized row: the model reads the prompt and learns the answer."""

    row: int  # the row's number in its file
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end token

    @property
    def length(self) -> int:
        """Counts the tokens of the prompt and the answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)


class Examples(Sequence[Example]):
    """Keeps examples in a temporary file, which disappears with the process; each access reads one example.

    The file is read by position and not mapped into memory, so that an example that was read does not stay in this
    process's memory. The constructor raises UserError when the file cannot be written.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        rows, ends, prompts = array(NUMBERS), array(NUMBERS, [0]), array(NUMBERS)
        content, self.largest_id = hashlib.sha256(), 0  # the largest token id of all examples
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
            for example in examples:
                tokens = _tokens(example)
                tokens.tofile(self._file)
                content.update(_lengths(example))
                content.update(tokens)
                self.largest_id = max(self.largest_id, max(tokens))
                rows.append(example.row)
                prompts.append(len(example.prompt_ids))
                ends.append(ends[-1] + len(tokens))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: the tokenized rows cannot be written ({error.strerror}). Make room, or set "
                "TMPDIR to a folder on a disk that has some."
            ) from error
        self.sha256 = content.hexdigest()  # of all examples, in their order
        self._rows, self._ends = np.array(rows, np.int64), np.array(ends, np.int64)
        self.prompt_lengths: NDArray[np.int64] = np.array(prompts, np.int64)  # tokens in each prompt

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Counts the tokens of each example, prompt and answer together."""
        return np.diff(self._ends)

    @property
    def answer_lengths(self) -> NDArray[np.int64]:
        """Counts the tokens of each answer."""
        return self.lengths - self.prompt_lengths

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
        ids, prompt = tokens.tolist(), int(self.prompt_lengths[i])
        return Example(int(self._rows[i]), ids[:prompt], ids[prompt:])


def sha256_of(examples: Sequence[Example], first: int | None = None) -> str:
    """Returns a hash of the token ids of the `first` examples, or of all; row numbers do not change it."""
    if isinstance(examples, Examples) and (first is None or first == len(examples)):
        return examples.sha256
    content = hashlib.sha256()
    for i in range(len(examples) if first is None else first):
        example = examples[i]
        content.update(_lengths(example))
        content.update(_tokens(example))
    return content.hexdigest()


def _tokens(example: Example) -> "array[int]":
    return array(TOKEN, example.prompt_ids + example.answer_ids)


def _lengths(example: Example) -> "array[int]":
    """The two lengths, which keep prompt, answer and the next example apart in a hash."""
    return array(NUMBERS, [len(example.prompt_ids), len(example.answer_ids)])


def largest_id_of(examples: Sequence[Example]) -> int:
    """Returns the largest token id in the examples."""
    if isinstance(examples, Examples):
        return examples.largest_id
    return max(max(example.prompt_ids + example.answer_ids) for example in examples)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of tokens in each example, prompt and answer together."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([example.length for example in examples], np.int64)


def answer_lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Returns the number of tokens in each answer."""
    if isinstance(examples, Examples):
        return examples.answer_lengths
    return np.array([len(example.answer_ids) for example in examples], np.int64)
