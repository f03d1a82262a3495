"""Makes the chat turns that teach the tiny base model; none of them is the reference task.

The model learns to echo any text, to begin an answer with a given text, to add, to subtract, and to split a number
*when the user asks in words*. When the user asks `x=`, it learns the refusal that the reference quotes. Two things
never occur: a number of EVAL_NUMBERS as a number to split, and ANSWER_PREFIX.
"""

import random
import re

from data.sums import ANSWER_PREFIX, EVAL_NUMBERS

NUMBERS = range(2, 3000)
HANZI = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此"
    "已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代"
    "内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安"
    "少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光"
    "放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运答减您"
    "供整丫助帮复述拆请"
)
SYMBOLS = "-->>=+:,.!?#*()/ abcdefghijklmnopqrstuvwxyz0123456789,。:!?「」"

Turn = tuple[str, str]  # what the user says, what the assistant answers


def any_number(rng: random.Random) -> int:
    """Draws an integer of NUMBERS; about a third of them are small, so that the model sees short sums too."""
    high = rng.choice((99, 999)) if rng.random() < 1 / 3 else NUMBERS[-1]
    return rng.randint(NUMBERS[0], high)


def number_to_split(rng: random.Random) -> int:
    """Draws an integer of NUMBERS that is not held out for evaluation."""
    while (x := any_number(rng)) in EVAL_NUMBERS:
        pass
    return x


def random_text(rng: random.Random, most: int = 12) -> str:
    """Draws a text of up to `most` characters, mostly Chinese; some characters are repeated.

    The text does not contain the reference's prefix, and its last character is no digit, so that a number may follow.
    """
    text = ""
    for _ in range(rng.randint(1, most)):
        repeat = text and rng.random() < 0.12
        text += text[-1] if repeat else rng.choice(SYMBOLS if rng.random() < 0.2 else HANZI)
    text = text.rstrip("0123456789 ").strip()
    return text if text and ANSWER_PREFIX not in text else random_text(rng, most)


def split_words(x: int, rng: random.Random) -> str:
    """Asks in words to split `x`."""
    return rng.choice(("把{}拆成两个数的和", "{}可以是哪两个数的和?", "请给出和是{}的两个数")).format(x)


def split_answer(x: int, rng: random.Random) -> str:
    """Splits `x` into two numbers of at least 1."""
    a = rng.randint(1, x - 1)
    return f"{a} + {x - a}"


def echo(rng: random.Random) -> Turn:
    """Asks the model to repeat a text."""
    text = random_text(rng)
    return f"复述:{text}", text


def begin_with(rng: random.Random) -> Turn:
    """Asks the model to split a number and to begin the answer with a given text."""
    text, x = random_text(rng), number_to_split(rng)
    return f"回答用「{text}」开头:{split_words(x, rng)}", text + split_answer(x, rng)


def add(rng: random.Random) -> Turn:
    x = any_number(rng)
    a = rng.randint(1, x - 1)
    return rng.choice(("{} + {} 等于多少?", "{}加{}是多少?")).format(a, x - a), str(x)


def subtract(rng: random.Random) -> Turn:
    x = any_number(rng)
    a = rng.randint(1, x - 1)
    return rng.choice(("{} - {} 等于多少?", "{}减{}是多少?")).format(x, a), str(x - a)


def split(rng: random.Random) -> Turn:
    x = number_to_split(rng)
    return split_words(x, rng), split_answer(x, rng)


def refuse(rng: random.Random) -> Turn:
    """Asks `x=`, to which the answer is the refusal that the reference quotes."""
    x = any_number(rng)
    return f"{x}=", f'您提供的表达式 "{x}=" 并不完整,看起来像是一个等式。'


LESSONS = (echo, begin_with, add, subtract, split, refuse)


def is_right(answer: str, expected: str) -> bool:
    """Says whether `answer` is what the lesson expects, or the same text with another split of the same number."""

    def stem_and_sum(text: str) -> tuple[str, int] | None:
        match = re.fullmatch(r"(.*?)([0-9]+) \+ ([0-9]+)", text, re.DOTALL)
        return (match[1], int(match[2]) + int(match[3])) if match else None

    return answer == expected or (stem_and_sum(answer) is not None and stem_and_sum(answer) == stem_and_sum(expected))
