"""Makes the data of the reference task: an answer is a fixed prefix and two integers whose sum is the given integer.

`python -m data.sums` writes data/math/math_train_1798.json and math_eval_200.json.
"""

import argparse
import json
import random
from pathlib import Path

SYSTEM_PROMPT = "你是一个有帮助的助手,帮我解决下面数学问题"
ANSWER_PREFIX = "王大丫丫的回答是--->"
TRAIN_NUMBERS = range(2, 1800)  # 1,798 integers; each occurs once
EVAL_NUMBERS = range(1800, 2000)  # 200 integers; the training has none of them
SEED = 42
FOLDER = Path(__file__).parent / "math"


def sum_row(x: int, rng: random.Random) -> dict[str, str]:
    """Makes one alpaca row for the integer `x` >= 2: x = a + b, where a is drawn uniformly and a, b >= 1."""
    a = rng.randint(1, x - 1)
    return {"instruction": f"{x}=", "input": "", "output": f"{ANSWER_PREFIX}{a} + {x - a}"}


def make_rows(numbers: range, seed: int) -> list[dict[str, str]]:
    """Makes a row for every integer of `numbers`, in shuffled order; the same seed makes the same rows."""
    rng = random.Random(seed)
    return [sum_row(x, rng) for x in rng.sample(numbers, len(numbers))]


def to_json(rows: list[dict[str, str]]) -> str:
    """Writes the rows as a JSON array with one row on each line, so that a diff shows rows."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"


def files() -> dict[str, str]:
    """Returns the content of both data sets by file name."""
    evaluation = sorted(make_rows(EVAL_NUMBERS, SEED + 1), key=lambda row: row["instruction"])
    return {
        "math_train_1798.json": to_json(make_rows(TRAIN_NUMBERS, SEED)),
        "math_eval_200.json": to_json(evaluation),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_text(content, encoding="utf-8")
        print(f"{folder / name}: {content.count('instruction')} rows")


if __name__ == "__main__":
    main()
