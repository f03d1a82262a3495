"""AdamW's state as whole fp32 tensors under the adapters' names, out of and back into any ZeRO stage.

DeepSpeed's own checkpoints belong to one stage and one number of ranks, and are pickles. This state
belongs to none: it goes through DeepSpeed's public calls for single parameters.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.batch import Window
from loop.step import train_step

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_optimizer(model: torch.nn.Module, optimizer: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """{"exp_avg.<name>", "exp_avg_sq.<name>", "master.<name>": fp32 on the CPU}; every rank enters, rank 0 gets it.

    master, the weight that the optimizer updates, is left out where the adapter itself is fp32.
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
    """Gives `optimizer` the state that it had after `updates` updates; every rank enters, each with all of `state`.

    Optimizers create their state in their first step, each stage in its own way. So one step is taken that
    changes nothing, of a window without labels at learning rate 0, and what it created is overwritten.
    """
    nothing = LambdaLR(optimizer, lambda _: 0.0)  # leaves the peak behind as initial_lr
    train_step(empty_window, model, optimizer, nothing, 1.0, accelerator)
    for name, parameter in trainable_parameters(accelerator.unwrap_model(model, keep_torch_compile=False)).items():
        for key in (*MOMENTS, "master"):
            _set(parameter, key, state[f"{key}.{name}"].to(accelerator.device), optimizer)
    set_update_count(optimizer, updates)


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole parameter's, where ZeRO-3 holds only a part."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _get(parameter: Any, key: str, optimizer: Any) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value: Tensor = (
            safe_get_full_fp32_param(parameter) if key == "master" else safe_get_full_optimizer_state(parameter, key)
        )
        return value
    master = _plain_master(parameter, optimizer)
    value = master if key == "master" else _torch_optimizer(optimizer).state[master][key]
    return value


def _set(parameter: Any, key: str, value: Tensor, optimizer: Any) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # Not the calls for whole tensors: they fail on sizes that the ranks do not divide.
        count = parameter.ds_tensor.numel()
        ranks = torch.distributed.get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, count * ranks - value.numel()))
        part = padded.narrow(0, count * torch.distributed.get_rank(), count)
        if key == "master":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == "master":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        master = _plain_master(parameter, optimizer)
        target = master if key == "master" else _torch_optimizer(optimizer).state[master][key]
        target.data.copy_(value)


def _torch_optimizer(optimizer: Any) -> Any:
    """The innermost one: accelerate's wrapper holds DeepSpeed's, which holds it; at stage 0 in fp32 nobody does."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _plain_master(parameter: Tensor, optimizer: Any) -> Tensor:
    """The tensor that is updated for `parameter`: itself, or at stage 0 in fp16 an fp32 copy."""
    wrapper = getattr(optimizer, "optimizer", None)
    for halves, masters in zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True):
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                found: Tensor = master
                return found
    return parameter


def set_update_count(optimizer: Any, updates: int) -> None:
    """AdamW's bias correction depends on how many updates there were."""
    adamw = _torch_optimizer(optimizer)
    for state in adamw.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(updates)
        else:
            state["step"] = updates
    if hasattr(adamw, "ds_opt_adam"):
        # DeepSpeed's AdamW for host memory multiplies the powers of both betas up in C++, one factor an update:
        # made to count on a single number, they are what they were, to the bit.
        group = adamw.param_groups[0]
        one = [torch.zeros(1) for _ in range(4)]
        for count in range(2, updates + 1):
            adamw.ds_opt_adam.adam_update(adamw.opt_id, count, 0.0, *group["betas"], group["eps"], 0.0, True, *one)
