"""Opens tokenizers and base models, for training and for evaluation. This module imports nothing of an engine."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def open_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def open_base_model(name_or_path: str, trust_remote_code: bool = False, **how: Any) -> Any:
    """Opens a causal language model; `how` are further arguments of transformers' from_pretrained."""
    return AutoModelForCausalLM.from_pretrained(
        name_or_path,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # the other format is pickle, which can run code
        **how,
    )
