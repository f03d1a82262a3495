"""The judges: each says of an answer to a row whether it is right. `build_judge` makes one from its name.

A judge is a function from a row and an answer, without its thought, to a Verdict. It raises NotJudgeable for a row that
it cannot judge any answer to.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from data.conversation import Row
from data.errors import UserError
from eval.check import Verdict, check_answer, number_asked
from eval.judging.own import NotJudgeable, own_judge
from eval.judging.parts import choice_of, json_of, keys_of, last_number, missing_calls, same_json

SHOWN = 80  # characters of a text that a reason shows

Judging = Callable[[Row, str], Verdict]


@dataclass(frozen=True)
class Judge:
    """Holds a judge and the name with which the user asked for it."""

    name: str
    judge: Judging

    def __call__(self, row: Row, answer: str) -> Verdict:
        return self.judge(row, spoken(answer))


def spoken(answer: str) -> str:
    """Returns the answer without the thought in front of it."""
    return answer.rpartition("</think>")[2].lstrip() if "</think>" in answer else answer


def _if(right: bool, reason: str) -> Verdict:
    return Verdict(1) if right else Verdict(0, reason)


def _short(text: str) -> str:
    return repr(text.strip()[:SHOWN])


def sums(row: Row, answer: str) -> Verdict:
    try:
        x = number_asked(row.question)
    except UserError as error:
        raise NotJudgeable(str(error)) from None
    return check_answer(x, answer)


def exact(row: Row, answer: str) -> Verdict:
    return _if(answer.strip() == row.answer.strip(), f"not {_short(row.answer)}")


def contains(row: Row, answer: str) -> Verdict:
    wanted, there = (" ".join(text.casefold().split()) for text in (row.answer, answer))
    return _if(wanted in there, f"without {_short(row.answer)}")


def number(row: Row, answer: str) -> Verdict:
    wanted, found = last_number(row.answer), last_number(answer)
    if wanted is None:
        raise NotJudgeable("its own answer has no number")
    return _if(found == wanted, "no number" if found is None else f"{found}, not {wanted}")


def choice(row: Row, answer: str) -> Verdict:
    wanted, found = choice_of(row.answer), choice_of(answer)
    if wanted is None:
        raise NotJudgeable("its own answer names no option, as B or (B) does")
    return _if(found == wanted, f"{found}, not {wanted}" if found else "no single option")


def _json(argument: str) -> Judging:
    if argument not in ("", "parses", "keys"):
        raise UserError(f"--judge json:{argument}: there is json, json:keys and json:parses.")

    def judge(row: Row, answer: str) -> Verdict:
        try:
            wanted = None if argument == "parses" else json_of(row.answer)
        except ValueError:
            raise NotJudgeable("its own answer is no JSON; json:parses asks for any JSON") from None
        try:
            found = json_of(answer)
        except ValueError as error:
            return Verdict(0, f"no JSON: {error}")
        if argument == "parses":
            return Verdict(1)
        if argument == "keys":
            missing = sorted(keys_of(wanted) - keys_of(found))
            return _if(not missing, f"without the key {', '.join(missing)}")
        return _if(same_json(found, wanted), f"not {_short(json.dumps(wanted, ensure_ascii=False))}")

    return judge


def _regex(argument: str) -> Judging:
    def judge(row: Row, answer: str) -> Verdict:
        pattern = argument or row.answer.strip()
        try:
            return _if(re.search(pattern, answer) is not None, f"does not match {_short(pattern)}")
        except re.error as error:
            raise NotJudgeable(f"its own answer is no regular expression: {error}") from None

    try:
        re.compile(argument)
    except re.error as error:
        raise UserError(f"--judge regex:{argument}: is no regular expression: {error}.") from None
    return judge


def tool_call(row: Row, answer: str) -> Verdict:
    if row.plain is not None:
        raise NotJudgeable("it is a plain text, which calls no tool")
    reason = missing_calls(row.turns[-1].tool_calls, answer)
    return _if(not reason, reason)


def _without_argument(judge: Judging) -> Callable[[str], Judging]:
    def make(argument: str) -> Judging:
        if argument:
            raise UserError(f"--judge {judge.__name__}: takes nothing behind a colon, and got {argument!r}.")
        return judge

    return make


JUDGES: dict[str, Callable[[str], Judging]] = {
    **{judge.__name__: _without_argument(judge) for judge in (sums, exact, contains, number, choice, tool_call)},
    "json": _json,
    "regex": _regex,
}


def build_judge(asked: str) -> Judge:
    """Makes the judge `NAME`, `NAME:ARGUMENT`, or `FILE.py:FUNCTION`. Raises UserError where there is none such."""
    name, _, argument = asked.partition(":")
    if name in JUDGES:
        return Judge(asked, JUDGES[name](argument))
    file, _, function = asked.rpartition(":")
    if file.endswith(".py"):
        return Judge(asked, own_judge(file, function))
    raise UserError(
        f"--judge {asked}: there is no such judge. There are {', '.join(JUDGES)}, and FILE.py:FUNCTION for your own."
    )
