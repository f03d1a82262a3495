"""Turns rows into token ids: what the model reads, and which of it is learned."""

from collections.abc import Sequence

from data.conversation import Row
from data.errors import UserError
from data.examples import Example, Span
from data.template import ChatTemplate, Rendering

ONE_TOKEN = "is a single token, which nothing before it predicts; remove the row"


def encode_row(row: Row, template: ChatTemplate) -> list[Example]:
    """Tokenizes one row, which becomes more than one example where the chat template changes earlier turns.

    A control token in the row's text, such as <|im_end|>, becomes plain text: it makes no turn. Raises UserError when
    the chat template does not show the row as it is.
    """
    (examples,) = encode_batch([row], template)
    if isinstance(examples, UserError):
        raise examples
    return examples


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
        if row.plain is not None:
            examples = [_behind(template.begin, example) for example in examples]
        result.append(examples if all(example.spans for example in examples) else UserError(ONE_TOKEN))
    return result


def _behind(begin: list[int], example: Example) -> Example:
    """The example behind the tokens with which every text begins. The first token of all is no label, because nothing
    stands before it that could predict it."""
    moved = [Span(max(1, start + len(begin)), end + len(begin), weight) for start, end, weight in example.spans]
    return Example(example.row, begin + example.ids, tuple(span for span in moved if span.start < span.end))


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
        return template.begin + template.encoder.ids([rendering.text[: rendering.spans[0][0]]])[0]
    return template.encoder.ids([template.prompt(row)])[0]
