"""Turns rows into token ids with the tokenizer's own chat template, which writes the prompt around the user's text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.examples import Example, Examples
from data.rows import Problems, Row

BATCH = 1000  # rows tokenized at once
PLACE = "\ue000"  # a character for private use; it stands for the user's text in a template


def user_text(row: Row) -> str:
    """Returns what the user says: the row's instruction and, if it has one, its input on the next line."""
    return f"{row.instruction}\n{row.input}" if row.input else row.instruction


def render_prompt(user: str, system_prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat turns as text, up to where the assistant begins to answer what `user` says.

    Raises UserError when the tokenizer's chat template does not work.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": user})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template is a program that comes with the model, and may raise anything
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template fails: {error}. Correct it; if it wants no system turn, "
            "leave data.system_prompt empty."
        ) from error


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that can begin or end a turn.

    They are all special tokens, and those of the other added tokens that the chat template writes and that are more
    than white space.
    """
    template = str(tokenizer.chat_template)
    added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    return [token.content for token in added if token.special or token.content in template]


def encode_row(
    row: Row, system_prompt: str, tokenizer: PreTrainedTokenizerBase, control: Sequence[str] | None = None
) -> Example:
    """Tokenizes one row. A control token in the row's text, such as <|im_end|>, becomes plain text: it makes no turn.

    `control` is what `control_tokens` returns for `tokenizer`; without it this function calls `control_tokens` itself.
    """
    forged = control_tokens(tokenizer) if control is None else control

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return encoded

    def plain_ids(text: str) -> list[int]:
        """Cuts `text` after the first character of each control token, and tokenizes the parts.

        So the tokenizer never sees a control token.
        """
        cuts = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in forged)
        return [token_id for part in re.split(cuts, text) for token_id in ids(part)] if cuts else ids(text)

    user = user_text(row)
    if any(token in user for token in forged):
        before, after = render_prompt(PLACE, system_prompt, tokenizer).split(PLACE)
        prompt_ids = ids(before) + plain_ids(user) + ids(after)
    else:
        prompt_ids = ids(render_prompt(user, system_prompt, tokenizer))
    return Example(row.number, prompt_ids, [*plain_ids(row.output), tokenizer.eos_token_id])


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
    show what the user says.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template. Use an Instruct model.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token. Set its eos_token.")
    if render_prompt(PLACE, system_prompt, tokenizer).count(PLACE) != 1:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not show what the user says once. Correct it."
        )
    problems = Problems()
    examples = Examples(_encoded(rows, system_prompt, max_length, tokenizer, problems))
    problems.fail(path)
    return examples


def _encoded(
    rows: Iterable[Row], system_prompt: str, max_length: int, tokenizer: PreTrainedTokenizerBase, problems: Problems
) -> Iterator[Example]:
    """Yields the rows that are not too long, and adds to `problems` what is wrong with the others."""
    control = control_tokens(tokenizer)
    most = max_length * max(len(token) for token in tokenizer.get_vocab())  # characters that max_length tokens can have
    for batch in batched(rows, BATCH):
        lengths = [len(user_text(row)) + len(row.output) for row in batch]
        # A row with more characters is surely too long, and may be too much for the tokenizer.
        fitting = [row for row, characters in zip(batch, lengths, strict=True) if characters <= most]
        found = {example.row: example for example in encode_batch(fitting, system_prompt, tokenizer, control)}
        for row, characters in zip(batch, lengths, strict=True):
            example = found.get(row.number)
            length = example.length if example else 0
            problem = None
            if example is None or length > max_length:
                size = f"{length} tokens" if example else f"{characters:,} characters"
                problem = f"row {row.number}: {size}; shorten it or raise data.max_length ({max_length})"
            problems.add(problem)
            if example is not None and problem is None:
                yield example


def encode_batch(
    rows: Sequence[Row], system_prompt: str, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]
) -> list[Example]:
    """Tokenizes `rows` to the same examples as `encode_row` does, but faster.

    It calls the tokenizer only twice for all the rows whose text contains no control token.
    """
    forged = [any(token in user_text(row) or token in row.output for token in control) for row in rows]
    plain = [row for row, is_forged in zip(rows, forged, strict=True) if not is_forged]
    prompts = [render_prompt(user_text(row), system_prompt, tokenizer) for row in plain]
    ids = iter(zip(_ids_of_all(prompts, tokenizer), _ids_of_all([row.output for row in plain], tokenizer), strict=True))
    examples = []
    for row, is_forged in zip(rows, forged, strict=True):
        if is_forged:
            examples.append(encode_row(row, system_prompt, tokenizer, control))
        else:
            prompt, answer = next(ids)
            examples.append(Example(row.number, prompt, [*answer, tokenizer.eos_token_id]))
    return examples


def _ids_of_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return encoded
