"""Finds the layers that no row of text reaches, such as those of a vision tower: an adapter would never learn there."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn


def unreached_layers(base: nn.Module, targets: Collection[str]) -> list[str]:
    """The full names of the layers that `targets` names and that `base` does not call for a row of text.

    `base` lies on the meta device. Where it cannot be called there, nothing is known, and the list is empty.
    """
    called = called_modules(base)
    if called is None:
        return []
    named = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in targets]
    return [name for name in named if name not in called]


def called_modules(base: nn.Module) -> set[str] | None:
    """The full names of the modules that `base`, on the meta device, calls for a row of three tokens.

    None where it cannot be called there: a mixture of experts, for example, may look at the contents of its tensors.
    """
    called: set[str] = set()

    def note(name: str, *_: Any) -> None:
        called.add(name)

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in base.named_modules()]
    try:
        with torch.no_grad():
            base(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # models raise many kinds where tensors have no contents
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return called
