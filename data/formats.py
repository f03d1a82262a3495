"""Reads a decoded row in any of the formats that people have, recognised by its keys, as a conversation.

docs/data.md has a table of the formats. A row that cannot be read, and a field that nothing reads, is named and never
dropped without a word.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from data.conversation import Row, Turn, question

Fields = Mapping[str, Any]
IGNORED = "ignore"  # as the new name of a column in data.columns: the column is left out on purpose
SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"function_call": "function_call", "tool_call": "function_call", "observation": "tool", "tool": "tool"},
}
TURN_FIELDS = {
    "messages": (
        *("role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls"),
        *("name", "tool_call_id", "weight", "train"),
    ),
    "conversations": ("from", "value", "weight", "train"),
}


class BadRow(ValueError):
    """Says what is wrong with a row and how to correct it; the caller knows the file and the row's number."""


def read_row(number: int, value: Any, columns: Mapping[str, str] | None = None) -> tuple[str, Row]:
    """Returns the name of the row's format, and the row. Raises BadRow.

    `columns` gives columns of the file the names that a format has; the name "ignore" leaves a column out.
    """
    if not isinstance(value, dict):
        raise BadRow(f"is of type {type(value).__name__}; give an object with the fields instruction and output")
    fields = _renamed(value, columns) if columns else value
    name = _format_of(tuple(fields))
    needs, may, read = FORMATS[name]
    _no_others(fields, (*needs, *may), needs[0])
    row = read(number, fields)
    for key, content in fields.items():
        if not _is_text(content):
            raise BadRow(f"the field {key!r} has half of a surrogate pair, which is no character; remove it")
    return name, row


@lru_cache
def _format_of(keys: tuple[Any, ...]) -> str:
    """Returns the name of the format that has these keys. Raises BadRow where no format or two have them."""
    found = [name for name, (needs, _, _) in FORMATS.items() if all(key in keys for key in needs)]
    if len(found) > 1:
        raise BadRow(
            f"has the fields of two formats, {found[0]} and {found[1]}; leave one out with data.columns: "
            f"{{{FORMATS[found[1]][0][0]}: {IGNORED}}}"
        )
    # A row of no format is most often alpaca with a field missing, unless it has a part of another format.
    part = [name for name, (needs, _, _) in FORMATS.items() if any(key in keys for key in needs)]
    name = (found or part or ["alpaca"])[0]
    for key in FORMATS[name][0]:
        if key not in keys:
            raise BadRow(f"the field {key!r} is missing; add it")
    return name


def _renamed(value: Fields, columns: Mapping[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, content in value.items():
        name = columns.get(key, key)
        if name == IGNORED:
            continue
        if name in fields:
            raise BadRow(f"data.columns gives two columns the name {name!r}; keep one of them")
        fields[name] = content
    return fields


def _no_others(fields: Fields, known: Sequence[str], instead: str) -> None:
    """Raises BadRow where a field says something that nothing reads."""
    unknown = [key for key in fields if key not in known]
    unknown = sorted(str(key) for key in unknown if fields[key] not in (None, "", [], {}))
    if unknown:
        names = ", ".join(map(repr, unknown))[:200]
        raise BadRow(
            f"nothing reads {names}; remove it, put what it says into {instead!r}, or leave it out with "
            f"data.columns: {{{unknown[0][:40]}: {IGNORED}}}"
        )


def _is_text(value: Any) -> bool:
    """Whether all texts in `value` can be encoded; half of a surrogate pair cannot."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, dict):
        return all(map(_is_text, value)) and all(map(_is_text, value.values()))
    return not isinstance(value, list) or all(map(_is_text, value))


def _text(fields: Fields, key: str, may_be_empty: bool = False) -> str:
    """Returns the text of a field; None counts as an empty one where it may be empty."""
    content = fields.get(key)
    if content is None and may_be_empty:
        return ""
    if not isinstance(content, str):
        raise BadRow(f"the field {key!r} is of type {type(content).__name__}; make it text")
    if not content.strip() and not may_be_empty:
        raise BadRow(f"the field {key!r} is empty; fill it or remove the row")
    return content


def _decoded(content: Any, problem: str) -> Any:
    """Returns what a text says as JSON, and anything else as it is. Raises BadRow with the problem for other texts."""
    if not isinstance(content, str):
        return content
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise BadRow(problem) from None


def _list(fields: Fields, key: str) -> list[Any]:
    """Returns the list of a field; a text is read as JSON, because many files hold nested values so."""
    content = fields.get(key)
    if content is None or content == "":
        return []
    content = _decoded(content, f"the field {key!r} is a text that is no JSON; make it a list")
    if not isinstance(content, list):
        raise BadRow(f"the field {key!r} is of type {type(content).__name__}; make it a list")
    return content


# ---- alpaca


def _alpaca(number: int, fields: Fields) -> Row:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    more, system = _text(fields, "input", may_be_empty=True), _text(fields, "system", may_be_empty=True)
    history = []
    for pair in _list(fields, "history"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)):
            raise BadRow("the field 'history' needs pairs of a question and an answer, both text and not empty")
        history.append((pair[0], pair[1]))
    return question(number, f"{instruction}\n{more}" if more else instruction, output, history, system)


# ---- prompt and completion, text


def _prompt_completion(number: int, fields: Fields) -> Row:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = [replace(turn, weight=0.0) for turn in _turns(_list(fields, "prompt"), "prompt", _message)]
        turns = [*before, *_turns(_list(fields, "completion"), "completion", _message)]
        tools = _tools(fields)
        return Row(number, _conversation(turns, tools), tools)
    return Row(number, plain=(_text(fields, "prompt"), _text(fields, "completion")))


def _plain_text(number: int, fields: Fields) -> Row:
    return Row(number, plain=("", _text(fields, "text")))


# ---- conversations


def _messages(number: int, fields: Fields) -> Row:
    tools = _tools(fields)
    return Row(number, _conversation(_turns(_list(fields, "messages"), "messages", _message), tools), tools)


def _sharegpt(number: int, fields: Fields) -> Row:
    tools, system = _tools(fields), _text(fields, "system", may_be_empty=True)
    turns = _turns(_list(fields, "conversations"), "conversations", _sharegpt_turn)
    if system:
        if turns and turns[0].role == "system":
            raise BadRow("has a system turn and the field 'system'; keep one of them")
        turns.insert(0, Turn("system", system))
    return Row(number, _conversation(turns, tools), tools)


def _turns(values: list[Any], field: str, read: Callable[[Any], Turn]) -> list[Turn]:
    """Reads each turn; a BadRow says which one."""
    turns = []
    for place, value in enumerate(values, start=1):
        try:
            if not isinstance(value, dict):
                raise BadRow(f"is of type {type(value).__name__}; make it an object")
            turns.append(read(value))
        except BadRow as error:
            raise BadRow(f"turn {place} of {field!r}: {error}") from None
    return turns


def _message(value: Fields) -> Turn:
    """Reads a message as the chat API of OpenAI has it."""
    _no_others(value, TURN_FIELDS["messages"], "content")
    role = value.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise BadRow(f"the role is {role!r}; make it system, user, assistant or tool")
    reasoning = [_text(value, key, True) for key in ("reasoning_content", "reasoning", "thinking") if value.get(key)]
    if len(reasoning) > 1:
        raise BadRow("has two fields with a thought; keep one of them")
    turn = Turn(
        role,
        _content(value.get("content")),
        reasoning=reasoning[0] if reasoning else "",
        tool_calls=tuple(map(_call, _list(value, "tool_calls"))),
        name=_text(value, "name", may_be_empty=True),
        call_id=_text(value, "tool_call_id", may_be_empty=True),
        weight=_weight(value, role),
    )
    if role != "assistant" and (turn.reasoning or turn.tool_calls):
        raise BadRow(f"only an assistant thinks or calls a tool, and the role is {role}")
    return turn


def _content(content: Any) -> str:
    """Returns a message's text; a content may be a list of parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        if other := [part for part in content if not (isinstance(part, dict) and part.get("type") == "text")]:
            kind = other[0].get("type") if isinstance(other[0], dict) else type(other[0]).__name__
            raise BadRow(f"the content has a part of the type {kind!r}; only text is trained here")
        return "".join(_text(part, "text", may_be_empty=True) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"the content is of type {type(content).__name__}; make it text")
    return content


def _sharegpt_turn(value: Fields) -> Turn:
    _no_others(value, TURN_FIELDS["conversations"], "value")
    role = SHAREGPT_ROLES.get(str(value.get("from")))
    if role is None:
        raise BadRow(f"'from' is {value.get('from')!r}; make it one of {', '.join(SHAREGPT_ROLES)}")
    if role == "function_call":
        calls = _decoded(value.get("value"), "the function call is no JSON; give an object with name and arguments")
        listed = calls if isinstance(calls, list) else [calls]
        return Turn("assistant", "", tool_calls=tuple(map(_call, listed)), weight=_weight(value, "assistant"))
    return Turn(role, _text(value, "value"), weight=_weight(value, role))  # type: ignore[arg-type]


def _weight(value: Fields, role: str) -> float:
    """Returns what the labels of a turn weigh: 1, or what its field `weight` says, or 0 where `train` is false."""
    weight, train = value.get("weight"), value.get("train")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"the field 'train' is {train!r}; make it true or false")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf
    ):
        raise BadRow(f"the field 'weight' is {weight!r}; make it a number of at least 0")
    if role != "assistant":
        if train or weight:
            raise BadRow(f"only an assistant's turn is learned, and this one is the {role}'s; remove its weight")
        return 0.0
    if train is False and weight:
        raise BadRow(f"the field 'train' is false and the weight {weight}; keep one of them")
    return 0.0 if train is False else 1.0 if weight is None else float(weight)


def _call(value: Any) -> dict[str, Any]:
    """Reads a tool call, which may stand in a field `function`, with its arguments as an object or as JSON."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        call_id, value = value.get("id"), value["function"]
    else:
        call_id = value.get("id") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise BadRow("a tool call has no name; give an object with name and arguments")
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    said = f"the arguments of the tool call {value['name']} are no"
    arguments = _decoded(arguments, f"{said} JSON; make them an object")
    if not isinstance(arguments, dict):
        raise BadRow(f"{said} object; make them one")
    return {"name": value["name"], "arguments": arguments, "id": str(call_id or "")}


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Reads the functions that an assistant may call, in the form that chat templates take."""
    tools = []
    for value in _list(fields, "tools"):
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("a tool has no name; give an object with name, description and parameters")
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _conversation(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Returns the turns. Raises BadRow for an order that no server has, and where there is nothing to learn."""
    if not turns:
        raise BadRow("has no turns; give at least one question and its answer")
    known = {tool["function"]["name"] for tool in tools}
    calls = False  # whether the assistant's last turn has called a tool
    for place, turn in enumerate(turns, start=1):
        before = turns[place - 2].role if place > 1 else None
        if not turn.content.strip() and not turn.tool_calls:
            raise BadRow(f"turn {place} is empty; fill it or remove it")
        if turn.role == "system" and before is not None:
            raise BadRow(f"turn {place} is a system turn; only the first may be one")
        if turn.role == "user" and before == "user":
            raise BadRow(f"turns {place - 1} and {place} are both the user's; join them")
        if turn.role == "assistant" and before in (None, "system"):
            raise BadRow(f"turn {place} is the assistant's, but nobody has asked anything; begin with a user's turn")
        if turn.role == "assistant" and before == "assistant":
            raise BadRow(f"turns {place - 1} and {place} are both the assistant's; join them")
        if turn.role == "tool" and not calls:
            raise BadRow(f"turn {place} is a tool's, but no tool was called before it")
        if missing := [call["name"] for call in turn.tool_calls if call["name"] not in known]:
            raise BadRow(f"turn {place} calls {missing[0]!r}, which the field 'tools' does not have; add it there")
        calls = bool(turn.tool_calls) if turn.role == "assistant" else calls and turn.role == "tool"
    if turns[-1].role != "assistant":
        raise BadRow(f"the last turn is the {turns[-1].role}'s, and nothing is learned from it; end with an answer")
    if not any(turn.weight for turn in turns):
        raise BadRow("no turn of it is learned, because each has weight 0; remove the row")
    return tuple(turns)


# For each format: the fields that it needs, those that it may have, and what reads it.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[int, Fields], Row]]] = {
    "messages": (("messages",), ("tools",), _messages),
    "sharegpt": (("conversations",), ("system", "tools"), _sharegpt),
    "prompt and completion": (("prompt", "completion"), ("tools",), _prompt_completion),
    "text": (("text",), (), _plain_text),
    "alpaca": (("instruction", "output"), ("input", "system", "history"), _alpaca),
}
