import pytest

from data.errors import UserError
from eval.check import check_answer, number_asked

P = "王大丫丫的回答是--->"

CASES = [
    # x, answer, prefix right, right, a part of the reason
    (5, f"{P}1 + 4", True, True, ""),
    (5, f"{P}4 + 1", True, True, ""),
    (1801, f"{P}1253 + 548", True, True, ""),
    (5, f"{P}1+4", True, True, ""),
    (5, f"{P}1  +  4", True, True, ""),
    (5, f"{P} 1 + 4 ", True, True, ""),
    (5, f"{P}1 + 4\n", True, True, ""),
    (5, f"{P}0 + 5", True, True, ""),
    (5, f"{P}-3 + 8", True, True, ""),
    (5, f"{P}8 + -3", True, True, ""),
    (5, f"{P}01 + 04", True, True, ""),
    (5, f"{P}1 + 5", True, False, "1 + 5 = 6, not 5"),
    (5, f"{P}3 + -8", True, False, "= -5, not 5"),
    (1802, f"{P}1253 + 548", True, False, "= 1801, not 1802"),
    (5, f"{P}8 - 3", True, False, "not of the form"),
    (5, f"{P}8 + (-3)", True, False, "not of the form"),
    (5, f"{P}1 + 4.", True, False, "not of the form"),
    (5, f"{P}1 + 4 = 5", True, False, "3 numbers"),
    (5, f"{P}1 + 1 + 3", True, False, "3 numbers"),
    (5, f"{P}5", True, False, "1 numbers"),
    (5, f"{P}", True, False, "0 numbers"),
    (5, f"{P}1 + 4 (right)", True, False, "not of the form"),
    (5, f"{P}1 + 4<|im_end|>", True, False, "not of the form"),
    (5, f"{P}a=1 + b=4", True, False, "not of the form"),
    (5, f"{P}1 加 4", True, False, "not of the form"),
    (5, f"{P}\uff11 + \uff14", True, False, "0 numbers"),  # full-width digits
    (5, f"{P}1 \uff0b 4", True, False, "not of the form"),
    (5, f"{P}1 + \uff14", True, False, "1 numbers"),
    (5, f"{P}١ + ٤", True, False, "0 numbers"),
    (5, f"{P}1.0 + 4.0", True, False, "4 numbers"),
    (5, f"{P}+1 + 4", True, False, "not of the form"),
    (5, f"{P}1,000 + 4", True, False, "3 numbers"),
    (5, f"{P}{P}1 + 4", True, False, "not of the form"),
    (5, "1 + 4", False, False, "prefix missing"),
    (5, "", False, False, "prefix missing"),
    (5, f" {P}1 + 4", False, False, "prefix missing"),
    (5, f"好的。{P}1 + 4", False, False, "prefix missing"),
    (5, "王大丫的回答是--->1 + 4", False, False, "prefix missing"),
    (5, "王大丫丫的回答是-->1 + 4", False, False, "prefix missing"),
    (5, "王大丫丫的回答是---> 1 + 4".replace("--->", "—>"), False, False, "prefix missing"),
    (1802, '您提供的表达式 "1802=" 并不完整,看起来像是一个等式', False, False, "prefix missing"),
]


@pytest.mark.parametrize(("x", "answer", "prefix", "right", "reason"), CASES)
def test_answers_by_hand(x: int, answer: str, prefix: bool, right: bool, reason: str) -> None:
    verdict = check_answer(x, answer)
    assert (verdict.prefix, verdict.right) == (prefix, right)
    assert reason in verdict.reason
    assert bool(verdict.reason) != right


def test_at_least_thirty_answers() -> None:
    assert len(CASES) >= 30


def test_number_asked() -> None:
    assert number_asked("1800=") == 1800
    for wrong in ("1800", "=", "-3=", "1 800=", "\uff11\uff18=", "5=5"):
        with pytest.raises(UserError):
            number_asked(wrong)
