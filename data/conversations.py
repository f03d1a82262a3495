"""Makes conversations of several turns that a small model can learn to follow, and that are judged by exact comparison.

The user says what is in some boxes and then asks for one of them. `python -m data.conversations --out FOLDER` writes
train.jsonl and eval.jsonl in the format of chat messages. The two files share no row.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

SEED = 42
TRAIN, EVAL = 400, 40  # conversations
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "orange")
THINGS = (
    *("spoon", "candle", "letter", "stone", "coin", "rope", "clock", "shell", "button", "feather", "hammer", "mirror"),
    *("bottle", "pencil", "ring", "map", "key", "lamp", "brush", "whistle"),
)


def conversation(rng: random.Random) -> dict[str, Any]:
    """Makes one row: two to four boxes, each in a turn of its own, and then a question about one of them."""
    boxes = list(
        zip(
            rng.sample(COLOURS, count := rng.randint(2, 4)), rng.sample(THINGS, count), range(1, count + 1), strict=True
        )
    )
    messages = []
    for colour, thing, number in boxes:
        messages.append({"role": "user", "content": f"The {colour} box holds a {thing}."})
        messages.append({"role": "assistant", "content": f"Noted as {number}: {colour}, {thing}."})
    colour, thing, number = rng.choice(boxes)
    messages.append({"role": "user", "content": f"What is in the {colour} box?"})
    messages.append({"role": "assistant", "content": f"Note {number} says: a {thing}."})
    return {"messages": messages}


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Makes `count` rows, no two of which are the same."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = conversation(rng)
        rows[json.dumps(row)] = row
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(TRAIN + EVAL, SEED)
    for name, part in (("train", rows[:TRAIN]), ("eval", rows[TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} conversations")


if __name__ == "__main__":
    main()
