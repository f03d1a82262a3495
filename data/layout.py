"""Makes the tensors of one micro-batch from rows, in one of three layouts that give the same losses and gradients.

padded         There are B rows, each filled up on the right to the length of the longest.
packed         All examples stand behind one another in a single row, without padding; none sees another.
shared_prefix  Like packed, but the tokens with which all examples begin stand there once, and every example sees them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from data.examples import Example

IGNORE_INDEX = -100
Layout = Literal["padded", "packed", "shared_prefix"]


@dataclass(frozen=True)
class Apart:
    """Says which tokens of a row of T tokens belong to the same example; loop/model/attention.py keeps the others away.

    The first `prefix` tokens belong to all examples. Examples of about the same length form a group: a tensor [R, L] of
    the places of their tokens, in which a shorter example repeats the place of its last token. Attention computes the
    prefix and then group after group; `back` [T] maps that output to the original order of the tokens.
    """

    prefix: int
    groups: list[Tensor]
    back: Tensor
    in_line: "InLine"

    @cached_property
    def masks(self) -> list[Tensor]:
        """For each group [1, 1, L, prefix + L]: which tokens each of its queries sees. All layers share them."""
        shapes = [(group.shape[1], self.prefix + group.shape[1], group.device) for group in self.groups]
        return [
            torch.ones(queries, keys, dtype=torch.bool, device=device).tril(self.prefix)[None, None]
            for queries, keys, device in shapes
        ]

    def to(self, device: torch.device) -> "Apart":
        groups = [group.to(device) for group in self.groups]
        return Apart(self.prefix, groups, self.back.to(device), self.in_line.to(device))


@dataclass(frozen=True)
class InLine:
    """The same for a kernel that takes sequences of different lengths, one behind another: first the prefix, if there
    is one, and then each example, whose keys are those of the prefix and its own."""

    keys: Tensor | None  # the places of all sequences' keys; None where these are the tokens as they stand
    query_ends: Tensor  # [sequences + 1], int32: where each sequence's queries begin and end
    key_ends: Tensor  # [sequences + 1], int32
    most_queries: int  # of a sequence
    most_keys: int

    def to(self, device: torch.device) -> "InLine":
        keys = None if self.keys is None else self.keys.to(device)
        return replace(self, keys=keys, query_ends=self.query_ends.to(device), key_ends=self.key_ends.to(device))


@dataclass(frozen=True)
class MicroBatch:
    """B rows of T tokens. Where `apart` is given there is one row, in which all examples stand.

    labels holds the token ids that are learned, each in the place of its own token, and IGNORE_INDEX elsewhere.
    """

    input_ids: Tensor  # [B, T]
    position_ids: Tensor | None  # [B, T], from 0 in each example; None where it is the token's place in the row
    labels: Tensor  # [B, T]
    predicts: Tensor  # [N], the places (in the batch as B x T tokens in a line) of the tokens that stand before a label
    label_ids: Tensor  # [N], the labels themselves
    label_weights: Tensor | None  # [N], fp32, what each weighs in the loss; None where each weighs 1
    attention_mask: Tensor | None  # [B, T], 0 on padding; None where there is no padding
    apart: Apart | None
    rows: list[int]  # row numbers in the data file; a stand-in has none
    prefix: int  # number of tokens that all examples share and that stand there once
    own: list[int]  # for each example the number of its tokens after the prefix

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model."""
        every = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
            "apart": self.apart,
        }
        return {name: value for name, value in every.items() if value is not None}

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with all its tensors on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.inputs.items()}
        moved |= {name: getattr(self, name).to(device) for name in ("labels", "predicts", "label_ids")}
        if self.label_weights is not None:
            moved["label_weights"] = self.label_weights.to(device)
        return replace(self, **moved)


def collate(examples: Sequence[Example], layout: Layout, pad_token_id: int) -> MicroBatch:
    """Makes one micro-batch of the given examples."""
    if layout == "padded":
        return _padded(examples, pad_token_id)
    return _in_one_row(examples, shared_prefix(examples) if layout == "shared_prefix" else 0)


def stand_in(example: Example, layout: Layout, pad_token_id: int) -> MicroBatch:
    """Makes a micro-batch whose loss and gradient are exactly zero, because its one example has no label."""
    batch = collate([example], layout, pad_token_id)
    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    none: dict[str, Any] = {"predicts": batch.predicts[:0], "label_ids": batch.label_ids[:0], "label_weights": None}
    return replace(batch, labels=labels, **none, rows=[])


def shared_prefix(examples: Sequence[Example]) -> int:
    """The number of tokens with which all prompts begin; 0 for a single example.

    A prompt is what stands before an example's first label. Its last token is never counted: it predicts that label,
    which is the example's own.
    """
    if len(examples) == 1:
        return 0
    return common_prefix([example.prompt_ids for example in examples])


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """The number of tokens with which all prompts begin; at least the last token of each is left out."""
    # In alphabetical order all prompts stand between the first and the last, and begin with what these two share.
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _padded(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    own = [example.length for example in examples]
    shape = (len(examples), max(own))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, (example, length) in enumerate(zip(examples, own, strict=True)):
        input_ids[i, :length] = torch.tensor(example.ids)
        attention_mask[i, :length] = 1
        labels[i, :length] = torch.tensor(_labels(example))
    return MicroBatch(
        input_ids=input_ids,
        position_ids=None,
        labels=labels,
        **_predictions(labels, examples),
        attention_mask=attention_mask,
        apart=None,
        rows=[example.row for example in examples],
        prefix=0,
        own=own,
    )


def _in_one_row(examples: Sequence[Example], prefix: int) -> MicroBatch:
    ids, positions = examples[0].ids[:prefix], list(range(prefix))
    labels = [IGNORE_INDEX] * prefix
    own = []
    for example in examples:
        ids += example.ids[prefix:]
        labels += _labels(example)[prefix:]
        own.append(example.length - prefix)
        positions += range(prefix, example.length)
    in_one_row = torch.tensor([labels])
    return MicroBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        labels=in_one_row,
        **_predictions(in_one_row, examples),
        attention_mask=None,
        apart=_apart(prefix, own),
        rows=[example.row for example in examples],
        prefix=prefix,
        own=own,
    )


def _apart(prefix: int, own: Sequence[int]) -> Apart:
    starts = torch.tensor([prefix, *own[:-1]]).cumsum(0)
    lengths = torch.tensor(own)
    back = torch.arange(prefix + sum(own))
    groups, laid_out = [], prefix
    for members in _of_similar_length(own):
        longest = int(lengths[members].max())
        within = torch.arange(longest).minimum(lengths[members, None] - 1)  # [R, L]
        groups.append(starts[members, None] + within)
        for i, member in enumerate(members):
            start = int(starts[member])
            back[start : start + own[member]] = torch.arange(own[member]) + laid_out + i * longest
        laid_out += len(members) * longest
    return Apart(prefix, groups, back, _in_line(prefix, own))


def _in_line(prefix: int, own: Sequence[int]) -> InLine:
    queries = [prefix, *own] if prefix else list(own)
    keys = [prefix, *(prefix + length for length in own)] if prefix else list(own)
    query_ends, key_ends = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    places = None
    if prefix:
        shared = torch.arange(prefix)
        starts = query_ends[1:-1].tolist()
        mine = [torch.arange(start, start + length) for start, length in zip(starts, own, strict=True)]
        places = torch.cat([shared, *(part for each in mine for part in (shared, each))])
    return InLine(places, query_ends.int(), key_ends.int(), max(queries), max(keys))


def _of_similar_length(own: Sequence[int]) -> list[list[int]]:
    """Groups the indices of the examples. The longest of a group has at most 1.25 x the shortest + 8 tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(own)), key=lambda i: own[i]):
        if groups and own[i] <= 1.25 * own[groups[-1][0]] + 8:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def _labels(example: Example) -> list[int]:
    """The example's tokens, with IGNORE_INDEX in the place of each that is no label."""
    labels = [IGNORE_INDEX] * example.length
    for start, end, _ in example.spans:
        labels[start:end] = example.ids[start:end]
    return labels


def _predictions(labels: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
    """The label ids and their weights, and the places of the tokens before them, which predict them and are of the
    same example."""
    places = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    spans = [span for example in examples for span in example.spans]
    weights = None
    if any(span.weight != 1 for span in spans):
        weights = torch.tensor([span.weight for span in spans for _ in range(span.start, span.end)])
    return {"predicts": places - 1, "label_ids": labels.flatten()[places], "label_weights": weights}
