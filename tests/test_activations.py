"""A step on the meta device against the same step on real tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from data.examples import Example
from data.layout import Layout, collate
from loop.model.attention import BY_ROW, IN_LINE
from loop.model.build import adapt, add_adapters, set_checkpointing, set_layout
from loop.model.head import LinearNLL
from loop.model.lora import share_inputs, shared_inputs
from loop.planning.activations import measure_step
from loop.recipe import parse_recipe
from tests.equality import TINY
from tests.reference_loop import TARGETS

ROWS, TOKENS, LABELS = 3, 40, 12
DROPOUT = 0.0  # because a GPU keeps masks of dropout and a CPU does not
BATCH = collate([Example.of(row, [1] * (TOKENS - LABELS), [1] * LABELS) for row in range(ROWS)], "padded", 0)


def adapted(device: str, dtype: torch.dtype) -> Any:
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=dtype)
        config = LoraConfig(r=8, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        return adapt(base, config, autocast_adapter_dtype=False).to(dtype).train()


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Counts the bytes that autograd keeps: each storage once, without parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages are kept alive, so that no address is used twice
    result: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield result
    result.append(sum(storage.nbytes() for storage in kept.values()))


@pytest.mark.parametrize("how", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_is_what_autograd_saves(how: str, dtype: torch.dtype) -> None:
    model = adapted("cpu", dtype)
    base = model.get_base_model()
    set_checkpointing(base, how)
    with saved_bytes(model) as saved:
        mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
        mask[0, -5:] = 0  # or PyTorch would take the way without a mask
        ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
        hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        labels = torch.zeros(ROWS * LABELS, dtype=torch.long)
        loss = LinearNLL.apply(hidden.flatten(0, 1)[: ROWS * LABELS], base.lm_head.weight, None, labels, None)  # type: ignore
    planned = measure_step(adapted("meta", dtype), BATCH, how)
    assert planned.saved == pytest.approx(saved[0], rel=0.05)
    assert planned.peak > planned.saved
    assert loss.isfinite()


def test_recomputing_keeps_one_input_a_layer() -> None:
    """Two more layers add two inputs of a layer: rows x tokens x hidden size in bf16 each. The last layer keeps all."""
    deep, shallow = (adapted("meta", torch.bfloat16) for _ in range(2))
    layers = shallow.get_base_model().model.layers
    del layers[2:]
    kept = [measure_step(model, BATCH, "non_reentrant").saved for model in (deep, shallow)]
    assert kept[0] - kept[1] == 2 * ROWS * TOKENS * 128 * 2


def test_measuring_leaves_the_model_as_it_was() -> None:
    """After measurements of all kinds, modules, modes, hooks and gradients are as before, and so is a measurement."""
    model = adapted("meta", torch.bfloat16).eval()

    def state() -> list[object]:
        modules = [
            (name, type(module), module.training, getattr(module, "gradient_checkpointing", None), hooks_of(module))
            for name, module in model.named_modules()
        ]
        parameters = [(name, p.grad, p.requires_grad, hooks_of(p)) for name, p in model.named_parameters()]
        return [modules, parameters, model.get_base_model().config.to_dict()]

    before = state()
    measured = [
        measure_step(model, BATCH, kind) for kind in ("none", "reentrant", "non_reentrant", "none", "reentrant")
    ]
    assert state() == before
    assert measured[0] == measured[3]
    assert measured[1] == measured[4]
    assert measured[0] != measured[1]


def hooks_of(owner: Any) -> list[int]:
    """The numbers of hooks of each kind."""
    return [len(hooks) for name, hooks in sorted(vars(owner).items()) if "hooks" in name and isinstance(hooks, dict)]


def test_events_are_the_modules_in_order() -> None:
    """The modules begin in order in the forward pass, and in the opposite order in the backward pass."""
    planned = measure_step(adapted("meta", torch.bfloat16), BATCH, "none")
    layers = [event.module for event in planned.events if event.kind == "fetch" and event.module.endswith("mlp")]
    names = [f"base_model.model.model.layers.{i}.mlp" for i in range(4)]
    assert layers == names + names[::-1]


@pytest.mark.parametrize("attention", [BY_ROW, IN_LINE])
@pytest.mark.parametrize(("layout", "shared"), [("packed", 0), ("shared_prefix", 64)])
def test_memory_of_packed_rows_grows_with_their_number_and_not_with_its_square(
    layout: Layout, shared: int, attention: str
) -> None:
    """Each further pair of rows of 400 tokens adds the same; a mask over all of them would add more and more."""
    peaks = []
    for rows in (2, 4, 6, 8):
        model = adapted("meta", torch.bfloat16)
        set_layout(model.get_base_model(), layout, attention)
        examples = [Example.of(i, [1] * shared + [2 + i] * 200, [3] * 200) for i in range(rows)]
        peaks.append(measure_step(model, collate(examples, layout, 0), "none").peak)
    added = [more - less for less, more in pairwise(peaks)]
    assert added == pytest.approx([added[0]] * 3, rel=0.01)


def test_layers_that_share_an_input_keep_it_once() -> None:
    """What the planner measures is what trains: q, k and v keep one input after dropout and one mask, not three."""
    recipe = parse_recipe(["--lora.target_modules", "[q_proj, k_proj, v_proj]"])[1]
    config = AutoConfig.from_pretrained(TINY)
    with torch.device("meta"):
        model = add_adapters(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), recipe)
    model.to(torch.bfloat16)
    together = measure_step(model, BATCH, "none").saved
    share_inputs(model, [[name] for names in shared_inputs(model) for name in names])
    apart = measure_step(model, BATCH, "none").saved
    saves = 2 * ROWS * TOKENS * config.hidden_size * (2 + 1)  # two inputs of two bytes and two masks
    costs = 3 * 8 * config.hidden_size * 2  # their matrices A beside one another
    assert apart - together == config.num_hidden_layers * (saves - costs)
