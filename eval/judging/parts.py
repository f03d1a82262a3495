"""Finds in an answer what a judge compares: a number, an option, a JSON value, calls of tools."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

# A minus belongs to a number unless a word or a number stands right before it, as in 10-5.
NUMBER = re.compile(
    r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])(?:[eE][-+]?[0-9]+\b)?"
)
SAID = re.compile(
    r"(?i:answer|choice|option|答案|选项|选择|选)\W{0,4}(?i:is|是|为)?[\W_]*([A-Z])(?![A-Za-z])(?! [a-z])"
)
FIRST = re.compile(r"[\W_]*([A-Z])(?:\s*[^\w\s'’]|\s*\n|\s*$)")
ALONE = re.compile(r"(?<![A-Za-z'’])([A-HJ-Z])(?![A-Za-z'’])(?! (?!(?:or|and|is)\b)[a-z])")  # I is a word, and so is A
FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
NEAR = 100  # characters in front of a call's arguments among which its name stands


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text, without the commas between thousands; None where there is none."""
    found = [match[0] for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-"))]
    return Decimal(found[-1].replace(",", "")) if found else None


def choice_of(text: str) -> str | None:
    """Returns the letter A to Z of the option that a text names, or None where it names none or several.

    It is the letter behind "answer", "option" or the like, else that at the beginning, else the only one that stands
    alone. The letter of a word ("A cat") is none.
    """
    if said := SAID.findall(text):
        return str(said[-1])
    if first := FIRST.match(text):
        return first[1]
    alone = set(ALONE.findall(text))
    return alone.pop() if len(alone) == 1 else None


def json_of(text: str) -> Any:
    """Returns the JSON value that a text is; a Markdown code fence around it is left out. Raises ValueError."""
    fenced = FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: the order of keys does not matter, 1 is 1.0, and true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def keys_of(value: Any, path: str = "") -> set[str]:
    """Returns the keys of an object and of all objects in it, as paths: {"a": {"b": 1}} has a and a.b."""
    if not isinstance(value, dict):
        return set()
    return {key for name, inner in value.items() for key in ({f"{path}{name}"} | keys_of(inner, f"{path}{name}."))}


def missing_calls(wanted: Sequence[Mapping[str, Any]], answer: str) -> str:
    """Says how the calls in an answer differ from those that are `wanted`, in any order; empty where they do not.

    A call is JSON with a name and arguments, or its arguments as JSON behind its name, as chat templates write it. The
    ids of calls do not count.
    """
    found = list(_calls(answer))
    for call in wanted:
        same = [each for each in found if _is_call(each, call)]
        if not same:
            shown = json.dumps(call["arguments"], ensure_ascii=False)
            return f"without the call {call['name']}({shown[:80]})" + ("" if found else ": no call in JSON")
        found.remove(same[0])
    return f"{len(found)} calls too many" if found else ""


def _is_call(found: tuple[str, str, Any], call: Mapping[str, Any]) -> bool:
    name, before, arguments = found
    named = name == call["name"] if name else re.search(rf"(?<!\w){re.escape(call['name'])}(?!\w)", before)
    return bool(named) and same_json(arguments, call["arguments"])


def _calls(answer: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the name, the text before it, and the arguments of each call; the name is empty where JSON has none."""
    decoder, at = json.JSONDecoder(), 0
    while found := re.compile(r"[{\[]").search(answer, at):
        try:
            value, end = decoder.raw_decode(answer, found.start())
        except (ValueError, RecursionError):
            if re.match(r'\{\s*"', answer[found.start() :]):  # an object that does not end: nothing in it is a call
                return
            at = found.end()
            continue
        before = answer[max(at, found.start() - NEAR) : found.start()]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from _call(each, before)
        at = end


def _call(value: dict[str, Any], before: str) -> Iterator[tuple[str, str, Any]]:
    value = value["function"] if isinstance(value.get("function"), dict) else value
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(value.get("name"), str) and arguments is not None:
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return
        yield value["name"], before, arguments
    else:
        yield "", before, value
