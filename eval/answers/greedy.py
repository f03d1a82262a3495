"""Decodes many prompts at once, greedily. Their common prefix is computed once, and a row that has ended costs nothing.

In some models padding changes the result: models with a recurrent state, or with an attention window shorter than the
text. Such a model gets one prompt at a time instead.
"""

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from data.layout import common_prefix
from loop.measure.memory import free_host_memory
from loop.model.attention import why_not_plain_attention

MOST = 512  # prompts in a batch; larger batches are not faster
SHARE = 0.7  # the share of the free memory that a batch may take
OVERHEAD = 2.0  # memory of keys and values counts twice, because a layer copies them when they grow

OnAnswered = Callable[[int], object]  # a function that gets the number of prompts just answered


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[list[int]],
    batch_size: int | None,
    max_new_tokens: int,
    stops: Collection[int],
    progress: OnAnswered = lambda answered: None,
) -> list[list[int]]:
    """Returns the token ids of the answer to each prompt, in the order of the prompts.

    An answer ends with the first token that is in `stops`, or is cut off after `max_new_tokens`. Each prompt is a list
    of token ids and not empty. Prompts of similar length share a batch, and the longest prompts come first. When
    `batch_size` is None, a batch takes as many prompts as fit into memory.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = len(prompts[order[0]]) + max_new_tokens
    if why_not_plain_attention(model, longest):  # padding between prefix and prompt would change the result
        return [_decode_alone(model, prompt, max_new_tokens, stops, progress) for prompt in prompts]
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    batch_size = batch_size or size_that_fits(model, longest)
    prefix = None
    if shared:
        ids = torch.tensor([prompts[0][:shared]], device=model.device)
        prefix = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    answers: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        batch = order[start : start + batch_size]
        found = None
        try:
            found = decode_batch(model, prefix, shared, [prompts[i] for i in batch], max_new_tokens, stops)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        if found is None:  # outside of `except`, because the exception keeps the tensors of the batch alive
            batch_size = max(1, batch_size // 2)
            torch.cuda.empty_cache()
            continue
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
        start += len(batch)
        progress(len(batch))
    return answers


def _decode_alone(
    model: Any, prompt: list[int], max_new_tokens: int, stops: Collection[int], progress: OnAnswered
) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=min(stops),
        repetition_penalty=1.0,  # a checkpoint's own generation_config may say otherwise
        **settings,
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    progress(1)
    return answer


def decode_batch(
    model: Any,
    prefix: DynamicCache | None,
    shared: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Collection[int],
) -> list[list[int]]:
    """Returns the answers to one batch of prompts.

    A row consists of the prefix, then padding, then the prompt's own tokens. Positions do not count the padding.
    """
    device, b = model.device, len(prompts)
    width = max(map(len, prompts)) - shared
    ids = torch.full((b, width), min(stops))  # what stands in the padding is masked
    mask = torch.ones(b, shared + width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        padding = width + shared - len(prompt)
        ids[i, padding:] = torch.tensor(prompt[shared:])
        mask[i, shared : shared + padding] = 0
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    cache = deepcopy(prefix) if prefix is not None else DynamicCache(config=model.config)
    cache.batch_repeat_interleave(b)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(b))  # the rows that have not ended
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = output.logits[:, -1].argmax(-1)  # [rows that have not ended]
        going_on = []
        for i, token in enumerate(tokens.tolist()):  # tolist() waits for the GPU
            answers[rows[i]].append(token)
            if token not in stops:
                going_on.append(i)
        if not going_on:
            break
        positions = positions[:, -1:] + 1
        if len(going_on) < len(rows):
            keep = torch.tensor(going_on, device=device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            rows = [rows[i] for i in going_on]
        ids = tokens[:, None]
        mask = _one_more(mask)
    return answers


def _one_more(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def size_that_fits(model: Any, tokens: int) -> int:
    """Returns how many rows of `tokens` tokens fit into the free memory with their keys, values and logits."""
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize * tokens
    row = OVERHEAD * cached + 2 * 4 * config.vocab_size + 8 * tokens * config.hidden_size * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else free_host_memory()
    return max(1, min(MOST, int(SHARE * free / row)))
