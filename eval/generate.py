"""Batched greedy generation, in a process without DeepSpeed."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses its old names

Progress = Callable[[int], object]  # called with the number of prompts just answered


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """With padding on the left, where a decoder needs it, and a padding token in any case."""
    tokenizer: Any = AutoTokenizer.from_pretrained(
        name_or_path, padding_side="left", trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_model(
    name_or_path: str, adapter: Path | None = None, merge: bool = True, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The model in its checkpoint's own dtype, on the GPU if there is one, with `adapter` on top.

    Merged into the weights the adapter costs nothing a token; unmerged it costs two more
    multiplications in every linear layer.
    """
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # the other format is pickle, which can run code
    )
    model = model.to(device)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        if merge:
            model = model.merge_and_unload()
    model.eval()
    assert isinstance(model, PreTrainedModel | PeftModel)
    return model


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    progress: Progress = lambda answered: None,
) -> tuple[list[str], int]:
    """Greedy answers to rendered `prompts`, in their order, and the number of tokens generated.

    An answer ends at the end token, which is counted and not shown, or after `max_new_tokens`.
    """
    answers: list[str] = []
    num_tokens = 0
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # A checkpoint's own generation_config may say otherwise; greedy means none of these.
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
        )
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
            num_tokens += len(ids)
            answers.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
        progress(batch["input_ids"].shape[0])
    return answers, num_tokens


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
