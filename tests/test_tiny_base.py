"""Tests that the embedded model is what its card says: it is small, opens by path, and cannot solve the task."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from data.sums import ANSWER_PREFIX, EVAL_NUMBERS, SYSTEM_PROMPT
from data.tiny_base import lessons
from data.tiny_base.build import accuracies, answers, build_tokenizer

TINY = Path(__file__).parents[1] / "data" / "tiny_base"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY)


def test_opens_by_path_and_is_small(model: Any) -> None:
    assert isinstance(model, Qwen2ForCausalLM)
    assert (TINY / "model.safetensors").stat().st_size <= 4_000_000
    assert model.config.tie_word_embeddings
    assert model.dtype == torch.float32


def test_tokenizer_is_the_one_that_build_makes(tokenizer: Any) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    rng = random.Random(7)
    for _ in range(300):
        text = lessons.random_text(rng) + str(rng.randrange(10**6))
        ids = tokenizer(text)["input_ids"]
        assert ids == built(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_digits_stay_single_and_any_text_survives(tokenizer: Any) -> None:
    pieces = [tokenizer.decode(i) for i in tokenizer("1253 + 548")["input_ids"]]
    assert pieces == ["1", "2", "5", "3", " +", " ", "5", "4", "8"]
    for text in ("héllo wörld", "龘 unseen", "emoji 🙂", "tab\tand\nnewline"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_lessons_never_show_the_task() -> None:
    rng = random.Random(1)
    for lesson in lessons.LESSONS:
        for _ in range(20_000):
            user, assistant = lesson(rng)
            assert ANSWER_PREFIX not in user + assistant
            if lesson in (lessons.split, lessons.begin_with):
                numbers = re.findall(r"[0-9]+", user if lesson is lessons.split else user.rpartition("」")[2])
                assert len(numbers) == 1
                assert int(numbers[0]) not in EVAL_NUMBERS
            if lesson is lessons.refuse:
                assert "+" not in assistant


def test_base_refuses_the_task_and_can_split_in_words(model: Any, tokenizer: Any) -> None:
    for x, answer in zip((1800, 1802, 7), answers(model, tokenizer, ["1800=", "1802=", "7="]), strict=True):
        assert answer == f'您提供的表达式 "{x}=" 并不完整,看起来像是一个等式。'
    reached = accuracies(model, tokenizer, 50)
    assert reached["split_held_out"] >= 0.98
    assert min(reached.values()) >= 0.9


def test_is_right() -> None:
    assert lessons.is_right("5", "5")
    assert not lessons.is_right("6", "5")
    assert lessons.is_right("好>600 + 653", "好>1 + 1252")
    assert not lessons.is_right("坏>600 + 653", "好>1 + 1252")
    assert not lessons.is_right("600 + 654", "1 + 1252")
    assert not lessons.is_right("nonsense", "1 + 1252")


def test_system_prompt_is_the_references() -> None:
    assert SYSTEM_PROMPT == "你是一个有帮助的助手,帮我解决下面数学问题"
