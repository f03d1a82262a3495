"""Serves a run as its users would and compares the answers with the evaluation's: `python -m eval.serve_check --run …`.

This command exports the run into a temporary folder, starts `transformers serve` on it, asks it through the OpenAI chat
protocol, and compares each answer with the greedy answer that eval.run gets from base + adapter. It ends with the exit
code 1 where they differ.
"""

import argparse
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.chat import prompt_ids
from data.conversation import Row
from data.errors import UserError
from data.rows import read_rows
from eval.answers.generate import generate, load_model
from eval.answers.settings import Settings
from eval.questions import asked_rows, files_to_ask
from loop.export import main as export
from loop.exporting.cases import messages_of
from loop.exporting.files import stop_tokens
from loop.exporting.source import Source, open_source
from loop.guard.process import RunError, end_process, exit_codes
from loop.recipe import find_model

NEEDED = ("fastapi", "openai", "uvicorn")  # by `transformers serve`
HOST = "127.0.0.1"
SECONDS_TO_START = 300


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line. Raises UserError where the server cannot be started."""
    parser = argparse.ArgumentParser(prog="python -m eval.serve_check", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--model.name_or_path", dest="model", help="where the base model lies now, if it was moved")
    parser.add_argument("--data", help="rows to ask (default: the recipe's eval.data, or its validation file)")
    parser.add_argument("--limit", type=int, default=20, help="ask only the first so many questions")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens after which an answer is cut off")
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise UserError(f"transformers serve needs {', '.join(missing)}. Install them: pip install -e '.[serve]'.")
    return parser.parse_args(argv)


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """Serves an exported model with `transformers serve` as long as the context lasts; gives the server's address.

    Raises RunError where the server ends or does not answer in time.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    address = f"http://{HOST}:{port}"
    words = ["serve", str(folder), "--host", HOST, "--port", str(port)]
    with log.open("wb") as output:
        command = [sys.executable, "-m", "transformers.cli.transformers", *words]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _is_up(address):
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
                raise RunError(f"transformers serve does not answer; the last it said: {said[-1]}")
            time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def chat(address: str, model: str, messages: Sequence[dict[str, str]], max_new_tokens: int) -> str:
    """The greedy answer of a server that speaks the OpenAI chat protocol."""
    body: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def our_answers(source: Source, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """The greedy answers that the evaluation gets from base + adapter."""
    model_recipe = source.recipe.model
    name = find_model(model_recipe.name_or_path)
    model = load_model(name, source.adapter, trust_remote_code=model_recipe.trust_remote_code)
    prompts = [prompt_ids(row, source.template) for row in rows]
    settings = Settings(max_new_tokens)
    found = generate(model, source.template.tokenizer, prompts, stop_tokens(source), None, settings)
    return [answer.text for (answer,) in found]


@exit_codes()
def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    source = open_source(args.run, args.model)
    files = files_to_ask(args.data, source.recipe)
    rows = [row for file in files for row in asked_rows(read_rows(file, source.recipe.data.columns), file)][
        : args.limit
    ]
    asked = [(row, messages) for row in rows if (messages := messages_of(row, source.recipe.data.system_prompt))]
    if not asked:
        raise UserError(f"{', '.join(files)}: no row has plain turns only. Give other rows with --data.")
    ours = our_answers(source, [row for row, _ in asked], args.max_new_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        moved = ["--model.name_or_path", args.model] if args.model else []
        export([str(args.run), "--to", str(folder), "--no-proof", *moved])
        with served(folder, Path(scratch) / "server.log") as address:
            theirs = [chat(address, str(folder), messages, args.max_new_tokens) for _, messages in asked]
    different = 0
    for (row, _), one, other in zip(asked, ours, theirs, strict=True):
        if one.strip() != other.strip():
            different += 1
            print(f"  {row.question!r}: ours {one!r}, the server's {other!r}")
    if different:
        raise RunError(f"{different} of {len(asked)} answers of transformers serve are not those of the evaluation.")
    print(f"all {len(asked)} answers of transformers serve are those of the evaluation")


if __name__ == "__main__":
    end_process(main)
