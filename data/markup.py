"""Keeps the structure of a conversation apart from its text: what makes a control token, and what only spells one.

A control token in what somebody says is hidden behind a *mask*, one character for private use, before the chat template
sees it, so that neither the template nor the tokenizer takes it for structure. data/tokens.py turns it back into the
characters with which it is written.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.conversation import Row, Turn
from data.errors import UserError

MASKS = 0x100000  # the code point of the first mask: U+100000 to U+10FFFD are for private use
NAMES = 0xF0000  # the code point of the first character that names a control token while a text is tokenized
RESERVED = re.compile(f"[{chr(NAMES)}-{chr(0x10FFFF)}]")
LEADING_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
TOOL_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)


class Masks:
    """Hides control tokens in texts, and shows them again."""

    def __init__(self, control: Sequence[str]) -> None:
        self.control = control
        longest_first = sorted(control, key=len, reverse=True)
        self.any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is nowhere
        self._mask = {token: chr(MASKS + i) for i, token in enumerate(control)}
        self._token = {mask: token for token, mask in self._mask.items()}

    def hide(self, value: Any) -> Any:
        """Returns a text, or all texts in lists and objects, with a mask for each control token in it.

        Raises UserError for a character that is reserved for masks.
        """
        if isinstance(value, str):
            if RESERVED.search(value):
                raise UserError("a text has a character for private use above U+F0000, which is no text; remove it")
            return self.any.sub(lambda found: self._mask[found[0]], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.hide(inner) for inner in value)
        return value

    def show(self, text: str) -> str:
        """Returns `text` with each mask replaced by the characters of its control token."""
        return RESERVED.sub(lambda found: self._token.get(found[0], found[0]), text)

    def in_row(self, row: Row, thoughts_in_content: bool) -> Row:
        """Returns the row with masks in all that is said. With `thoughts_in_content` the marks of a thought at the
        beginning of an answer stay: the template has no field for it."""
        turns = tuple(self._in_turn(turn, thoughts_in_content) for turn in row.turns)
        return Row(row.number, turns, self.hide(row.tools))

    def _in_turn(self, turn: Turn, thoughts_in_content: bool) -> Turn:
        content = self._answer(turn.content) if thoughts_in_content else self.hide(turn.content)
        if content == turn.content and not turn.reasoning and not turn.tool_calls:
            return turn
        return replace(
            turn, content=content, reasoning=self.hide(turn.reasoning), tool_calls=self.hide(turn.tool_calls)
        )

    def _answer(self, content: str) -> str:
        found = LEADING_THOUGHT.fullmatch(content)
        if not found:
            return str(self.hide(content))
        start, end = content.index("<think>") + len("<think>"), content.index("</think>")
        behind = end + len("</think>")
        return f"{content[:start]}{self.hide(content[start:end])}{content[end:behind]}{self.hide(content[behind:])}"


def read_markup(turn: Turn, thoughts: bool, tool_calls: bool) -> Turn:
    """Reads the structure in the text of an assistant's turn: a thought at its beginning, and tool calls behind it.

    `thoughts` and `tool_calls` say which of the two the template has a place for. Raises UserError for a tool call that
    is not written as JSON with a name and arguments.
    """
    if thoughts and not turn.reasoning and (found := LEADING_THOUGHT.fullmatch(turn.content)):
        turn = replace(turn, reasoning=found[1].strip(), content=found[2])
    if tool_calls and not turn.tool_calls and TOOL_CALL.search(turn.content):
        calls = [_call(found[1]) for found in TOOL_CALL.finditer(turn.content)]
        said = TOOL_CALL.sub("\n", turn.content).strip()
        if not turn.content.strip().startswith(said):
            raise UserError("text follows a tool call in an answer; put the call last, or into the field tool_calls")
        turn = replace(turn, tool_calls=tuple(calls), content=said)
    return turn


def _call(text: str) -> dict[str, Any]:
    try:
        call = json.loads(text)
        return {"name": str(call["name"]), "arguments": dict(call["arguments"]), "id": ""}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"the tool call {text[:40]!r} is no JSON with name and arguments; put it into the field tool_calls, or set "
            "data.assistant_markup: plain to learn it as plain text"
        ) from None
