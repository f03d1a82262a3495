"""One contender: python -m benchmarks.train_worker KIND FOLDER STEPS CHECKPOINTING [--KEY VALUE …]

KIND is ours, bare, trainer, trl or trl_packing; FOLDER a model with rows.json; STEPS those of a turn.
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
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.turns import Turns
from benchmarks.workload import load_rows
from data.batch import epoch_order, windows
from data.examples import Example
from loop.measure.phases import ACCOUNT, STEP
from loop.model.build import Data, adapt, set_checkpointing, set_layout
from loop.recipe import Recipe, parse_recipe
from loop.step import summed_nll

SOURCE, TARGET = 30, 20  # tokens the reference pads prompt and answer to; one more of padding stands behind
PAD = 0
LOSSES = 16  # steps of which the mean is shown
RECIPE: Recipe = parse_recipe([])[1]


class TakesTurns(TrainerCallback):
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
    import loop.train
    from loop.step import train_step

    losses = deque[float](maxlen=LOSSES)

    def step(window: Any, *rest: Any) -> Any:
        turns.before_step()
        result = train_step(window, *rest)
        losses.append(float(result.nlls.sum()) / window.num_label_tokens)
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
                *("--model.name_or_path", str(folder), "--gradient_checkpointing", checkpointing, "--epochs", "50"),
                *(
                    "--rank_timeout",
                    "100000",
                    "--optim.lr",
                    "1e-4",
                    "--tracker",
                    "null",
                    "--run_dir",
                    f"{runs}/run",
                    "--data.max_length",
                    "9999",
                ),
                *more,
            ]
        )


def bare(folder: Path, turns: Turns, checkpointing: str, more: list[str]) -> None:
    """Forward, backward and AdamW on our batches with our model, and nothing else of our loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    model.config.use_cache = False
    set_layout(model, "shared_prefix")
    set_checkpointing(model, checkpointing)
    model = adapt(model, lora(), autocast_adapter_dtype=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    examples = load_rows(folder)
    for epoch in range(50):
        for window in windows(examples, epoch_order(len(examples), 42, epoch), 16, 1, 1, 0, "shared_prefix", PAD):
            turns.before_step()
            with torch.autocast(device, torch.bfloat16):
                nll = summed_nll(model, window.micro_batches[0].to(torch.device(device)))
            (nll / window.num_label_tokens).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.after_step(loss=nll.item() / window.num_label_tokens)


def cost_of_step() -> dict[str, float]:
    """This rank's so far: collectives and their bytes a step, peak bytes of a step's phases."""
    costs = [ACCOUNT.costs[phase] for phase in STEP if phase in ACCOUNT.costs]
    traffic = [each for cost in costs for each in cost.collectives.values()]
    steps = len(ACCOUNT.step_seconds) + 1
    return {
        "collectives": sum(each.count for each in traffic) / steps,
        "collective_bytes": sum(each.bytes for each in traffic) / steps,
        "peak_bytes": max(cost.peak_bytes or 0 for cost in costs),
    }


def lora() -> LoraConfig:
    return LoraConfig(
        r=RECIPE.lora.rank,
        lora_alpha=int(RECIPE.lora.alpha),
        lora_dropout=RECIPE.lora.dropout,
        target_modules=list(RECIPE.lora.target_modules),
        task_type="CAUSAL_LM",
    )


def arguments(checkpointing: str, out: str) -> dict[str, Any]:
    """What both trainers are told, as the reference's own run."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": 16,
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
    """Rows of 51 tokens, or of more where prompts or answers are longer than the reference's: their padding is in the
    labels, and their attention mask has a hole."""
    source = max(SOURCE, *(len(example.prompt_ids) for example in examples))
    target = max(TARGET, *(len(example.answer_ids) for example in examples))
    rows = []
    for example in examples:
        prompt, answer = source - len(example.prompt_ids), target - len(example.answer_ids)
        ids = [*example.prompt_ids, *[PAD] * prompt, *example.answer_ids, *[PAD] * answer, PAD]
        mask = [1] * len(example.prompt_ids) + [0] * prompt + [1] * len(example.answer_ids) + [0] * answer + [1]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": [-100] * source + ids[source:]})
    return rows


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trainer(folder: Path, turns: Turns, checkpointing: str, more: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as out:
        Trainer(
            model=get_peft_model(model, lora()),
            args=TrainingArguments(**arguments(checkpointing, out)),
            train_dataset=as_reference(load_rows(folder)),
            data_collator=stacked,
            callbacks=[TakesTurns(turns)],
        ).train()


def trl(folder: Path, turns: Turns, checkpointing: str, more: list[str], packing: bool = False) -> None:
    library: Any = importlib.import_module("trl")  # an extra, which not everybody has
    datasets: Any = importlib.import_module("datasets")
    rows = [
        {
            "input_ids": example.prompt_ids + example.answer_ids,
            "completion_mask": [0] * len(example.prompt_ids) + [1] * len(example.answer_ids),
        }
        for example in load_rows(folder)
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    how: dict[str, Any] = {
        "completion_only_loss": True,
        "packing": packing,
        "max_length": 16 * longest if packing else longest,
    }
    if packing:  # as many rows as a micro-batch has, in one
        how["per_device_train_batch_size"] = 1
    with tempfile.TemporaryDirectory() as out:
        library.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            args=library.SFTConfig(**(arguments(checkpointing, out) | how)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora(),
            callbacks=[TakesTurns(turns)],
        ).train()


KINDS = {"ours": ours, "bare": bare, "trainer": trainer, "trl": trl, "trl_packing": partial(trl, packing=True)}


def main(argv: list[str]) -> None:
    kind, folder, steps, checkpointing, *more = argv
    KINDS[kind](Path(folder), Turns(int(steps)), checkpointing, more)  # type: ignore[operator]


if __name__ == "__main__":
    main(sys.argv[1:])
