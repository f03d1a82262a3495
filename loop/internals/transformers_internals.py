"""The private parts of transformers that this project reads or sets, and the reason for each."""

from typing import Any

from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

WRITTEN_AGAINST = "5.23.0"


def carries_state(model: Any) -> bool:
    """True when a model passes a state from token to token besides attention, as Mamba does. transformers' generate
    reads the same attribute; the configuration has no public field for it."""
    return bool(model._is_stateful)


def lets_attention_be_replaced(model: Any) -> bool:
    """True when model.set_attn_implementation will work. That function is public, but where a model cannot do it, it
    only prints a warning; transformers itself asks this private method first."""
    return bool(model._can_set_attn_implementation())


def attention_of(model: Any) -> str:
    """The name of the attention implementation in use. transformers has a public function to set it and none to
    read it."""
    return str(model.config._attn_implementation)


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a model that transformers can checkpoint one by one, without those inside another of them. Their
    common class is not documented; the public _no_split_modules names other modules beside them."""
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def keep_activations_of_last_layer(model: Any) -> None:
    """Switches gradient checkpointing off for the last layer of a model that has it switched on.

    The backward pass starts with that layer, so its activations would be dropped and recomputed at once: that would
    save no memory. The public activation_checkpointing_enable switches all layers alike.
    """
    for last in decoder_layers(model)[-1:]:
        last.gradient_checkpointing = False


def name_in_file(model: Any, name: str, weight: Any) -> str | None:
    """The name under which a checkpoint stores the parameter `name` of `model`; None where it stores it otherwise, for
    example joined with others.

    transformers renames some weights when it opens a checkpoint, and its save_pretrained takes the same private
    function to give them their old names. A weight that is only renamed comes back as the same object.
    """
    try:
        stored = revert_weight_conversion(model, {name: weight})
    except Exception:  # a conversion that takes several weights fails with one alone
        return None
    return next((key for key, tensor in stored.items() if tensor is weight), None)
