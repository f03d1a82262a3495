"""Judges answers of the reference task. Verdict is what every judge returns (eval/judging/judges.py has the others)."""

import re
from dataclasses import dataclass

from data.errors import UserError
from data.sums import ANSWER_PREFIX


@dataclass(frozen=True)
class Verdict:
    """Says how good an answer is. `reason` is empty for a right answer and says what is wrong with any other."""

    score: float  # 0 for a wrong answer to 1 for a right one
    reason: str = ""
    prefix: bool | None = None  # in the reference task: whether the answer begins as it has to

    @property
    def right(self) -> bool:
        return self.score >= 1


def number_asked(instruction: str) -> int:
    """Returns the x of an instruction "x=". Raises UserError for any other text."""
    match = re.fullmatch(r"([0-9]+)=", instruction.strip())
    if match is None:
        raise UserError(f"{instruction!r} is no question of the reference task; it has to be an integer and '='")
    return int(match[1])


def check_answer(x: int, answer: str) -> Verdict:
    """Judges one answer to "x=", which is right if it begins with the prefix and the rest is "a + b" with a + b = x.

    Spaces around the numbers and around the sign do not matter; all other text does. Negative numbers count as
    integers: the task asks for any two integers whose sum is x.
    """
    if not answer.startswith(ANSWER_PREFIX):
        return Verdict(0, "prefix missing", False)
    rest = answer.removeprefix(ANSWER_PREFIX).strip()
    # The pattern is [0-9] because \d accepts the digits of every script, and int() reads all of them.
    numbers = re.findall(r"[0-9]+", rest)
    match = re.fullmatch(r"(-?[0-9]+)\s*\+\s*(-?[0-9]+)", rest)
    if match is None:
        if len(numbers) != 2:
            return Verdict(0, f"{len(numbers)} numbers instead of 2", True)
        return Verdict(0, "not of the form a + b", True)
    a, b = int(match[1]), int(match[2])
    if a + b != x:
        return Verdict(0, f"{a} + {b} = {a + b}, not {x}", True)
    return Verdict(1, "", True)
