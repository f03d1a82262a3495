"""Chooses what the base model with its adapter and the exported model are both asked: rows of the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.chat import encode_row, prompt_ids
from data.conversation import Row, Turn, question
from data.errors import UserError
from data.files import HUB, sources
from data.rows import iter_rows
from loop.exporting.source import Source
from loop.recipe import data_files, find_data

TOKENS = 1024  # a row is cut off here, so that its logits fit into memory
PLACES = 16  # places of a row whose logits are compared
# Where the run's rows are gone, these take their place.
MADE_UP = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 17 + 25?", "17 + 25 = 42."),
    ("Name three colours.", "Red, green and blue."),
    ("Write a sentence about rain.", "The rain fell all night on the quiet roofs."),
    ("Which day comes after Monday?", "Tuesday."),
)


@dataclass(frozen=True)
class Case:
    """A row as both models get it."""

    ids: list[int]
    places: list[int]  # of ids; the logits there say what the next token is, which is one that was learned
    prompt: list[int]  # empty where the row begins with what is learned
    messages: list[dict[str, str]] | None  # the prompt as a server gets it; None where it is more than plain turns


def choose_cases(source: Source, count: int) -> tuple[list[Case], str]:
    """Up to `count` cases, and which rows they are, in words that name no folder, because the model card has them.

    Rows that the chat template cannot show are left out. Prints why, where the rows of the run cannot be used.
    """
    file = next(iter(data_files(source.recipe.data.train_file)))
    problem = "no row can be shown"
    try:
        cases = list(islice(_cases(source, _rows(source, file)), count))
        if cases:
            return cases, f"rows of {file if file.startswith(HUB) else Path(file).name}"
    except (UserError, OSError) as error:
        problem = str(error)
    made_up = (question(i, *pair) for i, pair in enumerate(MADE_UP, 1))
    cases = list(islice(_cases(source, made_up), count))
    if not cases:
        raise UserError(f"{file}: {problem}, and no made-up row can be shown either. Give the run its rows back.")
    print(f"note: the rows of the run cannot be used: {problem}", flush=True)
    return cases, "made-up rows, because the rows of the run could not be used,"


def _rows(source: Source, file: str) -> Iterator[Row]:
    for label, found in sources(find_data(file)):
        yield from iter_rows(label, found, source.recipe.data.columns)


def _cases(source: Source, rows: Iterator[Row]) -> Iterator[Case]:
    for row in rows:
        try:
            example = encode_row(row, source.template)[-1]
            prompt = prompt_ids(row, source.template)
        except UserError:
            continue
        learned = [place - 1 for start, end, _ in example.spans for place in range(start, end) if 0 < place < TOKENS]
        if learned:
            chosen = learned[:: -(-len(learned) // PLACES)]
            yield Case(
                list(example.ids[:TOKENS]),
                chosen,
                list(prompt[:TOKENS]),
                messages_of(row, source.recipe.data.system_prompt),
            )


def messages_of(row: Row, system_prompt: str) -> list[dict[str, str]] | None:
    """What a client sends to have the row's last answer generated; None where that is more than plain turns."""
    if row.plain is not None or row.tools or any(turn.reasoning or turn.tool_calls for turn in row.turns):
        return None
    turns = list(row.turns[:-1])
    if system_prompt and turns[0].role != "system":
        turns.insert(0, Turn("system", system_prompt))
    return [{"role": turn.role, "content": turn.content} for turn in turns]
