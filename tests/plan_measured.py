"""Holds the plan against measurement: `python -m tests.plan_measured` writes its section of docs/plan.md.

Six configurations on one and on two processes train a Qwen2 of 315 M parameters with random weights. What a rank holds
during an update is counted tensor by tensor (tests/distributed/memory_worker.py) and has to be the plan's to the byte;
its peak memory within a tenth. On one NVIDIA GPU of at least 75 GB also the shape of Qwen2.5-14B.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from loop.model.build import build_data, build_tokenizer
from loop.plan import model_without_weights
from loop.planning.estimate import CUDA_CONTEXT, Estimate, Hardware, Subject, Work, estimate
from loop.planning.launch_file import read_launch
from loop.recipe import ROOT, Recipe, parse_recipe
from tests.distributed.launching import CONFIGS, Run, launch
from tests.guarantees import write_section

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
WORKER = ROOT / "tests" / "distributed" / "memory_worker.py"
TINY = ROOT / "data" / "tiny_base"
SHAPE_14B = ROOT / "loop" / "shapes" / "Qwen2.5-14B-Instruct"
EXACT = ("base", "adapters", "gradients", "optimizer")
# So that memory a process has let go is not resident any more: glibc keeps it for later otherwise.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True)
class Cell:
    config: str
    processes: int
    checkpointing: str = "non_reentrant"


@dataclass(frozen=True)
class Result:
    cell: Cell
    exact: dict[str, tuple[int, int]]  # predicted, measured, of every rank the same
    gathered: tuple[int, int]  # bytes of a step's all-gathers in forward and backward
    peak: tuple[int, int]  # bytes beyond the process's own

    @property
    def error(self) -> float:
        return self.peak[0] / self.peak[1] - 1


def random_model(folder: Path, config: Any) -> Path:
    """A checkpoint of that shape, with random weights in bf16 and the embedded tokenizer."""
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def middling() -> Any:
    """315 M parameters, nearly all of them in the layers."""
    config = AutoConfig.from_pretrained(TINY)
    layers = 20
    config.update(
        {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "layer_types": ["full_attention"] * layers},
        }
    )
    return config


def write_rows(folder: Path, count: int = 32) -> Path:
    lines = (ROOT / "data" / "math" / "math_train_1798.json").read_text().splitlines()[1:]
    (folder / "rows.jsonl").write_text("\n".join(line.rstrip(",") for line in lines[:count]))
    return folder / "rows.jsonl"


def arguments(model: Path, rows: Path, cell: Cell) -> list[str]:
    return [
        *("--model.name_or_path", str(model), "--data.train_file", str(rows), "--data.validation_file", "null"),
        *(
            "--micro_batch_size",
            "4",
            "--epochs",
            "1",
            "--save_every",
            "1000",
            "--tracker",
            "null",
            "--batching",
            "padded",
        ),
        *("--gradient_checkpointing", cell.checkpointing, "--rows_per_step", "null"),
    ]


@cache
def subject(model: Path, rows: Path, checkpointing: str) -> Subject:
    recipe = recipe_of(model, rows, checkpointing)
    examples = build_data(recipe, build_tokenizer(recipe)).train
    return Subject(recipe, model_without_weights(recipe, "bf16"), Work(examples, "padded", real=True))


def recipe_of(model: Path, rows: Path, checkpointing: str) -> Recipe:
    return parse_recipe(arguments(model, rows, Cell("", 1, checkpointing)))[1]


def plan(model: Path, rows: Path, cell: Cell, configs: Path = CONFIGS) -> Estimate:
    planned = subject(model, rows, cell.checkpointing)
    launched = read_launch(str(configs / f"{cell.config}.yaml"), planned.recipe, planned.model, cell.processes)
    if not torch.cuda.is_available() and cell.processes == 1 and launched.deepspeed:
        # Its device is the host, and nobody else has a share: a weight is used where it lies, and nothing is copied.
        launched.deepspeed["zero_optimization"].pop("offload_param", None)
    return estimate(planned, launched, Hardware())


def measure(
    model: Path, rows: Path, cell: Cell, folder: Path, precision: str | None = None, env: dict[str, str] | None = None
) -> Run:
    """Trains a cell. Peaks of resident memory need env=MALLOC; what a rank holds is the same without."""
    run = launch(
        CONFIGS / f"{cell.config}.yaml",
        *arguments(model, rows, cell),
        folder=folder,
        processes=cell.processes,
        precision=precision,
        script=WORKER,
        env=env,
    )
    assert run.code == 0, run.output
    return run


def compare(planned: Estimate, run: Run, cell: Cell, overhead: int = 0) -> Result:
    """On a CPU what is planned for the GPU and for the host lies in the same memory, beside `overhead`."""
    ranks = json.loads((run.folder / "held.json").read_text())
    on_cpu = not torch.cuda.is_available()
    exact = {}
    for key in EXACT:
        predicted = getattr(planned.device, key) + on_cpu * getattr(planned.on_host, key)
        exact[key] = (predicted, max((rank.get(key, 0) for rank in ranks), key=lambda found: abs(found - predicted)))
    gathered = (planned.gathered_bytes, ranks[0]["gathered"])
    return Result(cell, exact, gathered, (predicted_peak(planned), measured_peak(run) - overhead))


def predicted_peak(planned: Estimate) -> int:
    on_host = 0 if torch.cuda.is_available() else planned.on_host.total
    return planned.device_peak - int(CUDA_CONTEXT) + on_host


def measured_peak(run: Run) -> int:
    phases = json.loads((run.folder / "usage.json").read_text())["ranks"][0]["phases"]
    return max(int(phases[phase]["peak_bytes"]) for phase in ("forward", "backward", "update"))


def process_overhead(rows: Path, cell: Cell, folder: Path) -> int:
    """Resident bytes of Python, its libraries and their caches: what a model of 2 MB leaves of a process's peak."""
    if torch.cuda.is_available():
        return 0  # CUDA's allocator counts tensors only
    return measured_peak(measure(TINY, rows, cell, folder, env=MALLOC)) - predicted_peak(plan(TINY, rows, cell))


def cells() -> list[Cell]:
    every = [Cell(config, processes) for config in STAGES for processes in (1, 2)]
    return [*every, Cell("zero0", 1, "none"), Cell("zero3", 2, "none")]


def section(results: list[Result], about: str) -> str:
    exact = sum(predicted == found for result in results for predicted, found in result.exact.values())
    within = sum(abs(result.error) <= 0.1 for result in results)
    lines = [
        about,
        "",
        f"{exact} of {len(results) * len(EXACT)} sizes of a rank's tensors are exact (predicted = measured, in bytes); "
        f"{within} of {len(results)} peaks are within 10 %. MB are 10^6 bytes, predicted | measured where they differ.",
        "",
        f"| configuration | processes | checkpointing | {' | '.join(EXACT)} | gathered a step | peak, predicted | "
        "peak, measured | error |",
        "|---" * (7 + len(EXACT)) + "|",
    ]

    def both(pair: tuple[int, int]) -> str:
        one, other = (f"{value / 1e6:,.3f}" for value in pair)
        return one if pair[0] == pair[1] else f"{one} \\| {other}"

    for result in results:
        cell = result.cell
        row = [cell.config, str(cell.processes), cell.checkpointing, *(both(result.exact[key]) for key in EXACT)]
        row += [both(result.gathered), *(f"{value / 1e6:,.0f}" for value in result.peak), f"{result.error:+.1%}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.plan_measured", description=__doc__)
    parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_rows(folder)
        on_gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 75e9
        if on_gpu:
            model = random_model(folder / "model", AutoConfig.from_pretrained(SHAPE_14B))
            chosen = [Cell("zero0", 1), Cell("zero3_offload", 1)]
        else:
            model = random_model(folder / "model", middling())
            chosen = cells()
        results = []
        for cell in chosen:
            name = f"{cell.config}-{cell.processes}-{cell.checkpointing}"
            overhead = process_overhead(rows, cell, folder / f"{name}-tiny")
            run = measure(model, rows, cell, folder / name, env=MALLOC)
            results.append(compare(plan(model, rows, cell), run, cell, overhead))
            print(results[-1], f"{results[-1].error:+.1%}", flush=True)
    what = "Qwen2.5-14B's shape" if on_gpu else "A Qwen2 of 315 M parameters"
    memory = "CUDA's allocator" if on_gpu else "resident memory, less what the same configuration takes for itself"
    about = f"{what} with random weights in bf16, 4 rows a micro-batch; {len(results)} runs in "
    about += f"{(time.monotonic() - begun) / 60:.0f} minutes. Peaks are of {memory}, on rank 0."
    title = "Held against measurement on a GPU" if on_gpu else "Held against measurement on a CPU"
    write_section(title, "python -m tests.plan_measured", section(results, about), "plan.md")


if __name__ == "__main__":
    main()
