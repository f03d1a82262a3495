"""Runs one contender of the training: python -m benchmarks.train_worker KIND FOLDER STEPS CHECKPOINTING [--KEY VALUE …]

KIND is ours, bare, trainer, trl, trl_packing or trl_liger. FOLDER has a model and rows.json. A turn has STEPS steps.
"""

import importlib
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.turns import Turns
from benchmarks.workload import load_rows, lora_config
from data.batch import epoch_order, windows
from data.examples import Example
from loop.measure.phase_names import STEP_PHASES
from loop.measure.phases import ACCOUNT
from loop.model.build import Data, adapt, set_checkpointing, set_layout
from loop.step import summed_nll

SOURCE, TARGET = 30, 20  # tokens to which the reference pads prompt and answer; one more padding token follows
PAD = 0
LOSSES = 16  # the loss that a contender tells is the mean of its last 16 steps


class TakesTurns(TrainerCallback):
    """Makes a HF Trainer, or a trainer derived from it, wait for its turns."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.losses = turns, deque[float](maxlen=LOSSES)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.before_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self.turns.after_step(loss=mean_of(self.losses), peak_bytes=peak)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def mean_of(losses: deque[float]) -> float:
    return sum(losses) / len(losses) if losses else float("nan")


def ours(folder: Path, turns: Turns, checkpointing: str, more: list[str]) -> None:
    """Runs our whole loop, with its rows taken from `folder`."""
    import loop.train
    from loop.step import train_step

    losses = deque[float](maxlen=LOSSES)

    def step(window: Any, *rest: Any) -> Any:
        assert len(window.micro_batches) == 1, "the figures count one micro-batch a step"
        turns.before_step()
        result = train_step(window, *rest)
        losses.append(float(result.nlls.sum()) / window.label_weight)
        turns.after_step(loss=mean_of(losses), **cost_of_step())
        return result

    def data(*_: Any) -> Data:
        return Data(load_rows(folder), [], PAD)

    with (
        patch("loop.train.build_data", data),
        patch("loop.train.train_step", step),
        tempfile.TemporaryDirectory() as runs,
    ):
        loop.train.main(
            [
                *("--model.name_or_path", str(folder), "--data.max_length", "9999", "--epochs", "50"),
                *("--gradient_checkpointing", checkpointing, "--optim.lr", "1e-4", "--rank_timeout", "100000"),
                *("--rows_per_step", "null", "--tracker", "null", "--run_dir", f"{runs}/run"),
                *more,
            ]
        )


def bare(folder: Path, turns: Turns, checkpointing: str, more: list[str]) -> None:
    """Runs forward, backward and AdamW with our model on our batches, and nothing else of our loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    model.config.use_cache = False
    set_layout(model, "shared_prefix")
    set_checkpointing(model, checkpointing)
    model = adapt(model, lora_config(), autocast_adapter_dtype=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    examples = load_rows(folder)
    for epoch in range(50):
        for window in windows(examples, epoch_order(len(examples), 42, epoch), 16, 1, 1, 0, "shared_prefix", PAD):
            turns.before_step()
            with torch.autocast(device, torch.bfloat16):
                nll = summed_nll(model, window.micro_batches[0].to(torch.device(device)))
            (nll / window.label_weight).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.after_step(loss=nll.item() / window.label_weight)


def cost_of_step() -> dict[str, Any]:
    """Returns what this rank's steps have cost so far: collectives and their bytes a step, the peak bytes, and the
    seconds of each phase of a step."""
    costs = [ACCOUNT.costs[phase] for phase in STEP_PHASES if phase in ACCOUNT.costs]
    traffic = [each for cost in costs for each in cost.collectives.values()]
    steps = len(ACCOUNT.step_seconds) + 1
    return {
        "collectives": sum(each.count for each in traffic) / steps,
        "collective_bytes": sum(each.bytes for each in traffic) / steps,
        "peak_bytes": max(cost.peak_bytes or 0 for cost in costs),
        "phases": {name: ACCOUNT.costs[name].seconds / steps for name in STEP_PHASES if name in ACCOUNT.costs},
    }


def rows_at_once(more: Sequence[str]) -> int:
    """Returns the rows of a step, which are the reference's unless an option says otherwise."""
    return int(more[more.index("--micro_batch_size") + 1]) if "--micro_batch_size" in more else 16


def arguments(checkpointing: str, out: str, more: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of both trainers, which are those of the reference's own run."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": rows_at_once(more),
        "num_train_epochs": 50,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.1,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": checkpointing != "none",
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing != "none" else None,
    }


def as_reference(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Pads `examples` as the reference does: the labels contain padding, and the attention mask has a hole.

    A row has 51 tokens, or more where prompts or answers are longer than the reference's.
    """
    source = max(SOURCE, *(len(example.prompt_ids) for example in examples))
    target = max(TARGET, *(len(example.label_ids) for example in examples))
    rows = []
    for example in examples:
        prompt, answer = source - len(example.prompt_ids), target - len(example.label_ids)
        ids = [*example.prompt_ids, *[PAD] * prompt, *example.label_ids, *[PAD] * answer, PAD]
        mask = [1] * len(example.prompt_ids) + [0] * prompt + [1] * len(example.label_ids) + [0] * answer + [1]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": [-100] * source + ids[source:]})
    return rows


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trainer(folder: Path, turns: Turns, checkpointing: str, more: list[str]) -> None:
    """Trains with HF Trainer in the reference's way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as out:
        Trainer(
            model=get_peft_model(model, lora_config()),
            args=TrainingArguments(**arguments(checkpointing, out, more)),
            train_dataset=as_reference(load_rows(folder)),
            data_collator=stacked,
            callbacks=[TakesTurns(turns)],
        ).train()


def trl(
    folder: Path, turns: Turns, checkpointing: str, more: list[str], packing: bool = False, liger: bool = False
) -> None:
    """Trains with TRL's SFTTrainer; `packing` puts as many rows as a micro-batch has into one row, and `liger` takes
    the kernels of the package liger-kernel."""
    library: Any = importlib.import_module("trl")  # it comes with the extra `bench`, which not everybody installs
    datasets: Any = importlib.import_module("datasets")
    rows = [
        {
            "input_ids": example.ids,
            "completion_mask": [0] * len(example.prompt_ids) + [1] * len(example.label_ids),
        }
        for example in load_rows(folder)
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    how: dict[str, Any] = {
        "completion_only_loss": True,
        "packing": packing,
        "max_length": rows_at_once(more) * longest if packing else longest,
        "use_liger_kernel": liger,
    }
    if packing:  # the one row of a micro-batch holds 16 of ours
        how["per_device_train_batch_size"] = 1
    with tempfile.TemporaryDirectory() as out:
        library.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            args=library.SFTConfig(**(arguments(checkpointing, out, more) | how)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora_config(),
            callbacks=[TakesTurns(turns)],
        ).train()


KINDS = {
    "ours": ours,
    "bare": bare,
    "trainer": trainer,
    "trl": trl,
    "trl_packing": partial(trl, packing=True),
    "trl_liger": partial(trl, liger=True),
}


def main(argv: list[str]) -> None:
    kind, folder, steps, checkpointing, *more = argv
    KINDS[kind](Path(folder), Turns(int(steps)), checkpointing, more)  # type: ignore[operator]


if __name__ == "__main__":
    main(sys.argv[1:])
