"""Finds out what a model calls for a row of text, by doing so on the meta device, where tensors have no contents.

Three things follow from it. A layer that no row reaches, such as that of a vision tower, gets no adapter, because it
would never learn. Layers that get the same input share LoRA's work. A decoder layer that every row passes once is a
unit that ZeRO-3 fetches as a whole.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from loop.internals.transformers_internals import decoder_layers


class Reach:
    """What `base` calls for a row of three tokens, on the meta device.

    Where it cannot be called there nothing is known: a model may look at the contents of its tensors.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.on_meta = base if next(base.parameters()).is_meta else deepcopy(base).to("meta")

    @cached_property
    def _calls(self) -> list[tuple[str, object]] | None:
        """Each module's full name and its first positional argument, in the order of the calls."""
        row = torch.zeros(1, 3, dtype=torch.long, device="meta")
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")  # transformers needs contents to make one
        for halve in (False, True):  # experts in one grouped product have to be of bf16 on this device
            for masked in ({"attention_mask": mask}, {}):  # not every model takes a mask of this shape
                base = deepcopy(self.on_meta).bfloat16() if halve else self.on_meta
                calls: list[tuple[str, object]] = []
                hooks = [
                    module.register_forward_pre_hook(partial(_note, calls, name))
                    for name, module in base.named_modules()
                ]
                try:
                    with torch.no_grad():
                        base(input_ids=row, use_cache=False, **masked)
                    return calls
                except Exception:  # models raise many kinds where tensors have no contents
                    continue
                finally:
                    for hook in hooks:
                        hook.remove()
        return None

    @property
    def called(self) -> set[str] | None:
        """The full names of the modules that are called; None where nothing is known."""
        return None if self._calls is None else {name for name, _ in self._calls}

    def unreached(self, targets: Collection[str]) -> list[str]:
        """The full names of the layers that `targets` names and that are not called; empty where nothing is known."""
        named = [name for name, _ in self.base.named_modules() if name.rpartition(".")[2] in targets]
        return [name for name in named if self.called is not None and name not in self.called]

    def shared_inputs(self, targets: Collection[str]) -> list[list[str]]:
        """The full names of the layers that `targets` names, in groups that get the same tensor, and in the order in
        which they are called. Only those in decoder layers that a row passes once, and each called once itself."""
        inside = {inner for layer in self.passed_once() for inner in layer.modules()}
        named = {name for name, module in self.base.named_modules() if module in inside}
        calls = [(name, x) for name, x in self._calls or [] if name in named and name.rpartition(".")[2] in targets]
        times = Counter(name for name, _ in calls)
        groups = defaultdict(list)
        for name, x in calls:
            if times[name] == 1 and isinstance(x, Tensor):
                groups[id(x)].append(name)
        return list(groups.values())

    def passed_once(self) -> list[nn.Module]:
        """The decoder layers that a row passes exactly once, and that get its hidden states as first argument."""
        calls = Counter(name for name, x in self._calls or [] if isinstance(x, Tensor))
        layers = decoder_layers(self.base)
        return [module for name, module in self.base.named_modules() if module in layers and calls[name] == 1]


def _note(calls: list[tuple[str, object]], name: str, _: nn.Module, arguments: Sequence[Any]) -> None:
    """Writes a call of the module `name` down, when its forward pass begins."""
    calls.append((name, arguments[0] if arguments else None))
