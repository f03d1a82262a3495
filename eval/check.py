"""Is an answer of the reference task right? Pure functions: text in, verdict out."""

import re
from dataclasses import dataclass

from data.errors import UserError
from data.sums import ANSWER_PREFIX


@dataclass(frozen=True)
class Verdict:
    """`reason` is empty for a right answer, else it says what is wrong."""

    prefix: bool  # the answer begins with the prefix
    right: bool  # and the rest is "a + b" with a + b = x
    reason: str


def number_asked(instruction: str) -> int:
    """The x of an instruction "x="; UserError for any other text."""
    match = re.fullmatch(r"([0-9]+)=", instruction.strip())
    if match is None:
        raise UserError(f"{instruction!r} is no question of the reference task; it has to be an integer and '='.")
    return int(match[1])


def check_answer(x: int, answer: str) -> Verdict:
    """Judges one answer to "x=". Spaces around the numbers and the sign do not matter; anything else does.

    Negative numbers are integers too: the task only asks for any two that sum to x.
    """
    if not answer.startswith(ANSWER_PREFIX):
        return Verdict(False, False, "prefix missing")
    rest = answer.removeprefix(ANSWER_PREFIX).strip()
    # [0-9], because \d takes digits of every script and int() reads them all.
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
