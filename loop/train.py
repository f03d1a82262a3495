"""Fine-tunes a language model with LoRA.

accelerate launch --config_file accel_configs/zero3.yaml loop/train.py [--config RECIPE] [--KEY VALUE …]
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.nn import Module
from torch.optim import Optimizer

from loop.batch_arithmetic import BatchArithmetic, num_launched
from loop.engine.accelerator import build_accelerator, on_main_process, prepare
from loop.engine.launcher import obey_launcher
from loop.guard.guard import Guard
from loop.guard.learned import check_learned
from loop.guard.process import Stopped, end_process, exit_codes
from loop.guard.ranks import Watch
from loop.measure.phases import ACCOUNT, measured
from loop.model.build import (
    build_data,
    build_lr_scheduler,
    build_model,
    build_optimizer,
    build_tokenizer,
    check_model,
)
from loop.planning.decisions import decide, keep_rows_apart
from loop.recipe import parse_recipe, recipe_as_dict
from loop.saving.adapter import choose, publish_adapter, write_asking
from loop.saving.checkpoint import Checkpoint, restore_adapter, save_checkpoint, unwrap
from loop.saving.resume import check_resumable, find_checkpoint, fingerprint, keep_decisions, resume_optimizer
from loop.saving.run_folder import check_run_folder, create_run_folder
from loop.state import Interval, Job, Learner, TrainState
from loop.step import seed_dropout, train_step, validate
from loop.telling.first_page import overview
from loop.telling.run_costs import write_usage
from loop.telling.tracking import Tracking


@exit_codes()
def main(argv: Sequence[str]) -> None:
    obey_launcher()
    name, asked = parse_recipe(argv)
    checkpoint = find_checkpoint(name, asked)  # the one that --resume means; None for a new run
    check_run_folder(asked, checkpoint)
    recipe = keep_decisions(checkpoint, asked, num_launched())
    data = build_data(recipe, build_tokenizer(recipe))
    model_without_weights = check_model(recipe)
    accelerator = build_accelerator(recipe)
    with Watch(recipe.rank_timeout, checkpoint.step if checkpoint else 0, accelerator) as watch:
        batch = BatchArithmetic.of(recipe, accelerator.num_processes, len(data.train))
        batch.check_schedule()
        run = fingerprint(recipe, data, batch, accelerator)
        check_resumable(checkpoint, run, recipe, data, batch, accelerator)
        decided = decide(recipe, data, model_without_weights, accelerator)  # what the recipe leaves to auto
        recipe, batch = decided.write_into(recipe, batch)
        model = build_model(recipe, model_without_weights, accelerator)
        restore_adapter(checkpoint, model, accelerator)
        engine, optimizer = prepare(model, build_optimizer(recipe, model), accelerator)
        decided = keep_rows_apart(decided, recipe, data, engine, accelerator)
        recipe, batch = decided.write_into(recipe, batch)
        run_dir = create_run_folder(name, recipe, run, data, checkpoint, accelerator)

        job = Job(recipe, replace(data, layout=decided.layout), batch, run_dir, checkpoint, accelerator)
        learner = build_learner(job, engine, optimizer, checkpoint)
        state = TrainState.begin(checkpoint, run | {"recipe": recipe_as_dict(recipe)}, accelerator)
        inner = unwrap(learner.model, accelerator)
        with (
            Tracking(recipe, run_dir, state.step, batch.total_steps, accelerator) as tracking,
            Guard(inner, watch, accelerator) as guard,
        ):
            tracking.say(overview(job, decided, inner))
            fit(job, learner, state, guard, tracking)
            publish_chosen(job, state, inner, tracking)
            write_usage(run_dir, inner, state.step, accelerator)
            check_learned(inner, accelerator)
            tracking.say(f"report: python -m eval.report {shlex.quote(str(run_dir))}")
    accelerator.state.destroy_process_group()


def build_learner(job: Job, model: Module, optimizer: Optimizer, checkpoint: Checkpoint | None) -> Learner:
    """What learns, as far as `checkpoint` had come; every rank enters. The engine has wrapped model and optimizer."""
    resume_optimizer(checkpoint, model, optimizer, job.empty_window(), job.accelerator)
    done = checkpoint.updates if checkpoint else 0
    return Learner(model, optimizer, build_lr_scheduler(job.recipe, optimizer, job.batch.total_steps, done))


def fit(job: Job, learner: Learner, state: TrainState, guard: Guard, tracking: Tracking) -> None:
    """Learns the windows that are left after `state`; every rank enters.

    Job says when it logs, validates and saves, and when it is over. After a signal it saves and raises Stopped.
    """
    model, optimizer, lr_scheduler = learner.model, learner.optimizer, learner.lr_scheduler
    max_grad_norm, accelerator = job.recipe.optim.max_grad_norm, job.accelerator
    model.train()
    for window in ACCOUNT.steps(job.windows(state)):
        seed_dropout(job.recipe.seed, state.step, accelerator.process_index)
        result = train_step(window, model, optimizer, lr_scheduler, max_grad_norm, accelerator)
        state.advance(window, result)
        stop = guard.check(state.step, window, result)  # a signal's number, or 0; raises where a number is not finite
        due = job.due(state.step, stop)
        metrics = state.interval.metrics(result, accelerator) if due.log else {}
        if due.validate:
            losses = validate(job.validation_windows(), model, accelerator)
            state.validated(guard.check_validation(state.step, losses["val/loss"]))
            metrics |= losses
        tracking.advance(state.step)
        if metrics:
            tracking.log(state.step, metrics)
        if due.save or job.has_to_stay(state):
            folder = save(job, learner, state)
        if stop:
            raise Stopped(stop, f"stopped after step {state.step} as asked; go on with --resume {folder}")
        if due.log:
            state.interval = Interval(accelerator.device)
    if ended := job.out_of_patience(state):
        tracking.say(ended)


def save(job: Job, learner: Learner, state: TrainState) -> Path:
    """Writes a checkpoint and returns its folder; every rank enters."""
    model, limit = unwrap(learner.model, job.accelerator), job.recipe.save_total_limit
    resumed_from = job.checkpoint.folder if job.checkpoint else None
    contents = state.as_json()
    return save_checkpoint(model, learner.optimizer, job.run_dir, contents, limit, resumed_from, job.accelerator)


@measured("save")
def publish_chosen(job: Job, state: TrainState, model: PeftModel, tracking: Tracking) -> None:
    """Makes adapter/ of the checkpoint that the recipe's choose_by means, and says which; every rank enters."""

    def publish() -> None:
        choice = choose(job.run_dir, job.recipe.choose_by, state.validations)
        config: Any = getattr(model.get_base_model(), "generation_config", None)
        publish_adapter(job.run_dir, choice, partial(write_asking, job.data.template, config))
        tracking.say(f"adapter: {job.run_dir / 'adapter'} (step {choice.step} of {state.step}, {choice.reason})")

    on_main_process(publish, job.accelerator)


if __name__ == "__main__":
    end_process(main)
