"""Fine-tunes a language model with LoRA.

accelerate launch --config_file accel_configs/zero3.yaml loop/train.py [--config RECIPE] [--KEY VALUE …]
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from data.batch import empty_window, epoch_order, num_windows, windows
from loop.engine.accelerator import build_accelerator, prepare
from loop.guard.finite_values import FiniteCheck
from loop.guard.process import Stopped, end_process, exit_codes
from loop.guard.ranks import Watch
from loop.guard.signals import StopSignals
from loop.measure.phases import ACCOUNT, watch_phases
from loop.model.build import (
    Data,
    build_data,
    build_lr_scheduler,
    build_model,
    build_optimizer,
    build_tokenizer,
    check_model,
    rows_per_step,
)
from loop.planning.decisions import decide
from loop.recipe import Recipe, parse_recipe
from loop.saving.checkpoint import Checkpoint, restore_adapter, save_adapter, save_checkpoint, unwrap
from loop.saving.resume import check_resumable, find_checkpoint, fingerprint, resume_optimizer
from loop.saving.run_folder import check_run_folder, create_run_folder, write_engine_config, write_report
from loop.step import seed_dropout, train_step, validate
from loop.telling.first_page import overview
from loop.telling.run_costs import write_usage
from loop.telling.tracking import Interval, Tracking


@exit_codes()
def main(argv: Sequence[str]) -> None:
    name, recipe = parse_recipe(argv)
    checkpoint = find_checkpoint(name, recipe)  # what --resume means; None: a new run
    check_run_folder(recipe, checkpoint)
    tokenizer = build_tokenizer(recipe)
    data = build_data(recipe, tokenizer)
    model_without_weights = check_model(recipe, tokenizer)
    accelerator = build_accelerator(recipe)
    with Watch(recipe.rank_timeout, accelerator) as watch:
        total_steps = recipe.epochs * num_windows(len(data.train), rows_per_step(recipe, accelerator))
        watch.step = checkpoint.step if checkpoint else 0
        check_resumable(checkpoint, recipe, total_steps, accelerator)
        decided = decide(recipe, data, model_without_weights, accelerator)  # what the recipe leaves to auto
        data = replace(data, layout=decided.layout)
        model = build_model(recipe, decided.layout, decided.checkpointing, accelerator)
        restore_adapter(checkpoint, model, accelerator)
        run_dir = create_run_folder(name, recipe, checkpoint, accelerator)

        optimizer = build_optimizer(recipe, model)
        model, optimizer = prepare(model, optimizer, accelerator)
        write_engine_config(run_dir, accelerator)
        nothing = empty_window(data.train[0], recipe.grad_accum_steps, data.layout, data.pad_token_id)
        resume_optimizer(checkpoint, model, optimizer, nothing, accelerator)
        lr_scheduler = build_lr_scheduler(recipe, optimizer, total_steps, done=checkpoint.updates if checkpoint else 0)

        with (
            Tracking(recipe, run_dir, checkpoint.step if checkpoint else 0, total_steps, accelerator) as tracking,
            StopSignals(accelerator) as signals,
        ):
            tracking.say(overview(recipe, decided, data, model, run_dir, total_steps, accelerator))
            fit(
                recipe, data, model, optimizer, lr_scheduler, checkpoint, run_dir, tracking, signals, watch, accelerator
            )
            save_adapter(unwrap(model, accelerator), run_dir / "adapter", accelerator)
            tracking.say(f"adapter: {run_dir / 'adapter'}")
            write_usage(run_dir, unwrap(model, accelerator), total_steps, accelerator)
    accelerator.state.destroy_process_group()
    write_report(run_dir, accelerator)


def fit(
    recipe: Recipe,
    data: Data,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    checkpoint: Checkpoint | None,
    run_dir: Path,
    tracking: Tracking,
    signals: StopSignals,
    watch: Watch,
    accelerator: Accelerator,
) -> None:
    """Trains all epochs, or what is left after `checkpoint`; every rank enters.

    Logs, validates and saves as often as the recipe says. Raises Stopped after a signal, a checkpoint later.
    """
    share = partial(  # of this rank
        windows,
        micro_batch_size=recipe.micro_batch_size,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        layout=data.layout,
        pad_token_id=data.pad_token_id,
    )
    rows = rows_per_step(recipe, accelerator)
    steps_per_epoch = num_windows(len(data.train), rows)
    eval_every = recipe.eval_every or steps_per_epoch
    save_every = recipe.save_every or steps_per_epoch
    step, updates = (checkpoint.step, checkpoint.updates) if checkpoint else (0, 0)
    interval = Interval.restore(checkpoint, accelerator)
    finite = FiniteCheck(unwrap(model, accelerator), accelerator)
    run = fingerprint(recipe, accelerator)
    watch_phases(model, accelerator)
    model.train()
    for epoch in range(step // steps_per_epoch, recipe.epochs):
        order = epoch_order(len(data.train), recipe.seed, epoch)[step % steps_per_epoch * rows :]
        for window in ACCOUNT.steps(share(data.train, order, grad_accum_steps=recipe.grad_accum_steps)):
            seed_dropout(recipe.seed, step, accelerator.process_index)
            result = train_step(window, model, optimizer, lr_scheduler, recipe.optim.max_grad_norm, accelerator)
            step = watch.step = step + 1
            finite.check(step, window, result)
            updates += not result.skipped
            interval.add(window, result)
            epoch_ends = step % steps_per_epoch == 0
            logs = step % recipe.log_every == 0 or epoch_ends
            metrics = interval.metrics(result, accelerator) if logs else {}
            if data.validation and step % eval_every == 0:
                val_windows = share(data.validation, range(len(data.validation)), grad_accum_steps=1)
                metrics["val/loss"] = finite.check_validation(step, validate(val_windows, model, accelerator))
            tracking.advance(step)
            if metrics:
                tracking.log(step, metrics)
            stop = signals.agreed()
            if step % save_every == 0 or epoch_ends or stop:
                state = {
                    "step": step,
                    "updates": updates,
                    "interval": None if logs else interval.state(),
                    "val_loss": metrics.get("val/loss"),
                    "run": run,
                }
                inner = unwrap(model, accelerator)
                folder = save_checkpoint(
                    inner, optimizer, run_dir, state, recipe.save_total_limit, checkpoint, accelerator
                )
                if stop:
                    raise Stopped(stop, f"stopped after step {step} as asked; go on with --resume {folder}")
            if logs:
                interval = Interval(accelerator.device)


if __name__ == "__main__":
    end_process(main)
