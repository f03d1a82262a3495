"""Every private part of a library that loop/internals/ uses is still there and still means what we rely on.

A failure here says which module of loop/internals/ has to be read again beside the library's new source.
"""

import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from loop.internals import (
    accelerate_internals,
    deepspeed_internals,
    peft_internals,
    torch_internals,
    transformers_internals,
)
from loop.recipe import ROOT
from tests.equality import TINY

MODULES: dict[str, ModuleType] = {
    "accelerate": accelerate_internals,
    "deepspeed": deepspeed_internals,
    "peft": peft_internals,
    "torch": torch_internals,
    "transformers": transformers_internals,
}


def moved(library: str, what: str) -> str:
    return (
        f"{library} {version(library)} {what}. loop/internals/{library}_internals.py was written against "
        f"{MODULES[library].WRITTEN_AGAINST}: read it again beside the new source."
    )


def source(member: Any) -> str:
    return inspect.getsource(inspect.unwrap(member))


@pytest.mark.parametrize("library", MODULES)
def test_was_written_against_the_pinned_version(library: str) -> None:
    """Whoever pins another version is sent to read the module again."""
    pinned = re.search(rf"^{library}==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned_version = pinned[1] if pinned else "no version"
    assert pinned_version == MODULES[library].WRITTEN_AGAINST, moved(library, f"is pinned to {pinned_version}")


def deepspeed_parts() -> dict[str, tuple[Callable[[], Any], list[str]]]:
    """Each part by its name: the function of DeepSpeed that we read or replace, and words that its source has to hold
    for our use of it to be right."""
    from deepspeed.runtime import compiler
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.utils.mixed_precision_linkage import link_hp_params

    return {
        "a partitioned parameter": (lambda: Init, [".ds_id", ".ds_shape", ".ds_tensor", ".ds_status"]),
        "the link to masters": (lambda: link_hp_params, ["_hp_mapping = "]),
        "the link at stage 0 in bf16": (lambda: BF16_Optimizer, ["link_hp_params("]),
        "the norm": (lambda: DeepSpeedEngine.get_global_grad_norm, ["return self._global_grad_norm"]),
        "clipping in fp32": (
            lambda: DeepSpeedEngine,
            ["self.clip_fp32_gradients()", "self.optimizer._global_grad_norm"],
        ),
        "masters of fp16": (lambda: FP16_UnfusedOptimizer, ["self.fp16_groups = []", "self.fp32_groups = []"]),
        "clipping in fp16": (
            lambda: FP16_UnfusedOptimizer.step,
            ["self._global_grad_norm = get_global_norm", "self.unscale_and_clip_grads(self._global_grad_norm)"],
        ),
        "one gather each": (
            lambda: Stage3,
            ["self.persistent_parameters[0].all_gather(self.persistent_parameters)"],
        ),
        "stage 3 ends its step so": (lambda: Stage3, ["def _post_step(", "self._post_step(timer_names)"]),
        "the coordinator": (lambda: Stage3, ["def _get_param_coordinator("]),
        "the order of modules": (
            lambda: PartitionedParameterCoordinator,
            [
                "@functools.lru_cache(maxsize=None)\n    def __params_to_release(",
                "def _invalidate_trace(",
                "def is_invalid_trace(",
            ],
        ),
        "Muon's compiler": (lambda: compiler.compile, ["def compile("]),
    }


@pytest.mark.parametrize("part", deepspeed_parts())
def test_deepspeed(part: str) -> None:
    function, words = deepspeed_parts()[part]
    text = source(function())
    for word in words:
        assert word in text, moved("deepspeed", f"no longer has {word!r} in {function().__qualname__} ({part})")


def test_deepspeeds_muon_module_is_where_we_import_it() -> None:
    """An import error is suppressed in production, because without this module nothing has to be prevented."""
    from importlib.util import find_spec

    spec = find_spec("deepspeed.runtime.zero.muon.original_muon")
    assert spec is not None, moved("deepspeed", "has no module runtime.zero.muon.original_muon")
    assert spec.origin is not None
    assert "@compiler.compile()" in Path(spec.origin).read_text(), moved("deepspeed", "no longer compiles Muon")


def test_deepspeeds_cpu_adam_keeps_its_powers_in_cpp() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    text = source(DeepSpeedCPUAdam)
    for word in ("self.ds_opt_adam", "self.opt_id", "adam_update(self.opt_id, state['step']"):
        assert word in text, moved("deepspeed", f"no longer has {word!r} in DeepSpeedCPUAdam")


def test_shape_and_size_of_a_partitioned_parameter() -> None:
    whole = nn.Parameter(torch.zeros(3, 5))
    assert (deepspeed_internals.shape_of(whole), deepspeed_internals.numel_of(whole)) == ((3, 5), 15)
    assert not deepspeed_internals.is_partitioned(whole)
    share: Any = nn.Parameter(torch.zeros(0))  # what remains of a partitioned parameter between its uses
    share.ds_id, share.ds_shape, share.ds_tensor = 0, torch.Size([3, 5]), torch.zeros(8)
    assert (deepspeed_internals.shape_of(share), deepspeed_internals.numel_of(share)) == ((3, 5), 15)
    assert deepspeed_internals.is_partitioned(share)
    assert deepspeed_internals.share_of(share) == 8


def test_peft_builds_the_layer_it_is_told_to() -> None:
    from peft import get_peft_model
    from peft.tuners import lora

    class Layer(lora.Linear):
        pass

    config = LoraConfig(target_modules=["0"])
    peft_internals.use_layer(config, nn.Linear, Layer)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert type(model.base_model.model[0]) is Layer, moved("peft", "ignores LoraConfig._register_custom_module")


def tiny(config: Any = None) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config or AutoConfig.from_pretrained(TINY))


def test_transformers_says_which_models_carry_a_state() -> None:
    mamba = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    assert not transformers_internals.carries_state(tiny()), moved("transformers", "says that Qwen2 has a state")
    assert transformers_internals.carries_state(tiny(mamba)), moved("transformers", "says that Mamba has no state")


def test_transformers_tells_and_replaces_the_attention() -> None:
    model = tiny()
    assert transformers_internals.lets_attention_be_replaced(model)
    model.set_attn_implementation("eager")
    assert transformers_internals.attention_of(model) == "eager", moved(
        "transformers", "has another _attn_implementation"
    )


def test_transformers_checkpoints_all_layers_but_the_last() -> None:
    model = tiny()
    model.activation_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert all(layer.gradient_checkpointing for layer in layers), moved("transformers", "marks layers in another way")
    transformers_internals.keep_activations_of_last_layer(model)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * (len(layers) - 1) + [False]


def test_transformers_tells_the_name_in_a_file() -> None:
    """Qwen2 is stored under its own names; the experts of Qwen3-MoE are joined in memory, and stand apart in files."""
    name = "model.layers.0.mlp.down_proj.weight"
    model = tiny()
    weight = model.get_parameter(name)
    assert transformers_internals.name_in_file(model, name, weight) == name
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "head_dim": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny(AutoConfig.for_model("qwen3_moe", **sizes, **experts))
    name = "model.layers.0.mlp.experts.down_proj"
    found = transformers_internals.name_in_file(model, name, model.get_parameter(name))
    assert found is None, moved("transformers", "no longer joins experts")


def test_torch_replaces_attention_within_the_context() -> None:
    query = torch.zeros(1, 1, 2, 4)
    with torch_internals.attention_replaced_by(lambda *_: "ours"):
        assert torch.nn.functional.scaled_dot_product_attention(query, query, query) == "ours"
    assert torch.nn.functional.scaled_dot_product_attention(query, query, query).shape == query.shape


def test_torch_keeps_one_python_object_for_a_storage() -> None:
    """loop/planning/activations.py counts storages by their ids."""
    tensor = torch.empty(4, 4, device="meta")
    first = id(tensor.untyped_storage())
    others = [tensor[1:].untyped_storage(), tensor.detach().untyped_storage(), tensor.T.untyped_storage()]
    assert {id(other) for other in others} == {first}, moved("torch", "makes a new Python object for a storage")


def test_torch_builds_an_extension_in_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """loop/engine/extensions.py looks there for a lock and for what was built."""
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    assert list(tmp_path.glob("**/cpu_adam")) == [folder], moved("torch", f"builds extensions in {folder}")


def test_accelerates_launcher_answers() -> None:
    file = ROOT / "accel_configs" / "zero3.yaml"
    environment, asked = accelerate_internals.ask_launcher(file, 4)
    assert environment is not None, moved("accelerate", "has another prepare_deepspeed_cmd_env")
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert (asked.num_processes, asked.options["mixed_precision"]) == (4, "bf16")
