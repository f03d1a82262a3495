"""Talks to the fine-tuned model, or to the base model and the fine-tuned model at once: `python -m eval.chat --run …`.

The conversation is rendered as in training, and the answers are those of eval.run. This command writes no file.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data.errors import UserError
from eval.answers.dialogue import Dialogue, Write
from eval.answers.generate import load_model
from eval.answers.settings import Settings
from eval.options import add_common_options, check_common_options
from eval.questions import BASE, TUNED, asked_recipe
from loop.guard.process import end_process, exit_codes
from loop.model.build import build_tokenizer, check_model
from loop.recipe import find_model
from loop.saving.finished import check_adapter, check_content

COMMANDS = {
    "/system": "begins a new conversation behind the system prompt that follows it, or behind none",
    "/reset": "begins a new conversation",
    "/undo": "forgets the last exchange",
    "/help": "shows this list",
    "/quit": "ends the program, as Ctrl-D does",
}
HELP = "".join(f"{command:8} {what}\n" for command, what in COMMANDS.items())
HELP += """A backslash at the end of a line continues the text on the next one.
//text says a text that begins with a slash.
Ctrl-C ends an answer, and what it has said so far counts. Ctrl-C at the prompt ends the program.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of this command. Raises UserError for values that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.chat", description=__doc__)
    add_common_options(parser)
    parser.add_argument("--base", action="store_true", help="with --run: talk to the base model too")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, help="tokens after which an answer is cut off (default: 1024)"
    )
    args = parser.parse_args(argv)
    check_common_options(args)
    if args.base and not args.run:
        raise UserError("--base goes with --run, the folder of a training: --config asks the base model anyway.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("python -m eval.chat is one process: run it without accelerate launch.")
    return args


def open_dialogue(args: argparse.Namespace) -> Dialogue:
    """Loads the model that the options name. Raises UserError when the run, recipe or model is missing or does not fit.

    The base's weights are in memory once: the adapter stays beside them where the base has to answer too.
    """
    recipe = asked_recipe(args)
    without_weights = check_model(recipe)
    if args.run:
        check_content(args.run, recipe)
        check_adapter(args.run / "adapter", without_weights)
    adapter: Path | None = args.run / "adapter" if args.run else None
    model = load_model(
        find_model(recipe.model.name_or_path),
        adapter,
        merge=not (args.base or args.no_merge),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    adapted = ({BASE: False} if args.base or not args.run else {}) | ({TUNED: True} if args.run else {})
    settings = Settings(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed, stop=tuple(args.stop))
    return Dialogue(model, recipe, build_tokenizer(recipe), adapted, settings)


def talk(lines: Iterable[str], dialogue: Dialogue, write: Write) -> None:
    """Says each text of `lines` to the dialogue, and does each command, until /quit or the end of the lines."""
    for text in whole_texts(lines):
        try:
            if text.strip() == "/quit":
                return
            if text.startswith("/") and not text.startswith("//"):
                obey(text, dialogue, write)
            elif text.strip():
                dialogue.say(text.removeprefix("/") if text.startswith("//") else text, write)
        except UserError as error:
            write(f"{error}\n")
        except KeyboardInterrupt:  # between two answers, or just behind one
            write("\n")


def whole_texts(lines: Iterable[str]) -> Iterator[str]:
    """Joins each line that ends with a backslash to the next one."""
    begun: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield "\n".join([*begun, line])
        begun = []
    if begun:
        yield "\n".join(begun)


def obey(text: str, dialogue: Dialogue, write: Write) -> None:
    """Does what a command says. Raises UserError for a command that there is not, or that cannot be done."""
    command, rest = (*text.split(maxsplit=1), "")[:2]
    if command not in COMMANDS:
        raise UserError(
            f"there is no command {command}; there are {', '.join(COMMANDS)}. //text says a text that begins with /."
        )
    if rest and command != "/system":
        raise UserError(f"{command} takes no text.")
    if command == "/help":
        write(HELP)
    elif command == "/undo":
        dialogue.undo()
        write("(the last exchange is forgotten)\n")
    elif command == "/reset":
        dialogue.reset()
        write("(a new conversation)\n")
    else:
        dialogue.begin(rest.strip())
        write(f"(a new conversation {'behind this' if rest else 'without a'} system prompt)\n")


def in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def typed_lines() -> Iterator[str]:
    """Returns what the user types, or what is piped into this process, until Ctrl-D or Ctrl-C."""
    shown = in_terminal()
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history and can be edited
    begun = False
    while True:
        try:
            line = input(("… " if begun else "you: ") if shown else "")
        except (EOFError, KeyboardInterrupt):
            if shown:
                print()
            return
        begun = line.endswith("\\")
        yield line


def write_now(text: str) -> None:
    print(text, end="", flush=True)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    for stream in (sys.stdin, sys.stdout):  # a byte that is no text, or a text that the terminal cannot show
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    dialogue = open_dialogue(args)
    if in_terminal():
        write_now(f"{' and '.join(dialogue.turns)} of {args.run or args.config}; /help lists the commands\n")
    talk(typed_lines(), dialogue, write_now)


if __name__ == "__main__":
    end_process(main)
