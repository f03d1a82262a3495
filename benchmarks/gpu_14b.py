"""Measures the 14B shape on one NVIDIA GPU of about 80 GB: `python -m benchmarks.gpu_14b`

The model has Qwen2.5-14B's shape and random weights, and a step has the reference's batch. The command measures tokens
a second, model FLOPs utilisation and peak memory of our loop at stage 0 and at stage 3 with offload, and of HF Trainer.
On a machine without such a GPU it says so and measures nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_throughput import Contender, computed
from benchmarks.turns import spread, take_turns, write_results
from benchmarks.workload import ANSWER, PROMPT, SHARED, TINY, made_up_rows, write_rows
from eval.peak import matmul_peak
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes
from loop.measure.flops import matrix_products
from loop.plan import model_without_weights
from loop.recipe import ROOT, parse_recipe

SHAPE = ROOT / "loop" / "shapes" / "Qwen2.5-14B-Instruct"
ENOUGH = 75e9  # bytes of GPU memory that the benchmark needs
ROWS = 1798
ABOUT = """One GPU, Qwen2.5-14B's shape with random weights, 16 rows of 49 tokens a step, LoRA of the reference. Tokens
are the rows' own, prompts and answers; utilisation counts what a step needs without recomputation, with
shared tokens once, against a bf16 matrix product measured in the same call."""


def write_14b(folder: Path) -> None:
    """Makes the model on the GPU and writes its checkpoint of 29.5 GB, with rows, to `folder`."""
    config = AutoConfig.from_pretrained(SHAPE)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    write_rows(folder, made_up_rows(ROWS, config.vocab_size, SHARED, PROMPT, ANSWER))


def contenders() -> dict[str, Contender]:
    return {
        "ours, stage 0": Contender("ours", "auto", (), "zero0"),
        "ours, stage 0, checkpointed": Contender("ours", "non_reentrant", (), "zero0"),
        "ours, stage 3 + offload": Contender("ours", "auto", (), "zero3_offload"),
        "HF Trainer, checkpointed": Contender("trainer", "non_reentrant"),
    }


def measure(folder: Path, name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Measures one contender alone, because no two of them fit on one GPU."""
    command = contenders()[name].command(folder, steps)
    found = take_turns({name: command}, rounds, threads=8)[name]
    batch = computed(Contender("ours", "auto"), folder)  # what a step needs, whichever contender takes it
    products = matrix_products(model_without_weights(parse_recipe(["--model.name_or_path", str(SHAPE)])[1], "bf16"))
    return {
        "tokens_per_second": [batch.rows * (SHARED + PROMPT + ANSWER) * steps / seconds for seconds in found.seconds],
        "flops_per_second": [products.model_flops(batch) * steps / seconds for seconds in found.seconds],
        "peak_bytes": found.notes["peak_bytes"],
        "loss": found.notes["loss"],
    }


def as_markdown(results: dict[str, Any], peak: float) -> str:
    rows = []
    for name, row in results.items():
        share = spread([100 * flops / peak for flops in row["flops_per_second"]])
        cells = [name, spread(row["tokens_per_second"]), f"{share} %", f"{row['peak_bytes'] / 1e9:.1f}"]
        rows.append([*cells, f"{row['loss']:.3f}"])
    return markdown_table(["", "tokens/s", "model FLOPs utilisation", "peak GPU memory, GB", "loss"], rows)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_14b", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="turns that count, for each contender")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < ENOUGH:
        print(f"no NVIDIA GPU with {ENOUGH / 1e9:.0f} GB on this machine: nothing was measured")
        return
    peak = matmul_peak()
    flops = next(iter(peak.values()))["bf16"]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        write_14b(folder)
        torch.cuda.empty_cache()
        for name in contenders():
            results[name] = measure(folder, name, args.rounds, args.steps)
            print(name, results[name], flush=True)
    text = f"{ABOUT}\n\nA matrix product: {flops / 1e12:.0f} TFLOP/s.\n\n{as_markdown(results, flops)}"
    print(text)
    write_results("gpu_14b", "14B on one GPU", {"peak": peak, **results}, text)


if __name__ == "__main__":
    main(sys.argv[1:])
