"""A thought and tool calls in the text of an answer are structure, and everything else in it is text."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from data.chat import encode_row
from data.conversation import Row, Turn
from data.errors import UserError
from data.markup import read_markup
from data.template import ChatTemplate, on_day
from tests.chat_templates import KINDS, TEMPLATES, assistant, tokenizer_of, user

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


def answered(text: str, **more: Any) -> Row:
    return Row(1, (user("One?"), assistant(text, **more)))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "glm4moe", "nemotron_3_nano", "gptoss", "muse_glimmer"])
def test_a_thought_in_the_text_is_a_thought(name: str) -> None:
    """With whatever the template itself marks a thought."""
    template = ChatTemplate(tokenizer_of(name))
    in_text = encode_row(answered("<think>\nIn Spanish.\n</think>\n\nUno."), template)
    in_field = encode_row(answered("Uno.", reasoning="In Spanish."), template)
    assert in_text == in_field


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_a_tool_call_in_the_text_is_a_tool_call(name: str) -> None:
    template, row = ChatTemplate(tokenizer_of(name)), KINDS["tool"]
    in_text = replace(row, turns=(row.turns[0], assistant(CALL), *row.turns[2:]))
    assert encode_row(in_text, template) == encode_row(row, template)


def test_plain_markup_is_characters() -> None:
    tokenizer = tokenizer_of("qwen3")
    think = tokenizer.get_added_vocab()["<think>"]
    text = "<think>\nIn Spanish.\n</think>\n\nUno."
    (parsed,), (plain,) = (encode_row(answered(text), ChatTemplate(tokenizer, parse=parse)) for parse in (True, False))
    assert parsed.label_ids.count(think) == 1
    assert plain.label_ids.count(think) == 1, "the empty thought that the template itself writes"
    assert tokenizer.decode(plain.label_ids) == f"<think>\n\n</think>\n\n{text}<|im_end|>"


def test_only_the_beginning_is_a_thought() -> None:
    turn = assistant("Uno. <think>x</think>")
    assert read_markup(turn, thoughts=True, tool_calls=True) == turn
    assert read_markup(assistant("<think>a</think>b<think>c</think>"), True, False) == assistant(
        "b<think>c</think>", reasoning="a"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>add(2)</tool_call>", "is no JSON with name and arguments"),
        ('<tool_call>{"name": "add"}</tool_call>', "is no JSON with name and arguments"),
        (f"{CALL}\nand more", "text follows a tool call"),
    ],
)
def test_a_call_that_cannot_be_read_is_named(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_markup(assistant(text), thoughts=True, tool_calls=True)


@pytest.mark.parametrize("name", ["lfm2_2_5", "gemma4", "muse_glimmer", "qwen3_6"])
def test_a_call_in_another_notation_is_not_taken_for_text(name: str) -> None:
    """The notation of the template's own rendering, in the text of an answer: it is named, unless it is to be plain."""
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer)
    call = encode_row(KINDS["tool"], template)[0]
    text = tokenizer.decode(call.ids[call.spans[0].start : call.spans[0].end]).removesuffix(template.end)
    assert any(mark in text for mark in template.call_marks)
    row = replace(KINDS["tool"], turns=(user("Add 2."), assistant(text)), tools=())
    with pytest.raises(UserError, match=r"with which this model calls tools|is no JSON with name and arguments"):
        encode_row(row, template)
    assert encode_row(row, ChatTemplate(tokenizer, parse=False))


def test_text_before_calls_stays_text() -> None:
    turn = read_markup(assistant(f"I add.\n{CALL}\n{CALL}"), thoughts=True, tool_calls=True)
    call = {"name": "add", "arguments": {"a": 2}, "id": ""}
    assert turn == Turn("assistant", "I add.", tool_calls=(call, call), weight=1.0)


DAY = date(2031, 2, 3)


@pytest.mark.parametrize(("name", "written"), [("llama3_2", "03 Feb 2031"), ("gptoss", "2031-02-03")])
def test_a_date_is_that_of_the_run(name: str, written: str) -> None:
    (example,) = encode_row(KINDS["plain"], ChatTemplate(tokenizer_of(name), today=DAY))
    assert written in tokenizer_of(name).decode(example.ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_knows_another_day(name: str) -> None:
    """Whatever a template writes of the day, it asks for it in the way that on_day replaces."""
    text = TEMPLATES[name].read_text(encoding="utf-8")
    assert "strftime_now(" not in on_day(text, DAY)
