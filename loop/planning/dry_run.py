"""Shows what a training would do without starting it: rows with their masks, learning rates, contradictions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.errors import UserError
from data.examples import Example
from data.rows import count_rows
from data.shown import shown, summary
from loop.batch_arithmetic import warmup_steps
from loop.model.build import Data, build_data, build_lr_scheduler, build_tokenizer
from loop.model.limits import check_limits
from loop.recipe import Recipe, data_files, find_data, find_model
from loop.saving.run_folder import check_run_folder

SHOWN = 5  # rows


@dataclass
class Findings:
    """What a plan has found. `problems` would keep a training from starting; `notes` are worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Does `action` and returns its result. A UserError becomes a problem, and the result is None."""
        try:
            return action()
        except UserError as error:
            self.problems.append(str(error))
            return None


def open_tokenizer(recipe: Recipe, found: Findings) -> PreTrainedTokenizerBase | None:
    """Opens the tokenizer of a model folder, or one that was downloaded before: a plan uses no network."""
    name = found.attempt(lambda: find_model(recipe.model.name_or_path))
    if name is None:
        return None
    if not Path(name).is_dir():
        try:
            AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:  # transformers raises many kinds for files that are not there
            found.notes.append(
                f"no tokenizer of {name} on this machine: every row is taken for {recipe.data.max_length} tokens "
                f"(data.max_length), and rows are not shown. For real lengths: hf download {name} --include '*.json'"
            )
            return None
    tokenizer: PreTrainedTokenizerBase | None = found.attempt(lambda: build_tokenizer(recipe))
    return tokenizer


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, found: Findings) -> Data | None:
    """Reads and tokenizes both files. Without a tokenizer the files are only checked, and the result is None."""
    if tokenizer is not None:
        data: Data | None = found.attempt(lambda: build_data(recipe, tokenizer))
        return data
    for file in (*data_files(recipe.data.train_file), *data_files(recipe.data.validation_file)):
        found.attempt(partial(count_rows, find_data(file), recipe.data.columns))
    return None


def contradictions(recipe: Recipe, data: Data | None, model: Any, steps: int, rows: int, found: Findings) -> None:
    """Adds to `found` the problems that no single value shows. `steps` are those of the whole run, `rows` the training
    rows."""
    if data and (warning := found.attempt(lambda: check_limits(model.get_base_model(), [data.train, data.validation]))):
        found.notes.append(f"{warning}.")
    for key, value in (
        ("log_every", recipe.log_every),
        ("save_every", recipe.save_every),
        ("max_steps", recipe.max_steps),
    ):
        if value is not None and value > steps:
            found.notes.append(f"{key} is {value}, but there are only {steps} steps.")
    if recipe.micro_batch_size != "auto" and recipe.micro_batch_size > rows:
        found.notes.append(f"micro_batch_size is {recipe.micro_batch_size}, but there are only {rows} rows.")
    if data and data.validation and (both := set(map(key_of, data.train)) & set(map(key_of, data.validation))):
        found.notes.append(f"{len(both)} validation rows are training rows too: val/loss will flatter.")
    if recipe.lora.alpha / recipe.lora.rank > 64:
        found.notes.append(f"lora.alpha / lora.rank is {recipe.lora.alpha / recipe.lora.rank:g}: an unusual scale.")
    found.attempt(lambda: check_run_folder(recipe, None))


def key_of(example: Example) -> int:
    """A number that is the same for rows with the same tokens and labels."""
    return hash((*example.ids, *example.spans))


def key_rates(recipe: Recipe, steps: int) -> list[tuple[int, float]]:
    """Pairs of a step and its learning rate: at the beginning, the end of warm-up, each quarter and the end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optim.lr)
    scheduler = build_lr_scheduler(recipe, optimizer, steps)
    warm = warmup_steps(recipe.optim.warmup_ratio, steps)
    wanted = sorted({1, warm, warm + 1, steps // 4, steps // 2, 3 * steps // 4, steps} & set(range(1, steps + 1)))
    rates = []
    for step in range(1, steps + 1):
        if step in wanted:
            rates.append((step, float(optimizer.param_groups[0]["lr"])))
        optimizer.step()
        scheduler.step()
    return rates


def shown_rows(data: Data) -> str:
    """A summary of the training rows, and the first of them as the model reads them."""
    assert data.template is not None
    rows = [shown(example, data.template) for example in data.train[:SHOWN]]
    return "\n".join([*summary(data.train, data.tallies), *rows])
