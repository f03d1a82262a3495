"""Counts what a step of the 14B shape dispatches on a GPU: `python -m benchmarks.dispatches`

It runs on any machine, because it makes the step on the meta device, and its numbers are exact: ATen calls, and those
of them that start a kernel. A card whose rows are short waits for each of them. What a decoder layer takes is the
difference between a model with four layers and one with three.
"""

import argparse
import contextlib
import sys
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.docs_section import write_section
from benchmarks.workload import ANSWER, PROMPT, SHARED, lora_config, made_up_rows
from data.layout import Layout, MicroBatch, collate
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes
from loop.internals.torch_internals import TorchDispatchMode
from loop.model.attention import IN_LINE
from loop.model.build import add_adapters, set_checkpointing, set_layout
from loop.model.head import HeadWithLoss
from loop.model.lora import FusedLora
from loop.model.operators import use_fused_operators
from loop.planning.activations import as_fused_kernels
from loop.recipe import ROOT, Recipe, parse_recipe

SHAPE = ROOT / "loop" / "shapes" / "Qwen2.5-14B-Instruct"
LAYERS = 48  # of the whole model
ROWS = 16  # of a micro-batch of the reference
PARTS = ("norms", "LoRA", "RoPE", "attention", "activation", "residual", "head", "rest")
# Calls that start no kernel: they make a view, or memory without contents.
NO_KERNEL = {
    *("view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "_unsafe_view", "detach", "alias"),
    *("reshape", "permute", "split", "split_with_sizes", "unbind", "as_strided", "chunk", "narrow", "_reshape_alias"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "sym_size"),
}


@dataclass(frozen=True)
class Dispatched:
    """What one step dispatches, forward and backward together, by part."""

    calls: Counter[str]
    kernels: Counter[str]

    def __sub__(self, other: "Dispatched") -> "Dispatched":
        calls, kernels = Counter(self.calls), Counter(self.kernels)
        calls.subtract(other.calls)
        kernels.subtract(other.kernels)
        return Dispatched(calls, kernels)


@dataclass(frozen=True)
class Contender:
    name: str
    layout: Layout
    checkpointing: str = "none"
    ours: bool = True


CONTENDERS = (
    Contender("ours", "shared_prefix"),
    Contender("ours, checkpointed", "shared_prefix", "non_reentrant"),
    Contender("ours", "packed"),
    Contender("ours", "padded"),
    Contender("PEFT and transformers", "padded", ours=False),
    Contender("PEFT and transformers, checkpointed", "padded", "non_reentrant", ours=False),
)


class _Counter(TorchDispatchMode):
    """Counts each call for the part of the model that makes it.

    A call of the backward pass belongs to the part that has made its autograd node: nodes are numbered in the order of
    the forward pass, and `borders` has the number from which each part begins.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = []  # the parts that are at work in the forward pass, or in a recomputation
        self.borders: list[tuple[int, str]] = [(0, "rest")]
        self.calls: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part = self.part()
        self.calls[part] += 1
        if str(function).split(".")[1] not in NO_KERNEL:
            self.kernels[part] += 1
        return function(*args, **(kwargs or {}))

    def part(self) -> str:
        node = torch._C._current_autograd_node()
        if self.stack or node is None:
            return self.stack[-1] if self.stack else "rest"
        return self.borders[bisect_right(self.borders, (node._sequence_nr(), "~")) - 1][1]

    def enter(self, part: str) -> None:
        self.stack.append(part)
        self.borders.append((torch._C._autograd._get_sequence_nr(), part))

    def leave(self, *_: object) -> None:
        self.stack.pop()
        self.borders.append((torch._C._autograd._get_sequence_nr(), self.stack[-1] if self.stack else "rest"))


def part_of(module: nn.Module) -> str | None:
    """The part that a module's own calls belong to; None where it is that of the module around it."""
    kind = type(module).__name__
    if isinstance(module, FusedLora) or "lora" in type(module).__module__:
        return "LoRA"
    if isinstance(module, HeadWithLoss) or kind.endswith("ForCausalLM"):
        return "head"
    named = {"Norm": "norms", "Attention": "RoPE", "MLP": "activation", "DecoderLayer": "residual", "Model": "rest"}
    return next((part for end, part in named.items() if kind.endswith(end)), None)


@contextlib.contextmanager
def _parts_told(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """Within this context `counter` learns which part is at work."""
    hooks = []
    for module in model.modules():
        part = part_of(module)
        if part:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: counter.enter(part)))
            hooks.append(module.register_forward_hook(counter.leave, always_call=True))
    names = ("loop.model.attention.varlen_attn", "torch.nn.functional.scaled_dot_product_attention")
    with contextlib.ExitStack() as stack:
        for name in names:
            home, _, function = name.rpartition(".")
            original = getattr(sys.modules[home], function)
            stack.enter_context(patch(name, _told(original, counter)))
        yield
    for hook in hooks:
        hook.remove()


def _told(function: Any, counter: _Counter) -> Any:
    def attention(*args: Any, **kwargs: Any) -> Any:
        counter.enter("attention")
        try:
            return function(*args, **kwargs)
        finally:
            counter.leave()

    return attention


def build(contender: Contender, layers: int) -> Any:
    """The contender's model on the meta device, with so many layers."""
    config = AutoConfig.from_pretrained(SHAPE, num_hidden_layers=layers)
    config.layer_types = ["full_attention"] * layers
    config.use_cache = False
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model: Any = add_adapters(base, _recipe()) if contender.ours else get_peft_model(base, lora_config())
    model.to(torch.bfloat16).train()
    set_checkpointing(base, contender.checkpointing)
    if contender.ours:
        set_layout(base, contender.layout, IN_LINE)
        use_fused_operators(base)
    return model


def _recipe() -> Recipe:
    return parse_recipe(["--model.name_or_path", str(SHAPE)])[1]


def micro_batch(layout: Layout) -> MicroBatch:
    """Sixteen rows as the reference's are, on the meta device."""
    vocab = AutoConfig.from_pretrained(SHAPE).vocab_size
    return collate(made_up_rows(ROWS, vocab, SHARED, PROMPT, ANSWER), layout, 0).to(torch.device("meta"))


def count_step(contender: Contender, layers: int) -> Dispatched:
    """Counts the forward and the backward pass of one micro-batch."""
    model, batch, counter = build(contender, layers), micro_batch(contender.layout), _Counter()
    inputs = batch.inputs
    if batch.attention_mask is not None:  # transformers cannot make this mask of the other on this device
        rows, tokens = batch.input_ids.shape
        inputs["attention_mask"] = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    with as_fused_kernels(), _parts_told(model, counter), counter:
        if contender.ours:
            loss = model(labels=batch.label_ids, predicts=batch.predicts, **inputs)
        else:
            logits = model(**inputs).logits.flatten(0, 1).float()
            loss = nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
        loss.backward()
    return Dispatched(counter.calls, counter.kernels)


def count_layer(contender: Contender) -> Dispatched:
    """What one decoder layer adds to a step."""
    return count_step(contender, 4) - count_step(contender, 3)


def as_markdown(found: dict[Contender, tuple[Dispatched, Dispatched]]) -> str:
    rows = []
    for contender, (layer, three) in found.items():
        parts = [layer.kernels[part] for part in PARTS if part not in ("head", "rest")]
        whole = sum(three.calls.values()) + (LAYERS - 3) * sum(layer.calls.values())
        rows.append([contender.name, contender.layout, *parts, f"**{sum(layer.kernels.values())}**", f"{whole:,}"])
    head = ["", "layout", *(part for part in PARTS if part not in ("head", "rest")), "a layer", "ATen calls a step"]
    return markdown_table(head, [[str(cell) for cell in row] for row in rows])


ABOUT = """Kernels of one decoder layer, forward and backward together, by what makes them (LoRA includes the frozen
products that it belongs to), and ATen calls of a whole step of 48 layers with 16 of the reference's rows. Attention and
RMSNorm count as on a GPU, where one kernel computes each."""


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatches", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    args = parser.parse_args(argv)
    found = {contender: (count_layer(contender), count_step(contender, 3)) for contender in CONTENDERS}
    table = as_markdown(found)
    print(table)
    if args.docs:
        text = f"{ABOUT}\n\n{table}"
        write_section("What a step dispatches", "python -m benchmarks.dispatches --docs", text, "performance.md")


if __name__ == "__main__":
    main(sys.argv[1:])
