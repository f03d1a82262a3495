"""The private part of PEFT that this project uses, and the reason."""

from typing import Any

from peft import LoraConfig
from torch import nn

WRITTEN_AGAINST = "0.21.2"


def use_layer(config: LoraConfig, kind: type[nn.Module], layer: type[nn.Module]) -> None:
    """Makes PEFT build a LoRA layer of class `layer` on every target whose class is exactly `kind`.

    PEFT's guide to custom models describes `_register_custom_module` as the way to do this ("experimental support for
    dynamic dispatch of custom modules"), although its name is private. The files of an adapter do not mention it.
    PEFT would give the layer subclasses of `kind` too, for example quantized ones; None leaves those to PEFT.
    """

    def layer_on(target: nn.Module, *args: Any, **kwargs: Any) -> nn.Module | None:
        return layer(target, *args, **kwargs) if type(target) is kind else None

    config._register_custom_module({kind: layer_on})  # type: ignore[dict-item]
