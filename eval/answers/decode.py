"""Decodes many prompts at once. Their common prefix is computed once, and a row that has ended costs nothing.

In some models padding changes the result: models with a recurrent state, or with an attention window shorter than the
text. Such a model gets one prompt at a time instead.
"""

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from data.layout import common_prefix
from eval.answers.settings import Choice
from loop.measure.memory import free_host_memory
from loop.model.attention import why_not_plain_attention

MOST = 512  # prompts in a batch; larger batches are not faster
SHARE = 0.7  # the share of the free memory that a batch may take
OVERHEAD = 2.0  # memory of keys and values counts twice, because a layer copies them when they grow

OnAnswered = Callable[[int], object]  # a function that gets the number of answers just generated
Draws = Sequence[float] | None  # a number of 0..1 for each token of an answer; None where the likeliest token is taken


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[list[int]],
    batch_size: int | None,
    choice: Choice,
    stops: Collection[int],
    progress: OnAnswered = lambda answered: None,
) -> list[list[int]]:
    """Returns the token ids of the answers to each prompt, all answers to a prompt one after another.

    An answer ends with the first token that is in `stops`, or where the settings of `choice` say. Each prompt is a list
    of token ids and not empty. Prompts of similar length share a batch, and the longest prompts come first. When
    `batch_size` is None, a batch takes as many prompts as fit into memory.
    """
    samples, max_new_tokens = choice.settings.samples, choice.settings.max_new_tokens
    draws = [choice.draws(prompt, sample) if choice.drawn else None for prompt in prompts for sample in range(samples)]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = len(prompts[order[0]]) + max_new_tokens
    if why_not_plain_attention(model, longest):  # padding between prefix and prompt would change the result
        return [
            _decode_alone(model, prompt, choice, of, stops, progress) for prompt, of in zip(prompts, draws, strict=True)
        ]
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
            asked, of = [prompts[i] for i in batch], [draws[i] for i in batch]
            found = decode_batch(model, prefix, shared, asked, choice, of, stops)
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


class _Chosen(LogitsProcessor):
    """Has transformers' greedy search take the token that `choice` takes."""

    def __init__(self, choice: Choice, draws: Draws, prompt: int) -> None:
        self.choice, self.draws, self.prompt = choice, draws, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self.choice.tokens(scores, [_draw(self.draws, input_ids.shape[1] - self.prompt)])
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Ends transformers' generation at the texts at which an answer ends."""

    def __init__(self, choice: Choice, prompt: int) -> None:
        self.choice, self.prompt = choice, prompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = self.choice.has_ended(input_ids[0, self.prompt :].tolist())
        return torch.tensor([ended], device=input_ids.device)


def _draw(draws: Draws, place: int) -> float:
    return 0.0 if draws is None else float(draws[place])


def _decode_alone(
    model: Any, prompt: list[int], choice: Choice, draws: Draws, stops: Collection[int], progress: OnAnswered
) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=choice.settings.max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=min(stops),
        repetition_penalty=1.0,  # a checkpoint's own generation_config may say otherwise
        logits_processor=LogitsProcessorList([_Chosen(choice, draws, len(prompt))]),
        stopping_criteria=StoppingCriteriaList([_Ended(choice, len(prompt))]),
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
    choice: Choice,
    draws: Sequence[Draws],
    stops: Collection[int],
) -> list[list[int]]:
    """Returns the answers to one batch of prompts; `draws` has the numbers with which each answer's tokens are drawn.

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
    for place in range(choice.settings.max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # [rows that have not ended]
        tokens = choice.tokens(output.logits[:, -1], [_draw(draws[row], place) for row in rows])
        going_on = []
        for i, token in enumerate(tokens.tolist()):  # tolist() waits for the GPU
            answers[rows[i]].append(token)
            if token not in stops and not choice.has_ended(answers[rows[i]]):
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
