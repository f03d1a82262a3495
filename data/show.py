"""Prints rows as the model gets them: `python -m data.show --config RECIPE [--row N] [--html FILE] [--KEY VALUE …]`.

What is learned stands in its own lines, in colour in a terminal. Beside each row stands what the model's chat template
writes of it. The options behind it are keys of the recipe, as for loop/train.py. Nothing is trained and no weights are
read.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from data.chat import encode_row
from data.errors import UserError
from data.files import sources
from data.rows import iter_rows
from data.shown import as_html, beside, shown, summary

SHOWN = 5  # rows, where no row is asked for


def main(argv: Sequence[str]) -> None:
    # What knows recipes and models is in loop/, which imports data/; only this command imports it from here.
    from loop.model.build import build_data, build_tokenizer
    from loop.recipe import data_files, find_data, parse_recipe

    parser = argparse.ArgumentParser(prog="python -m data.show", description=__doc__)
    parser.add_argument("--config", help="recipe (YAML); loop/recipes/tiny.yaml without it")
    parser.add_argument("--row", type=int, help="show this row only; the number is that of messages")
    parser.add_argument("--file", help="show rows of this training file; the first without it")
    parser.add_argument("--html", type=Path, help="write a page to this file instead")
    args, rest = parser.parse_known_args(argv)
    _, recipe = parse_recipe([*(["--config", args.config] if args.config else []), *rest])
    data = build_data(recipe, build_tokenizer(recipe))
    template = data.template
    assert template is not None
    file = args.file or next(iter(data_files(recipe.data.train_file)))
    rows = (
        row
        for label, found in sources(find_data(file))
        for row in iter_rows(label, found, recipe.data.columns)
        if args.row is None or row.number == args.row
    )
    chosen = [(row, encode_row(row, template)) for row in islice(rows, SHOWN if args.row is None else 1)]
    if not chosen:
        raise UserError(f"--row {args.row}: {file} has no such row.")
    lines = summary(data.train, data.tallies)
    if args.html:
        args.html.write_text(as_html(lines, chosen, template), encoding="utf-8")
        print(args.html)
        return
    print("\n".join(lines))
    for row, examples in chosen:
        for example, compared in zip(examples, beside(row, examples, template), strict=True):
            print(f"\n{shown(example, template, sys.stdout.isatty())}\n  {compared}")


if __name__ == "__main__":
    from loop.guard.process import end_process, exit_codes

    end_process(exit_codes()(main))
