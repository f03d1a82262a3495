"""Makes what the benchmarks train: folders with a checkpoint of random weights and rows.json with token ids.

The LoRA configuration that all contenders share is here too.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, set_seed

from data.examples import Example
from data.load import Reading, load
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from loop.recipe import ROOT, Recipe, parse_recipe

TINY = ROOT / "data" / "tiny_base"
RECIPE: Recipe = parse_recipe([])[1]  # the recipe's defaults
ROWS = 1798  # the reference has as many
# How many tokens a row of the reference has with Qwen2.5's tokenizer. An answer is 18 tokens and the end token.
SHARED, PROMPT, ANSWER = 20, 10, 19


@dataclass(frozen=True)
class Shape:
    """Gives the sizes of a Qwen2 model."""

    hidden: int = 768
    intermediate: int = 2624
    layers: int = 8
    heads: int = 12
    vocab: int = 8192


COMPUTE_BOUND = Shape()  # 80 million parameters: matrix products take most of a step on a CPU


def write_compute_bound(folder: Path, shape: Shape = COMPUTE_BOUND, tokens: tuple[int, int, int] | None = None) -> None:
    """Writes a Qwen2 of the sizes `shape`, a tokenizer and rows to `folder`.

    `tokens` counts the tokens of a row: those that all rows share, those of its own prompt, and those of its answer
    with the end token.
    """
    set_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        tie_word_embeddings=False,
    )
    transformers.utils.logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    write_rows(folder, made_up_rows(ROWS, shape.vocab, *(tokens or (SHARED, PROMPT, ANSWER))))


def made_up_rows(count: int, vocab: int, shared: int, prompt: int, answer: int) -> list[Example]:
    """Makes `count` rows of random tokens; every prompt begins with the same `shared` tokens."""
    drawn = random.Random(0)

    def ids(number: int) -> list[int]:
        return [drawn.randrange(300, vocab) for _ in range(number)]

    system = ids(shared)
    return [Example.of(row, system + ids(prompt), ids(answer)) for row in range(1, count + 1)]


def lora_config() -> LoraConfig:
    """Returns PEFT's configuration with the numbers of the default recipe."""
    return LoraConfig(
        r=RECIPE.lora.rank,
        lora_alpha=int(RECIPE.lora.alpha),
        lora_dropout=RECIPE.lora.dropout,
        target_modules=list(RECIPE.lora.target_modules),
        task_type="CAUSAL_LM",
    )


def write_tiny(folder: Path) -> None:
    """Writes a model of the embedded model's shape, and the reference's rows as the embedded tokenizer cuts them."""
    set_seed(0)
    transformers.utils.logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(folder)
    path = ROOT / "data" / "math" / "math_train_1798.json"
    write_rows(folder, load({str(path): 1}, [], Reading(ChatTemplate(tokenizer, SYSTEM_PROMPT), 99)).train)


def write_rows(folder: Path, examples: Sequence[Example]) -> None:
    rows = [{"row": e.row, "prompt": e.prompt_ids, "answer": e.label_ids} for e in examples]
    (folder / "rows.json").write_text(json.dumps(rows))


def load_rows(folder: Path) -> list[Example]:
    rows = json.loads((folder / "rows.json").read_text())
    return [Example.of(row["row"], row["prompt"], row["answer"]) for row in rows]
