"""Loads a model and generates answers in batches, in a process without DeepSpeed."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answers.decode import OnAnswered, decode
from eval.answers.settings import Choice, Settings
from loop.model.opening import open_base_model

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses old names of transformers


def load_model(
    name_or_path: str, adapter: Path | None = None, merge: bool = True, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Returns the model with `adapter` on top, in the dtype of its checkpoint, on this process's GPU if there is one.

    An adapter that is merged into the weights adds no work to a token. An adapter that is not merged adds two
    multiplications in every linear layer that it changes. It is not merged into a weight that another layer uses too,
    as lm_head and the embedding do in many models: that layer would change with it.
    """
    transformers.utils.logging.disable_progress_bar()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    # With device_map the weights go straight to the device, without a copy in host memory.
    model = open_base_model(name_or_path, trust_remote_code, dtype="auto", device_map={"": device})
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        if merge and not _shares_adapted_weights(model):
            model = model.merge_and_unload()
    model.eval()
    assert isinstance(model, PreTrainedModel | PeftModel)
    return model


def _shares_adapted_weights(model: PeftModel) -> bool:
    """Whether another layer uses the weight of a layer that has an adapter."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(uses[id(layer.get_base_layer().weight)] > 1 for layer in layers)


@dataclass(frozen=True)
class Answer:
    """Holds an answer; the token at which it has stopped is counted, but is not part of the text."""

    text: str
    num_tokens: int
    cut_off: bool = False  # whether it has ended at the most tokens that it may have


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stops: Collection[int],
    batch_size: int | None,
    settings: Settings,
    progress: OnAnswered = lambda answered: None,
) -> list[list[Answer]]:
    """Returns the answers to each of the tokenized `prompts`, in their order: as many as the settings ask for.

    An answer ends at a token of `stops`, or where the settings say.
    """
    choice = Choice(settings, tokenizer)
    answers = iter(decode(model, prompts, batch_size, choice, stops, progress))
    return [[answer_of(next(answers), choice, stops) for _ in range(settings.samples)] for _ in prompts]


def answer_of(ids: list[int], choice: Choice, stops: Collection[int]) -> Answer:
    """Returns the answer with these token ids."""
    return Answer(choice.text(ids), len(ids), ids[-1] not in stops and not choice.has_ended(ids))


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Runs `action`; returns its result and its seconds, including the work that it leaves to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
