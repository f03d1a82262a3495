"""Each judge against answers that a person has judged, and a judge of the user's own with its mistakes."""

from pathlib import Path
from typing import Any

import pytest

from data.conversation import Row, Turn, question
from data.errors import UserError
from eval.judging.judges import JUDGES, build_judge
from eval.judging.own import NotJudgeable

# judge: (the row's own answer, an answer, whether it is right)
BY_HAND: dict[str, list[tuple[str, str, bool]]] = {
    "exact": [
        ("a b", "a b", True),
        ("a b", " a b\n", True),
        (" a b", "a b", True),
        ("a b", "a  b", False),
        ("a b", "A b", False),
        ("a b", "a b.", False),
        ("a b", "", False),
        ("数", "数", True),
        ("数", "数数", False),
        ("a\nb", "a\nb", True),
        ("Yes", "<think>\nYes or no?\n</think>\n\nYes", True),
        ("Yes", "<think>Yes</think>No", False),
    ],
    "contains": [
        ("Paris", "The capital is Paris.", True),
        ("Paris", "the capital is PARIS", True),
        ("Paris", "London", False),
        ("New York", "It is New\nYork, of course", True),
        ("New York", "York, New", False),
        ("12", "It is 12.", True),
        ("12", "It is 1 2", False),
        ("Straße", "in der STRASSE", True),
        ("巴黎", "首都是巴黎。", True),
        ("Paris", "", False),
        ("Paris", "<think>Paris?</think>London", False),
    ],
    "number": [
        ("18", "So she makes $18.", True),
        ("18", "18 eggs minus 9 is 9", False),
        ("#### 1,800", "It is 1800.00 dollars", True),
        ("1800", "That is 1,800", True),
        ("-5", "The result is -5", True),
        ("-5", "The result is \u22125.", True),
        ("5", "10-5", True),
        ("0.5", "It is .5", True),
        ("5", "five", False),
        ("5", "", False),
        ("1e3", "about 1000", True),
        ("42", "\\boxed{42}", True),
        ("42", "x42", False),
        ("7", "7/8", False),
        ("3.14", "π is 3.14", True),
        ("12", "1, 2", False),
    ],
    "choice": [
        ("B", "B", True),
        ("B", "(B)", True),
        ("B", "B. Paris", True),
        ("(B)", "The answer is B.", True),
        ("B", "**B**", True),
        ("B", "I think that it is B", True),
        ("B", "A", False),
        ("A", "A cat sat on the mat", False),
        ("A", "A cat sat there, so the answer is (A).", True),
        ("B", "A or B", False),
        ("B", "B Paris", True),
        ("A", "A is right", True),
        ("C", "答案是C。", True),
        ("C", "正确选项:C", True),
        ("B", "Answer: C", False),
        ("B", "Bananas", False),
        ("B", "", False),
    ],
    "json": [
        ('{"a": 1}', '{"a": 1}', True),
        ('{"a": 1, "b": [2]}', '{ "b": [2], "a": 1 }', True),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ('{"a": 1}', '```json\n{"a": 1}\n```', True),
        ('{"a": 1}', 'Here: {"a": 1}', False),
        ('{"a": 1}', '{"a": 1', False),
        ('{"a": NaN}'.replace("NaN", "1"), '{"a": NaN}', False),
        ("[1, 2]", "[2, 1]", False),
        ("null", "null", True),
        ("null", "", False),
    ],
    "json:keys": [
        ('{"a": 1}', '{"a": 2}', True),
        ('{"a": 1}', '{"a": null, "b": 1}', True),
        ('{"a": {"b": 1}}', '{"a": {"b": 2}}', True),
        ('{"a": {"b": 1}}', '{"a": 2}', False),
        ('{"a": {"b": 1}}', '{"a": {}, "b": 1}', False),
        ('{"a": 1}', "[]", False),
        ('{"a": 1}', '"a"', False),
        ('{"a": 1}', "a", False),
        ("[1]", "[2]", True),
        ('{"a": 1, "b": 1}', '{"b": 0, "a": 0}', True),
    ],
    "json:parses": [
        ("x", "{}", True),
        ("x", "1", True),
        ("x", '"x"', True),
        ("x", "x", False),
        ("x", "", False),
        ("x", "{'a': 1}", False),
        ("x", "[1,]", False),
        ("x", "```\n[]\n```", True),
        ("x", "[] []", False),
        ("x", "Infinity", False),
        ("x", "[" * 100_000, False),
    ],
    "regex": [
        (r"\d+ apples", "I have 3 apples.", True),
        (r"\d+ apples", "I have three apples.", False),
        (r"^yes", "yes, sir", True),
        (r"^yes", "Yes, sir", False),
        (r"(?i)^yes", "Yes, sir", True),
        (r"a.b", "a\nb", False),
        (r"(?s)a.b", "a\nb", True),
        (r"^$", "", True),
        (r"cat|dog", "hotdog", True),
        (r"\bdog\b", "hotdog", False),
    ],
    "regex:^[A-Z]{3}$": [
        ("x", "ABC", True),
        ("x", "AB", False),
        ("x", "abc", False),
        ("x", "ABCD", False),
        ("x", " ABC", False),
    ],
}


@pytest.mark.parametrize(
    ("judge", "own", "answer", "right"),
    [(judge, *case) for judge, cases in BY_HAND.items() for case in cases],
)
def test_answers_by_hand(judge: str, own: str, answer: str, right: bool) -> None:
    verdict = build_judge(judge)(question(1, "?", own), answer)
    assert (verdict.right, verdict.score, verdict.reason == "") == (right, float(right), right)


def test_each_judge_has_ten_cases() -> None:
    """The cases of sums stand in test_check.py and those of tool_call below."""
    assert {name.partition(":")[0] for name in BY_HAND} == JUDGES.keys() - {"sums", "tool_call"}
    assert all(len(cases) >= 10 for name, cases in BY_HAND.items() if not name.startswith("regex:"))


WEATHER: dict[str, Any] = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}
TIME: dict[str, Any] = {"name": "time", "arguments": {}}
BOTH = '{"name": "time", "arguments": {}} {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
AS_FUNCTION = '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}'
CALLS = [
    ([WEATHER], '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>', True),
    ([WEATHER], '{"arguments": {"days": 2, "city": "Paris"}, "name": "get_weather"}', True),
    ([WEATHER], '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', True),
    ([WEATHER], '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, "id": "a"}]', True),
    ([WEATHER], 'functions.get_weather:0 {"city": "Paris", "days": 2}', True),
    ([WEATHER], 'get_weather\n```json\n{"city": "Paris", "days": 2}\n```', True),
    ([WEATHER], 'I look. {"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}', True),
    ([WEATHER], AS_FUNCTION, True),
    ([WEATHER], '{"name": "get_weather", "arguments": {"city": "London", "days": 2}}', False),
    ([WEATHER], '{"name": "get_weather", "arguments": {"city": "Paris"}}', False),
    ([WEATHER], '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}', False),
    ([WEATHER], 'forget_weather {"city": "Paris", "days": 2}', False),
    ([WEATHER], "It is sunny in Paris.", False),
    ([WEATHER], '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}', False),
    ([WEATHER, TIME], BOTH, True),
    ([WEATHER, TIME], '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}', False),
    ([TIME], '{"name": "time", "arguments": {}}{"name": "time", "arguments": {}}', False),
    ([], "It is sunny in Paris.", True),
    ([], '{"name": "time", "arguments": {}}', False),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "answer", "right"), CALLS)
def test_calls_by_hand(calls: list[dict[str, Any]], answer: str, right: bool) -> None:
    turn = Turn("assistant", "" if calls else "It is sunny.", tool_calls=tuple(calls), weight=1.0)
    verdict = build_judge("tool_call")(Row(1, (Turn("user", "Weather?"), turn)), answer)
    assert (verdict.right, verdict.reason == "") == (right, right)


@pytest.mark.parametrize(
    ("judge", "own", "said"),
    [
        ("sums", "x", "is no question of the reference task"),
        ("number", "none", "its own answer has no number"),
        ("choice", "Paris", "its own answer names no option"),
        ("json", "Paris", "its own answer is no JSON"),
        ("regex", "(", "its own answer is no regular expression"),
    ],
)
def test_a_row_that_nobody_can_judge(judge: str, own: str, said: str) -> None:
    with pytest.raises(NotJudgeable, match=said):
        build_judge(judge)(question(1, "?", own), "1")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("exactly", "there is no such judge. There are .*contains.*FILE.py:FUNCTION"),
        ("exact:5", "takes nothing behind a colon, and got '5'"),
        ("regex:(", "is no regular expression: missing"),
        ("json:key", "there is json, json:keys and json:parses"),
        ("nowhere/mine.py:judge", "there is no file nowhere/mine.py"),
        ("mine.py", "there is no such judge"),
    ],
)
def test_a_judge_that_is_not_there(asked: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_judge(asked)


# the body of a judge, what it returns for the row's own answer "b" as (score, reason), or the error
OWN: dict[str, tuple[str, tuple[float, str] | str]] = {
    "true": ("return answer == row.answer", (1.0, "")),
    "false": ("return answer != row.answer", (0.0, "wrong")),
    "false with a reason": ("return False, 'not this'", (0.0, "not this")),
    "true with a reason": ("return True, 'well done'", (1.0, "")),
    "a score": ("return 0.25", (0.25, "score 0.25")),
    "a score with a reason": ("return 0.25, 'a part'", (0.25, "a part")),
    "numpy": ("import numpy; return numpy.bool_(True)", (1.0, "")),
    "the question": ("return row.question == 'a'", (1.0, "")),
    "a bug": ("x = 1\n    return answer[5]", r"mine.py:5: row 7: the judge judge fails: IndexError: string index"),
    "a bug below": ("return helper(answer)", r"mine.py:2: row 7: the judge judge fails: ZeroDivisionError: division"),
    "an exit": ("raise SystemExit(3)", r"mine.py:4: row 7: the judge judge fails: SystemExit: 3"),
    "none": ("pass", r"mine.py: row 7: the judge judge returns None. It has to return True or False, or a score"),
    "too much": ("return 2", r"returns 2. It has to return"),
    "not a number": ("return float('nan')", r"returns nan. It has to return"),
    "a text": ("return 'yes'", r"returns 'yes'. It has to return"),
    "a bad reason": ("return True, 3", r"returns \(True, 3\). It has to return"),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_a_judge_of_the_users_own(case: str, tmp_path: Path) -> None:
    body, expected = OWN[case]
    file = tmp_path / "mine.py"
    file.write_text(f"def helper(answer):\n    return 1 / 0\ndef judge(row, answer):\n    {body}\n")
    judge = build_judge(f"{file}:judge")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            judge(question(7, "a", "b"), "b")
    else:
        verdict = judge(question(7, "a", "b"), "b")
        assert (verdict.score, verdict.reason) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def judge(row, answer:\n    pass\n", r"mine.py:1: the judge cannot be read: SyntaxError"),
        ("x = 1\nimport not_there\n", r"mine.py:2: the judge cannot be read: ModuleNotFoundError: No module"),
        ("x = 1\n", "the file has no function 'judge'"),
        ("judge = 1\n", "the file has no function 'judge'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_judge(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said):
        build_judge(f"{tmp_path / 'mine.py'}:judge")


def test_a_judge_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_judge.py").write_text("ANSWER = 'b'\n")
    (tmp_path / "mine.py").write_text(
        "from beside_the_judge import ANSWER\ndef judge(row, answer): return answer == ANSWER\n"
    )
    assert build_judge(f"{tmp_path / 'mine.py'}:judge")(question(1, "a", "x"), "b").right
