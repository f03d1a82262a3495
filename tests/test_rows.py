from pathlib import Path

import pytest

from data.conversation import question
from data.errors import UserError
from data.rows import read_rows

GOOD = '{"instruction": "5=", "output": "1 + 4"}'


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"[{GOOD}, {GOOD}]",
        f"  \n[\n{GOOD},\n{GOOD}\n]\n",
        f"{GOOD}\n{GOOD}",
        f"{GOOD}\r\n\r\n{GOOD}\r\n",
        f"{GOOD}\r{GOOD}",
        b"\xef\xbb\xbf" + f"{GOOD}\n{GOOD}\n".encode(),
    ],
)
def test_array_and_lines(tmp_path: Path, content: str | bytes) -> None:
    rows = read_rows(write(tmp_path, content))
    assert [(row.question, row.answer) for row in rows] == [("5=", "1 + 4")] * 2


def test_row_numbers_are_lines_or_elements(tmp_path: Path) -> None:
    assert [row.number for row in read_rows(write(tmp_path, f"{GOOD}\n\n{GOOD}"))] == [1, 3]
    assert [row.number for row in read_rows(write(tmp_path, f"[{GOOD},\n\n{GOOD}]"))] == [1, 2]


def test_input_is_kept(tmp_path: Path) -> None:
    text = (
        '{"instruction": "split", "input": "5", "output": "1 + 4"}\n{"instruction": "a", "input": null, "output": "b"}'
    )
    assert read_rows(write(tmp_path, text)) == [question(1, "split\n5", "1 + 4"), question(2, "a", "b")]


def test_an_empty_field_that_nothing_reads_says_nothing(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path, GOOD[:-1] + ', "system": "", "history": [], "id": null}'))) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("\n \n", "no rows"),
        (f"[{GOOD}", "line 1"),
        (f"{GOOD}\n{{oops", "row 2: not JSON"),
        ('[""]', "row 1: is of type str"),
        ('"hello"', "row 1: is of type str"),
        (f'{GOOD}\n""', "row 2: is of type str"),
        ("[" * 100_000, "nested too deeply"),
        (f"{GOOD}\n" + '{"a":' * 100_000, "row 2: nested too deeply"),
        (f"{GOOD}\n" + "1" * 5000, "row 2: not JSON that can be read"),
        ('{"instruction": "x", "output": "\\ud800"}', "row 1: the field 'output' has half of a surrogate pair"),
        ('{"instruction": "x", "input": false, "output": "y"}', "row 1: the field 'input' is of type bool"),
        ('{"instruction": NaN, "output": "y"}', "row 1: the field 'instruction' is of type float"),
        (f"[{GOOD}, 5]", "row 2: is of type int"),
        (f"{GOOD}\n[1]", "row 2: is of type list"),
        ('{"output": "x"}', "row 1: the field 'instruction' is missing"),
        ('{"instruction": "x"}', "row 1: the field 'output' is missing"),
        ('{"instruction": "x", "output": "  "}', "row 1: the field 'output' is empty"),
        ('{"instruction": 5, "output": "x"}', "row 1: the field 'instruction' is of type int"),
        ('{"instruction": "x", "output": null}', "row 1: the field 'output' is of type NoneType"),
        ('{"instruction": "x", "input": 3, "output": "y"}', "row 1: the field 'input' is of type int"),
        (
            GOOD[:-1] + ', "source": "s", "scores": [1]}',
            "row 1: nothing reads 'scores', 'source'; remove it",
        ),
        (b'{"instruction": "\xff"}', "byte 17 is not UTF-8"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="no file in this folder can be read"):
        read_rows(tmp_path)


def test_every_bad_row_is_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join([GOOD] + ["{}"] * 14))
    with pytest.raises(UserError) as error:
        read_rows(path)
    message = str(error.value)
    assert "14 of 15 rows are bad" in message
    assert [f"row {number}:" in message for number in (1, 2, 11, 12)] == [False, True, True, False]
    assert "and 4 more" in message
