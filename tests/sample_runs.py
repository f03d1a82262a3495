"""Writes folders of runs as training, evaluation and comparison write them, with numbers that are easy to check."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.reporting.evaluation import Evaluation
from eval.reporting.run_summary import Run

CONFIGURATIONS = (
    "one_process",
    "reference-stage0",
    "reference-stage1",
    "reference-stage2_offload",
    "reference-stage3_offload",
    "zero2",
    "zero3",
)
WARM_UP = [9.0, 9.0, 9.0]
STEADY = [1.0] * 5 + [2.0] * 7 + [4.0] * 5  # 17 steps, whose quartiles are 1, 2 and 4
SAMPLES = """\
seconds,machine_cpu_percent,tree_cpu_percent,machine_used_bytes,tree_rss_bytes,tree_shared_bytes,tree_swap_bytes,\
rank0_rss_bytes,rank1_rss_bytes
0.5,10.0,100.0,1000000000,300000000,5000000,,200000000,
1.0,20.0,100.0,1500000000,900000000,7000000,,400000000,350000000
1.5,60.0,400.0,1200000000,800000000,6000000,,300000000,360000000
"""


def collectives(**sizes: float) -> dict[str, Any]:
    return {"collectives": {kind: {"count": 1, "bytes": size} for kind, size in sizes.items()}}


def usage(steady: Sequence[float] = STEADY, **changes: Any) -> dict[str, Any]:
    ranks = [
        {
            "rank": rank,
            "pid": 100 + rank,
            "device": f"cpu x86, {rank}",
            "phases": {
                "load": {"seconds": 1.0, "count": 1, "peak_bytes": load, **collectives(all_gather=10**12)},
                "forward": {"seconds": 1.0, "count": 1, "peak_bytes": forward, **collectives(all_gather=gathered)},
                "backward": {
                    **{"seconds": 1.0, "count": 1, "peak_bytes": None},
                    **collectives(reduce_scatter=scattered, all_gather=20_000_000),
                },
            },
        }
        for rank, load, forward, gathered, scattered in (
            (0, 500_000_000, 700_000_000, 20_000_000, 40_000_000),
            (1, 450_000_000, 800_000_000, 40_000_000, 10_000_000),
        )
    ]
    steps = [*WARM_UP, *steady]
    return {
        "engine": "DeepSpeed ZeRO-3",
        "precision": "bf16",
        "device_type": "cpu",
        "memory_of": "resident host memory",
        "first_step": 0,
        "last_step": len(steps),
        "wall_seconds": 70.0,
        "step_seconds": steps,
        "rows": 320,
        "tokens": 6400,
        "label_tokens": 3200,
        "model_flops": 4_000_000_000,
        "parameters": 1000,
        "trainable": 10,
        "ranks": ranks,
        **changes,
    }


def write_run(folder: Path, usage: Mapping[str, Any] | None = None) -> None:
    folder.mkdir(parents=True)
    losses = [{"step": step, "train/loss": 8.0 / step, "train/lr": 0.1, "train/grad_norm": 1.0} for step in (1, 2, 4)]
    losses[-1]["val/loss"] = 2.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    (folder / "recipe.yaml").write_text("model: {name_or_path: tiny}\noptim: {lr: 0.001}\n")
    (folder / "versions.json").write_text('{"torch": "2.13.0"}')
    (folder / "deepspeed_config.json").write_text('{"zero_optimization": {"stage": 3}}')
    if usage is not None:
        (folder / "usage.json").write_text(json.dumps(usage))


def write_evaluation(folder: Path, answer: str = "王大丫丫的回答是--->1 + 1", base: bool = True) -> None:
    score = {"prefix_rate": 1.0, "seconds": 2.0, "tokens_per_second": 50.0, "peak_load_bytes": 10**8}
    scores = {"base": score | {"accuracy": 0.0}} if base else {}
    (folder / "eval.json").write_text(json.dumps(scores | {"tuned": score | {"accuracy": 0.975}}))
    lines = [
        {
            "model": "tuned",
            "instruction": "5=",
            "answer": answer,
            "prefix": True,
            "right": False,
            "reason": "1 + 1 = 2",
        },
        {"model": "tuned", "instruction": "6=", "answer": "right one", "prefix": True, "right": True, "reason": ""},
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def judged() -> dict[str, Any]:
    """Returns the content of an eval.json with a judge: one of five right before the training, three after it."""
    score = {"seconds": 2.0, "tokens_per_second": 50.0, "peak_load_bytes": 10**8, "verified": 0, "different": 0}
    return {
        "asked": {"data": "held_out.jsonl", "num_questions": 5, "judges": ["exact"], "max_new_tokens": 64},
        "scores": {
            "base": {"accuracy": 0.2, "interval": [0.036, 0.624], "accuracies": {"exact": 0.2}, **score},
            "tuned": {"accuracy": 0.6, "interval": [0.231, 0.882], "accuracies": {"exact": 0.6}, **score},
        },
        "comparisons": {
            "exact": {"difference": 0.4, "interval": [0.02, 0.78], "p_value": 0.03, "better": [1, 2, 3], "worse": [4]}
        },
    }


def write_judged_evaluation(folder: Path, copies: int = 1, words: int = 1) -> None:
    """Writes an evaluation of five questions: three became better, one worse, one is wrong both times.

    The tuned model's lines are in reverse order. Of `copies` there are more rows alike, and texts are repeated `words`
    times.
    """
    (folder / "eval.json").write_text(json.dumps(judged()))
    lines = []
    for row in range(5 * copies):
        of: dict[str, Any] = {
            "row": row,
            "turn": 1,
            "instruction": f"question {row}",
            "expected": f"expected {row} " * words,
        }
        for model, right in (("base", row % 5 == 4), ("tuned", row % 5 in (1, 2, 3))):
            answer = f"{model} {row} " * words
            reason = "" if right else f"{row} is not expected" if row % 5 else "no answer"
            verdict = {"right": right, "score": float(right), "reason": reason}
            lines.append(
                {"model": model, **of, "answer": answer.strip(), "expected": of["expected"].strip(), **verdict}
            )
    lines = [line for line in lines if line["model"] == "base"] + [
        line for line in lines[::-1] if line["model"] == "tuned"
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_configuration(folder: Path, usage: Mapping[str, Any] | None, wall_seconds: float, **result: Any) -> None:
    write_run(folder / "run", usage)
    (folder / "samples.csv").write_text(SAMPLES)
    outcome = {
        **{"name": folder.name, "accel_config": f"accel_configs/{folder.name}.yaml", "status": "finished"},
        **{"reason": None, "wall_seconds": wall_seconds, "num_processes": 2, "micro_batch_size": 16},
        **{"grad_accum_steps": 1, "sampling": {"samples": 3, "cpu_seconds": 0.1, "share_of_a_core": 0.0042}},
        **result,
    }
    (folder / "result.json").write_text(json.dumps(outcome))


def write_comparison(folder: Path, names: Sequence[str] = CONFIGURATIONS, **changes: Any) -> None:
    """Writes only comparison.json, which describes a machine with four cores."""
    folder.mkdir(parents=True, exist_ok=True)
    comparison = {
        **{"recipe": "tiny", "config": None, "overrides": ["--epochs", "1"], "interval": 0.5, "timeout": 100.0},
        "accel_configs": {name: f"accel_configs/{name}.yaml" for name in names},
        "machine": {"cpu": "A CPU", "cores": 4, "memory_bytes": 10**10, "gpus": []},
        **{"matmul_peak_flops": {"cpu": 4e8}, "versions": {"torch": "2.13.0"}, "date": "2026-11-25"},
        **changes,
    }
    (folder / "comparison.json").write_text(json.dumps(comparison))


def run(
    name: str, device: str = "cuda", stage: int | None = None, offloaded: Sequence[str] = (), **figures: Any
) -> Run:
    """Returns a run with these figures and no other data."""
    return Run(
        name=name,
        result={},
        usage={"device_type": device},
        memory_of="CUDA allocator",
        stage=stage,
        offloaded=list(offloaded),
        recipe={},
        versions={},
        evaluation=Evaluation(),
        answers=[],
        metrics=[],
        samples={},
        figures=figures,
    )
