"""Turns rows into token ids with the tokenizer's own chat template, which writes the prompt and the answer."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.examples import Example, Examples
from data.rows import Problems, Row
from data.template import ChatTemplate, plain_parts

BATCH = 1000  # rows tokenized at once


def user_text(row: Row) -> str:
    """Returns what the user says: the row's instruction and, if it has one, its input on the next line."""
    return f"{row.instruction}\n{row.input}" if row.input else row.instruction


def encode_row(row: Row, system_prompt: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenizes one row. A control token in the row's text, such as <|im_end|>, becomes plain text: it makes no turn.

    Raises UserError when the chat template does not show the row as it is.
    """
    (example,) = encode_batch([row], ChatTemplate(tokenizer, system_prompt))
    if isinstance(example, UserError):
        raise example
    return example


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yields `rows` in lists of `size`; the last list may be shorter."""
    rest = iter(rows)
    while batch := list(islice(rest, size)):
        yield batch


def encode_rows(
    rows: Iterable[Row], path: Path, system_prompt: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Examples:
    """Tokenizes every row; prompt, answer and end token together have at most `max_length` tokens.

    Raises UserError, naming the rows of the file `path`, when a row is longer: no row is cut off. It also raises
    UserError when the tokenizer has no end token or no chat template, and when the chat template fails or does not
    show what a row says.
    """
    problems = Problems()
    examples = Examples(_encoded(rows, ChatTemplate(tokenizer, system_prompt), max_length, problems))
    problems.fail(path)
    return examples


def _encoded(rows: Iterable[Row], template: ChatTemplate, max_length: int, problems: Problems) -> Iterator[Example]:
    """Yields the rows that are not too long, and adds to `problems` what is wrong with the others."""
    # Characters that max_length tokens can have.
    most = max_length * max(len(token) for token in template.tokenizer.get_vocab())
    for batch in batched(rows, BATCH):
        lengths = [len(user_text(row)) + len(row.output) for row in batch]
        # A row with more characters is surely too long, and may be too much for the tokenizer.
        fitting = [row for row, characters in zip(batch, lengths, strict=True) if characters <= most]
        found = {row.number: example for row, example in zip(fitting, encode_batch(fitting, template), strict=True)}
        for row, characters in zip(batch, lengths, strict=True):
            example = found.get(row.number)
            if isinstance(example, UserError):
                problems.add(f"row {row.number}: {example}")
            elif example is None or example.length > max_length:
                size = f"{example.length} tokens" if example else f"{characters:,} characters"
                problems.add(f"row {row.number}: {size}; shorten it or raise data.max_length ({max_length})")
            else:
                problems.add(None)
                yield example


def encode_batch(rows: Sequence[Row], template: ChatTemplate) -> list[Example | UserError]:
    """Tokenizes `rows`; an error stands in the place of a row that the template does not show as it is.

    An answer is tokenized behind the end of its prompt, so that no tokenizer takes it for the beginning of a text.
    Where the tokenizer joins both, the answer is tokenized apart, because a server gives the prompt alone to the model.
    """
    texts: list[tuple[str, str] | UserError | None] = []
    for row in rows:
        user, output = user_text(row), _behind_thought(row.output, template)
        if any(token in user or token in output for token in template.control):
            texts.append(None)  # tokenized in pieces below
            continue
        try:
            texts.append(template.turn(user, row.output))
        except UserError as error:
            texts.append(error)
    ids = iter(_ids_of_turns([text for text in texts if isinstance(text, tuple)], template))
    examples: list[Example | UserError] = []
    for row, text in zip(rows, texts, strict=True):
        if isinstance(text, UserError):
            examples.append(text)
        elif text is None:
            examples.append(_encode_in_pieces(row, template))
        else:
            examples.append(Example.of(row.number, *next(ids)))
    return examples


def _ids_of_turns(turns: Sequence[tuple[str, str]], template: ChatTemplate) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the ids of each prompt and of its answer."""
    context = template.context
    begins = [context if context and prompt.endswith(context) else prompt for prompt, _ in turns]
    prompts = _ids_of_all([prompt for prompt, _ in turns], template.tokenizer)
    behind = _ids_of_all([begin + turn[1] for begin, turn in zip(begins, turns, strict=True)], template.tokenizer)
    of_context = _ids(context, template.tokenizer) if context else []
    for begin, (_, answer), ids, both in zip(begins, turns, prompts, behind, strict=True):
        before = of_context if begin == context else ids
        joined = both[: len(before)] != before
        yield ids, _ids(answer, template.tokenizer) if joined else both[len(before) :]


def _behind_thought(output: str, template: ChatTemplate) -> str:
    """The part of an answer in which a control token is plain text: all but the marks of a thought at its beginning."""
    if "<think>" in template.control and output.lstrip().startswith("<think>") and "</think>" in output:
        return output.replace("<think>", "", 1).replace("</think>", "", 1)
    return output


def prompt_ids(user: str, template: ChatTemplate) -> list[int]:
    """The ids of what a server sends when the user says `user`; a control token in it is plain text."""
    if not any(token in user for token in template.control):
        return _ids(template.prompt(user), template.tokenizer)
    return _ids_of_pieces([template.before, *plain_parts(user, template.control), template.after], template)


def _encode_in_pieces(row: Row, template: ChatTemplate) -> Example:
    """Tokenizes what the template writes, and what the row says as plain text, in which no control token is seen."""
    answer = _ids_of_pieces([template.lead, *plain_parts(row.output, template.control), template.end], template)
    return Example.of(row.number, prompt_ids(user_text(row), template), answer)


def _ids_of_pieces(pieces: Sequence[str], template: ChatTemplate) -> list[int]:
    return [token_id for piece in pieces if piece for token_id in _ids(piece, template.tokenizer)]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


def _ids_of_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return encoded
