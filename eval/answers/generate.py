"""Batched greedy generation, in a process without DeepSpeed."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval.answers.greedy import Progress, decode

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses its old names


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_model(
    name_or_path: str, adapter: Path | None = None, merge: bool = True, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The model in its checkpoint's own dtype, on this process's GPU if there is one, with `adapter` on top.

    Merged into the weights the adapter costs nothing a token; unmerged it costs two more
    multiplications in every linear layer.
    """
    transformers.utils.logging.disable_progress_bar()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # the other format is pickle, which can run code
        device_map={"": device},  # straight there: no second copy in host memory
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        if merge:
            model = model.merge_and_unload()
    model.eval()
    assert isinstance(model, PreTrainedModel | PeftModel)
    return model


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int | None,
    max_new_tokens: int,
    progress: Progress = lambda answered: None,
) -> tuple[list[str], int]:
    """Greedy answers to rendered `prompts`, in their order, and the number of tokens generated.

    An answer ends at the end token, which is counted and not shown, or after `max_new_tokens`.
    """
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = decode(model, ids, batch_size, max_new_tokens, int(tokenizer.eos_token_id), progress)
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers], sum(map(len, answers))


class PeakMemory:
    """Bytes at their highest since `reset`: allocated on the GPU, or resident in host memory without one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to what is resident now

    def peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")

    def now(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        return _status("VmRSS")


def _status(field: str) -> int:
    """A size out of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """The action's result and its seconds, the GPU's included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
