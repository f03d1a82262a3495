"""Each format of a row becomes the conversation that it describes, and whatever is wrong with it is named."""

from typing import Any

import pytest

from data.conversation import Row, Turn, question
from data.formats import FORMATS, BadRow, read_row

ADD = {"name": "add", "parameters": {"type": "object"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = ({"type": "function", "function": ADD},)
MADE = {"name": "add", "arguments": {"a": 2}, "id": "c1"}


def user(text: str) -> Turn:
    return Turn("user", text)


def answer(text: str, weight: float = 1.0, **more: Any) -> Turn:
    return Turn("assistant", text, weight=weight, **more)


def ask(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}
FORMS: list[tuple[str, dict[str, Any], Row]] = [
    ("alpaca", {"instruction": "i", "output": "o"}, Row(7, (user("i"), answer("o")))),
    (
        "alpaca",
        {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q", "r"]]},
        Row(7, (Turn("system", "s"), user("q"), answer("r"), user("i\nn"), answer("o"))),
    ),
    ("messages", ask(U, A), Row(7, (user("u"), answer("a")))),
    (
        "messages",
        ask({"role": "developer", "content": "s"}, U, A | {"weight": 0}, U, A | {"weight": 0.5}),
        Row(7, (Turn("system", "s"), user("u"), answer("a", 0.0), user("u"), answer("a", 0.5))),
    ),
    (
        "messages",
        ask(U, A | {"train": False}, U, A | {"reasoning_content": "r"}),
        Row(7, (user("u"), answer("a", 0.0), user("u"), answer("a", reasoning="r"))),
    ),
    (
        "messages",
        ask({"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]}, A),
        Row(7, (user("uv"), answer("a"))),
    ),
    (
        "messages",
        ask(
            *(U, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
            *({"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}, A),
            tools=[ADD],
        ),
        Row(
            7,
            (user("u"), answer("", tool_calls=(MADE,)), Turn("tool", "4", name="add", call_id="c1"), answer("a")),
            TOOLS,
        ),
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "a"},
            ],
        },
        Row(
            7,
            (
                *(Turn("system", "s"), user("u"), answer("", tool_calls=(MADE | {"id": ""},))),
                *(Turn("tool", "4"), answer("a")),
            ),
            TOOLS,
        ),
    ),
    ("prompt and completion", {"prompt": "p", "completion": " c"}, Row(7, plain=("p", " c"))),
    (
        "prompt and completion",
        {"prompt": [U, A, U], "completion": [A]},
        Row(7, (user("u"), answer("a", 0.0), user("u"), answer("a"))),
    ),
    ("text", {"text": "once upon"}, Row(7, plain=("", "once upon"))),
]


@pytest.mark.parametrize(("name", "value", "row"), FORMS)
def test_a_row_is_the_conversation_that_it_describes(name: str, value: dict[str, Any], row: Row) -> None:
    assert read_row(7, value) == (name, row)


def test_every_format_is_tried() -> None:
    assert {name for name, _, _ in FORMS} == set(FORMATS)


def test_columns_get_other_names_or_are_left_out() -> None:
    columns = {"q": "instruction", "a": "output", "id": "ignore"}
    assert read_row(1, {"q": "x", "a": "y", "id": 5}, columns) == ("alpaca", question(1, "x", "y"))
    with pytest.raises(BadRow, match="two columns the name 'output'"):
        read_row(1, {"q": "x", "a": "y", "output": "z"}, columns)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"instruction": "i", "output": "o", "source": "web"}, "nothing reads 'source'; remove it"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "'history' needs pairs"),
        ({"instruction": "i", "output": "o", "history": "q"}, "'history' is a text that is no JSON"),
        ({"instruction": "i", "output": "o", "text": "t"}, "two formats, text and alpaca; leave one out"),
        ({"prompt": "p"}, "the field 'completion' is missing"),
        ({"prompt": "p", "completion": [A]}, "the field 'prompt' is a text that is no JSON"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "the field 'completion' is missing"),
        ({"text": 5}, "'text' is of type int"),
        ({"text": " "}, "'text' is empty"),
        ({"messages": {}}, "'messages' is of type dict; make it a list"),
        ({"messages": []}, "has no turns"),
        (ask("u", A), "turn 1 of 'messages': is of type str"),
        (ask({"role": "human", "content": "u"}, A), "turn 1 of 'messages': the role is 'human'"),
        (ask({"role": "user", "content": 5}, A), "turn 1 of 'messages': the content is of type int"),
        (ask({"role": "user", "content": [{"type": "image"}]}, A), "a part of the type 'image'; only text"),
        (ask(U | {"audio": "x"}, A), "turn 1 of 'messages': nothing reads 'audio'"),
        (ask({"role": "user", "content": " "}, A), "turn 1 is empty"),
        (ask(U, {"role": "assistant", "content": ""}), "turn 2 is empty"),
        (ask(U, U, A), "turns 1 and 2 are both the user's"),
        (ask(U, A, A), "turns 2 and 3 are both the assistant's"),
        (ask(A, U, A), "turn 1 is the assistant's, but nobody has asked"),
        (ask(U, A, {"role": "system", "content": "s"}, U, A), "turn 3 is a system turn"),
        (ask(U, A, U), "the last turn is the user's"),
        (ask(U, A, {"role": "tool", "content": "4"}, A), "turn 3 is a tool's, but no tool was called"),
        (ask(U, A | {"tool_calls": [CALL]}, {"role": "tool", "content": "4"}, A), "turn 2 calls 'add', which"),
        (ask(U, A | {"tool_calls": [{"function": {}}]}), "a tool call has no name"),
        (ask(U, A | {"tool_calls": [{"name": "f", "arguments": "{"}]}), "arguments of the tool call f are no JSON"),
        (ask(U, A | {"tool_calls": [{"name": "f", "arguments": "[]"}]}), "arguments of the tool call f are no object"),
        (ask(U, A, tools=[{"type": "function"}]), "a tool has no name"),
        (ask(U | {"reasoning_content": "r"}, A), "only an assistant thinks"),
        (ask(U, A | {"reasoning": "r", "thinking": "t"}), "two fields with a thought"),
        (ask(U, A | {"weight": -1}), "'weight' is -1"),
        (ask(U, A | {"weight": True}), "'weight' is True"),
        (ask(U, A | {"train": "no"}), "'train' is 'no'"),
        (ask(U | {"weight": 1}, A), "only an assistant's turn is learned"),
        (ask(U, A | {"weight": 0}), "no turn of it is learned"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "'from' is 'bot'; make it one of human"),
        ({"conversations": [{"from": "human", "value": 5}]}, "'value' is of type int"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "the function call is no JSON"),
        ({"conversations": [{"from": "system", "value": "s"}], "system": "t"}, "a system turn and the field 'system'"),
        (ask(U, {"role": "assistant", "content": "\ud800"}), "'messages' has half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_named(value: Any, said: str) -> None:
    with pytest.raises(BadRow) as error:
        read_row(1, value)
    assert said in str(error.value)
