"""Compares decoding in batches behind a shared prefix with one prompt at a time and the whole text computed anew."""

import math
import random
from collections.abc import Collection
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, MistralConfig

from data.chat import prompt_ids
from data.conversation import question
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from eval.answers import decode as decoding
from eval.answers.decode import _decode_alone, decode, size_that_fits
from eval.answers.generate import generate, load_model
from eval.answers.settings import Choice, Settings
from loop.model.attention import why_not_plain_attention
from loop.model.opening import open_tokenizer
from tests.equality import TINY
from tests.test_head import SIZES

END = 7
MOST = 25
GREEDY = Choice(Settings(MOST))


@pytest.fixture(scope="module")
def model() -> Any:
    """Makes a model with random weights.

    Its logits are large, so that no two tokens are nearly equally likely; its vocabulary is small, so that rows end.
    """
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(TINY, vocab_size=24, pad_token_id=None, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def by_hand(model: Any, prompt: list[int], stops: Collection[int] = (END,)) -> list[int]:
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < MOST and not set(stops) & set(answer):
            answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


def prompts(shared: int, count: int = 24) -> list[list[int]]:
    drawn = random.Random(shared)
    first = [drawn.randrange(24) for _ in range(shared)]
    return [first + [drawn.randrange(24) for _ in range(drawn.randrange(1, 12))] for _ in range(count)]


def test_an_answer_ends_with_the_first_of_several_stop_tokens(model: Any) -> None:
    asked, stops = prompts(9), {END, 3, 11}
    expected = [by_hand(model, prompt, stops) for prompt in asked]
    assert {answer[-1] for answer in expected} >= stops, "each of them ends some answer"
    assert decode(model, asked, None, GREEDY, stops) == expected
    stateful = [_decode_alone(model, prompt, GREEDY, None, stops, lambda answered: None) for prompt in asked[:5]]
    assert stateful == expected[:5]


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_is_one_at_a_time(model: Any, shared: int, batch_size: int | None) -> None:
    asked = prompts(shared)
    expected = [by_hand(model, prompt) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 3, "rows have to end at different times"
    answered: list[int] = []
    assert decode(model, asked, batch_size, GREEDY, {END}, answered.append) == expected
    assert sum(answered) == len(asked)


def short_sighted() -> Any:
    torch.manual_seed(2)
    sizes = {**SIZES, "vocab_size": 24, "use_cache": True}
    config = MistralConfig(**sizes, sliding_window=8, initializer_range=0.5, eos_token_id=END, bos_token_id=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_window_shorter_than_the_prompts() -> None:
    """Padding would push tokens out of the window."""
    model, asked = short_sighted(), prompts(9, 6)
    assert why_not_plain_attention(model, 40)
    answered: list[int] = []
    assert decode(model, asked, None, GREEDY, {END}, answered.append) == [by_hand(model, prompt) for prompt in asked]
    assert sum(answered) == 6


def test_heads_by_any_name() -> None:
    """GPT-NeoX has as many heads for keys and values as for queries, so its configuration has no number for them."""
    torch.manual_seed(3)
    config = GPTNeoXConfig(**{**SIZES, "vocab_size": 24, "use_cache": True}, initializer_range=0.4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    asked = prompts(4, 6)
    assert decode(model, asked, None, GREEDY, {END}) == [by_hand(model, prompt) for prompt in asked]


def test_equal_prompts(model: Any) -> None:
    """All prompts share all their tokens but the last."""
    assert decode(model, [[3, 4, 5]] * 3, None, GREEDY, {END}) == [by_hand(model, [3, 4, 5])] * 3


def test_work_is_saved(model: Any) -> None:
    """Counts the tokens that go through the model.

    These are the prefix, once; the own tokens of each prompt; and the tokens of each answer but the last.
    """
    asked = prompts(9)
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        answers = decode(model, asked, 100, GREEDY, {END})
    finally:
        hook.remove()
    width = max(map(len, asked)) - 9
    assert sum(seen) == 9 + len(asked) * width + sum(len(answer) - 1 for answer in answers)


def test_a_batch_that_does_not_fit_is_halved(model: Any) -> None:
    asked = prompts(0, 9)
    sizes: list[int] = []
    real = decoding.decode_batch

    def small(model: Any, prefix: Any, shared: int, batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError
        return real(model, prefix, shared, batch, *rest)

    with patch.object(decoding, "decode_batch", small):
        assert decode(model, asked, 8, GREEDY, {END}) == [by_hand(model, prompt) for prompt in asked]
    assert sizes == [8, 4, 2, 2, 2, 2, 1]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Memory:
        available = 0

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    return Memory


def test_batch_size_follows_the_memory(model: Any, free: Any) -> None:
    sizes = []
    for available in (0, 10**6, 10**7, 10**12):
        free.available = available
        sizes.append(size_that_fits(model, tokens=100))
    assert sizes[0] == 1
    assert 1 <= sizes[1] < sizes[2] < sizes[3] == decoding.MOST


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_drawn_answers_do_not_depend_on_the_batch(model: Any, batch_size: int | None) -> None:
    """The reference divides the cumulated probabilities by hand, with the same numbers of 0..1."""
    asked = prompts(9, 6)
    choice = Choice(Settings(MOST, temperature=1.5, samples=3, seed=5))
    expected = [drawn_by_hand(model, prompt, choice.draws(prompt, k)) for prompt in asked for k in range(3)]
    assert len({tuple(answer) for answer in expected}) > len(asked), "the samples of a prompt differ"
    assert decode(model, asked, batch_size, choice, {END}) == expected
    alone = [
        _decode_alone(model, prompt, choice, choice.draws(prompt, 0), {END}, lambda answered: None) for prompt in asked
    ]
    assert alone == expected[::3]


def drawn_by_hand(model: Any, prompt: list[int], draws: Any) -> list[int]:
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < MOST and END not in answer:
            logits = model(torch.tensor([prompt + answer])).logits[0, -1].double().tolist()
            weights = [math.exp((logit - max(logits)) / 1.5) for logit in logits]
            left = draws[len(answer)] * sum(weights)
            token = 0
            while left >= weights[token]:
                left -= weights[token]
                token += 1
            answer.append(token)
    return answer


def test_draws_follow_the_probabilities() -> None:
    """The share of each of four tokens among 4,000 draws lies within five standard deviations of its probability; with
    top_k = 2 or top_p = 0.6 only the two likeliest tokens are left, in their proportion."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = np.random.default_rng(1).random(4000).tolist()
    for settings, left in (
        (Settings(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Settings(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (Settings(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Settings(temperature=1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
    ):
        tokens = Choice(settings).tokens(probabilities.log().expand(4000, 4), draws)
        for token, expected in enumerate(left):
            share = (tokens == token).double().mean().item()
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_other_seeds_samples_and_prompts_draw_otherwise() -> None:
    one, other = Choice(Settings(seed=1)), Choice(Settings(seed=2))
    found = [one.draws([1, 2], 0), one.draws([1, 2], 1), one.draws([12], 0), other.draws([1, 2], 0)]
    assert len({tuple(draws) for draws in found}) == 4
    assert list(one.draws([1, 2], 0)) == list(found[0])


def test_an_answer_ends_at_a_text() -> None:
    """The embedded model spells its refusal; the answer ends in front of the stop text, within a token or between."""
    tokenizer = open_tokenizer(str(TINY))
    model = load_model(str(TINY))
    template = ChatTemplate(tokenizer, SYSTEM_PROMPT)
    prompt = prompt_ids(question(1, "1802=", ""), template)
    ends = {tokenizer.eos_token_id}
    ((whole,),) = generate(model, tokenizer, [prompt], ends, None, Settings(40))
    for stop in ("并不完整", '1802="', "2=", "看起", "。"):
        settings = Settings(40, stop=("not there", stop))
        ((answer,),) = generate(model, tokenizer, [prompt], ends, None, settings)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.num_tokens < whole.num_tokens
        assert not answer.cut_off
        choice = Choice(settings, tokenizer)
        alone = _decode_alone(model, prompt, choice, None, ends, lambda answered: None)
        assert choice.text(alone) == answer.text
