import json
import re

from data import sums


def test_committed_files_are_what_the_generator_makes() -> None:
    for name, content in sums.files().items():
        assert (sums.FOLDER / name).read_bytes() == content.encode()


def test_every_number_once_and_every_sum_right() -> None:
    expected = {"math_train_1798.json": range(2, 1800), "math_eval_200.json": range(1800, 2000)}
    for name, numbers in expected.items():
        rows = json.loads((sums.FOLDER / name).read_text())
        assert sorted(int(row["instruction"].removesuffix("=")) for row in rows) == list(numbers)
        for row in rows:
            match = re.fullmatch(r"王大丫丫的回答是--->(\d+) \+ (\d+)", row["output"])
            assert match, row
            a, b = map(int, match.groups())
            assert a >= 1
            assert b >= 1
            assert f"{a + b}=" == row["instruction"]
            assert row["input"] == ""
