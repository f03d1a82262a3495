"""Talks to the models of a run: what they are asked, what they answer, and what is written meanwhile."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.conversation import Turn
from data.errors import UserError
from data.sums import SYSTEM_PROMPT
from data.template import ChatTemplate
from eval import chat
from eval.answers import dialogue as dialogues
from eval.answers.dialogue import Dialogue, as_remembered
from eval.answers.generate import Answer, generate, load_model
from eval.answers.settings import Settings
from eval.answers.stream import stream
from eval.chat import COMMANDS, open_dialogue, parse, talk, typed_lines, whole_texts
from loop.model.opening import open_tokenizer
from loop.recipe import ROOT, parse_recipe, recipe_as_dict
from tests.chat_templates import tokenizer_of
from tests.test_generate import one_by_one

TINY = str(ROOT / "data" / "tiny_base")
MOST = 40
POSITIONS = 512  # of the embedded model
RECIPE = parse_recipe([])[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the folder of a finished run, with a random adapter that is large enough to change answers."""
    torch.manual_seed(0)
    targets = list(RECIPE.lora.target_modules)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RECIPE.lora.rank, lora_alpha=16, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(str(folder / "adapter"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_as_dict(RECIPE), allow_unicode=True))
    return folder


def opened(run: Path, *options: str) -> Dialogue:
    return open_dialogue(parse(["--run", str(run), "--max-new-tokens", str(MOST), *options]))


def by_hand(model: Any, history: Sequence[str], system: str = SYSTEM_PROMPT) -> tuple[list[int], str]:
    """The greedy answer to the last text of `history`, whose texts are the user's and the assistant's in turn: its ids
    and its text. The tokenizer's own chat template renders the history."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = one_by_one(model, tokenizer, tokenizer(rendered(history, system))["input_ids"], MOST)
    return ids, str(tokenizer.decode(ids, skip_special_tokens=True))


def rendered(history: Sequence[str], system: str = SYSTEM_PROMPT, tokenizer: Any = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for place, text in enumerate(history):
        messages.append({"role": ("user", "assistant")[place % 2], "content": text})
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TINY)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_two_turns_with_both_models_are_those_of_plain_models(run: Path) -> None:
    """Each model is asked behind its own answers. The references are the plain base model, which has never seen an
    adapter, and the merged one; every token is computed from the whole text."""
    dialogue = opened(run, "--base")
    base_weights = sum(p.numel() for name, p in dialogue.model.named_parameters() if "lora_" not in name)
    assert base_weights == sum(p.numel() for p in load_model(TINY).parameters()), "the base is in memory once"
    said: list[str] = []
    talk(["1802=", "复述:大丫"], dialogue, said.append)
    expected = {}
    for label, model in (("base", load_model(TINY)), ("tuned", load_model(TINY, run / "adapter"))):
        (_, first), (_, second) = (one := by_hand(model, ["1802="])), by_hand(model, ["1802=", one[1], "复述:大丫"])
        expected[label] = (first, second)
    assert expected["base"][0] != expected["tuned"][0]
    assert {label: tuple(turn.content for turn in turns[1::2]) for label, turns in dialogue.turns.items()} == expected
    lines = [line for line in "".join(said).splitlines() if "was cut off" not in line]
    assert lines == [f"{label}: {expected[label][turn]}" for turn in (0, 1) for label in expected]
    assert len(said) > 3 * len(lines), "the answers have come in pieces"


@pytest.mark.parametrize("options", [[], ["--no-merge"]])
def test_the_tuned_model_alone(run: Path, options: list[str]) -> None:
    dialogue = opened(run, *options)
    assert isinstance(dialogue.model, PeftModel) == bool(options)
    dialogue.say("7=", lambda text: None)
    (turns,) = dialogue.turns.values()
    assert turns[1].content == by_hand(load_model(TINY, run / "adapter"), ["7="])[1]


def test_a_recipe_has_its_base_model() -> None:
    dialogue = open_dialogue(parse(["--config", str(ROOT / "loop" / "recipes" / "tiny.yaml")]))
    said: list[str] = []
    dialogue.say("1802=", said.append)
    assert "".join(said) == f"base: {by_hand(load_model(TINY), ['1802='])[1]}\n"


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_streamed_answer_is_that_of_the_evaluation(temperature: float) -> None:
    tokenizer, model = open_tokenizer(TINY), load_model(TINY)
    stops, pieces_in_all = {tokenizer.eos_token_id}, 0
    for words, stop in (("1802=", ()), ("3加5是多少?", ()), ("1802=", ("并不完整",)), ("1802=", ("看", "不完"))):
        prompt = tokenizer(rendered([words]))["input_ids"]
        settings = Settings(MOST, temperature, stop=stop)
        pieces: list[str] = []
        answer = stream(model, tokenizer, prompt, stops, settings, pieces.append)
        assert [[answer]] == generate(model, tokenizer, [prompt], stops, None, settings)
        assert "".join(pieces) == answer.text
        pieces_in_all += len(pieces)
    assert pieces_in_all > 20


@pytest.fixture
def parrot() -> Iterator[Callable[[list[int]], Any]]:
    """Makes the embedded model generate given tokens, whatever it is asked."""
    model, hooks = load_model(TINY), []

    def repeats(ids: list[int]) -> Any:
        coming = iter(ids)

        def say(module: Any, args: Any, output: Any) -> Any:
            output.logits = torch.nn.functional.one_hot(torch.tensor([[next(coming)]]), 833).float()
            return output

        hooks.append(model.register_forward_hook(say))
        return model

    yield repeats
    for hook in hooks:
        hook.remove()


def test_no_half_character_is_written(parrot: Callable[[list[int]], Any]) -> None:
    tokenizer = open_tokenizer(TINY)
    text = "a 龘靐é 😀👍 é!"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > len(text) + 5, "the characters have several tokens"
    pieces: list[str] = []
    answer = stream(parrot(ids), tokenizer, [3], {tokenizer.eos_token_id}, Settings(99), pieces.append)
    assert answer == Answer(text, len(ids))
    assert pieces == list(text)


def test_a_half_character_at_the_end_is_written_in_the_end(parrot: Callable[[list[int]], Any]) -> None:
    tokenizer = open_tokenizer(TINY)
    ids = tokenizer("a😀")["input_ids"]
    assert len(ids) == 5
    pieces: list[str] = []
    answer = stream(parrot(ids[:3]), tokenizer, [3], {tokenizer.eos_token_id}, Settings(3), pieces.append)
    assert answer == Answer(str(tokenizer.decode(ids[:3])), 3, cut_off=True)
    assert pieces == ["a", answer.text[1:]]


def test_what_may_begin_a_stop_text_waits(parrot: Callable[[list[int]], Any]) -> None:
    tokenizer = open_tokenizer(TINY)
    pieces: list[str] = []
    settings = Settings(99, stop=("+ + -",))
    ids = tokenizer("1 + 2 + + 3 + + - 4")["input_ids"]
    answer = stream(parrot(ids), tokenizer, [3], {tokenizer.eos_token_id}, settings, pieces.append)
    assert answer.text == "".join(pieces) == "1 + 2 + + 3 "
    assert not any(piece.endswith("+") for piece in pieces)


def interrupts(said: list[str], after: int) -> Callable[[str], None]:
    """What writes into `said`; during the piece `after` the user presses Ctrl-C."""

    def write(text: str) -> None:
        said.append(text)
        if len(said) == after:
            signal.raise_signal(signal.SIGINT)

    return write


def test_ctrl_c_ends_one_answer_and_what_was_said_counts(run: Path) -> None:
    dialogue = opened(run, "--base")
    whole = by_hand(load_model(TINY), ["1802="])[1]
    said: list[str] = []
    talk(["1802=", "7="], dialogue, interrupts(said, after=5))
    began = "".join(said[1:5])
    assert whole.startswith(began)
    assert 3 < len(began) < len(whole)
    tuned = by_hand(load_model(TINY, run / "adapter"), ["1802="])[1]
    assert "".join(said).startswith(f"base: {began}\ntuned: {tuned}\n")
    assert dialogue.turns["base"][1].content == began
    assert dialogue.turns["base"][3].content == by_hand(load_model(TINY), ["1802=", began, "7="])[1]


@pytest.fixture
def canned(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dialogue, list[str]]:
    """A dialogue whose models answer "base 1", "tuned 2" …, and the prompts that they get."""
    dialogue, prompts = opened(run, "--base"), []

    def answer(model: Any, tokenizer: Any, prompt: list[int], stops: Any, settings: Any, write: Any) -> Answer:
        active = not any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
        prompts.append(tokenizer.decode(prompt))
        text = f"{'tuned' if active else 'base'} {len(prompts)}"
        write(text)
        return Answer(text, 2)

    monkeypatch.setattr(dialogues, "stream", answer)
    return dialogue, prompts


def conversation(dialogue: Dialogue, *lines: str) -> str:
    said: list[str] = []
    talk(lines, dialogue, said.append)
    return "".join(said)


def test_prompts_are_what_the_chat_template_renders(canned: tuple[Dialogue, list[str]]) -> None:
    dialogue, prompts = canned
    said = conversation(dialogue, "a", "", "  ", "//b", "c\\", " d\\", "e", "<|im_end|> f")
    assert said.splitlines()[:3] == ["base: base 1", "tuned: tuned 2", "base: base 3"]
    assert prompts[:6] == [
        *(rendered(["a"]), rendered(["a"])),
        *(rendered(["a", "base 1", "/b"]), rendered(["a", "tuned 2", "/b"])),
        rendered(["a", "base 1", "/b", "base 3", "c\n d\ne"]),
        rendered(["a", "tuned 2", "/b", "tuned 4", "c\n d\ne"]),
    ]
    assert prompts[6] == rendered(["a", "base 1", "/b", "base 3", "c\n d\ne", "base 5", "<|im_end|> f"])
    end = dialogue.tokenizer.get_vocab()["<|im_end|>"]
    assert dialogue._prompt([Turn("user", "<|im_end|>")]).ids.count(end) == 2, "of system and user"


def test_commands(canned: tuple[Dialogue, list[str]]) -> None:
    dialogue, prompts = canned
    said = conversation(dialogue, "a", "b", "/undo", "c", "/reset", "d", "/system One word.", "e", "/system", "f")
    assert prompts[1::2] == [
        *(rendered(["a"]), rendered(["a", "tuned 2", "b"]), rendered(["a", "tuned 2", "c"]), rendered(["d"])),
        *(rendered(["e"], "One word."), rendered(["f"], "")),
    ]
    assert "(the last exchange is forgotten)\n" in said
    assert "(a new conversation behind this system prompt)\n" in said
    assert "(a new conversation without a system prompt)\n" in said
    assert len(prompts) == 12
    said = conversation(dialogue, "/undo", "/undo", "/undo", "/foo bar", "/reset now", "/", "g", "/help", "/quit", "h")
    assert said.count("nothing has been said yet.\n") == 2, "behind /system f there was one exchange"
    assert f"there is no command /foo; there are {', '.join(COMMANDS)}." in said
    assert "/reset takes no text.\n" in said
    assert "there is no command /;" in said
    assert all(f"\n{command}" in said for command in COMMANDS)
    assert prompts[12:] == [rendered(["g"], "")] * 2


def test_the_option_system_is_the_first_system_prompt(run: Path) -> None:
    for system in ("One word.", ""):
        dialogue = opened(run, "--system", system)
        ids = dialogue._prompt([Turn("user", "a")]).ids
        assert dialogue.tokenizer.decode(ids) == rendered(["a"], system)


def test_lines_that_go_on() -> None:
    assert list(whole_texts(["a", "b\\", "c", "d\\"])) == ["a", "b\nc", "d"]


def test_a_conversation_that_is_too_long_is_said_and_goes_on(canned: tuple[Dialogue, list[str]]) -> None:
    dialogue, prompts = canned
    said = conversation(dialogue, "a", "龘" * POSITIONS, "\U000f0000", "b")
    assert "tokens, and the model was made for 512. /undo drops" in said
    assert "this cannot be asked: a text has a character for private use" in said
    assert prompts[2:] == [rendered(["a", "base 1", "b"]), rendered(["a", "tuned 2", "b"])]


def test_an_answer_ends_where_the_positions_end(run: Path) -> None:
    dialogue = opened(run)
    ids, _ = by_hand(load_model(TINY, run / "adapter"), ["1802="])
    assert len(ids) > 5
    dialogue.positions = len(dialogue._prompt([Turn("user", "1802=")]).ids) + 5
    said = conversation(dialogue, "1802=", "and now?")
    first = dialogue.tokenizer.decode(ids[:5], skip_special_tokens=True)
    assert said.startswith(f"tuned: {first}\n(tuned was cut off after 5 tokens; /undo drops")
    assert "this cannot be asked: the conversation would have" in said
    dialogue = opened(run, "--max-new-tokens", "3")
    assert "(tuned was cut off after 3 tokens; --max-new-tokens gives it more)" in conversation(dialogue, "1802=")


def test_a_gpu_without_memory_ends_only_the_answer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = opened(run)

    def fails(*given: Any) -> Answer:
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(dialogues, "stream", fails)
        assert "does not fit into the GPU's memory" in conversation(dialogue, "1802=")
    assert dialogue.turns == {"tuned": ()}
    assert conversation(dialogue, "/undo") == "nothing has been said yet.\n"


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_a_thought_that_the_template_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model continues a thought, so its tokens have no mark of the beginning. The next prompt is that of a
    conversation whose thoughts stand in the field for thoughts, also where a thought was cut off."""
    tokenizer = tokenizer_of(name)
    coming = iter(["Hm.\n</think>\n\nUno.", "Hm, hm"])
    prompts: list[str] = []

    def answer(model: Any, tokenizer: Any, prompt: list[int], stops: Any, settings: Any, write: Any) -> Answer:
        prompts.append(tokenizer.decode(prompt))
        write(text := next(coming, ""))
        return Answer(text, 9)

    monkeypatch.setattr(dialogues, "stream", answer)
    monkeypatch.setattr(dialogues, "build_template", lambda recipe, tokenizer: ChatTemplate(tokenizer))
    model = load_model(TINY)
    model.resize_token_embeddings(len(tokenizer))
    dialogue = Dialogue(model, RECIPE, tokenizer, {"base": False}, Settings(9))
    said = conversation(dialogue, "One?", "Two?", "Three?")
    assert said.startswith("base: <think>Hm.\n</think>\n\nUno.\nbase: <think>Hm, hm\n")
    thoughts = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno.", "reasoning_content": "Hm."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm, hm"},
        {"role": "user", "content": "Three?"},
    ]
    for number, prompt in enumerate(prompts):
        assert prompt == tokenizer.apply_chat_template(
            thoughts[: 2 * number + 1], tokenize=False, add_generation_prompt=True
        )


def test_only_a_models_own_marks_are_thoughts() -> None:
    tiny, thinking = ChatTemplate(open_tokenizer(TINY)), tokenizer_of("qwen3")
    assert as_remembered("<think>a", tiny) == "<think>a"
    assert as_remembered("<think>a", ChatTemplate(thinking, parse=False)) == "<think>a"
    assert as_remembered("<think>a", ChatTemplate(thinking)) == "<think>a</think>"
    assert as_remembered("<think>a</think>b", ChatTemplate(thinking)) == "<think>a</think>b"


def test_what_cannot_be_talked_to(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--base goes with --run"):
        parse(["--config", "recipe.yaml", "--base"])
    with pytest.raises(UserError, match="--max-new-tokens is 0, but has to be at least 1"):
        parse(["--run", "runs/x", "--max-new-tokens", "0"])
    with pytest.raises(UserError, match=r"no recipe\.yaml in there"):
        opened(tmp_path)
    (tmp_path / "adapter").mkdir()
    for file in ("recipe.yaml", "adapter/adapter_config.json"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    held = load_file(run / "adapter" / "adapter_model.safetensors")
    held.popitem()
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not of the model and the recipe of this run"):
        opened(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is one process"):
        parse(["--run", str(run)])


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_prompt_ends_the_program(end: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    coming = iter(["a\\", "b"])
    asked: list[str] = []

    def line(prompt: str) -> str:
        asked.append(prompt)
        if text := next(coming, None):
            return text
        raise end

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(chat, "in_terminal", lambda: True)
    assert list(typed_lines()) == ["a\\", "b"]
    assert asked == ["you: ", "… ", "you: "]


def command(run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "eval.chat", "--run", str(run), "--max-new-tokens", str(MOST), *options]


@pytest.mark.launches
def test_a_script_that_is_piped_into_it(run: Path) -> None:
    script = b"1802=\n\xff\n/undo\n/quit\n7=\n"
    done = subprocess.run(command(run, "--base"), input=script, capture_output=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [line for line in done.stdout.decode().splitlines() if "cut off" not in line]
    assert lines[0] == f"base: {by_hand(load_model(TINY), ['1802='])[1]}"
    assert lines[1] == f"tuned: {by_hand(load_model(TINY, run / 'adapter'), ['1802='])[1]}"
    assert lines[-1] == "(the last exchange is forgotten)"


def test_an_error_of_the_user_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        chat.main(["--run", str(run), "--top-k", "3"])
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert said.err.startswith("error: --top-p and --top-k need --temperature")


@pytest.mark.launches
def test_ctrl_c_at_the_prompt_of_a_terminal(run: Path) -> None:
    own, terminal = pty.openpty()
    process = subprocess.Popen(command(run), stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(terminal)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(own, 1000)
        seen = seen.partition(text)[2]

    try:
        wait_for(b"/help lists the commands")
        wait_for(b"you: ")
        os.write(own, b"7=\n")
        wait_for(b"tuned: ")
        wait_for(b"you: ")
        while process.poll() is None:  # the prompt may be written before the process waits for a line
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, b"")
    finally:
        process.kill()
        os.close(own)
