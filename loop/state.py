"""The objects of the training loop: what is asked (Job), what learns (Learner), where the run stands (TrainState)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.batch import Window, empty_window, epoch_order, windows
from loop.batch_arithmetic import BatchArithmetic
from loop.measure.phases import ACCOUNT
from loop.model.build import Data
from loop.recipe import Recipe
from loop.saving.checkpoint import VALIDATION_ROWS, Checkpoint
from loop.step import StepResult


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    log: bool
    validate: bool
    save: bool


@dataclass(frozen=True)
class Job:
    """What is asked of a run. Nothing in it changes from the first step to the last."""

    recipe: Recipe  # with what was decided where it said auto
    data: Data
    batch: BatchArithmetic
    run_dir: Path
    checkpoint: Checkpoint | None  # that the run goes on from; None for a new run
    accelerator: Accelerator

    def due(self, step: int, stop: int) -> Due:
        """What is due after `step` steps; `stop` is a signal that asks the run to stop, or 0.

        The recipe's log_every, eval_every and save_every count steps from the beginning of the run. The end of an
        epoch is always logged and saved, and it is where an eval_every or save_every of 0 falls. The last step is
        logged, validated and saved. A run that is asked to stop is saved first. With patience each validation is
        logged, because the run may end there. Nothing is validated without validation rows.
        """
        recipe, every, last = self.recipe, self.batch.steps_per_epoch, step == self.batch.total_steps
        ends = last or step % every == 0
        validate = len(self.data.validation) > 0 and (last or step % (recipe.eval_every or every) == 0)
        return Due(
            log=ends or step % recipe.log_every == 0 or (validate and recipe.patience is not None),
            validate=validate,
            save=ends or step % (recipe.save_every or every) == 0 or stop > 0,
        )

    def has_to_stay(self, state: "TrainState") -> bool:
        """Whether the weights after this step may become adapter/, so that they need a checkpoint: those after the
        last step, and with choose_by val/loss those of a validation that is lower than all before it.
        """
        if self.recipe.choose_by == "val/loss" and (lowest := state.lowest) and lowest.step == state.step:
            return True
        return self.is_over(state)

    def is_over(self, state: "TrainState") -> bool:
        """Whether no step is left to learn."""
        return state.step >= self.batch.total_steps or self.out_of_patience(state) is not None

    def out_of_patience(self, state: "TrainState") -> str | None:
        """Says why the run ends before its total_steps; None where it goes on, and where it has made all of them."""
        patience = self.recipe.patience
        if patience is None or state.step >= self.batch.total_steps or (lowest := state.lowest) is None:
            return None
        since = sum(validation.step > lowest.step for validation in state.validations)
        if since < patience:
            return None
        return (
            f"ended after step {state.step}: val/loss has not been lower than {lowest.loss:.4f} (step {lowest.step}) "
            f"for {since} validations.\nIt goes on with --resume and a larger --patience."
        )

    def windows(self, state: "TrainState") -> Iterator[Window]:
        """This rank's share of every window that is left to learn, until the run is over. `state` has to go on
        meanwhile."""
        left = self._windows(state.step)
        while not self.is_over(state):
            yield next(left)

    def _windows(self, after: int) -> Iterator[Window]:
        """This rank's share of the windows of all epochs, without those of the first `after` steps."""
        batch = self.batch
        for epoch in range(after // batch.steps_per_epoch, batch.epochs):
            learned = max(0, after - epoch * batch.steps_per_epoch) * batch.rows_per_step
            order = epoch_order(batch.num_rows, self.recipe.seed, epoch)[learned:]
            yield from self._share(self.data.train, order, grad_accum_steps=batch.grad_accum_steps)

    def validation_windows(self) -> dict[str, Iterator[Window]]:
        """This rank's share of the validation rows of each file, a micro-batch in each window."""
        parts, start = {}, 0
        for name, count in (self.data.parts or {"all": len(self.data.validation)}).items():
            parts[name] = self._share(self.data.validation, range(start, start + count), grad_accum_steps=1)
            start += count
        return parts

    def empty_window(self) -> Window:
        """A window without a label, with which the engine takes a step that changes nothing."""
        data = self.data
        return empty_window(data.train[0], self.batch.grad_accum_steps, data.layout, data.pad_token_id)

    @property
    def _share(self) -> partial[Iterator[Window]]:
        return partial(
            windows,
            micro_batch_size=self.batch.micro_batch_size,
            num_processes=self.batch.num_processes,
            process_index=self.accelerator.process_index,
            layout=self.data.layout,
            pad_token_id=self.data.pad_token_id,
        )


@dataclass(frozen=True)
class Learner:
    """What a step changes, as the engine has wrapped it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler


class Interval:
    """What happened since the last log line. Losses stay on the device until a line is due."""

    def __init__(self, device: torch.device, nll: float = 0.0, label_weight: float = 0.0) -> None:
        self.nll = torch.tensor(nll, device=device)  # nats, summed over this rank's label tokens
        self.label_weight = label_weight  # of the labels of all ranks, added up
        self.num_tokens = 0  # over all ranks, since `started`
        self.started = time.monotonic()
        self.logged = False  # True once a log line has told it; then nothing of it is left to be told

    def add(self, window: Window, result: StepResult) -> None:
        self.nll += result.nlls.sum()
        self.label_weight += window.label_weight
        self.num_tokens += window.num_tokens

    def metrics(self, last: StepResult, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of a log line; train/loss is the mean over its interval's label tokens. Every rank enters."""
        self.logged = True
        nll = accelerator.reduce(self.nll, reduction="sum")  # collective
        assert isinstance(nll, Tensor)
        return {
            "train/loss": nll.item() / self.label_weight,  # device sync
            "train/lr": last.lr,
            "train/grad_norm": last.grad_norm,
            "train/tokens_per_second": self.num_tokens / (time.monotonic() - self.started),
            **({} if ACCOUNT.peak_bytes is None else {"train/peak_bytes": ACCOUNT.peak_bytes}),  # of this rank, so far
        }


class Validation(NamedTuple):
    step: int  # after which the validation was
    loss: float  # val/loss


@dataclass
class TrainState:
    """Where a run stands: exactly what trainer_state.json of a checkpoint holds."""

    step: int  # optimizer steps learned
    updates: int  # the same without the steps that fp16 skipped
    interval: Interval
    validations: list[Validation]  # all so far, on the same rows
    run: dict[str, Any]  # the fingerprint (loop/saving/resume.py): a checkpoint is resumed by a run of the same one

    @classmethod
    def begin(cls, checkpoint: Checkpoint | None, run: dict[str, Any], accelerator: Accelerator) -> "TrainState":
        """The state before the first step, or the state that `checkpoint` holds.

        Each rank goes on with its own losses since the last log line; where the number of ranks is another one, rank 0
        goes on with all of them. Where the validation rows are others by now, the validations before are forgotten.
        """
        if checkpoint is None:
            return cls(0, 0, Interval(accelerator.device), [], run)
        known: dict[str, Any] = checkpoint.state["interval"] or {"nlls": [0.0], "label_weight": 0.0}
        nlls: list[float] = known["nlls"]
        if len(nlls) != accelerator.num_processes:
            nlls = [sum(nlls)] + [0.0] * (accelerator.num_processes - 1)
        interval = Interval(accelerator.device, nlls[accelerator.process_index], known["label_weight"])
        now = run.get(VALIDATION_ROWS)
        same_rows = checkpoint.state["run"].get(VALIDATION_ROWS, now) == now  # an older version did not say
        validations = [Validation(step, loss) for step, loss in checkpoint.validations] if same_rows else []
        return cls(checkpoint.step, checkpoint.updates, interval, validations, run)

    @property
    def lowest(self) -> Validation | None:
        """The validation with the lowest loss, the first of them where several are equal; None before the first."""
        return min(self.validations, key=lambda validation: validation.loss, default=None)

    def validated(self, loss: float) -> None:
        """Keeps the loss of the validation after this step."""
        self.validations.append(Validation(self.step, loss))

    def advance(self, window: Window, result: StepResult) -> None:
        """Counts a step that was learned."""
        self.step += 1
        self.updates += not result.skipped
        self.interval.add(window, result)

    def as_json(self) -> dict[str, Any]:
        """The contents of trainer_state.json; every rank enters."""
        interval = None
        if not self.interval.logged:
            nlls: list[float] = gather_object([self.interval.nll.item()])  # collective
            interval = {"nlls": nlls, "label_weight": self.interval.label_weight}
        return {
            "step": self.step,
            "updates": self.updates,
            "interval": interval,
            "validations": [list(validation) for validation in self.validations],
            "run": self.run,
        }
