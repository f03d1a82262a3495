"""Generates answers with vLLM, the engine of a server with GPUs, where the extra `vllm` is installed.

vLLM does not merge the adapter into the weights.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig

from data.chat import prompt_ids
from data.conversation import Row
from data.errors import UserError
from eval.answers.generate import Answer, timed
from eval.answers.settings import Choice, Settings
from loop.model.build import build_template, build_tokenizer
from loop.recipe import Recipe, find_model


class VllmQuestion(Protocol):
    """Names the fields of eval.run's Question that vLLM needs."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def adapter(self) -> Path | None: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def batch_size(self) -> int | None: ...
    @property
    def settings(self) -> Settings: ...


def check_vllm(verify: int, no_merge: bool) -> None:
    """Raises UserError when vLLM is not installed or cannot do what the options ask for."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--backend vllm: vLLM is not installed. Run: pip install -e '.[vllm]', on a machine with a GPU."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--backend vllm spreads over the GPUs itself: run python -m eval.run without accelerate launch."
        )
    if verify or no_merge:
        raise UserError("--backend vllm goes neither with --verify nor with --no-merge: leave these out.")


def ask_vllm(question: VllmQuestion) -> tuple[list[list[Answer]], float]:
    """Returns the answers to each row, in the order of the rows, and the seconds.

    With a temperature vLLM draws other tokens than transformers does, from the same seed.
    """
    vllm: Any = importlib.import_module("vllm")
    recipe, tokenizer = question.recipe, build_tokenizer(question.recipe)
    name = find_model(recipe.model.name_or_path)
    engine = vllm.LLM(
        model=name,
        trust_remote_code=recipe.model.trust_remote_code,
        enable_prefix_caching=True,
        enable_lora=question.adapter is not None,
        **({"max_lora_rank": _rank(question.adapter)} if question.adapter else {}),
        **({"max_num_seqs": question.batch_size} if question.batch_size else {}),
    )
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:  # a model need not have one
        config = None
    template = build_template(recipe, tokenizer)
    stops = sorted(template.stop_tokens(config))
    settings = question.settings
    sampling = vllm.SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed if settings.temperature else None,
        n=settings.samples,
        stop=list(settings.stop),
        max_tokens=settings.max_new_tokens,
        stop_token_ids=stops,
    )
    adapter = None
    if question.adapter is not None:
        adapter = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, str(question.adapter))
    prompts = [{"prompt_token_ids": prompt_ids(row, template)} for row in question.rows]
    outputs, seconds = timed(lambda: engine.generate(prompts, sampling, lora_request=adapter))
    choice = Choice(settings, tokenizer)

    def answer(said: Any) -> Answer:
        ids = list(said.token_ids)
        return Answer(choice.text(ids), len(ids), said.finish_reason == "length")

    return [[answer(said) for said in output.outputs] for output in outputs], seconds


def _rank(adapter: Path) -> int:
    """Returns the smallest rank that vLLM has room for (8, 16, 32 …) and that the adapter's rank fits into."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    return max(8, 1 << (rank - 1).bit_length())
