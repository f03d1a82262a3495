"""Measures the 14B shape on one NVIDIA GPU of about 80 GB: `python -m benchmarks.gpu_14b`

It is made for a card that one has for minutes. All contenders share one checkpoint of Qwen2.5-14B's shape with random
weights; the most telling come first; each result is printed and written as soon as it is there; and no contender starts
when the minutes are over. `--rehearse` goes the same way with a small model, on any machine.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.train_throughput import MICRO, Contender, computed
from benchmarks.turns import spread, take_turns, write_results
from benchmarks.workload import ANSWER, PROMPT, SHARED, TINY, made_up_rows, write_rows
from eval.peak import matmul_peak
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes
from loop.measure.flops import MatrixProducts, matrix_products
from loop.plan import model_without_weights
from loop.recipe import ROOT, parse_recipe

SHAPE = ROOT / "loop" / "shapes" / "Qwen2.5-14B-Instruct"
ENOUGH = 75e9  # bytes of GPU memory that the benchmark needs
COUNT = 1798  # rows of a file


@dataclass(frozen=True)
class Rows:
    """The tokens of each row: those that all share, those of its own prompt, and those of its answer."""

    shared: int
    prompt: int
    answer: int
    at_once: int = MICRO

    @property
    def tokens(self) -> int:
        return self.shared + self.prompt + self.answer


SHORT = Rows(SHARED, PROMPT, ANSWER)  # the reference's
LONG = Rows(64, 448, 512)
LONGER = Rows(64, 1984, 2048, at_once=4)


@dataclass(frozen=True)
class Job:
    name: str
    contender: Contender
    rows: Rows
    steps: int  # in a turn
    rounds: int  # turns that count


def ours(checkpointing: str, config: str) -> Contender:
    return Contender("ours", checkpointing, (), config)


JOBS = (
    Job("short rows: ours, zero0, kept", ours("none", "zero0"), SHORT, 6, 3),
    Job("short rows: HF Trainer, checkpointed", Contender("trainer", "non_reentrant"), SHORT, 6, 3),
    Job("short rows: ours, zero3, kept", ours("none", "zero3"), SHORT, 6, 3),
    Job("1,024 tokens: ours, zero0, auto", ours("auto", "zero0"), LONG, 2, 2),
    Job("1,024 tokens: TRL, liger, checkpointed", Contender("trl_liger", "non_reentrant"), LONG, 2, 2),
    Job("1,024 tokens: TRL, checkpointed", Contender("trl", "non_reentrant"), LONG, 2, 2),
    Job("short rows: ours, zero0, checkpointed", ours("non_reentrant", "zero0"), SHORT, 6, 2),
    Job("4,096 tokens: ours, zero0, auto", ours("auto", "zero0"), LONGER, 1, 2),
    Job("4,096 tokens: TRL, liger, checkpointed", Contender("trl_liger", "non_reentrant"), LONGER, 1, 2),
    Job("short rows: TRL, packed, checkpointed", Contender("trl_packing", "non_reentrant"), SHORT, 6, 2),
    Job("short rows: ours, zero3 + offload", ours("auto", "zero3_offload"), SHORT, 2, 2),
    Job("1,024 tokens: ours, zero3 + offload", ours("auto", "zero3_offload"), LONG, 1, 2),
)
ABOUT = """One GPU, Qwen2.5-14B's shape with random weights, LoRA of the reference, 16 rows a step (4 of 4,096 tokens).
*Short* rows have 20 shared tokens, 10 of prompt and 19 of answer. Tokens are the rows' own; utilisation counts what a
step needs without recomputation, with shared tokens once, against a bf16 matrix product measured in the same call.
Phases are seconds of a step between CUDA events, waiting for the host included."""


def write_model(folder: Path, config: Any) -> None:
    """Makes a model of this shape with random weights in bf16 and writes its checkpoint (29.5 GB for 14B)."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def with_rows(model: Path, folder: Path, rows: Rows, vocab: int) -> Path:
    """A folder with links to the checkpoint, and with rows of these lengths."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "rows.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    write_rows(folder, made_up_rows(COUNT if rows == SHORT else 200, vocab, rows.shared, rows.prompt, rows.answer))
    return folder


def measure(job: Job, folder: Path, products: MatrixProducts, peak: float) -> dict[str, Any]:
    """Measures one contender alone, because no two of them fit on one GPU."""
    contender = replace(job.contender, more=("--micro_batch_size", str(job.rows.at_once)))
    found = take_turns({job.name: contender.command(folder, job.steps)}, job.rounds, threads=8)[job.name]
    needed = products.model_flops(computed(replace(contender, kind="ours"), folder))  # whichever contender takes it
    steps = [seconds / job.steps for seconds in found.seconds]
    return {
        "samples_per_second": [job.rows.at_once / seconds for seconds in steps],
        "tokens_per_second": [job.rows.at_once * job.rows.tokens / seconds for seconds in steps],
        "utilisation": [needed / seconds / peak for seconds in steps],
        "joules_a_step": found.notes["joules"] / job.steps if found.notes.get("joules") else None,
        **{key: found.notes.get(key) for key in ("peak_bytes", "phases", "loss")},
    }


def as_line(name: str, row: dict[str, Any]) -> list[str]:
    """The cells of a result."""
    share = spread([100 * part for part in row["utilisation"]])
    joules = f"{row['joules_a_step']:.0f}" if row["joules_a_step"] else "–"
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in (row["phases"] or {}).items()) or "–"
    memory = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "–"
    speeds = [spread(row["samples_per_second"]), spread(row["tokens_per_second"])]
    return [name, *speeds, f"{share} %", memory, joules, phases, f"{row['loss']:.3f}"]


HEAD = ["", "samples/s", "tokens/s", "utilisation", "peak, GB", "J a step", "phases, s", "loss"]


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_14b", description=__doc__)
    parser.add_argument("--minutes", type=float, default=13, help="no contender starts after so many minutes")
    parser.add_argument("--model", type=Path, help="a checkpoint of an earlier call; by default one is made")
    parser.add_argument("--out", type=Path, help="JSON file that gets each result as it comes")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contenders whose names have one of these words")
    parser.add_argument("--rehearse", action="store_true", help="a small model, one short turn each, on any machine")
    args = parser.parse_args(argv)
    begun, has_gpu = time.monotonic(), torch.cuda.is_available()
    if not args.rehearse and (not has_gpu or torch.cuda.get_device_properties(0).total_memory < ENOUGH):
        print(f"no NVIDIA GPU with {ENOUGH / 1e9:.0f} GB on this machine: nothing was measured")
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    peak = matmul_peak()
    flops = next(iter(peak.values()))["bf16"]
    print(f"a matrix product in bf16: {flops / 1e12:.3g} TFLOP/s", flush=True)
    shape = TINY if args.rehearse else SHAPE
    config = AutoConfig.from_pretrained(shape)
    products = matrix_products(model_without_weights(parse_recipe(["--model.name_or_path", str(shape)])[1], "bf16"))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or Path(directory) / "model"
        if args.model is None:
            write_model(model, config)
            if has_gpu:
                torch.cuda.empty_cache()
        for number, job in enumerate(JOBS):
            if args.only and not any(word in job.name for word in args.only):
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                print(f"no time left for {job.name}", flush=True)
                continue
            if args.rehearse:
                job = replace(job, steps=1, rounds=1, rows=Rows(4, 5, 6, job.rows.at_once))
            folder = with_rows(model, Path(directory) / f"rows-{number}", job.rows, config.vocab_size)
            try:
                results[job.name] = measure(job, folder, products, flops)
            except SystemExit as error:  # a contender that cannot run, for example without its package
                print(f"{job.name}: failed: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            print(" | ".join(as_line(job.name, results[job.name])), flush=True)
            if args.out:
                args.out.write_text(json.dumps({"peak": peak, **results}, indent=1) + "\n")
    table = markdown_table(HEAD, [as_line(name, row) for name, row in results.items()])
    text = f"{ABOUT}\n\nA matrix product: {flops / 1e12:.3g} TFLOP/s.\n\n{table}"
    if not args.rehearse:
        write_results("gpu_14b", "14B on one GPU", {"peak": peak, **results}, text)


if __name__ == "__main__":
    main(sys.argv[1:])
