"""The equality matrix: `python -m tests.equality` (some minutes) writes its section of docs/guarantees.md.

Six accel configurations x {1, 2} processes x accumulation {1, 4} x gradient checkpointing {off, on} with padded
rows, and the other layouts of a micro-batch on two processes: 20 updates on 157 rows of unequal lengths, each
launched by accelerate's own launcher (tests/warm.py), against tests/reference_loop.py. In fp32 every cell has to agree
within 1e-5; in bf16 within three times what computing in bf16 costs (bf16_tolerance).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from tests.distributed.launching import CONFIGS, ROOT, WORKER, Run, launch
from tests.guarantees import write_section
from tests.reference_loop import PEAK, RANK, TARGETS, History, reference_loop

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
TINY = ROOT / "data" / "tiny_base"
NUM_ROWS, ROWS_PER_STEP, SEED = 157, 8, 42  # 19 full windows, and one of five rows
FP32 = 1e-5
FIGURES = ("loss", "grad_norm", "lr", "adapter")


@dataclass(frozen=True)
class Cell:
    config: str
    processes: int
    accum: int
    checkpointing: str
    precision: str = "no"
    layout: str = "padded"

    def __str__(self) -> str:
        return f"{self.config}-{self.processes}-{self.accum}-{self.checkpointing}-{self.precision}-{self.layout}"


@dataclass(frozen=True)
class Difference:
    """Largest of all steps, relative: to the reference's value, for lr to the peak, for the adapter to each norm."""

    loss: float
    grad_norm: float
    lr: float
    adapter: float

    def within(self, other: "Difference") -> bool:
        return all(getattr(self, name) <= getattr(other, name) for name in FIGURES)


def write_task(folder: Path, count: int = NUM_ROWS, tied: bool = True) -> Path:
    """rows.jsonl: real rows, of very unequal lengths. model: a Qwen2 like tiny_base, but with random weights; lm_head
    and the embedding share theirs where it is `tied`.

    The trained one meets rows of which fp32 itself, in plain PyTorch, knows the gradient's norm to 3e-5 only.
    """
    rows = json.loads((ROOT / "data" / "math" / "math_train_1798.json").read_text())[:count]
    for i, row in enumerate(rows):
        row["output"] += " + 0" * (i * i % 11)  # up to 36 tokens more
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    set_seed(SEED)
    config = AutoConfig.from_pretrained(TINY, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    return folder


def run_cell(cell: Cell, task: Path, folder: Path, *more: str) -> Run:
    micro = ROWS_PER_STEP // (cell.processes * cell.accum)
    return launch(
        CONFIGS / f"{cell.config}.yaml",
        *("--model.name_or_path", str(task / "model"), "--data.train_file", str(task / "rows.jsonl")),
        *("--data.validation_file", "null", "--lora.dropout", "0"),
        *("--epochs", "1", "--log_every", "1", "--tracker", "null", "--optim.lr", str(PEAK)),
        *("--micro_batch_size", str(micro), "--grad_accum_steps", str(cell.accum), "--rows_per_step", "null"),
        *("--gradient_checkpointing", cell.checkpointing, "--batching", cell.layout, "--data.max_length", "99", *more),
        folder=folder,
        processes=cell.processes,
        precision=cell.precision,
        script=WORKER,
    )


@cache
def reference(
    task: Path, precision: str, rows_per_step: int = ROWS_PER_STEP, targets: tuple[str, ...] = TARGETS
) -> History:
    """In float64, over the weights as `precision` stores them."""
    weights = torch.bfloat16 if precision == "bf16" else torch.float32
    return _judge(task, weights, torch.float64, rows_per_step, targets)


@cache
def bf16_tolerance(task: Path) -> Difference:
    """Three times what computing in bf16 costs: the plain reference in bf16, against itself in float64.

    The plain one rounds gradients where it computes them; a run rounds them again where it accumulates
    micro-batches and where it reduces over ranks, neither of which costs more than computing them did.
    """
    plain, exact = _judge(task, torch.bfloat16, torch.bfloat16), reference(task, "bf16")
    cost = compare(plain, exact)
    return Difference(3 * cost.loss, 3 * cost.grad_norm, FP32, 3 * cost.adapter)


def _judge(
    task: Path,
    weights: torch.dtype,
    arithmetic: torch.dtype,
    rows_per_step: int = ROWS_PER_STEP,
    targets: tuple[str, ...] = TARGETS,
) -> History:
    start = {name: tensor.to(weights) for name, tensor in initial_adapter(targets).items()}
    return reference_loop(task / "model", task / "rows.jsonl", start, rows_per_step, SEED, weights, arithmetic)


def initial_adapter(targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """What PEFT draws from the recipe's seed; nothing else of it is used."""
    base = AutoModelForCausalLM.from_pretrained(TINY)
    set_seed(SEED)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=list(targets)))
    return {short(name): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def short(name: str) -> str:
    """ "model.layers.0.mlp.up_proj.lora_A", out of PEFT's longer name."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


def history(run: Run) -> History:
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    adapter = {short(name): tensor.double() for name, tensor in saved.items()}
    return History(run.series("train/loss"), run.series("train/grad_norm"), run.series("train/lr"), adapter)


def compare(ours: History, judge: History) -> Difference:
    def relative(got: list[float], expected: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))

    assert ours.adapter.keys() == judge.adapter.keys()
    return Difference(
        loss=relative(ours.loss, judge.loss),
        grad_norm=relative(ours.grad_norm, judge.grad_norm),
        lr=max(abs(a - b) for a, b in zip(ours.lr, judge.lr, strict=True)) / max(judge.lr),
        adapter=max(float((ours.adapter[name] - t).norm() / t.norm()) for name, t in judge.adapter.items()),
    )


def all_cells() -> Iterable[Cell]:
    for config in STAGES:
        for processes in (1, 2):
            for accum in (1, 4):
                for checkpointing in ("none", "non_reentrant"):
                    yield Cell(config, processes, accum, checkpointing)


def bf16_cells() -> Iterable[Cell]:
    return (Cell(config, 2, accum, "non_reentrant", "bf16") for config in STAGES for accum in (1, 4))


def layout_cells() -> Iterable[Cell]:
    for config in STAGES:
        for checkpointing in ("none", "non_reentrant"):
            for layout in ("packed", "shared_prefix"):
                yield Cell(config, 2, 1, checkpointing, layout=layout)


def tolerance(cell: Cell, task: Path) -> Difference:
    return bf16_tolerance(task) if cell.precision == "bf16" else Difference(FP32, FP32, FP32, FP32)


def deepspeed_settings(run: Run) -> dict[str, Any]:
    """The resolved DeepSpeed configuration, without the batch's numbers, which stand in the table."""
    config = json.loads((run.folder / "deepspeed_config.json").read_text())
    return {key: value for key, value in config.items() if "batch" not in key and "accumulation" not in key}


def section(results: list[tuple[Cell, Run, Difference, Difference]], seconds: float) -> str:
    lines = [
        f"{len(results)} runs in {seconds / 60:.0f} minutes, each of 20 updates on {NUM_ROWS} rows, {ROWS_PER_STEP} a",
        f"step however they are cut up, the last five; the reference's learning rate ({PEAK:g}); a small Qwen2 with",
        "random weights, because of the trained tiny_base fp32 itself knows some rows' gradients to 3e-5 only. Each",
        "figure: the largest relative difference of all steps from [the reference loop](../tests/reference_loop.py),",
        "plain PyTorch in float64; for lr relative to the peak, for the adapter the largest of all tensors, in the",
        "2-norm.",
        "",
    ]
    for precision, title in (("no", "fp32"), ("bf16", "bf16")):
        chosen = [result for result in results if result[0].precision == precision]
        if not chosen:
            continue
        limit = chosen[0][3]
        limits = ", ".join(f"{name} {getattr(limit, name):.1e}" for name in FIGURES)
        good = sum(found.within(limit) for _, _, found, _ in chosen)
        lines += [f"### {title}: {good} of {len(chosen)} within {limits}", ""]
        if precision == "bf16":
            lines += [
                "The limit is three times the distance of the plain reference computed in bf16 from itself in float64,",
                "over the same bf16 weights: gradients are rounded where they are computed, and in a run again where",
                "micro-batches are accumulated and where ranks are reduced.",
                "",
            ]
        head = (
            "configuration",
            "processes",
            "accumulation",
            "checkpointing",
            "batching",
            "adapter",
            "optimizer",
            "accumulates in",
        )
        lines += [f"| {' | '.join((*head, *FIGURES))} |", "|---" * (len(head) + len(FIGURES)) + "|"]
        for cell, run, found, _ in chosen:
            facts = json.loads((run.folder / "engine.json").read_text())
            optimizer = " in ".join(dict.fromkeys((facts["optimizer"], facts["deepspeed_optimizer"])))
            values = (
                cell.config,
                cell.processes,
                cell.accum,
                cell.checkpointing,
                cell.layout,
                facts["adapter"],
                optimizer,
            )
            figures = [f"{getattr(found, name):.1e}" for name in FIGURES]
            lines.append(f"| {' | '.join(map(str, (*values, facts['accumulation'], *figures)))} |")
        lines.append("")
    lines += ["### DeepSpeed's configuration, resolved", "", "```"]
    shared: dict[str, list[str]] = {}
    for cell, run, _, _ in results:
        where = f"{cell.config} {'bf16' if cell.precision == 'bf16' else 'fp32'} on {cell.processes}"
        names = shared.setdefault(json.dumps(deepspeed_settings(run)), [])
        names += [where] if where not in names else []
    return "\n".join([*lines, *(f"{', '.join(names)}: {settings}" for settings, names in shared.items()), "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.equality", description=__doc__)
    parser.parse_args()
    results = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        (task := Path(name) / "task").mkdir()
        write_task(task)
        for cell in (*all_cells(), *layout_cells(), *bf16_cells()):
            run = run_cell(cell, task, Path(name) / str(cell))
            if run.code:
                sys.exit(f"{cell}:\n{run.output}")
            results.append((cell, run, compare(history(run), reference(task, cell.precision)), tolerance(cell, task)))
            print(cell, results[-1][2], flush=True)
        write_section("The equality matrix", "python -m tests.equality", section(results, time.monotonic() - begun))
    sys.exit(0 if all(found.within(limit) for _, _, found, limit in results) else 1)


if __name__ == "__main__":
    main()
