"""gradient_checkpointing: auto asks for recomputation where a step without it would not fit, and says what it found."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTNeoXConfig, OPTConfig

from data.examples import Example
from loop.batch_arithmetic import BatchArithmetic
from loop.model.attention import BY_ROW
from loop.model.build import Data, add_adapters
from loop.planning.decisions import decide
from loop.recipe import parse_recipe
from tests.test_batching import base
from tests.test_head import SIZES
from tests.test_layout import unequal_rows

RECIPE = parse_recipe(["--batching", "padded"])[1]


class Memory:
    available = 10**12


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    monkeypatch.setattr(Memory, "available", 10**12)
    return Memory


def decided(recipe: Any = RECIPE, examples: list[Example] | None = None) -> tuple[str, str]:
    examples = examples or unequal_rows()
    found = decide(recipe, Data(examples, [], 0), add_adapters(base(), recipe), Accelerator(cpu=True))
    return found.checkpointing, found.said["gradient checkpointing"]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_a_step_in_any_layout(layout: Any, memory: type[Memory]) -> None:
    """A single row is measured too, although no other row has to be kept apart from it."""
    for examples in (unequal_rows(), unequal_rows()[:1]):
        assert decided(replace(RECIPE, batching=layout), examples)[0] == "none"


def test_kept_where_it_fits_and_recomputed_where_not(memory: type[Memory]) -> None:
    chosen, why = decided()
    assert chosen == "none"
    need = float(why.split(" of ")[0].split()[-1]) * 1e9
    assert need > 0
    memory.available = int(need * 1.3)
    assert decided()[0] == "none"
    memory.available = int(need * 0.9)
    chosen, why = decided()
    assert chosen == "non_reentrant"
    assert why.startswith("non_reentrant (auto): a step without would take")


def test_rows_at_once_are_as_many_as_fit(memory: type[Memory]) -> None:
    """With auto a process computes its whole share, or as much of it as memory allows; a step keeps its rows."""
    recipe = replace(RECIPE, micro_batch_size="auto", rows_per_step=8, gradient_checkpointing="none")
    rows = [Example.of(i, [1] * 100, [2] * 100) for i in range(8)]
    found = {}
    accelerator = Accelerator(cpu=True)
    data, model = Data(rows, [], 0), add_adapters(base(), recipe)
    batch = BatchArithmetic.of(recipe, 1, len(rows))
    assert (batch.micro_batch_size, batch.grad_accum_steps) == (8, 1)
    for share in (1.2, 0.6, 0.3, 0.001):
        memory.available = 10**12
        why = decide(recipe, data, model, accelerator).said["gradient checkpointing"]
        memory.available = int(float(why.split(" takes ")[1].split()[0]) * 1e9 * share)
        told = decide(recipe, data, model, accelerator)
        cut, batch_cut = told.write_into(recipe, batch)
        assert batch_cut.rows_per_step == batch.rows_per_step == 8
        assert accelerator.gradient_accumulation_steps == cut.grad_accum_steps == 8 // told.rows_at_once
        found[share] = told.rows_at_once
    assert found[1.2] == 8
    assert 8 > found[0.6] >= found[0.3] >= found[0.001] == 1


def test_processes_of_a_machine_share_its_memory(memory: type[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    need = float(decided()[1].split(" of ")[0].split()[-1]) * 1e9
    memory.available = int(need * 1.5)
    assert decided()[0] == "none"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert decided()[0] == "non_reentrant"


def test_long_rows_need_more(memory: type[Memory]) -> None:
    def need(examples: list[Example]) -> float:
        return float(decided(examples=examples)[1].split(" of ")[0].split()[-1])

    assert need([Example.of(1, [1] * 500, [2] * 500)]) > 3 * need([Example.of(1, [1] * 100, [2] * 100)])


@pytest.mark.parametrize("said", ["none", "reentrant", "non_reentrant"])
def test_explicit_values_are_obeyed(said: Any, memory: type[Memory]) -> None:
    memory.available = 1
    assert decided(replace(RECIPE, gradient_checkpointing=said)) == (said, said)


@pytest.mark.parametrize("config", [Gemma2Config, CohereConfig, GPTNeoXConfig, OPTConfig])
def test_models_of_other_kinds(config: Any, memory: type[Memory]) -> None:
    """Whether or not their step can be measured on the meta device, there is a decision and no traceback."""
    sizes = {key: value for key, value in SIZES.items() if config is not OPTConfig or key != "intermediate_size"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**sizes))
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = sorted(linear - {"lm_head", "embed_out"})
    recipe = replace(RECIPE, batching="auto", lora=replace(RECIPE.lora, target_modules=tuple(targets)))
    data, adapted = Data(unequal_rows(), [], 0), add_adapters(model, recipe)
    found = decide(recipe, data, adapted, Accelerator(cpu=True))
    assert found.checkpointing in ("none", "non_reentrant")
    assert "(auto)" in found.said["gradient checkpointing"]
    given = replace(recipe, gradient_checkpointing="none", micro_batch_size="auto", rows_per_step=4)
    found = decide(given, data, adapted, Accelerator(cpu=True))
    assert found.checkpointing == "none", "what is given is obeyed, and only the rows at once are chosen"
    assert found.rows_at_once in (1, 2, 4)


def test_the_model_is_left_as_it_was(memory: type[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring needs another attention and another precision, which are those of a copy."""
    monkeypatch.setattr("loop.planning.decisions.mixed_precision", lambda accelerator: "bf16")
    adapted: Any = add_adapters(base(), RECIPE)

    def description() -> tuple[object, ...]:
        dtypes = {name: parameter.dtype for name, parameter in adapted.named_parameters()}
        settings = adapted.get_base_model().config.to_dict()
        modules = {name: (type(inner), inner.training, sorted(vars(inner))) for name, inner in adapted.named_modules()}
        return dtypes, settings, adapted.get_base_model().config._attn_implementation, modules

    before = description()
    data = Data(unequal_rows(), [], 0)
    found = decide(replace(RECIPE, batching="packed"), data, adapted, Accelerator(cpu=True))
    assert found.checkpointing == "none"
    assert description() == before


def test_what_is_decided_is_written_into_the_recipe(memory: type[Memory]) -> None:
    memory.available = 1
    recipe = replace(RECIPE, batching="auto")
    found = decide(recipe, Data(unequal_rows(), [], 0), add_adapters(base(), recipe), Accelerator(cpu=True))
    written, batch = found.write_into(recipe, BatchArithmetic.of(recipe, 1, 7))
    assert batch == BatchArithmetic.of(recipe, 1, 7)
    assert (written.batching, written.gradient_checkpointing) == (found.layout, "non_reentrant")
    assert replace(written, batching="auto", gradient_checkpointing="auto", grad_accum_steps=1) == recipe


def test_asks_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 10**12

    class OnGpu:
        device = torch.device("cuda", 0)
        num_processes = 1

        def __getattr__(self, name: str) -> Any:
            return getattr(Accelerator(cpu=True), name)

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Card)
    monkeypatch.setattr("loop.planning.decisions.largest_of_ranks", lambda value, accelerator: value)
    monkeypatch.setattr("loop.model.build.attention_for", lambda *_: BY_ROW)
    monkeypatch.setattr("loop.model.build.use_fused_operators", lambda _: None)
    data, model = Data(unequal_rows(), [], 0), add_adapters(base(), RECIPE)
    accelerator: Any = OnGpu()
    assert decide(RECIPE, data, model, accelerator).checkpointing == "none"
    monkeypatch.setattr(Card, "total_memory", 6 * 10**8)  # CUDA itself takes as much
    assert decide(RECIPE, data, model, accelerator).checkpointing == "non_reentrant"
