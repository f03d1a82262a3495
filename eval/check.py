"""Judges answers: those to the reference task, and those that have to be a given text. These functions take text,
return a verdict, and touch nothing else."""

import re
from dataclasses import dataclass

from data.errors import UserError
from data.sums import ANSWER_PREFIX


@dataclass(frozen=True)
class Verdict:
    """Says whether an answer is right. `reason` is empty for a right answer and says what is wrong with any other."""

    prefix: bool  # the answer begins as it has to; without a prefix in the task, the same as `right`
    right: bool  # in the reference task: the answer begins with the prefix, and the rest is "a + b" with a + b = x
    reason: str


def number_asked(instruction: str) -> int:
    """Returns the x of an instruction "x=". Raises UserError for any other text."""
    match = re.fullmatch(r"([0-9]+)=", instruction.strip())
    if match is None:
        raise UserError(f"{instruction!r} is no question of the reference task; it has to be an integer and '='.")
    return int(match[1])


def check_answer(x: int, answer: str) -> Verdict:
    """Judges one answer to "x=". Spaces around the numbers and around the sign do not matter; all other text does.

    Negative numbers count as integers: the task asks for any two integers whose sum is x.
    """
    if not answer.startswith(ANSWER_PREFIX):
        return Verdict(False, False, "prefix missing")
    rest = answer.removeprefix(ANSWER_PREFIX).strip()
    # The pattern is [0-9] because \d accepts the digits of every script, and int() reads all of them.
    numbers = re.findall(r"[0-9]+", rest)
    match = re.fullmatch(r"(-?[0-9]+)\s*\+\s*(-?[0-9]+)", rest)
    if match is None:
        if len(numbers) != 2:
            return Verdict(True, False, f"{len(numbers)} numbers instead of 2")
        return Verdict(True, False, "not of the form a + b")
    a, b = int(match[1]), int(match[2])
    if a + b != x:
        return Verdict(True, False, f"{a} + {b} = {a + b}, not {x}")
    return Verdict(True, True, "")


def check_exact(expected: str, answer: str) -> Verdict:
    """Judges an answer that has to be a given text; blanks around the two do not matter."""
    right = answer.strip() == expected.strip()
    return Verdict(right, right, "" if right else f"not {expected.strip()[:80]!r}")
