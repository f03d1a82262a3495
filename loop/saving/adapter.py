"""Writes adapter/ of a run folder: the adapter of one of its checkpoints, to the bit, and which one it is and why.

Beside the adapter lies what asks the model as it was trained: tokenizer, chat template and generation_config.json.
chosen.json says which step the adapter is of.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from data.errors import UserError
from data.template import ChatTemplate
from loop.guard.process import RunError
from loop.saving.checkpoint import ADAPTER, OF_ADAPTER, WRITTEN, list_checkpoints, lowest, step_of
from loop.saving.publish import damage, publish
from loop.saving.run_folder import write_json

CHOSEN = "chosen.json"


@dataclass(frozen=True)
class Choice:
    """Which checkpoint becomes adapter/, and why."""

    checkpoint: Path
    by: str  # last, val/loss, or the name of a judge
    values: Mapping[int, float]  # what was compared, by the steps of the checkpoints; empty for last

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def value(self) -> float | None:
        """What the chosen checkpoint has of `values`."""
        return self.values.get(self.step)

    def as_json(self) -> dict[str, Any]:
        """The contents of chosen.json."""
        return {"step": self.step, "by": self.by, "value": self.value, "of": dict(self.values)}

    @property
    def reason(self) -> str:
        """Why, for people: "the last", or "lowest val/loss 0.4100"."""
        best = "lowest" if self.by == "val/loss" else "best"
        return "the last" if self.value is None else f"{best} {self.by} {self.value:.4f}"


def choose(run_dir: Path, choose_by: str, validations: Sequence[tuple[int, float]]) -> Choice:
    """The choice of the recipe's key choose_by among the checkpoints of a run that is over. `validations` are its steps
    and their val/loss. Those without a checkpoint cannot be chosen, and a note says so where one of them was lower.
    """
    folders, losses = list_checkpoints(run_dir), dict(validations)
    if choose_by != "val/loss":  # a judge chooses later
        return Choice(folders[-1], "last", {})
    best = lowest(folders, losses)
    first = min(losses, key=lambda step: losses[step], default=None)
    if best is None:
        print("note: no checkpoint was validated, so none is chosen by val/loss", flush=True)
        return Choice(folders[-1], "last", {})
    if first is not None and losses[first] < losses[step_of(best)]:
        print(f"note: val/loss was lower, {losses[first]:.4f}, after step {first}: it has no checkpoint", flush=True)
    there = {step_of(folder) for folder in folders}
    return Choice(best, choose_by, {step: loss for step, loss in losses.items() if step in there})


def publish_adapter(run_dir: Path, choice: Choice, write_beside: Callable[[Path], None] | None = None) -> None:
    """Makes `run_dir`/adapter of the checkpoint that was chosen; one process alone calls it, and no model is needed.

    `write_beside` writes what lies beside the adapter into a folder. Without it that is taken from the adapter/ that is
    there. Raises RunError where the checkpoint is damaged or adapter/ cannot be written, and UserError where there is
    no adapter/ to take anything from.
    """
    folder, source = run_dir / "adapter", choice.checkpoint
    if wrong := damage(source, set(OF_ADAPTER), WRITTEN):
        raise RunError(f"checkpoint {source}: {wrong}. {folder} was not written.")
    if write_beside is None and not (folder / ADAPTER).is_file():
        raise UserError(f"{folder}: there is no adapter yet. Let the run come to its end: --resume {run_dir}")

    def write(beside: Path) -> None:
        if write_beside is None:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
        else:
            write_beside(beside)
        for name in OF_ADAPTER:
            shutil.copyfile(source / name, beside / name)
        write_json(beside / CHOSEN, choice.as_json())

    publish(folder, write)


def write_asking(template: ChatTemplate | None, config: GenerationConfig | None, folder: Path) -> None:
    """Writes tokenizer and chat template, and the model's generation `config` with the tokens at which an answer ends
    as generation_config.json."""
    if template is None:
        return
    template.tokenizer.save_pretrained(folder)
    config = deepcopy(config) or GenerationConfig()
    config.eos_token_id = sorted(template.stop_tokens(config))
    config.to_json_file(folder / GENERATION_CONFIG_NAME)  # save_pretrained refuses what some models come with
