"""Compares batched generation with one prompt at a time, and a merged adapter with an unmerged one.

load_model puts the model on the GPU where there is one, so the tensors of these tests follow the model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from data.chat import prompt_ids
from data.conversation import question
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from eval.answers.generate import Answer, generate, load_model
from eval.answers.settings import Settings
from loop.model.opening import open_tokenizer

TINY = str(Path(__file__).parents[1] / "data" / "tiny_base")
WORDS = ("复述:大丫", "7=", "把1253拆成两个数的和", "3加5是多少?", "回答用「好」开头:把9拆成两个数的和", "1999=")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a random adapter that is large enough to change answers, and returns its folder."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


def one_by_one(model: Any, tokenizer: Any, ids: list[int], most: int) -> list[int]:
    """Generates one greedy answer by hand.

    The whole text goes through the model for every token, without a cache, without padding and without `generate`.
    """
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < most and tokenizer.eos_token_id not in answer:
            text = torch.tensor([ids + answer], device=model.device)
            answer.append(int(model(text).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("merge", [True, False])
def test_batched_is_one_by_one(adapter: Path, merge: bool) -> None:
    tokenizer = open_tokenizer(TINY)
    model = load_model(TINY, adapter, merge)
    template = ChatTemplate(tokenizer, SYSTEM_PROMPT)
    prompts = [prompt_ids(question(1, words, ""), template) for words in WORDS]
    expected = [one_by_one(model, tokenizer, prompt, 40) for prompt in prompts]
    for batch_size in (1, 4, 100):
        answers = generate(model, tokenizer, prompts, {tokenizer.eos_token_id}, batch_size, Settings(40))
        ended = [tokenizer.eos_token_id in ids for ids in expected]
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in expected]
        assert answers == [
            [Answer(*of)] for of in zip(texts, map(len, expected), [not each for each in ended], strict=True)
        ]


def test_merging_changes_nothing(adapter: Path) -> None:
    ids = torch.tensor([open_tokenizer(TINY)("复述:大丫")["input_ids"]])
    with torch.no_grad():
        models = (load_model(TINY), load_model(TINY, adapter, merge=True), load_model(TINY, adapter, merge=False))
        base, merged, unmerged = (model(ids.to(model.device)).logits for model in models)
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 0.1


def test_an_adapter_of_lm_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    """tiny_base's lm_head and embedding share their weight. A merge into it would change what the model reads."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"])
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY, dtype="auto"), lora).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ids = torch.tensor([open_tokenizer(TINY)("复述:大丫")["input_ids"]])
    with torch.no_grad():
        expected = tuned(ids).logits
        for merge in (True, False):
            model = load_model(TINY, tmp_path, merge)
            found = model(ids.to(model.device)).logits.cpu()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (found - load_model(TINY)(ids.to(model.device)).logits.cpu()).abs().max() > 0.1


def test_answers_end_where_a_server_ends_them(tmp_path: Path) -> None:
    """tiny_base, whose answers end with <|im_end|>, with another end token in its tokenizer: its generation_config.json
    lists both, as those of many models do."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    tokenizer = open_tokenizer(TINY)
    end, other, third = (tokenizer.get_vocab()[name] for name in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}))
    changed = open_tokenizer(str(folder))
    assert changed.eos_token_id == other
    template = ChatTemplate(tokenizer, SYSTEM_PROMPT)
    prompts = [prompt_ids(question(1, words, ""), template) for words in WORDS]
    expected = generate(load_model(TINY), tokenizer, prompts, {end}, None, Settings(40))
    model, asks = load_model(str(folder)), ChatTemplate(changed, SYSTEM_PROMPT)
    assert generate(model, changed, prompts, asks.stop_tokens(model.generation_config), None, Settings(40)) == expected
    assert asks.stop_token == end, "the template ends its turns with it"
    assert asks.stop_tokens(None) == {other, end}
    assert asks.stop_tokens(GenerationConfig(eos_token_id=[third])) == {other, end, third}


def test_progress_and_cut_off() -> None:
    tokenizer = open_tokenizer(TINY)
    seen: list[int] = []
    prompts, stops = [tokenizer(word)["input_ids"] for word in "复述大"], {tokenizer.eos_token_id}
    answers = generate(load_model(TINY), tokenizer, prompts, stops, 2, Settings(1), seen.append)
    assert seen == [2, 1]
    assert [(answer.num_tokens, answer.cut_off) for of in answers for answer in of] == [(1, True)] * 3
