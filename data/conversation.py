"""Defines what a row of any format becomes: a conversation of turns, or a text that no chat template touches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """Holds one turn of a conversation. Only an assistant's turn is learned, and may have a thought and tool calls."""

    role: Role
    content: str
    reasoning: str = ""  # what the assistant thinks before it answers
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # each {"name": text, "arguments": object, "id": text}
    name: str = ""  # the tool that answers
    call_id: str = ""  # the id of the call that a tool answers
    weight: float = 0.0  # of each label of the turn in the loss; 0 for a turn that is not learned


@dataclass(frozen=True)
class Row:
    """Holds one row of a file. `number` counts from 1 the elements of an array, the lines or the records of a file.

    A row has `turns`, which the chat template writes, or `plain`: a prompt and a completion that the model gets as they
    are. The prompt of `plain` may be empty.
    """

    number: int
    turns: tuple[Turn, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the functions that the assistant may call
    plain: tuple[str, str] | None = None

    @property
    def question(self) -> str:
        """What the user says last before the last answer, or the prompt of a plain text."""
        if self.plain is not None:
            return self.plain[0]
        return next((turn.content for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def answer(self) -> str:
        """What the row's last turn answers, or the completion of a plain text."""
        return self.plain[1] if self.plain is not None else self.turns[-1].content


def question(number: int, user: str, answer: str, history: Sequence[tuple[str, str]] = (), system: str = "") -> Row:
    """Makes the row of a conversation in which each answer of the assistant is learned and weighs 1."""
    turns = [Turn("system", system)] if system else []
    for asked, answered in (*history, (user, answer)):
        turns += [Turn("user", asked), Turn("assistant", answered, weight=1.0)]
    return Row(number, tuple(turns))
