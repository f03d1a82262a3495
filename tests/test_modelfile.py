"""Ollama's template writes what the chat template writes.

Go is not at hand in a test, so the few constructs of Go's text/template that the Modelfile uses are translated to Jinja
and rendered there.
"""

import json
import re
from typing import Any

import jinja2
import pytest

from data.conversation import question
from data.template import ChatTemplate
from loop.exporting.modelfile import find_between, go_template, modelfile
from tests.chat_templates import tokenizer_of

NAMES = ("gemma", "gemma3", "gptoss", "lfm2", "llama3", "llama3_1", "phi3", "qwen2_5", "qwen3")
TALKS = {
    "one turn": [("user", "What is 2 + 2?")],
    "a system turn": [("system", 'Say "one" word.'), ("user", "What is 2 + 2?")],
    "three turns": [("user", "1?"), ("assistant", "Uno."), ("user", "2?"), ("assistant", "Dos."), ("user", "3\n?")],
}


def render(go: str, talk: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the template, given the messages of a talk."""
    words = {
        r"\$before := (\".*?\")": r"{% set ns = namespace(before=\1) %}",
        r"range .Messages": "{% for m in messages %}",
        r"if and \(eq \$before (\".*?\")\) \(eq .Role (\".*?\")\)": r"{% if ns.before == \1 and m.role == \2 %}",
        r"if eq \$before (\".*?\")": r"{% if ns.before == \1 %}",
        r".Content": "{{ m.content }}",
        r"\$before = .Role": "{% set ns.before = m.role %}",
    }
    opened: list[str] = []
    parts = []
    go = re.sub(r"\s*\{\{- ", "{{ ", re.sub(r" -\}\}\s*", " }}", go))  # the dashes trim the white space beside them
    for text, action in re.findall(r"(.*?)(?:\{\{ ((?:\"(?:\\.|[^\"\\])*\"|[^\"])*?) \}\}|\Z)", go, re.DOTALL):
        parts.append(text)
        if action.startswith('"'):
            parts.append("{{ " + json.dumps(json.loads(action), ensure_ascii=True) + " }}")
        elif action == "end":
            parts.append({"range": "{% endfor %}", "if": "{% endif %}"}[opened.pop()])
        elif action:
            (found,) = [re.sub(go, jinja, action) for go, jinja in words.items() if re.fullmatch(go, action)]
            parts.append(found)
            opened += [word for word in ("range", "if") if action.startswith(word + " ")]
    template = jinja2.Environment(keep_trailing_newline=True).from_string("".join(parts))
    return template.render(messages=[{"role": role, "content": text} for role, text in talk])


def expected(template: ChatTemplate, talk: list[tuple[str, str]]) -> str:
    """What the chat template writes of a talk that the model has to answer."""
    messages: Any = [
        {"role": role, "content": [{"type": "text", "text": text}] if template.as_parts else text}
        for role, text in talk
    ]
    return str(
        template.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=template.text, **template.variables
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_writes_what_the_chat_template_writes(name: str) -> None:
    template = ChatTemplate(tokenizer_of(name))
    between = find_between(template)
    assert between is not None
    for kind, talk in TALKS.items():
        if name == "gemma" and kind == "a system turn":  # its template refuses one
            continue
        assert render(go_template(between), talk) == expected(template, talk)


def test_a_template_that_counts_turns_is_told() -> None:
    """It writes the number of each turn, which depends on more than the turn before."""
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
    )
    text, problem = modelfile(ChatTemplate(tokenizer), [0])
    assert problem is not None
    assert "TEMPLATE " not in text.replace("# no TEMPLATE", "")
    assert "FROM .\n# no TEMPLATE: this chat template cannot be written" in text


def test_what_the_tokenizer_writes_by_itself_is_left_out() -> None:
    """Ollama's tokenizer begins with <s> as this one does, so a template with <s> would write it twice."""
    tokenizer = tokenizer_of("llama3")
    template = ChatTemplate(tokenizer)
    between = find_between(template)
    assert between is not None
    assert between["start", "user"].startswith("<s>")
    template.begin = [tokenizer.convert_tokens_to_ids("<s>")]
    without = find_between(template)
    assert without is not None
    assert between["start", "user"] == "<s>" + without["start", "user"]


def test_system_turn_and_stops() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    template = ChatTemplate(tokenizer, system_prompt='Be "brief".\nAlways.')
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text, problem = modelfile(template, [stop])
    assert problem is None
    assert 'SYSTEM """Be "brief".\nAlways."""\nPARAMETER stop "<|im_end|>"\n' in text
    assert template.prompt(question(1, "a", "b")).count("Always.") == 1
