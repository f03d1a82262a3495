"""Measures what each setting of ZeRO changes: `python -m benchmarks.zero_settings`

For each value of a setting it starts one short training as a user does, and compares it with the default. Two processes
on CPUs train a Qwen2 of 61 M random weights. The command writes the section "Measured" of docs/zero.md, and takes about
ten minutes on two quiet cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.docs_section import write_section
from benchmarks.launching import CONFIGS, launch_command, run_to_end
from benchmarks.workload import TINY
from eval.reporting.markdown import markdown_table
from loop.measure.phase_names import STEP_PHASES
from loop.recipe import ROOT

COMMAND = "python -m benchmarks.zero_settings"
HIDDEN, INTERMEDIATE, LAYERS = 512, 2048, 16
STEPS, WARM_UP = 10, 3
EVERYTHING = 1_000_000_000  # DeepSpeed's default for two sizes, in elements; this model has fewer
SHARE = 4_100_000  # the share of this model that the default is of Qwen2.5-14B: 6.8 %
SMALL = 88_000  # elements; a sixteenth of the weights that are trained
HOST = {"device": "cpu", "pin_memory": False}
# With this the C library returns memory to the system as soon as it is freed: resident memory is memory in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

STAGES: dict[str, dict[str, Any]] = {
    "stage 2": {"stage": 2, "reduce_bucket_size": "auto"},
    "stage 3": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": SHARE,
        "stage3_max_reuse_distance": SHARE,
    },
}


@dataclass(frozen=True)
class Variant:
    """Describes a stage with one setting changed. A variant without a setting is the default of its stage."""

    stage: str
    setting: str = ""
    value: str = ""
    zero: Mapping[str, Any] = field(default_factory=dict)
    init: bool = True
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """Says what one run costs.

    `seconds` is the median of the steady steps. `collectives` maps each kind of collective to how many of them, and
    how many bytes in them, rank 0 sends in a step.
    """

    seconds: float
    peak_bytes: int  # the resident memory of rank 0 in forward, backward and update
    collectives: dict[str, tuple[float, float]]


def one(stage: str, setting: str, *values: Any) -> list[Variant]:
    """Returns one variant for each of `values` that `setting` takes."""
    return [Variant(stage, f"`{setting}`", f"{v:,}" if type(v) is int else json.dumps(v), {setting: v}) for v in values]


VARIANTS = [
    *one("stage 2", "overlap_comm", True),
    *one("stage 2", "contiguous_gradients", False),
    *one("stage 2", "reduce_scatter", False),
    *one("stage 2", "reduce_bucket_size", SMALL),
    *one("stage 2", "allgather_bucket_size", SMALL),
    *one("stage 2", "allgather_partitions", False),
    Variant("stage 2", "`offload_optimizer`", "cpu", {"offload_optimizer": HOST}),
    *one("stage 3", "overlap_comm", False),
    *one("stage 3", "contiguous_gradients", False),
    *one("stage 3", "reduce_scatter", False),
    *one("stage 3", "reduce_bucket_size", SMALL),
    *one("stage 3", "sub_group_size", SMALL),
    *one("stage 3", "stage3_prefetch_bucket_size", 0, 10_000_000),
    *one("stage 3", "stage3_max_live_parameters", 0, EVERYTHING),
    *one("stage 3", "stage3_max_reuse_distance", 0, EVERYTHING),
    *one("stage 3", "stage3_param_persistence_threshold", 0, 10 * HIDDEN),
    *one("stage 3", "stage3_gather_16bit_weights_on_model_save", True),
    Variant("stage 3", "`zero3_init_flag`", "false", init=False),
    Variant("stage 3", "`offload_optimizer`", "cpu", {"offload_optimizer": HOST}),
    Variant("stage 3", "`offload_param`", "cpu", {"offload_param": HOST}),
    Variant("stage 3", "both offloads", "cpu", {"offload_optimizer": HOST, "offload_param": HOST}),
    *(
        Variant("stage 3", "the recipe's `gradient_checkpointing`", kind, arguments=("--gradient_checkpointing", kind))
        for kind in ("reentrant", "none")
    ),
]


def write_task(folder: Path) -> None:
    """Writes a model with random weights to `folder`/model, and two rows for each step to `folder`/rows.jsonl."""
    set_seed(0)
    config = AutoConfig.from_pretrained(
        TINY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        layer_types=["full_attention"] * LAYERS,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    rows = json.loads((ROOT / "data" / "math" / "math_train_1798.json").read_text())[: 2 * STEPS]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def write_accel(variant: Variant, folder: Path) -> Path:
    """Writes the accelerate YAML of `variant` and the DeepSpeed JSON that it names; returns the YAML's path."""
    config = {
        "zero_optimization": STAGES[variant.stage] | dict(variant.zero),
        "bf16": {"enabled": True},
        "gradient_clipping": "auto",
    }
    (folder / "deepspeed.json").write_text(json.dumps(config))
    name = "zero3" if variant.stage == "stage 3" else "zero2"
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    init = variant.init and variant.stage == "stage 3"
    values["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": init}
    del values["mixed_precision"]  # the JSON names it
    (folder / "accel.yaml").write_text(yaml.safe_dump(values))
    return folder / "accel.yaml"


def run(variant: Variant, task: Path) -> Cost:
    """Trains `variant` on the model and the rows in `task`; ends this command when the training fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        command = [
            *(*launch_command(write_accel(variant, Path(name))), "loop/train.py", "--run_dir", str(folder)),
            *("--model.name_or_path", str(task / "model"), "--data.train_file", str(task / "rows.jsonl")),
            *("--data.validation_file", "null", "--epochs", "1", "--micro_batch_size", "1"),
            *("--rows_per_step", "null", "--tracker", "null"),
            *variant.arguments,
        ]
        done = run_to_end(command, GIVE_BACK)
        if done.code:
            sys.exit(f"{variant}:\n{done.output}")
        return cost(json.loads((folder / "usage.json").read_text()))


def cost(usage: dict[str, Any]) -> Cost:
    """Works out what a step of a run costs from the run's usage.json."""
    steps = usage["last_step"] - usage["first_step"]
    phases = usage["ranks"][0]["phases"]
    collectives: dict[str, tuple[float, float]] = {}
    for phase in STEP_PHASES:
        for kind, traffic in phases.get(phase, {}).get("collectives", {}).items():
            count, size = collectives.get(kind, (0.0, 0.0))
            collectives[kind] = (count + traffic["count"] / steps, size + traffic["bytes"] / steps)
    return Cost(
        seconds=median(usage["step_seconds"][WARM_UP:]),
        peak_bytes=max(phases[phase]["peak_bytes"] or 0 for phase in STEP_PHASES if phase != "data"),
        collectives=collectives,
    )


def order(stage: str) -> Iterator[Variant]:
    """Yields the variants of `stage` in the order in which they run.

    The default runs first, in the middle and last: how much its runs differ shows how steady the machine is.
    """
    changed = [variant for variant in VARIANTS if variant.stage == stage]
    middle = len(changed) // 2
    yield from (Variant(stage), *changed[:middle], Variant(stage), *changed[middle:], Variant(stage))


def table(results: Sequence[tuple[Variant, Cost]]) -> str:
    """Describes the default of one stage, followed by the table that compares its variants with the default."""
    defaults = [cost for variant, cost in results if not variant.setting]
    usual = Cost(
        seconds=median(cost.seconds for cost in defaults),
        peak_bytes=int(median(cost.peak_bytes for cost in defaults)),
        collectives=defaults[0].collectives,
    )
    times = [cost.seconds / usual.seconds for cost in defaults]
    peaks = [cost.peak_bytes - usual.peak_bytes for cost in defaults]
    said = (
        f"The default takes {usual.seconds:.2f} s a step and {usual.peak_bytes / 1e6:,.0f} MB at its peak, "
        f"{count_and_size(usual)}. Its three runs lie between {min(times):.2f} and {max(times):.2f} times "
        f"that in time, and within {(max(peaks) - min(peaks)) / 1e6:.0f} MB."
    )
    rows = []
    for variant, cost in results:
        if variant.setting:
            count, size = total(cost)
            relative, more = cost.seconds / usual.seconds, cost.peak_bytes - usual.peak_bytes
            seen = changes(cost, usual)
            seen += [f"time × {relative:.2f}"] * (not min(times) <= relative <= max(times))
            seen += [f"memory {more / 1e6:+,.0f} MB"] * (not min(peaks) <= more <= max(peaks))
            cells = [variant.setting, variant.value, f"{relative:.2f}", f"{more / 1e6:+,.0f}", f"{count:,.0f}"]
            rows.append([*cells, f"{size / 1e6:,.0f}", "; ".join(seen) or "nothing"])
    head = ["setting", "value", "step time", "peak memory, MB", "collectives a step", "MB a step", "differs in"]
    return f"{said}\n\n{markdown_table(head, rows)}"


def total(cost: Cost) -> tuple[float, float]:
    """Returns how many collectives a step makes, and how many bytes they send."""
    return sum(count for count, _ in cost.collectives.values()), sum(size for _, size in cost.collectives.values())


def count_and_size(cost: Cost) -> str:
    parts = [f"{count:,.0f} {kind} of {size / 1e6:,.1f} MB" for kind, (count, size) in sorted(cost.collectives.items())]
    return f"with {', '.join(parts)} a step"


def changes(cost: Cost, usual: Cost) -> list[str]:
    """Names each kind of collective whose number or size differs between `cost` and `usual`."""

    def shown(of: Cost, kind: str) -> tuple[str, str]:
        count, size = of.collectives.get(kind, (0.0, 0.0))
        return f"{count:,.0f}", f"{size / 1e6:,.1f}"

    kinds = sorted(cost.collectives.keys() | usual.collectives.keys())
    pairs = [(kind, shown(usual, kind), shown(cost, kind)) for kind in kinds]
    return [
        f"{kind} {before[0]} → {after[0]}, {before[1]} → {after[1]} MB"
        for kind, before, after in pairs
        if before != after
    ]


def main() -> None:
    argparse.ArgumentParser(prog=COMMAND, description=__doc__).parse_args()
    begun = time.monotonic()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name))
        for stage in STAGES:
            results = []
            for variant in order(stage):
                results.append((variant, run(variant, Path(name))))
                print(stage, variant.setting or "default", variant.value, results[-1][1], flush=True)
            lines += ["", f"### {stage.capitalize()}", "", table(results)]
    minutes = (time.monotonic() - begun) / 60
    about = [
        f"Two processes, each one row a step; a Qwen2 with {LAYERS} layers of hidden size {HIDDEN} (61 M random",
        "weights, bf16), LoRA of rank 8, non-reentrant checkpointing. Step time: median of the last",
        f"{STEPS - WARM_UP} of {STEPS} steps, relative to the default. Peak memory: resident host memory of rank 0",
        "over forward, backward and update, difference from the default's median; of it about 600 MB are Python",
        "and its libraries. Collectives: of rank 0, bytes of whole tensors. In the last column is what lies",
        "outside the default's own three runs. At stage 3 the default has live parameters and reuse distance",
        f"scaled to the 6.8 % that {EVERYTHING:,} are of Qwen2.5-14B ({SHARE:,}). All took {minutes:.0f} minutes.",
    ]
    write_section("Measured", COMMAND, "\n".join([*about, *lines]), "zero.md")


if __name__ == "__main__":
    main()
