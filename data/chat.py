"""Rows -> token ids and labels, through the tokenizer's own chat template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.rows import Row, fail_on_bad_rows

PLACE = "\ue000"  # a character for private use: stands where the user's text goes


@dataclass(frozen=True)
class Example:
    """One tokenized row: the prompt, which is only read, and the answer, which is learned."""

    row: int  # the row's number in its file
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end token


def user_text(row: Row) -> str:
    return f"{row.instruction}\n{row.input}" if row.input else row.instruction


def render_prompt(user: str, system_prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat turns as text, up to where the assistant begins to answer what `user` says.

    Raises UserError when the tokenizer's chat template does not work.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": user})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template is a program that came with the model: anything may be raised in it
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template fails: {error}. Correct it; if it wants no system turn, "
            "leave data.system_prompt empty."
        ) from error


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What makes turns: all special tokens, and other added ones (but white space) that the chat template writes."""
    template = str(tokenizer.chat_template)
    added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    return [token.content for token in added if token.special or token.content in template]


def encode_row(
    row: Row, system_prompt: str, tokenizer: PreTrainedTokenizerBase, control: Sequence[str] | None = None
) -> Example:
    """Control tokens within the row's texts, such as <|im_end|>, are plain text: a row cannot forge a turn.

    `control` is what `control_tokens` says of `tokenizer`.
    """
    forged = control_tokens(tokenizer) if control is None else control

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return encoded

    def plain_ids(text: str) -> list[int]:
        """Cut after the first character of each control token, so that the tokenizer never sees one."""
        cuts = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in forged)
        return [token_id for part in re.split(cuts, text) for token_id in ids(part)] if cuts else ids(text)

    user = user_text(row)
    if any(token in user for token in forged):
        before, after = render_prompt(PLACE, system_prompt, tokenizer).split(PLACE)
        prompt_ids = ids(before) + plain_ids(user) + ids(after)
    else:
        prompt_ids = ids(render_prompt(user, system_prompt, tokenizer))
    return Example(row.number, prompt_ids, [*plain_ids(row.output), tokenizer.eos_token_id])


def encode_rows(
    rows: Sequence[Row], path: Path, system_prompt: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Every row as an Example of at most `max_length` tokens, prompt, answer and end token together.

    Raises UserError, naming the rows of the file `path`, when a row is longer (nothing is cut off), and
    when the tokenizer has no chat template, one that fails or leaves the user out, or no end token.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template. Use an Instruct model.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token. Set its eos_token.")
    if render_prompt(PLACE, system_prompt, tokenizer).count(PLACE) != 1:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not show what the user says once. Correct it."
        )
    control = control_tokens(tokenizer)
    most = max_length * max(len(token) for token in tokenizer.get_vocab())  # characters in max_length tokens
    examples, problems = [], []
    for row in rows:
        characters = len(user_text(row)) + len(row.output)
        if characters > most:  # sure to be too long, and maybe too much for the tokenizer
            problems.append(
                f"row {row.number}: {characters:,} characters; shorten it or raise data.max_length ({max_length})"
            )
            continue
        example = encode_row(row, system_prompt, tokenizer, control)
        length = len(example.prompt_ids) + len(example.answer_ids)
        if length > max_length:
            problems.append(f"row {row.number}: {length} tokens; shorten it or raise data.max_length ({max_length})")
        examples.append(example)
    fail_on_bad_rows(path, problems, len(rows))
    return examples
