"""Reads and tokenizes the files of a run: in several processes where the files are large, and once for a machine."""

import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.chat import encode_batch
from data.conversation import Row
from data.errors import UserError
from data.examples import Example, Examples, Packed, Selected, Span, in_batches
from data.files import Record, sources
from data.formats import BadRow, read_row
from data.rows import Problems, other_format
from data.template import ChatTemplate

BATCH = 1000  # rows that a process reads and tokenizes at once
INLINE = 4  # batches of a file that this process tokenizes by itself, before it starts others to help
AHEAD = 3  # batches for each process that wait for it or for being written

HELD_OUT = "held_out"  # the name in val/loss of the rows that validation_share takes
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
TooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class Reading:
    """Says how rows are read: what the recipe's section `data` says beside the names of the files."""

    template: ChatTemplate
    max_length: int  # tokens that the model reads of a row at most
    too_long: TooLong = "error"
    validation_share: float = 0.0  # of the training rows, which become validation rows
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Tally:
    """Counts what became of the rows of a file. A row becomes several examples under some chat templates."""

    rows: int = 0
    examples: int = 0
    dropped: int = 0  # examples that were too long
    cut: int = 0  # examples of which the end was cut off
    unlabelled: int = 0  # examples that were left out, because no label was left after the cut

    def add(self, other: "Tally") -> None:
        """Adds the counts of another."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def told(self) -> str:
        """What happened to rows that are not simply learned; nothing where there are none."""
        parts = [f"{self.rows:,} rows became {self.examples:,} examples"] if self.examples > self.rows else []
        parts += [f"{self.dropped:,} too long and dropped"] if self.dropped else []
        parts += [f"{self.cut:,} cut"] if self.cut else []
        parts += [f"{self.unlabelled:,} left out, because the cut left no label"] if self.unlabelled else []
        return ", ".join(parts)


@dataclass
class Encoded:
    """Holds what became of a batch of records."""

    train: Packed
    validation: Packed
    tally: Tally
    formats: dict[str, list[int]]  # the numbers of the rows of each format
    problems: dict[int, str]  # by the number of the row


@dataclass(frozen=True)
class Loaded:
    """Holds the examples of a run. The validation examples stand behind one another, file after file."""

    train: Examples
    validation: Examples
    times: list[tuple[int, int]]  # for each training file: its examples, and how many times an epoch has them
    parts: dict[str, int]  # for each validation file, by name: its examples
    tallies: dict[str, Tally]  # by file

    def shared(self) -> tuple[dict[str, Any], list[int]]:
        """What it takes to open the same examples once more, also in another process: a description, and descriptors
        of their files, which the caller has to close or to give on."""
        said = {
            "examples": [self.train.description, self.validation.description],
            "times": self.times,
            "parts": self.parts,
            "tallies": {name: asdict(tally) for name, tally in self.tallies.items()},
        }
        return said, [os.dup(self.train.fd), os.dup(self.validation.fd)]

    @classmethod
    def opened(cls, said: dict[str, Any], fds: list[int]) -> "Loaded":
        """The examples of another process, of which `shared` has told."""
        train, validation = (Examples.attach(fd, about) for fd, about in zip(fds, said["examples"], strict=True))
        tallies = {name: Tally(**counts) for name, counts in said["tallies"].items()}
        return cls(train, validation, [(n, times) for n, times in said["times"]], said["parts"], tallies)


def load(train: Mapping[str, int], validation: Iterable[str], reading: Reading) -> Loaded:
    """Reads and tokenizes all rows of the files, folders and data sets, in their order.

    `train` says how many times an epoch has the rows of each. Raises UserError, which names the file, the row and the
    fix: where a file cannot be read, where rows are bad (all are counted, and the first ten shown), where a row is too
    long and `too_long` is error, and where no row is left.
    """
    tallies: dict[str, Tally] = {}
    held_out: list[Packed] = []

    def read(name: str, how: Reading) -> Iterator[Packed]:
        for label, rows in sources(name):
            tally = tallies.setdefault(label, Tally())
            for encoded in _encode_file(label, rows, how, tally):
                held_out.append(encoded.validation)
                yield encoded.train

    counts: dict[str, int] = {}
    examples = Examples.of_packed(_counted(counts, train, lambda name: read(name, reading)))
    parts: dict[str, int] = {}
    every_row = replace(reading, validation_share=0.0)
    named = {_name_of(name, validation): name for name in validation}
    following = _counted(parts, named, lambda name: read(named[name], every_row))
    taken = sum(len(packed.rows) for packed in held_out)
    validation_examples = Examples.of_packed(chain(held_out, following))
    if not len(examples):
        raise UserError(
            f"{', '.join(train)}: no row is left to learn. Raise data.max_length or lower validation_share."
        )
    if reading.validation_share and not taken:
        raise UserError(
            f"data.validation_share {reading.validation_share} takes none of {len(examples)} rows. Raise it, or leave "
            "it out."
        )
    parts = ({HELD_OUT: taken} if taken else {}) | {name: count for name, count in parts.items() if count}
    return Loaded(
        examples, validation_examples, [(counts[name], times) for name, times in train.items()], parts, tallies
    )


def _counted(counts: dict[str, int], names: Iterable[str], read: Callable[[str], Iterator[Packed]]) -> Iterator[Packed]:
    """Yields what `read` reads of each name, and counts its examples in `counts`."""
    for name in names:
        counts[name] = 0
        for packed in read(name):
            counts[name] += len(packed.rows)
            yield packed


def _name_of(file: str, others: Iterable[str]) -> str:
    """A validation file's name in val/loss: its own without endings, unless another one has the same."""
    stem = Path(file).name.split(".")[0]
    return stem if sum(Path(other).name.split(".")[0] == stem for other in others) == 1 else file


def _encode_file(label: str, rows: Iterator[Record], reading: Reading, tally: Tally) -> Iterator[Encoded]:
    """Yields the batches of a file in their order, and raises UserError at its end where rows are bad."""
    problems, first = Problems(), None
    for batch, encoded in _encode_all(in_batches(rows, BATCH), reading):
        tally.add(encoded.tally)
        first = first or next(iter(encoded.formats), None)
        others = {
            number: other_format(name, first)
            for name, numbers in encoded.formats.items()
            for number in numbers
            if name != first
        }
        for number, _, _ in batch:
            problem = encoded.problems.get(number) or others.get(number)
            problems.add(f"row {number}: {problem}" if problem else None)
        yield encoded
    problems.end(label)


def _encode_all(batches: Iterator[list[Record]], reading: Reading) -> Iterator[tuple[list[Record], Encoded]]:
    """Encodes the batches in their order; after the first few, as many processes help as there are cores."""
    for batch in islice(batches, INLINE):
        yield batch, encode_records(batch, reading)
    following = next(batches, None)
    if following is None:
        return
    gc.freeze()  # the libraries' many objects, which the garbage collector would look through for every few rows
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers == 1:
        for batch in (following, *batches):
            yield batch, encode_records(batch, reading)
        return
    # A forked process has the tokenizer and the template at once. It has no threads of this one, so tokenizers is told
    # to use none there.
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, context, _become_worker, (reading,)) as pool:
            waiting: deque[tuple[list[Record], Future[Encoded]]] = deque([(following, pool.submit(_work, following))])
            while waiting:
                for batch in islice(batches, AHEAD * workers - len(waiting)):
                    waiting.append((batch, pool.submit(_work, batch)))
                batch, future = waiting.popleft()
                yield batch, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes rows was ended from outside, perhaps for lack of memory. Free some, or start on "
            "fewer cores (taskset)."
        ) from None


_READING: list[Reading] = []  # of a worker process


def _become_worker(reading: Reading) -> None:
    """Makes this process one that tokenizes; it ends with the process that has started it, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _READING.append(reading)


def _work(batch: list[Record]) -> Encoded:
    return encode_records(batch, _READING[0])


def encode_records(batch: list[Record], reading: Reading) -> Encoded:
    """Reads and tokenizes some records of a file."""
    formats: dict[str, list[int]] = {}
    problems: dict[int, str] = {}
    rows: list[Row] = []
    for number, value, problem in batch:
        if problem:
            problems[number] = problem
            continue
        try:
            name, row = read_row(number, value, reading.columns)
        except BadRow as error:
            problems[number] = str(error)
            continue
        formats.setdefault(name, []).append(number)
        rows.append(row)
    train: list[Example] = []
    validation: list[Example] = []
    tally = Tally(rows=len(batch))
    rows = [row for row in rows if not _is_surely_too_long(row, reading, tally, problems)]
    for row, examples in zip(rows, encode_batch(rows, reading.template), strict=True):
        if isinstance(examples, UserError):
            problems[row.number] = str(examples)
            continue
        kept = [fitting for example in examples if (fitting := _fitted(example, reading, tally, problems))]
        tally.examples += len(kept)
        (validation if _is_held_out(row, reading.validation_share) else train).extend(kept)
    return Encoded(Packed.of(train), Packed.of(validation), tally, formats, problems)


def _is_surely_too_long(row: Row, reading: Reading, tally: Tally, problems: dict[int, str]) -> bool:
    """Whether a row has more characters than max_length tokens can have, which is counted.

    Its tokens may be too much for the tokenizer. Where long rows are cut, its beginning is wanted all the same.
    """
    characters = sum(map(len, row.plain or ())) + sum(len(turn.content) for turn in row.turns)
    if characters <= reading.max_length * reading.template.longest_token or reading.too_long == "cut":
        return False
    if reading.too_long == "error":
        problems[row.number] = _too_long(f"{characters:,} characters", reading)
    else:
        tally.dropped += 1
    return True


def _fitted(example: Example, reading: Reading, tally: Tally, problems: dict[int, str]) -> Example | None:
    """The example, cut where it is too long; None where it is left out, which is counted."""
    most = reading.max_length
    if example.length <= most:
        return example
    if reading.too_long == "error":
        problems[example.row] = _too_long(f"{example.length} tokens", reading)
        return None
    if reading.too_long == "drop":
        tally.dropped += 1
        return None
    spans = tuple(Span(start, min(end, most), weight) for start, end, weight in example.spans if start < most)
    if not spans:
        tally.unlabelled += 1
        return None
    tally.cut += 1
    return Example(example.row, example.ids[:most], spans)


def _too_long(size: str, reading: Reading) -> str:
    said = f"raise data.max_length ({reading.max_length}), or set data.too_long: drop or cut for such rows"
    return f"{size}; shorten it, {said}"


def _is_held_out(row: Row, share: float) -> bool:
    """Whether a row is a validation row, by a hash of what it says: adding rows to a file moves none of the others."""
    if not share:
        return False
    content = repr((row.turns, row.tools, row.plain)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) < share * 2**64


def repeated(examples: Examples, counts: Sequence[tuple[int, int]]) -> Examples | Selected:
    """The examples of several files, those of each as often as is asked: pairs of a number of examples and of times."""
    if all(times == 1 for _, times in counts):
        return examples
    order: list[Any] = []
    start = 0
    for count, times in counts:
        order += [np.arange(start, start + count)] * times
        start += count
    return Selected(examples, np.concatenate(order))
