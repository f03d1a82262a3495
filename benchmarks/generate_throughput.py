"""Measures how fast the evaluation answers: `python -m benchmarks.generate_throughput`

It compares our generation with the reference's loop (one prompt at a time, the adapter beside the weights), with the
same loop and the adapter merged, and with transformers' generate in batches of 16. Each of them is one process and
generates at most 20 tokens for a prompt.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.turns import Measured, spread, take_turns, write_results
from benchmarks.workload import RECIPE, lora_config, write_compute_bound, write_tiny
from eval.peak import usable_cores
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes

PROMPTS = {"reference": 8, "merged": 8, "batched": 64, "ours": 200}  # in a turn, so that all turns take about as long
NEW_TOKENS = 20
SHAPES = {
    "compute_bound": ("80 M parameters, random weights", write_compute_bound),
    "tiny": ("The embedded model's shape, random weights", write_tiny),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ABOUT = """Prompts of the reference's lengths, 20 new tokens each at most. Every contender has a process of its own and
they take turns, each with new prompts; median and range of the turns, ratios within each. The last column: how many
answers differ from those of the merged model asked one prompt at a time, of the prompts that both had."""


def write_with_adapter(write: Callable[[Path], None], folder: Path, dtype: torch.dtype) -> None:
    """Writes a model and, in its folder `adapter`, a random adapter that is large enough to change answers."""
    write(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    base.save_pretrained(folder)
    model: Any = get_peft_model(base, lora_config())
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05 * RECIPE.lora.rank / RECIPE.lora.alpha)
    model.save_pretrained(str(folder / "adapter"))


def run(write: Callable[[Path], None], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Lets all contenders answer prompts on the model that `write` makes, and returns the figures of each."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        write_with_adapter(write, folder, dtype)
        worker = [sys.executable, "-m", "benchmarks.generate_worker"]
        commands = {kind: [*worker, kind, str(folder), str(n), str(NEW_TOKENS)] for kind, n in PROMPTS.items()}
        found = take_turns(commands, rounds, usable_cores())
    return {kind: _figures(measured, found["merged"]) for kind, measured in found.items()}


def _figures(measured: Measured, merged: Measured) -> dict[str, Any]:
    """Compares what a contender answered with what `merged` answered, and counts its tokens a second."""
    answers, alone, ends = measured.notes["answers"], merged.notes["answers"], measured.notes["ends"]
    tokens = [sum(map(len, answers[start:end])) for start, end in pairwise(ends)][1:]  # the first turn does not count
    compared = list(zip(answers, alone, strict=False))  # the contender that answered fewer prompts ends the comparison
    return {
        "prompts": ends[1],
        "tokens_per_second": [count / seconds for count, seconds in zip(tokens, measured.seconds, strict=True)],
        "differ_from_one_at_a_time": sum(a != b for a, b in compared),
        "compared": len(compared),
    }


def as_markdown(found: dict[str, Any]) -> str:
    reference = found["reference"]["tokens_per_second"]
    rows = []
    for kind, figures in found.items():
        speeds = figures["tokens_per_second"]
        ratios = spread([a / b for a, b in zip(speeds, reference, strict=True)])
        other = f"{figures['differ_from_one_at_a_time']} of {figures['compared']}"
        rows.append([kind, str(figures["prompts"]), spread(speeds), ratios, other])
    head = ["", "prompts a turn", "tokens/s", "× reference", "other answers than one at a time"]
    return markdown_table(head, rows)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate_throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, for each contender")
    args = parser.parse_args(argv)
    results, text = {}, [ABOUT]
    for shape, (title, write) in SHAPES.items():
        for dtype in DTYPES:
            found = results[f"{shape} {dtype}"] = run(write, DTYPES[dtype], args.rounds)
            text.append(f"### {title}, {dtype}\n\n{as_markdown(found)}")
            print(text[-1], flush=True)
    write_results("generate_throughput", "Generation beside others", results, "\n\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
