"""What is learned is what the chat template writes: for every template that the package trl ships.

The judge is the tokenizer's own apply_chat_template, with tokens and not with texts.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.chat import encode_row
from data.conversation import Row, question
from data.errors import UserError
from data.examples import Example
from data.template import ChatTemplate
from loop.recipe import ROOT
from tests.chat_templates import (
    ALL_REFUSED,
    ENDED_BY_THE_NEXT_TURN,
    KINDS,
    REASONS,
    REFUSED,
    TEMPLATES,
    TINY,
    examples_or_error,
    table,
    tokenizer_of,
)


def own_ids(template: ChatTemplate, row: Row, turns: int, prompt: bool, variables: Mapping[str, Any]) -> list[int]:
    """The tokens that apply_chat_template gives for the first `turns` turns, with the variables that a row needs."""
    messages: list[Any] = []
    for turn in row.turns[:turns]:
        content = [{"type": "text", "text": turn.content}] if template.as_parts else turn.content
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = [{"type": "function", "id": c["id"], "function": c} for c in turn.tool_calls]
        if turn.call_id:
            message |= {"tool_call_id": turn.call_id, "name": turn.name}
        messages.append(message)
    found: Any = template.tokenizer.apply_chat_template(
        messages,
        tools=[dict(tool) for tool in row.tools] or None,
        add_generation_prompt=prompt,
        return_dict=True,
        **variables,
    )
    ids: list[int] = found["input_ids"]
    return ids


def encoded(user: str, answer: str, tokenizer: Any, system: str = "") -> Example:
    """The one example of a single question and its answer."""
    (example,) = encode_row(question(1, user, answer), ChatTemplate(tokenizer, system))
    return example


def test_there_are_many() -> None:
    assert len(TEMPLATES) > 50


def thinking(name: str, kind: str) -> dict[str, bool]:
    """The variable under which this template asks for such an answer: it begins no thought that the answer lacks."""
    if name.startswith("nemotron_3") and kind != "thoughts":
        return {"enable_thinking": False}
    if name.startswith("qwen3_5_nothink") and kind == "thoughts":
        return {"enable_thinking": True}
    return {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_stands_where_a_server_asks_for_it(name: str, kind: str) -> None:
    """Each of the assistant's turns is learned once, behind the tokens that a server would send for it.

    The tokens up to its last label are those of the conversation that ends with this turn, and only the end of the text
    is left. A conversation that cannot be shown so is refused, with the reason of REFUSED.
    """
    row = KINDS[kind]
    found = examples_or_error(name, row)
    if reason := REFUSED.get((name, kind)):
        assert isinstance(found, UserError)
        with pytest.raises(UserError, match=f"(?s){REASONS[reason]}"):
            raise found
        return
    assert not isinstance(found, UserError), found
    template, variables = ChatTemplate(tokenizer_of(name)), thinking(name, kind)
    tokenizer = template.tokenizer
    learned = [(example, span) for example in found for span in example.spans]
    places = [place for place, turn in enumerate(row.turns) if turn.role == "assistant"]
    assert len(learned) == len(places)
    for place in places:
        server = own_ids(template, row, place, True, variables)
        whole = own_ids(template, row, place + 1, False, variables)
        ((example, span),) = [each for each in learned if each[1].start == len(server)]
        ids = example.ids[: span.end]
        assert ids[: span.start] == server
        if name in ENDED_BY_THE_NEXT_TURN:
            assert ids == [*whole, tokenizer.eos_token_id]
        else:
            assert ids == whole[: len(ids)]
            left = str(tokenizer.decode(whole[len(ids) :])).replace("<|eos|>", "").strip()
            assert left == "", "nothing that the model has to say is left out"
        text = tokenizer.decode(ids[span.start :])
        turn = row.turns[place]
        assert turn.content in text
        assert turn.reasoning in text
        assert all(call["name"] in text for call in turn.tool_calls)
        assert tokenizer.decode(ids[-1:]) in tokenizer.get_added_vocab(), "it ends with a control token"
    assert all(example.spans[-1].end == example.length for example in found), "nothing stands behind the last label"


def test_the_table_of_the_docs() -> None:
    assert table() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), "run python -m tests.chat_templates"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("qwen2_5", "It is 4.<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\nIt is 4.<|im_end|>"),
        ("qwen3_5_think", "\n</think>\n\nIt is 4.<|im_end|>"),
        ("gemma3", "It is 4.<end_of_turn>"),
        ("phi3", "It is 4.<|end|>"),
        ("gptoss", "<|channel|>final<|message|>It is 4.<|return|>"),
        ("cohere2", "It is 4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("glm4moe", "\n<think></think>\nIt is 4.<|eos|>"),
        ("llama3", "It is 4.<|eot_id|>"),
        ("nemotron_3_nano", "It is 4.<|im_end|>"),
        ("idefics3", " It is 4.<end_of_utterance>"),
    ],
)
def test_labels_by_hand(name: str, labels: str) -> None:
    tokenizer = tokenizer_of(name)
    example = encoded("2+2?", "It is 4.", tokenizer)
    assert tokenizer.decode(example.label_ids) == labels


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_a_thought_is_one_token_and_not_seven(name: str) -> None:
    tokenizer = tokenizer_of(name)
    example = encoded("2+2?", "<think>\nadd\n</think>\n\nIt is 4.", tokenizer)
    begins = [] if name == "qwen3_5_think" else ["<think>"]  # which its prompt has written already
    names = [tokenizer.decode([i]) for i in example.label_ids if i >= AutoTokenizer.from_pretrained(TINY).vocab_size]
    assert [token for token in names if "think" in token] == [*begins, "</think>"]
    assert tokenizer.decode(example.label_ids) == "".join(begins) + "\n" * len(begins) + (
        "add\n</think>\n\nIt is 4.<|im_end|>"
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - ALL_REFUSED))
def test_a_row_forges_no_turn(name: str) -> None:
    """Control tokens in what a row says are the characters with which they are written, under every template."""
    tokenizer = tokenizer_of(name)
    plain = encoded("a", "b", tokenizer)
    control = {id for token, id in tokenizer.get_added_vocab().items()}
    template = ChatTemplate(tokenizer)
    text = "".join(template.control)
    # Those of a tool call are refused in an answer, because they may be meant as such.
    said = "".join(token for token in template.control if token not in template.call_marks)
    example = encoded(f"a{text}", f"b{said}", tokenizer)
    for ours, theirs in ((example.prompt_ids, plain.prompt_ids), (example.label_ids, plain.label_ids)):
        assert [i for i in ours if i in control] == [i for i in theirs if i in control]


def test_an_answer_that_the_template_changes_is_named() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    shouting = tokenizer.chat_template.replace("message['content']", "message['content'].replace('ten', 'TEN')")
    tokenizer.chat_template = shouting
    encoded("a", "nine", tokenizer)
    with pytest.raises(UserError, match="the chat template does not show 'it is ten'"):
        encoded("a", "it is ten", tokenizer)
