"""What is learned is what the chat template writes: for every template that the package trl ships.

The judge is the tokenizer's own apply_chat_template, with tokens and not with texts.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from data.chat import encode_row
from data.errors import UserError
from data.rows import Row
from data.template import ChatTemplate
from loop.recipe import ROOT

TINY = ROOT / "data" / "tiny_base"
SPEC = find_spec("trl")
assert SPEC is not None
assert SPEC.origin is not None
# Those of trl's own, which mark what is learned for trl, are no templates of a model.
TEMPLATES = {
    path.stem: path
    for path in sorted((Path(SPEC.origin).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")
}
CONTROL = re.compile(r"<[|\uff5c/a-zA-Z\[][^<>\s'\"{}]*>")
THINKS = "its chat template has the model answer behind"
REFUSED = {
    # Their prompts begin a thought, and a conversation shows no answer with one.
    "deepseek_r1_distill": THINKS,
    "deepseekv3": THINKS,
}
NO_SYSTEM = {"gemma": "System role not supported"}  # a template that refuses a system turn itself
ENDED_BY_THE_NEXT_TURN = {"glm4moe"}


def tokenizer_of(name: str) -> Any:
    """tiny_base's tokenizer with this template, and with the control tokens that the template writes."""
    tokenizer, template = AutoTokenizer.from_pretrained(TINY), TEMPLATES[name].read_text(encoding="utf-8")
    found = sorted(set(CONTROL.findall(template)))
    tokenizer.add_tokens([AddedToken(token, special="|" in token, normalized=False) for token in found])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|eos|>"})
    tokenizer.chat_template = template
    return tokenizer


def own_ids(template: ChatTemplate, turns: list[dict[str, str]], prompt: bool) -> list[int]:
    """The tokens that apply_chat_template gives, asked in the way that `template` has found out."""
    messages: list[Any] = turns
    if template.as_parts:
        messages = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    found: Any = template.tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=True, **template.variables
    )
    ids: list[int] = found["input_ids"]
    return ids


def test_there_are_many() -> None:
    assert len(TEMPLATES) > 25


@pytest.mark.parametrize("system", ["", "One word."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_stands_where_a_server_asks_for_it(name: str, system: str) -> None:
    tokenizer = tokenizer_of(name)
    refused = REFUSED.get(name) or (NO_SYSTEM.get(name) if system else None)
    if refused:
        with pytest.raises(UserError, match=refused):
            ChatTemplate(tokenizer, system)
        return
    template = ChatTemplate(tokenizer, system)
    example = encode_row(Row(1, "What is 2 + 2?", "", "It is 4."), system, tokenizer)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "What is 2 + 2?"})
    assert example.prompt_ids == own_ids(template, turns, prompt=True)
    whole = own_ids(template, [*turns, {"role": "assistant", "content": "It is 4."}], prompt=False)
    ids = example.prompt_ids + example.label_ids
    if name in ENDED_BY_THE_NEXT_TURN:
        assert ids == [*whole, tokenizer.eos_token_id]
    else:
        assert ids == whole[: len(ids)]
        left = tokenizer.decode(whole[len(ids) :]).replace("<|eos|>", "").strip()
        assert left == "", "nothing that the model has to say is left out"
    assert example.label_ids[-1] == template.stop_token
    assert tokenizer.decode([template.stop_token]) in tokenizer.get_added_vocab(), "one control token"
    assert "It is 4." in tokenizer.decode(example.label_ids)


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
    example = encode_row(Row(1, "2+2?", "", "It is 4."), "", tokenizer)
    assert tokenizer.decode(example.label_ids) == labels


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_a_thought_is_one_token_and_not_seven(name: str) -> None:
    tokenizer = tokenizer_of(name)
    example = encode_row(Row(1, "2+2?", "", "<think>\nadd\n</think>\n\nIt is 4."), "", tokenizer)
    begins = [] if name == "qwen3_5_think" else ["<think>"]  # which its prompt has written already
    names = [tokenizer.decode([i]) for i in example.label_ids if i >= AutoTokenizer.from_pretrained(TINY).vocab_size]
    assert [token for token in names if "think" in token] == [*begins, "</think>"]
    assert tokenizer.decode(example.label_ids) == "".join(begins) + "\n" * len(begins) + (
        "add\n</think>\n\nIt is 4.<|im_end|>"
    )


def test_a_thought_that_the_template_would_drop_is_refused() -> None:
    tokenizer = tokenizer_of("nemotron_3_nano")
    with pytest.raises(UserError, match=THINKS):
        encode_row(Row(1, "2+2?", "", "<think>\nadd\n</think>\n\nIt is 4."), "", tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3"])
def test_a_row_forges_no_turn(name: str) -> None:
    """Control tokens in what a row says are the characters with which they are written."""
    tokenizer = tokenizer_of(name)
    plain = encode_row(Row(1, "a", "", "b"), "", tokenizer)
    control = {id for token, id in tokenizer.get_added_vocab().items()}
    text = "".join(ChatTemplate(tokenizer).control)
    example = encode_row(Row(1, f"a{text}", "", f"b{text}"), "", tokenizer)
    for ours, theirs in ((example.prompt_ids, plain.prompt_ids), (example.label_ids, plain.label_ids)):
        assert [i for i in ours if i in control] == [i for i in theirs if i in control]


def test_an_answer_that_the_template_changes_is_named() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    shouting = tokenizer.chat_template.replace("message['content']", "message['content'].replace('ten', 'TEN')")
    tokenizer.chat_template = shouting
    encode_row(Row(1, "a", "", "nine"), "", tokenizer)
    with pytest.raises(UserError, match="the chat template does not show 'it is ten'"):
        encode_row(Row(1, "a", "", "it is ten"), "", tokenizer)
