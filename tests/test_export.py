"""An exported model is the base model with its adapter, or it is not there.

What it has to be is computed by plain transformers and by PEFT's own merge in fp32.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)

from data.errors import UserError
from loop.export import main, parse
from loop.exporting.cases import choose_cases
from loop.exporting.files import write_beside_weights
from loop.exporting.merge import find_updates
from loop.exporting.proof import Proof, compare_answers
from loop.exporting.source import Source, open_source, stored_tensors
from loop.exporting.stranger import main as ask
from loop.guard.process import RunError
from loop.recipe import ROOT, LoraRecipe, parse_recipe, recipe_as_dict
from loop.saving.content import INPUTS, model_sha256
from tests.equality import TINY

SIZES: dict[str, Any] = {
    **{"vocab_size": 833, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 831},
    **{"eos_token_id": 830, "bos_token_id": None, "initializer_range": 0.3},
}
LINEAR = ("q_proj", "v_proj", "o_proj", "down_proj")
EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the proof ask in this process: a fresh one takes seconds to import its libraries. The tests that run the
    command as users do ask in fresh ones."""

    def here(who: str, out: Path, asked: dict[str, Any]) -> Any:
        out.mkdir(parents=True)
        try:
            ask({**json.loads(json.dumps(asked)), "out": str(out)})
        except RuntimeError as error:
            raise RunError(f"{who} could not be asked: {error}") from error
        return json.loads((out / "answers.json").read_text())

    monkeypatch.setattr("loop.exporting.proof._ask", here)
    monkeypatch.setattr("loop.exporting.proof.NEW_TOKENS", 8)  # random models do not end by themselves


def write_base(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A model of random weights in several files, with the tokenizer of the embedded model."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1


def write_run(base: Path, run: Path, targets: tuple[str, ...], size: float = 0.1, **lora: Any) -> Path:
    """The folder of a finished run on `base`: an adapter of random weights, and a recipe that fits it."""
    recipe = parse_recipe(["--config", str(ROOT / "loop" / "recipes" / "debug.yaml")])[1]
    model = replace(recipe.model, name_or_path=str(base))
    recipe = replace(recipe, model=model, lora=LoraRecipe(rank=4, alpha=8, target_modules=targets))
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **lora
    )
    opened = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(opened, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)
    adapted.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_as_dict(recipe), allow_unicode=True))
    (run / INPUTS).write_text(json.dumps({"model_sha256": model_sha256(recipe), "files": {}}))
    return run


def reference(run: Path, base: Path) -> tuple[PeftModel, dict[str, Tensor]]:
    """Base + adapter, and the weights of PEFT's merge in fp32."""
    opened = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kept = PeftModel.from_pretrained(opened, str(run / "adapter")).eval()
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if again.config.tie_word_embeddings:  # PEFT would change both layers
        again.config.tie_word_embeddings = False
        head = again.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged: Any = PeftModel.from_pretrained(again, str(run / "adapter")).merge_and_unload()
    return kept, merged.state_dict()


def texts() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(0, 800, (1, 24)) for _ in range(4)]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=ids).logits for ids in texts()])


def greedy(model: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": 830, "pad_token_id": 831}
    return [
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist() for ids in texts()
    ]


FAMILIES: dict[str, tuple[type, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}, LINEAR, {}),
    "llama, untied": (LlamaConfig, {"tie_word_embeddings": False}, LINEAR, {"use_rslora": True}),
    "llama, tied, with the head": (LlamaConfig, {"tie_word_embeddings": True}, (*LINEAR, "lm_head"), {}),
    "gemma, tied": (Gemma3TextConfig, {"tie_word_embeddings": True}, LINEAR, {"alpha_pattern": {"o_proj": 32}}),
    "gemma, untied": (Gemma3TextConfig, {"tie_word_embeddings": False}, (*LINEAR, "lm_head"), {}),
    "gpt2, whose matrices are transposed": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}, ("c_attn",), {}),
}


@pytest.mark.launches
@pytest.mark.parametrize("family", FAMILIES)
def test_every_precision(family: str, tmp_path: Path) -> None:
    """Each weight is PEFT's merge in fp32, rounded once. Computed in fp32, what differs in the logits is rounding."""
    kind, changes, targets, lora = FAMILIES[family]
    base, run = tmp_path / "base", tmp_path / "run"
    write_base(kind(**SIZES | changes), base)
    write_run(base, run, targets, **lora)
    kept, merged = reference(run, base)
    expected = logits(kept)
    for dtype in EPS:
        folder = tmp_path / str(dtype)
        main([str(run), "--to", str(folder), "--dtype", str(dtype).removeprefix("torch.")])
        written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert {tensor.dtype for tensor in written.values()} == {dtype}
        for name, tensor in written.items():
            torch.testing.assert_close(tensor.float(), merged[name].float(), rtol=EPS[dtype], atol=EPS[dtype] * 1e-2)
        opened: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert opened.dtype == dtype
        opened = opened.float()
        difference = (logits(opened) - expected).norm() / expected.norm()
        assert difference < 8 * EPS[dtype], f"{dtype}: {difference}"
        if dtype == torch.float32:
            assert greedy(opened) == greedy(kept)


def test_weights_that_transformers_renames(tmp_path: Path) -> None:
    """The files of Gemma 3 have other names than its modules, and the vision tower beside the text model stays."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 28, "patch_size": 14}
    tokens: Any = {"mm_tokens_per_image": 4, "image_token_index": 800, "boi_token_index": 801, "eoi_token_index": 802}
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    write_base(Gemma3Config(text_config=SIZES, vision_config=vision, **tokens), base)
    write_run(base, run, ("q_proj", "down_proj"), exclude_modules=".*vision.*")
    main([str(run), "--to", str(out)])
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (base, out)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_layer = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert changed == {f"language_model.model.layers.{i}.{name}" for i in (0, 1) for name in of_layer}
    opened = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(opened), logits(reference(run, base)[0]), rtol=1e-3, atol=1e-4)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_model_that_comes_with_its_own_code(tmp_path: Path) -> None:
    """The code goes along, and the exported folder opens with it."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    write_base(LlamaConfig(**SIZES), base)
    write_run(base, run, LINEAR)
    kept, _ = reference(run, base)  # before it gets another name, which only its own code knows
    own: dict[str, Any] = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    own |= {"auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "mine.py").write_text(CODE)
    (base / "LICENSE.txt").write_text("Yours.")
    (run / INPUTS).unlink()
    text = (run / "recipe.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (run / "recipe.yaml").write_text(text)
    main([str(run), "--to", str(out)])
    opened = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(opened).__name__ == "MineForCausalLM"
    torch.testing.assert_close(logits(opened), logits(kept), rtol=1e-3, atol=1e-4)
    assert (out / "LICENSE.txt").read_text() == "Yours."


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter has an effect, on a tied Llama of several files. No test may change what is in there."""
    folder = tmp_path_factory.mktemp("small")
    write_base(LlamaConfig(**SIZES), folder / "base")
    return write_run(folder / "base", folder / "run", LINEAR)


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 whose adapter changes each weight by less than half of what bf16 can tell apart."""
    folder = tmp_path_factory.mktemp("barely")
    write_base(LlamaConfig(**SIZES), folder / "base", torch.bfloat16)
    return write_run(folder / "base", folder / "run", LINEAR, size=0.001)


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """The exit code and the message of a command that ends with an error."""
    with pytest.raises(SystemExit) as leaving:
        main(list(map(str, words)))
    return int(str(leaving.value.code)), capsys.readouterr().err


def test_a_merge_that_loses_the_adapter_is_found(
    barely_trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused(capsys, barely_trained, "--to", tmp_path / "out")
    assert code == 1
    assert said.count("error: ") == 1
    shares = [float(word.strip("%(,")) for word in said.split("the adapter's change")[0].split() if "%" in word]
    assert shares, said
    assert shares[0] < 50, "most of the change is smaller than half a step of bf16"
    (lost,) = re.findall(r"by ([\d.]+)% of what the adapter changes in them \(\d+% is tolerated in bfloat16", said)
    assert float(lost) > 80
    assert "Export with --dtype float32, or keep the adapter beside the weights with --adapter." in said
    assert list(tmp_path.iterdir()) == []


def test_and_in_fp32_it_is_kept(barely_trained: Path, tmp_path: Path) -> None:
    main([str(barely_trained), "--to", str(tmp_path / "out"), "--dtype", "fp32"])
    kept, _ = reference(barely_trained, barely_trained.parent / "base")
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with kept.disable_adapter():
        effect = logits(kept).clone()
    effect = (logits(kept) - effect).norm()
    assert (logits(opened) - logits(kept)).norm() < 0.03 * effect


def test_weights_that_are_not_the_adapters_are_found(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof looks at what was written, and not at what was meant to be written."""

    def spoil(*arguments: Any) -> None:
        write_beside_weights(*arguments)
        file = next(file for file in sorted(arguments[-1].glob("*.safetensors")) if "layers.1" in str(load_file(file)))
        held = load_file(file)
        name = next(name for name in sorted(held) if name.endswith("proj.weight") and "layers.1" in name)
        save_file(held | {name: held[name] * 1.5}, file, metadata={"format": "pt"})

    monkeypatch.setattr("loop.export.write_beside_weights", spoil)
    code, said = refused(capsys, small, "--to", tmp_path / "out")
    assert code == 1
    assert "the exported model is not the base model with its adapter" in said
    assert list(tmp_path.iterdir()) == []


def test_stops_that_are_not_the_trained_ones_are_found(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported model is not told where an answer ends: its own generation_config.json says so."""
    base = AutoModelForCausalLM.from_pretrained(small.parent / "base", dtype=torch.float32)
    kept = PeftModel.from_pretrained(base, str(small / "adapter")).eval()
    row = load_answers(kept, small)

    def spoil(*arguments: Any) -> None:
        write_beside_weights(*arguments)
        file = arguments[-1] / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [row]}))

    monkeypatch.setattr("loop.export.write_beside_weights", spoil)
    code, said = refused(capsys, small, "--to", tmp_path / "out")
    assert code == 1
    assert "of 7 greedy answers are equal" in said


def load_answers(model: Any, run: Path) -> int:
    """A token that the model generates second when asked the first row of the run."""
    source = open_source(run, None)
    prompt = torch.tensor([choose_cases(source, 1)[0][0].prompt])
    output = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False, pad_token_id=831)
    return int(output[0, prompt.shape[1] + 1])


def test_what_stands_beside_the_weights(small: Path, tmp_path: Path) -> None:
    """Tokenizer, chat template, stop tokens, model card and Modelfile. The card names no folder of the machine."""
    scores = {"asked": {"data": "/data/eval.json", "num_questions": 9, "judges": ["sums"]}}
    run = Path(shutil.copytree(small, tmp_path / "run"))
    (run / "eval.json").write_text(json.dumps(scores | {"scores": {"tuned": {"accuracy": 0.75}}}))
    (run / "versions.json").write_text(json.dumps({"torch": "9.9"}))
    out = tmp_path / "out"
    main([str(run), "--to", str(out), "--no-proof"])
    assert "Not proved" in (out / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(out)
    main([str(run), "--to", str(out)])
    tokenizer, trained = (AutoTokenizer.from_pretrained(folder) for folder in (out, TINY))
    assert tokenizer.chat_template == trained.chat_template
    assert tokenizer("8= x")["input_ids"] == trained("8= x")["input_ids"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [830]
    card = (out / "README.md").read_text(encoding="utf-8")
    for said in (
        "7 of 7 greedy answers",
        "| tuned | 0.750 |",
        "9 questions of eval.json, judged by sums",
        "| torch | 9.9 |",
    ):
        assert said in card
    assert "rank: 4" in card
    assert str(tmp_path) not in card
    assert 'PARAMETER stop "<|im_end|>"' in (out / "Modelfile").read_text(encoding="utf-8")
    assert (out / "model.safetensors.index.json").is_file()
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_an_older_evaluation_is_read_too(small: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    (run / "eval.json").write_text(json.dumps({"base": {"accuracy": 0.0}, "tuned": {"accuracy": 1.0}}))
    main([str(run), "--to", str(tmp_path / "out"), "--no-proof"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| base | 0.000 |\n| tuned | 1.000 |" in card


def test_rows_that_are_gone_are_replaced_and_it_is_said(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    text = (run / "recipe.yaml").read_text().replace("train_file: data/math/debug.jsonl", "train_file: gone.jsonl")
    (run / "recipe.yaml").write_text(text)
    main([str(run), "--to", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "note: the rows of the run cannot be used: gone.jsonl" in said
    assert "The logits of 5 made-up rows, because the rows of the run could not be used, differ" in said
    assert "5 of 5 greedy answers are equal" in said


def test_the_adapter_alone(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(small), "--to", str(tmp_path / "out"), "--adapter"])
    assert "PEFT opens it on the base model, where it changes the logits of 7 rows" in capsys.readouterr().out
    kept, _ = reference(small, small.parent / "base")
    opened = AutoModelForCausalLM.from_pretrained(small.parent / "base", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(opened, str(tmp_path / "out"))), logits(kept))


def test_an_adapter_that_does_not_open_is_found(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT only warns where a file lacks tensors; the model would answer as the base model does."""
    real = shutil.copyfile

    def spoil(file: Path, to: Path) -> None:
        real(file, to)
        if to.name == "adapter_model.safetensors":
            held = load_file(to)
            held["another.weight"] = held.pop(min(held))
            save_file(held, to)

    monkeypatch.setattr(shutil, "copyfile", spoil)
    code, said = refused(capsys, small, "--to", tmp_path / "out", "--adapter")
    assert code == 1
    assert "does not hold what stands in adapter_model.safetensors" in said
    assert list(tmp_path.iterdir()) == []


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing to compare": (["--prove", "0"], "--prove is 0, but has to be at least 1"),
    "a precision for nothing": (["--adapter", "--dtype", "bf16"], "--dtype goes with merged weights"),
    "another model": (["--model.name_or_path", str(TINY)], "cannot|is not of the model|content is not that"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = MISTAKES[mistake]
    code, told = refused(capsys, small, "--to", tmp_path / "out", *words)
    assert code == 2
    assert re.search(said, told), told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        parse([str(small), "--to", str(tmp_path)])


def changed_base(small: Path, folder: Path, change: Callable[[Path], object]) -> Source:
    """The run's source with a changed copy of its base model."""
    source = open_source(small, None)
    base = Path(shutil.copytree(small.parent / "base", folder))
    change(base)
    return replace(source, base=base, config=json.loads((base / "config.json").read_text()))


def test_what_is_not_merged_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    def quantize(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))

    with pytest.raises(UserError, match=r"its weights are quantized .fp8.*--adapter"):
        stored_tensors(changed_base(small, tmp_path / "quantized", quantize))

    def pickle(base: Path) -> None:
        for file in base.glob("model*"):
            file.unlink()
        (base / "pytorch_model.bin").touch()

    with pytest.raises(UserError, match=r"has no model.safetensors. Save it as safetensors"):
        stored_tensors(changed_base(small, tmp_path / "pickled", pickle))


def test_another_kind_of_adapter_is_refused_by_name(small: Path) -> None:
    """DoRA rescales each row of the sum, which the two matrices alone do not tell."""
    source = open_source(small, None)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(LINEAR), use_dora=True)
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(source.base), config)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj: its adapter .* is no plain LoRA"):
        find_updates(replace(source, model=other), stored_tensors(source))


def test_a_weight_that_stands_in_no_file_is_refused_by_name(small: Path) -> None:
    source = open_source(small, None)
    stored = stored_tensors(source)
    stored["fused"] = stored.pop("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight: the checkpoint does not hold this weight"):
        find_updates(source, stored)


def test_a_disk_without_enough_space_is_said_at_once(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 999, 1))
    code, said = refused(capsys, small, "--to", tmp_path / "out")
    assert code == 1
    assert re.search(r"0 MB are needed and 0 MB are free. Free space.", said), said


def command(run: Path, to: Path, *words: str, before: str = "", shell: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, behind the Python statements `before` and the shell command `shell`."""
    script = f"import os, sys, loop.export\n{before}\nloop.export.main({[str(run), '--to', str(to), *words]!r})"
    line = f"{shell} exec {shlex.join([sys.executable, '-c', script])}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)


FIGURES: dict[str, Any] = {
    **{"rows": "rows", "num_rows": 9, "computed_in": torch.float32, "scale": 2.0, "num_prompts": 0, "same_prompts": 0},
    **{"dtype": torch.bfloat16, "difference": 0.02, "effect": 0.1, "num_answers": 9, "equal": 9, "ties": 0},
}
VERDICTS: dict[str, tuple[dict[str, Any], bool]] = {
    "a fifth of the effect": ({}, True),
    "a fifth of the effect in fp32": ({"dtype": torch.float32}, False),
    "what fp32 cannot compute more exactly": ({"dtype": torch.float32, "difference": 1e-5, "effect": 1e-9}, True),
    "as much as the effect": ({"difference": 0.1}, False),
    "an adapter that changes nothing": ({"difference": 0.0, "effect": 0.0}, True),
    "a change where there should be none": ({"difference": 0.02, "effect": 0.0}, False),
    "an answer that is another": ({"equal": 8}, False),
    "an answer that parts at a tie": ({"equal": 8, "ties": 1}, True),
    "most answers part at a tie": ({"equal": 4, "ties": 5}, False),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_what_a_proof_tolerates(case: str) -> None:
    changes, holds = VERDICTS[case]
    assert Proof(**FIGURES | changes).holds == holds


def test_where_answers_part() -> None:
    """The gap between our two best logits decides at the first token that differs, and at no other."""
    ours = {"ids": [1, 2, 3], "gaps": [9.0, 0.1, 9.0]}
    assert compare_answers([ours], [{"ids": [1, 2, 3]}], 0.2) == (1, 0)
    assert compare_answers([ours], [{"ids": [1, 4, 4]}], 0.2) == (0, 1)
    assert compare_answers([ours], [{"ids": [1, 4, 4]}], 0.05) == (0, 0)
    assert compare_answers([ours], [{"ids": [4, 2, 3]}], 0.2) == (0, 0)
    assert compare_answers([ours], [{"ids": [1, 2]}], 0.2) == (0, 0), "one ends and the other goes on"


@pytest.mark.launches
def test_killed_in_the_middle(small: Path, tmp_path: Path) -> None:
    """Nothing is there under the folder's name, and the next export clears up."""
    out = tmp_path / "out"
    done = command(small, out, before="loop.export.write_beside_weights = lambda *a: os.kill(os.getpid(), 9)")
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    assert list(left.glob("*.safetensors")), "it was in the middle"
    assert not (left / "config.json").exists()
    main([str(small), "--to", str(out), "--no-proof"])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.launches
def test_a_full_disk_is_one_message(small: Path, tmp_path: Path) -> None:
    done = command(small, tmp_path / "out", shell="ulimit -f 40;")  # KiB a file
    assert done.returncode == 1, done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "could not be written" in done.stderr
    assert "Nothing was left behind" in done.stderr
    assert "then export once more" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launches
def test_the_embedded_model_in_fresh_processes(tmp_path: Path) -> None:
    """The command as a user runs it: base + adapter and the exported model are asked in processes of their own."""
    run = write_run(ROOT / "data" / "tiny_base", tmp_path / "run", LINEAR)
    done = command(run, tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "7 of 7 greedy answers are equal" in done.stdout
    assert "writes 7 of 7 prompts as the run did" in done.stdout
    merged = reference(run, ROOT / "data" / "tiny_base")[1]
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        assert (
            torch.equal(tensor, merged[name].to(torch.bfloat16))
            or ((tensor.float() - merged[name]).abs() <= merged[name].abs() * 2**-8).all()
        )
