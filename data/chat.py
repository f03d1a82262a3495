"""Rows -> token ids and labels, through the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.rows import Row, fail_on_bad_rows


@dataclass(frozen=True)
class Example:
    """One tokenized row: the prompt, which is only read, and the answer, which is learned."""

    row: int  # the row's number in its file
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end token


def render_prompt(row: Row, system_prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat turns of `row` as text, up to where the assistant begins to answer."""
    user = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": user})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_row(row: Row, system_prompt: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt_ids = tokenizer(render_prompt(row, system_prompt, tokenizer), add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(row.output, add_special_tokens=False)["input_ids"]
    return Example(row.number, prompt_ids, [*answer_ids, tokenizer.eos_token_id])


def encode_rows(
    rows: Sequence[Row], path: Path, system_prompt: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Every row as an Example of at most `max_length` tokens, prompt, answer and end token together.

    Raises UserError, naming the rows of the file `path`, when a row is longer (nothing is cut off) or
    contains one of the tokenizer's control tokens as text (it could forge a turn of the chat), and
    when the tokenizer has no chat template or no end token.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template. Use an Instruct model.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token. Set its eos_token.")
    examples, problems = [], []
    for row in rows:
        forged = [token for token in tokenizer.all_special_tokens if token in row.instruction + row.input + row.output]
        if forged:
            problems.append(f"row {row.number}: contains the control token {forged[0]}; remove it")
            continue
        example = encode_row(row, system_prompt, tokenizer)
        length = len(example.prompt_ids) + len(example.answer_ids)
        if length > max_length:
            problems.append(f"row {row.number}: {length} tokens; shorten it or raise data.max_length ({max_length})")
        examples.append(example)
    fail_on_bad_rows(path, problems, len(rows))
    return examples
