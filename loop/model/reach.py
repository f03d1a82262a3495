"""Finds out which modules a row of text reaches, by calling the model on the meta device.

A layer that no row reaches, such as that of a vision tower, gets no adapter, which would never learn. A decoder layer
that every row passes once is a unit that ZeRO-3 fetches as a whole.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loop.internals.transformers_internals import decoder_layers


def unreached_layers(base: nn.Module, targets: Collection[str]) -> list[str]:
    """The full names of the layers that `targets` names and that `base` does not call for a row of text.

    `base` lies on the meta device. Where it cannot be called there, nothing is known, and the list is empty.
    """
    called = called_modules(base)
    if called is None:
        return []
    named = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in targets]
    return [name for name in named if name not in called]


def layers_passed_once(base: nn.Module) -> list[nn.Module]:
    """The decoder layers that a row of text passes exactly once, and that get its hidden states as their first
    argument. Empty where `base`, which lies on the meta device, cannot be called there."""
    calls = Counter(name for name, first in _calls(base) or [] if isinstance(first, Tensor))
    layers = decoder_layers(base)
    return [module for name, module in base.named_modules() if module in layers and calls[name] == 1]


def called_modules(base: nn.Module) -> set[str] | None:
    """The full names of the modules that `base`, on the meta device, calls for a row of three tokens.

    None where it cannot be called there: a mixture of experts, for example, may look at the contents of its tensors.
    """
    calls = _calls(base)
    return None if calls is None else {name for name, _ in calls}


def _calls(base: nn.Module) -> list[tuple[str, object]] | None:
    """The calls that `base`, on the meta device, makes for a row of three tokens: each module's full name and its first
    positional argument. None where `base` cannot be called there."""
    row = torch.zeros(1, 3, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")  # to make one, transformers looks into the positions
    for halve in (False, True):  # experts in one grouped product have to be of bf16 on this device
        for masked in ({"attention_mask": mask}, {}):  # not every model takes a mask of this shape
            tried = deepcopy(base).bfloat16() if halve else base
            calls: list[tuple[str, object]] = []
            hooks = [
                module.register_forward_pre_hook(partial(_note, calls, name)) for name, module in tried.named_modules()
            ]
            try:
                with torch.no_grad():
                    tried(input_ids=row, use_cache=False, **masked)
                return calls
            except Exception:  # models raise many kinds where tensors have no contents
                continue
            finally:
                for hook in hooks:
                    hook.remove()
    return None


def _note(calls: list[tuple[str, object]], name: str, _: nn.Module, arguments: Sequence[Any]) -> None:
    """Writes a call of the module `name` down, when its forward pass begins."""
    calls.append((name, arguments[0] if arguments else None))
