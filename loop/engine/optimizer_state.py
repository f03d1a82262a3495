"""Takes AdamW's state out of any ZeRO stage and puts it back, as whole fp32 tensors under the adapters' names.

DeepSpeed's own checkpoints belong to one stage and one number of ranks, and they are pickles. This state belongs to
none: it is read and written through DeepSpeed's public functions for single parameters.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.batch import Window
from loop.internals.deepspeed_internals import (
    has_public_state,
    is_partitioned,
    master_of,
    set_cpu_adam_update_count,
    share_of,
)
from loop.internals.deepspeed_internals import shape_of as shape_of
from loop.step import train_step

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by their names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_optimizer(model: torch.nn.Module, optimizer: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gathers the state as fp32 tensors on the CPU, named "exp_avg.<name>", "exp_avg_sq.<name>" and "master.<name>".

    Every rank enters; rank 0 gets the tensors and the others get none. The master is the weight that the optimizer
    updates; there is none where the adapter itself is fp32.
    """
    state = {}
    for name, parameter in trainable_parameters(model).items():
        for key in MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, "master"):
            value = _get(parameter, key, optimizer)  # collective
            if accelerator.is_main_process:
                state[f"{key}.{name}"] = value.detach().float().cpu().clone().reshape(shape_of(parameter))
    return state


def restore_optimizer(
    state: dict[str, Tensor], updates: int, model: Any, optimizer: Any, empty_window: Window, accelerator: Accelerator
) -> None:
    """Gives `optimizer` the state that it had after `updates` updates. Every rank enters and has the whole `state`.

    An optimizer creates its state in its first step, and each stage does so in its own way. So this function takes one
    step that changes nothing (a window without labels, at learning rate 0) and overwrites the state that it created.
    """
    nothing = LambdaLR(optimizer, lambda _: 0.0)  # it keeps the recipe's learning rate as initial_lr
    train_step(empty_window, model, optimizer, nothing, 1.0, accelerator)
    for name, parameter in trainable_parameters(accelerator.unwrap_model(model, keep_torch_compile=False)).items():
        for key in (*MOMENTS, "master"):
            _set(parameter, key, state[f"{key}.{name}"].to(accelerator.device), optimizer)
    set_update_count(optimizer, updates)


def _get(parameter: Any, key: str, optimizer: Any) -> Tensor:
    """The state `key` of one parameter, whole; `key` is a moment or master. Collective under ZeRO."""
    if has_public_state(parameter):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value: Tensor = (
            safe_get_full_fp32_param(parameter) if key == "master" else safe_get_full_optimizer_state(parameter, key)
        )
        return value
    master = master_of(parameter, optimizer)
    value = master if key == "master" else _torch_optimizer(optimizer).state[master][key]
    return value


def _set(parameter: Any, key: str, value: Tensor, optimizer: Any) -> None:
    """Overwrites the state `key` of one parameter with the whole tensor `value`."""
    if is_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # DeepSpeed's functions for whole tensors fail where the number of ranks does not divide the size.
        count = share_of(parameter)
        ranks = torch.distributed.get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, count * ranks - value.numel()))
        part = padded.narrow(0, count * torch.distributed.get_rank(), count)
        if key == "master":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif has_public_state(parameter):
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == "master":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        master = master_of(parameter, optimizer)
        target = master if key == "master" else _torch_optimizer(optimizer).state[master][key]
        target.data.copy_(value)


def _torch_optimizer(optimizer: Any) -> Any:
    """The innermost optimizer: accelerate's wrapper holds DeepSpeed's, where there is one, and that holds torch's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def set_update_count(optimizer: Any, updates: int) -> None:
    """Makes AdamW go on as after `updates` updates: its bias correction depends on their number."""
    adamw = _torch_optimizer(optimizer)
    for state in adamw.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(updates)
        else:
            state["step"] = updates
    set_cpu_adam_update_count(adamw, updates)
