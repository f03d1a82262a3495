"""The private parts of DeepSpeed that this project reads or replaces, and the reason for each."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

WRITTEN_AGAINST = "0.19.8"

# -- A parameter that ZeRO-3 has partitioned. DeepSpeed describes it in attributes that start with ds_, which are not
# -- documented; transformers, accelerate and PEFT read them as well. There is no public function for them.


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has partitioned it and this rank holds only a share."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def numel_of(parameter: Tensor) -> int:
    """The number of elements of the whole parameter, also where ZeRO-3 has partitioned it."""
    return shape_of(parameter).numel()


def is_partitioned(parameter: Tensor) -> bool:
    """True when ZeRO-3 manages this parameter."""
    return hasattr(parameter, "ds_id")


def share_of(parameter: Any) -> int:
    """The number of elements of each rank's share of a partitioned parameter; the last share is padded to it."""
    return int(parameter.ds_tensor.numel())


# -- A module whose parameters ZeRO-3 fetches and releases together. deepspeed.utils has set_z3_leaf_module and
# -- z3_leaf_module for the same attribute, but importing them takes seconds, also where no DeepSpeed runs.


def fetch_as_a_whole(module: Any) -> None:
    """Makes ZeRO-3 fetch all parameters in `module` when it begins, and put no hooks on the modules inside."""
    module._z3_leaf = True


def is_fetched_as_a_whole(module: Any) -> bool:
    """Whether fetch_as_a_whole was called for this module."""
    return bool(getattr(module, "_z3_leaf", False))


# -- The optimizer's state. DeepSpeed's public functions for it (deepspeed.utils.safe_get_full_optimizer_state and its
# -- kin) fail on a parameter that DeepSpeed does not manage, and no public function says which ones it manages.


def has_public_state(parameter: Tensor) -> bool:
    """True when DeepSpeed's functions safe_get_… and safe_set_… work on this parameter: at the stages 1, 2 and 3, and
    at stage 0 in bf16, where `_hp_mapping` links the parameter to its fp32 master."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def master_of(parameter: Tensor, optimizer: Any) -> Tensor:
    """The tensor that is updated for a parameter without public state: at stage 0 in fp16 an fp32 copy, which
    DeepSpeed's FP16_UnfusedOptimizer keeps in `fp32_groups`; everywhere else the parameter itself.

    `optimizer` is what accelerate returns; its attribute `optimizer` is DeepSpeed's.
    """
    wrapper = getattr(optimizer, "optimizer", None)
    for halves, masters in zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True):
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                found: Tensor = master
                return found
    return parameter


def set_cpu_adam_update_count(adamw: Any, updates: int) -> None:
    """Makes DeepSpeedCPUAdam continue after `updates` updates; does nothing to another optimizer.

    Its C++ code holds the powers of both betas and multiplies one factor to them in each update. It has no function
    that sets them. So it makes as many updates of a single number; then the powers are the same to the bit.
    """
    if not hasattr(adamw, "ds_opt_adam"):
        return
    group = adamw.param_groups[0]
    one = [torch.zeros(1) for _ in range(4)]
    for count in range(2, updates + 1):
        adamw.ds_opt_adam.adam_update(adamw.opt_id, count, 0.0, *group["betas"], group["eps"], 0.0, True, *one)


# -- Functions of the engine that are replaced.


def keep_grad_norm(engine: Any) -> None:
    """Makes stage 0 report the gradient norm before clipping, as every other stage does.

    engine.get_global_grad_norm() is public and reads `_global_grad_norm`. In fp32 the engine clips without keeping the
    norm there; in fp16 it keeps the norm of the scaled gradients. No setting changes either.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip_and_remember() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_and_remember
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        unscale_and_clip = optimizer.unscale_and_clip_grads

        def remember_unscaled(scaled_norm: float, *args: Any, **kwargs: Any) -> Any:
            optimizer._global_grad_norm = scaled_norm / optimizer.loss_scale_config.cur_scale
            return unscale_and_clip(scaled_norm, *args, **kwargs)

        optimizer.unscale_and_clip_grads = remember_unscaled


def gather_persistent_at_once(engine: Any) -> None:
    """Makes stage 3 gather all persistent parameters in one collective after each update.

    DeepSpeed's `_post_step` gathers every adapter and norm in a collective of its own: 913 for Qwen2.5-14B. No setting
    joins them. Here one call of `all_gather_coalesced` comes first, and `_post_step` finds nothing left to gather.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    persistent = getattr(engine.optimizer, "persistent_parameters", [])
    if not persistent:
        return
    after_update = engine.optimizer._post_step

    def gather_first(*arguments: Any) -> None:
        missing = [parameter for parameter in persistent if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        persistent[0].all_gather_coalesced(missing).wait()
        after_update(*arguments)

    engine.optimizer._post_step = gather_first


@contextlib.contextmanager
def order_of_modules_forgotten(engine: Any) -> Iterator[None]:
    """Within this context stage 3 forgets after each forward pass in which order the modules ran.

    Stage 3 records that order in one step and decides by it, in all later ones, which weights stay gathered until the
    backward pass. It keeps these decisions in a cache that nothing clears. Had it seen forward passes without a
    backward pass first, it would gather every weight twice in each step to the end of the run. Does nothing at other
    stages.
    """
    get_coordinator = getattr(getattr(engine, "optimizer", None), "_get_param_coordinator", None)
    if get_coordinator is None:
        yield
        return

    def forget(*_: Any) -> None:
        if not get_coordinator().is_invalid_trace():
            get_coordinator()._invalidate_trace()

    hook = engine.register_forward_hook(forget)
    try:
        yield
    finally:
        hook.remove()


def import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon optimizer without compiling its functions.

    DeepSpeed imports it in every start, to see whether the optimizer is a Muon. The module compiles functions when it
    is imported, and that loads torch's inductor: two seconds of every start, for an optimizer that is not used here.
    """
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda: lambda function: function), contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
