"""Tests the vLLM backend with a stand-in that has the interface of vLLM, because vLLM itself needs a GPU."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data.conversation import question
from data.errors import UserError
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from eval.answers.ask import Question, ask
from eval.answers.settings import Settings
from eval.run import parse
from loop.model.opening import open_tokenizer
from loop.recipe import parse_recipe
from tests.equality import TINY

RECIPE = parse_recipe([])[1]
ROWS = [question(1, "1802=", "x"), question(2, "7=", "x")]


class Engine:
    """Answers each prompt with its own last three tokens and the end token."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, lora_request: Any) -> list[Any]:
        asked.append((self.options, prompts, sampling, lora_request))
        ids = [[*prompt["prompt_token_ids"][-3:], *sampling.stop_token_ids] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=each, finish_reason="stop")]) for each in ids]


asked: list[Any] = []


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    module, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.__dict__.update(LLM=Engine, SamplingParams=lambda **options: SimpleNamespace(**options))
    request.__dict__.update(LoRARequest=lambda *arguments: arguments)
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("rank", "room"), [(4, 8), (8, 8), (12, 16), (64, 64)])
def test_asks_vllm(tmp_path: Path, rank: int, room: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    to_ask = Question("tuned", RECIPE, tmp_path, True, ROWS, None, Settings(9), backend="vllm")
    answer = ask(to_ask)
    tokenizer = open_tokenizer(str(TINY))
    options, prompts, sampling, adapter = asked[0]
    assert options["max_lora_rank"] == room
    assert options["enable_lora"] is True
    assert (sampling.temperature, sampling.max_tokens, sampling.stop_token_ids) == (0.0, 9, [tokenizer.eos_token_id])
    assert adapter[1:] == (1, str(tmp_path))
    texts = [ChatTemplate(tokenizer, SYSTEM_PROMPT).prompt(row) for row in ROWS]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [tokenizer(text)["input_ids"] for text in texts]
    last = [tokenizer.decode(tokenizer(text)["input_ids"][-3:], skip_special_tokens=True) for text in texts]
    assert [[of.text for of in row] for row in answer.answers] == [[text] for text in last]
    assert answer.num_tokens == 8
    assert not any(of.cut_off for row in answer.answers for of in row)
    assert answer.peak_load is None


@pytest.mark.usefixtures("vllm")
def test_the_base_has_no_adapter() -> None:
    ask(Question("base", RECIPE, None, True, ROWS, 4, Settings(9), backend="vllm"))
    options, _, _, adapter = asked[0]
    assert adapter is None
    assert options["enable_lora"] is False
    assert options["max_num_seqs"] == 4


def test_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match="vLLM is not installed"):
        parse(["--run", "runs/x", "--backend", "vllm"])


def test_what_does_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="leave these out"):
        parse(["--run", "runs/x", "--backend", "vllm", "--verify", "3"])
