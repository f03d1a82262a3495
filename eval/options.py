"""The options that the commands which have a model answer share: which model, behind which prompt, and how."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from data.errors import UserError


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model answers, and how. Each command adds its own --max-new-tokens."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run folder of a training")
    which.add_argument("--config", type=Path, help="a recipe: asks its base model only and writes nothing")
    parser.add_argument(
        "--model.name_or_path", dest="model", metavar="PATH", help="where the base model lies now, if it was moved"
    )
    parser.add_argument("--system", help="system prompt in the place of the recipe's and the rows' own; '' for none")
    parser.add_argument("--temperature", type=float, default=0.0, help="draw tokens at this temperature (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    parser.add_argument("--top-k", type=int, default=0, help="draw among so many of the likeliest tokens")
    parser.add_argument("--seed", type=int, default=42, help="seed of the drawing")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts at which an answer ends")
    parser.add_argument("--no-merge", action="store_true", help="keep the adapter beside the weights")


def check_common_options(args: argparse.Namespace) -> None:
    """Raises UserError for values of add_common_options and of --max-new-tokens that cannot be."""
    check_rules(
        args,
        {
            "max_new_tokens": (args.max_new_tokens is None or args.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= args.temperature < 100, "at least 0 and below 100"),
            "top_p": (0 < args.top_p <= 1, "above 0 and at most 1"),
            "top_k": (args.top_k >= 0, "at least 0"),
            "seed": (args.seed >= 0, "at least 0"),
            "stop": (all(args.stop), "texts that are not empty"),
        },
    )
    if not args.temperature and (args.top_p < 1 or args.top_k):
        raise UserError("--top-p and --top-k need --temperature above 0: without it the likeliest token is taken.")


def check_rules(args: argparse.Namespace, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises UserError for the first option that breaks its rule; `rules` says whether each is kept, and what it is."""
    for name, (kept, rule) in rules.items():
        if not kept:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but has to be {rule}.")
