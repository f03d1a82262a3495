"""Turns rows into token ids: what the model reads, and which of it is learned."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from data.conversation import Row
from data.errors import UserError
from data.examples import Example, Examples, Span
from data.rows import Problems
from data.template import ChatTemplate, Rendering

BATCH = 1000  # rows tokenized at once


def encode_row(row: Row, template: ChatTemplate) -> list[Example]:
    """Tokenizes one row, which becomes more than one example where the chat template changes earlier turns.

    A control token in the row's text, such as <|im_end|>, becomes plain text: it makes no turn. Raises UserError when
    the chat template does not show the row as it is.
    """
    (examples,) = encode_batch([row], template)
    if isinstance(examples, UserError):
        raise examples
    return examples


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yields `rows` in lists of `size`; the last list may be shorter."""
    rest = iter(rows)
    while batch := list(islice(rest, size)):
        yield batch


def encode_rows(rows: Iterable[Row], path: Path, template: ChatTemplate, max_length: int) -> Examples:
    """Tokenizes every row; what the model reads of it has at most `max_length` tokens, the end token included.

    Raises UserError, naming the rows of the file `path`, when a row is longer: no row is cut off. It also raises
    UserError when the chat template fails or does not show what a row says.
    """
    problems = Problems()
    examples = Examples(_encoded(rows, template, max_length, problems))
    problems.fail(path)
    return examples


def _encoded(rows: Iterable[Row], template: ChatTemplate, max_length: int, problems: Problems) -> Iterator[Example]:
    """Yields the rows that are not too long, and adds to `problems` what is wrong with the others."""
    # Characters that max_length tokens can have.
    most = max_length * max(len(token) for token in template.tokenizer.get_vocab())
    for batch in batched(rows, BATCH):
        # A row with more characters is surely too long, and may be too much for the tokenizer.
        fitting = [row for row in batch if _characters(row) <= most]
        found = dict(zip((row.number for row in fitting), encode_batch(fitting, template), strict=True))
        for row in batch:
            examples = found.get(row.number)
            if isinstance(examples, UserError):
                problems.add(f"row {row.number}: {examples}")
                continue
            longest = max(example.length for example in examples) if examples else None
            if longest is None or longest > max_length:
                size = f"{longest} tokens" if longest else f"{_characters(row):,} characters"
                problems.add(f"row {row.number}: {size}; shorten it or raise data.max_length ({max_length})")
                continue
            problems.add(None)
            yield from examples or ()


def _characters(row: Row) -> int:
    """A number of characters that the row's texts have at least."""
    return sum(map(len, row.plain or ())) + sum(len(turn.content) + len(turn.reasoning) for turn in row.turns)


def encode_batch(rows: Sequence[Row], template: ChatTemplate) -> list[list[Example] | UserError]:
    """Tokenizes `rows`; an error stands in the place of a row that cannot be learned as it is."""
    rendered = _renderings(rows, template)
    pieces = [_Pieces(one, template) for each in rendered if isinstance(each, list) for one in each]
    try:
        ids = iter(template.encoder.ids([text for piece in pieces for text in piece.texts]))
    except UserError as error:
        if len(rows) == 1:
            return [error]
        return [each for row in rows for each in encode_batch([row], template)]
    made = iter([piece.examples([next(ids) for _ in piece.texts]) for piece in pieces])
    result: list[list[Example] | UserError] = []
    for row, each in zip(rows, rendered, strict=True):
        if isinstance(each, UserError):
            result.append(each)
            continue
        examples = [Example(row.number, *one) for _ in each for one in next(made)]
        if any(start == 0 for example in examples for start, _, _ in example.spans):
            result.append(UserError("the first token of a row cannot be learned, because nothing stands before it"))
        else:
            result.append(examples)
    return result


def _renderings(rows: Sequence[Row], template: ChatTemplate) -> list[list[Rendering] | UserError]:
    """The renderings of each row, or what is wrong with it."""
    of_turns = iter(template.renderings_of([row for row in rows if row.plain is None]))
    found: list[list[Rendering] | UserError] = []
    for row in rows:
        try:
            found.append(next(of_turns) if row.plain is None else _plain(row, template))
        except UserError as error:
            found.append(error)
    return found


def _plain(row: Row, template: ChatTemplate) -> list[Rendering]:
    """The rendering of a text without a chat template: it is what it says, and the end token behind it is learned."""
    assert row.plain is not None
    prompt, completion = row.plain
    for token in template.control:
        if template.parse and (token in prompt or token in completion):
            raise UserError(
                f"the text has the control token {token!r}; give the conversation as messages, or set "
                "data.assistant_markup: plain, which reads it as plain characters"
            )
    prompt, completion = template.masks.hide(prompt), template.masks.hide(completion)
    text = f"{prompt}{completion}{template.eos}"
    return [Rendering(text, ((len(prompt), len(text), 1.0),))]


class _Pieces:
    """The texts to tokenize of a rendering, and how its ids are put together from theirs.

    Each span has three: what stands between the answer before it (with the token that ends that) and its own, the end
    of its prompt, and this end with the answer. So no tokenizer takes an answer for the beginning of a text. Where the
    tokenizer joins prompt and answer, the answer is tokenized apart, because a server gives the prompt alone to the
    model. Several spans have one text more, to compare with: what a server sends for the last of them.
    """

    def __init__(self, rendering: Rendering, template: ChatTemplate) -> None:
        self.rendering, self.template = rendering, template
        self.texts: list[str] = []
        text, at = rendering.text, 0
        for start, end, _ in rendering.spans:
            context = text[template.last_control(text, at, start) : start]
            self.texts += [template.control_at_end(text[:at]) + text[at:start], context, context + text[start:end]]
            at = end
        if len(rendering.spans) > 1:
            self.texts.append(text[: rendering.spans[-1][0]])

    def examples(self, ids: Sequence[list[int]]) -> list[tuple[list[int], tuple[Span, ...]]]:
        """The ids and spans of each example that the rendering becomes, given the ids of `texts`.

        It is one, unless the ids of an earlier answer are not those that a server's tokenizer makes of the text so far.
        """
        spans, encoder = self.rendering.spans, self.template.encoder
        whole: list[int] = []
        made: list[Span] = []
        for i, (start, end, weight) in enumerate(spans):
            gap, context, answer = ids[3 * i : 3 * i + 3]
            whole += gap[1:] if i else gap  # the token that ends the answer before it stands there already
            joined = answer[: len(context)] != context
            answer = encoder.ids([self.rendering.text[start:end]])[0] if joined else answer[len(context) :]
            made.append(Span(len(whole), len(whole) + len(answer), weight))
            whole += answer
        if len(spans) == 1 or whole[: made[-1].start] == ids[-1]:
            return [(whole, tuple(made))]
        alone = [_Pieces(Rendering(self.rendering.text[: span[1]], (span,)), self.template) for span in spans]
        return [example for one in alone for example in one.examples(encoder.ids(one.texts))]


def prompt_ids(row: Row, template: ChatTemplate) -> list[int]:
    """The ids of what a server sends to have the row's last answer generated."""
    if row.plain is not None:
        (rendering,) = _plain(row, template)
        return template.encoder.ids([rendering.text[: rendering.spans[0][0]]])[0]
    return template.encoder.ids([template.prompt(row)])[0]
