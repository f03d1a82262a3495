"""The chat templates that the package trl ships, conversations of several kinds, and what becomes of each.

`python -m tests.chat_templates` writes the table of docs/data.md; tests/test_template.py compares it.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer

from benchmarks.docs_section import replace_section
from data.chat import encode_row
from data.conversation import Row, Turn
from data.errors import UserError
from data.examples import Example
from data.template import ChatTemplate
from eval.reporting.markdown import markdown_table
from loop.recipe import ROOT

TINY = ROOT / "data" / "tiny_base"
SPEC = find_spec("trl")
assert SPEC is not None
assert SPEC.origin is not None
# Those whose name ends in _training are trl's own variants of a model's template.
TEMPLATES = {path.stem: path for path in sorted((Path(SPEC.origin).parent / "chat_templates").glob("*.jinja"))}
CONTROL = re.compile(r"<[|\uff5c/a-zA-Z\[][^<>\s'\"{}]*>")

ADD = {
    "name": "add",
    "description": "Adds numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str, **more: Any) -> Turn:
    return Turn("assistant", text, weight=1.0, **more)


KINDS = {
    "plain": Row(1, (user("What is 2 + 2?"), assistant("It is 4."))),
    "system": Row(1, (Turn("system", "One word."), user("What is 2 + 2?"), assistant("It is 4."))),
    "three turns": Row(
        1, tuple(turn for q, a in (("1?", "Uno."), ("2?", "Dos."), ("3?", "Tres.")) for turn in (user(q), assistant(a)))
    ),
    "thoughts": Row(
        1,
        (
            *(user("One?"), assistant("Uno.", reasoning="In Spanish.")),
            *(user("Two?"), assistant("Dos.", reasoning="Once more.")),
        ),
    ),
    "tool": Row(
        1,
        (
            user("Add 2."),
            assistant("", tool_calls=({"name": "add", "arguments": {"a": 2}, "id": "callabcd1"},)),
            Turn("tool", "five", name="add", call_id="callabcd1"),
            assistant("It is 5."),
        ),
        tools=({"type": "function", "function": ADD},),
    ),
}

NOT_ASKED = "no server asks for this answer"
NO_SYSTEM = "no system turn"
NO_THOUGHT = "no place for a thought"
NO_TOOL = "no tool calls"
# What the message says for each reason to refuse a conversation.
REASONS = {
    NOT_ASKED: "has the model answer behind '.*<think>.*but writes the answer behind",
    NO_SYSTEM: "System role not supported",
    NO_THOUGHT: "the chat template does not show 'Once more.', but makes",
    NO_TOOL: "the chat template does not show (the assistant's )?'add'|roles must alternate|Only user and assistant",
}


def families(*names: str) -> set[str]:
    """The names, each with trl's variant of it."""
    return {each for name in names for each in (name, f"{name}_training")}


# Their prompts begin a thought, and a conversation shows no answer with one.
ALL_REFUSED = families("deepseek_r1_distill", "deepseekv3")
REFUSED = {
    **{(name, kind): NOT_ASKED for name in ALL_REFUSED for kind in KINDS},
    **{(name, "system"): NO_SYSTEM for name in families("gemma")},
    **{
        (name, "thoughts"): NO_THOUGHT
        for name in families(
            *("cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "llama3", "llava_next", "phi3"),
            *("phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_vl", "smolvlm"),
        )
        | {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "llama3_1", "llama3_2"}
        | {"qwen3_instruct_2507", "qwen3_instruct_2507_training"}
    },
    **{
        (name, "tool"): NO_TOOL
        for name in families(
            *("cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5"),
            *("qwen2_5_vl", "smolvlm"),
        )
    },
}
ENDED_BY_THE_NEXT_TURN = {"glm4moe"}


def tokenizer_of(name: str) -> Any:
    """tiny_base's tokenizer with this template, and with the control tokens that the template writes."""
    tokenizer, template = AutoTokenizer.from_pretrained(TINY), TEMPLATES[name].read_text(encoding="utf-8")
    found = sorted(set(CONTROL.findall(template)))
    tokenizer.add_tokens([AddedToken(token, special="|" in token, normalized=False) for token in found])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|eos|>"})
    tokenizer.chat_template = template
    return tokenizer


def examples_or_error(name: str, row: Row) -> list[Example] | UserError:
    """What the row becomes under the template."""
    try:
        return encode_row(row, ChatTemplate(tokenizer_of(name)))
    except UserError as error:
        return error


def table() -> str:
    """A line for each template, and a column for each kind of conversation."""
    lines = []
    for name in TEMPLATES:
        cells = []
        for row in KINDS.values():
            found = examples_or_error(name, row)
            if isinstance(found, UserError):
                (cell,) = {reason for reason, said in REASONS.items() if re.search(said, str(found), re.DOTALL)}
            else:
                cell = "1 text" if len(found) == 1 else f"{len(found)} texts"
            cells.append(cell)
        lines.append([f"`{name}`", *cells])
    return markdown_table(["template", *KINDS], lines)


TITLE = "What becomes of a conversation under each chat template"
SAID = """*1 text*: the model reads the conversation once and learns each of the assistant's turns in it. *3 texts*: the
template writes an earlier turn otherwise once later ones are there, as most do with thoughts, so the row becomes three
examples; each answer then stands behind the very tokens that a server sends for it. The other cells say why such a row
is refused. This table is written by `python -m tests.chat_templates` from the templates that the package trl ships."""

if __name__ == "__main__":
    replace_section(TITLE, f"{SAID}\n\n{table()}", "data.md")
