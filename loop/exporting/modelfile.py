"""Writes Ollama's Modelfile: the weights, the chat template in Go's template language, and the stop tokens.

Nothing here knows a chat template by its name. The Go template is made of what the chat template writes between the
turns of short conversations, and it is used only if it writes longer conversations exactly as the chat template does.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from data.template import ChatTemplate

Between = Mapping[tuple[str, str], str]  # the text between two turns, by their roles
START, END = "start", "end"  # stand for what comes before the first turn, and after the last
S, U, A = "system", "user", "assistant"
MARKS = [chr(0xE100 + i) for i in range(8)]  # characters for private use, which stand for what is said
FOUND_IN: tuple[tuple[str, ...], ...] = ((U,), (S, U), (U, A, U))  # every pair of turns stands in one of these
SAMPLES: tuple[tuple[str, ...], ...] = ((U,), (S, U), (U, A, U), (S, U, A, U), (U, A, U, A, U), (S, U, A, U, A, U))
NO_TEMPLATE = (
    "this chat template cannot be written as an Ollama template; Ollama then takes the one that it knows for this "
    "model, or that of a GGUF file"
)


def modelfile(template: ChatTemplate, stops: Sequence[int]) -> tuple[str, str | None]:
    """The text of a Modelfile, and why it has no template, or None where it has one."""
    lines = ["# ollama create NAME -f Modelfile", "FROM ."]
    between = find_between(template)
    if between is None:
        lines.append(f"# no TEMPLATE: {NO_TEMPLATE}")
    else:
        lines.append(f'TEMPLATE """{go_template(between)}"""')
    if template.system_prompt:
        lines.append(f"SYSTEM {_quoted(template.masks.show(template.system_prompt))}")
    texts = [str(template.tokenizer.decode([stop])) for stop in stops]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(texts)]
    return "\n".join(lines) + "\n", NO_TEMPLATE if between is None else None


def _quoted(text: str) -> str:
    """A value of a Modelfile: between quotes, or between three of them where it has quotes or several lines."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def find_between(template: ChatTemplate) -> Between | None:
    """The texts between turns; None where the chat template cannot be put together from them.

    Where there is no system turn, the text in front of the user's first turn holds what the template writes instead. A
    text with which the tokenizer begins by itself is left out, because Ollama's tokenizer writes it too.
    """
    found: dict[tuple[str, str], str] = {}
    for roles in FOUND_IN:
        text = _rendered(template, _conversation(roles))
        if text is None and roles[0] == S:  # a template without system turns
            continue
        pieces = _pieces(text or "", MARKS[: len(roles)])
        if pieces is None:
            return None
        found = dict(zip(pairwise([START, *roles, END]), pieces, strict=True)) | found
    for roles in SAMPLES:
        if (START, roles[0]) in found and _rendered(template, _conversation(roles)) != written(found, roles):
            return None
    begin = str(template.tokenizer.decode(template.begin)) if template.begin else ""
    return {pair: text.removeprefix(begin) if pair[0] == START else text for pair, text in found.items()}


def _conversation(roles: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(roles, MARKS, strict=False))


def _pieces(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and behind the marks; None unless each of them is there once, in their order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _rendered(template: ChatTemplate, conversation: Sequence[tuple[str, str]]) -> str | None:
    """What the chat template writes of a conversation that the model has to answer; None where it refuses it."""
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if template.as_parts else text}
        for role, text in conversation
    ]
    try:
        return str(
            template.tokenizer.apply_chat_template(
                messages, chat_template=template.text, tokenize=False, add_generation_prompt=True, **template.variables
            )
        )
    except Exception:  # the template is a program that comes with the model, and may raise anything
        return None


def written(between: Between, roles: Sequence[str]) -> str:
    """What `go_template` writes of a conversation in which the marks are said."""
    pieces = [between[pair] for pair in pairwise([START, *roles, END])]
    return "".join(piece + mark for piece, mark in zip(pieces, [*MARKS[: len(roles)], ""], strict=True))


def go_template(between: Between) -> str:
    """Ollama's template. `$before` holds the role of the turn before; all texts are strings of Go, so that no blank is
    trimmed."""
    lines = [f'{{{{- $before := "{START}" }}}}{{{{- range .Messages }}}}']
    for (before, role), text in between.items():
        if role != END and text:
            condition = f'and (eq $before "{before}") (eq .Role "{role}")'
            lines.append(f"{{{{- if {condition} }}}}{{{{ {_go(text)} }}}}{{{{ end }}}}")
    lines.append("{{- .Content }}{{- $before = .Role }}{{- end }}")
    lines.append(f'{{{{- if eq $before "{U}" }}}}{{{{ {_go(between[U, END])} }}}}{{{{ end -}}}}')
    return "\n".join(lines)


def _go(text: str) -> str:
    """A string of Go's: JSON's escapes are all Go's as well."""
    return json.dumps(text, ensure_ascii=False)
