"""Fine-tunes a language model with LoRA.

accelerate launch --config_file accel_configs/zero3.yaml loop/train.py [--config RECIPE] [--KEY VALUE …]
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from data.batch import epoch_order, num_windows, windows
from data.errors import exit_codes
from loop.build import (
    Data,
    build_data,
    build_lr_scheduler,
    build_model,
    build_optimizer,
    build_tokenizer,
    rows_per_step,
)
from loop.checkpoint import save_adapter, save_checkpoint, unwrap
from loop.engine import build_accelerator, prepare
from loop.finite import check_finite
from loop.overview import overview
from loop.recipe import Recipe, parse_recipe
from loop.run_folder import check_run_folder, create_run_folder, write_json
from loop.step import train_step, validate
from loop.tracking import Interval, Tracking


@exit_codes()
def main(argv: Sequence[str]) -> None:
    name, recipe = parse_recipe(argv)
    check_run_folder(recipe)
    tokenizer = build_tokenizer(recipe)
    data = build_data(recipe, tokenizer)
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, accelerator)
    run_dir = create_run_folder(name, recipe, accelerator)

    optimizer = build_optimizer(recipe, model)
    model, optimizer = prepare(model, optimizer, accelerator)
    total_steps = recipe.epochs * num_windows(len(data.train), rows_per_step(recipe, accelerator))
    lr_scheduler = build_lr_scheduler(recipe, optimizer, total_steps)

    if accelerator.is_main_process:
        write_json(run_dir / "deepspeed_config.json", getattr(accelerator, "deepspeed_config", {}))
    tracking = Tracking(recipe, run_dir, total_steps, accelerator)
    tracking.say(overview(recipe, data, model, run_dir, total_steps, accelerator))
    fit(recipe, data, model, optimizer, lr_scheduler, run_dir, tracking, accelerator)
    save_adapter(unwrap(model, accelerator), run_dir / "adapter", accelerator)
    tracking.say(f"adapter: {run_dir / 'adapter'}")
    accelerator.state.destroy_process_group()
    tracking.close()


def fit(
    recipe: Recipe,
    data: Data,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    run_dir: Path,
    tracking: Tracking,
    accelerator: Accelerator,
) -> None:
    """Trains all epochs; every rank enters. Logs, validates and saves as often as the recipe says."""
    share = partial(  # of this rank
        windows,
        micro_batch_size=recipe.micro_batch_size,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        pad_token_id=data.pad_token_id,
    )
    steps_per_epoch = num_windows(len(data.train), rows_per_step(recipe, accelerator))
    eval_every = recipe.eval_every or steps_per_epoch
    step = 0
    model.train()
    for epoch in range(recipe.epochs):
        interval = Interval(accelerator.device)
        order = epoch_order(len(data.train), recipe.seed, epoch)
        for window in share(data.train, order, grad_accum_steps=recipe.grad_accum_steps):
            result = train_step(window, model, optimizer, lr_scheduler, recipe.optim.max_grad_norm, accelerator)
            step += 1
            check_finite(step, window, result, accelerator)
            interval.add(window, result)
            metrics: dict[str, float] = {}
            if step % recipe.log_every == 0 or step % steps_per_epoch == 0:
                metrics = interval.metrics(result, accelerator)
                interval = Interval(accelerator.device)
            if data.validation and step % eval_every == 0:
                val_windows = share(data.validation, range(len(data.validation)), grad_accum_steps=1)
                metrics["val/loss"] = validate(val_windows, model, accelerator)
            tracking.advance(step)
            if metrics:
                tracking.log(step, metrics)
        save_checkpoint(unwrap(model, accelerator), run_dir, step, epoch, recipe.save_total_limit, accelerator)


if __name__ == "__main__":
    main(sys.argv[1:])
