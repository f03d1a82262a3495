"""Input that a careless or hostile hand might give: data files, recipes, launch settings, models, checkpoints.

Each case makes its files in a folder of its own and says what the one message has to name.
"""

import gzip
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from loop.recipe import ROOT
from loop.saving.checkpoint import STATE
from loop.saving.publish import MANIFEST, file_fingerprint

TINY = ROOT / "data" / "tiny_base"
GOOD = '{"instruction": "5=", "output": "1 + 4"}'
MATH = "data/math/math_train_1798.json"
USER, ANSWER = {"role": "user", "content": "5="}, {"role": "assistant", "content": "1 + 4"}
CALLS = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
EVIL = b"cos\nsystem\n(S'touch plainloop-was-here'\ntR."  # a pickle that runs a command


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], list[str]]
    """Given an empty folder: fills it and returns arguments of loop/train.py."""
    said: str
    """Part of the message."""
    env: dict[str, str] = field(default_factory=dict)
    """What `accelerate launch` would have set for another YAML."""


def data(content: str | bytes, said: str, option: str = "--data.train_file", more: Sequence[str] = ()) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "rows.json").write_bytes(content.encode() if isinstance(content, str) else content)
        return [option, str(folder / "rows.json"), *more]

    return Case(make, said)


def row(said: str, **fields: Any) -> Case:
    """One bad row after a good one."""
    return data(f"{GOOD}\n{json.dumps(fields)}\n", f"row 2: {said}")


def file(name: str, content: bytes, said: str) -> Case:
    """A file with the ending of its kind."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["--data.train_file", str(folder / name)]

    return Case(make, said)


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["5="], "output": ["1 + 4"]}), sink)
    return sink.getvalue()


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


def chat(said: str, more: Sequence[str] = (), **fields: Any) -> Case:
    """A file of one bad row."""
    return data(json.dumps(fields), said, more=more)


def template_of(token: str, said: str) -> Case:
    """A chat template of the user's own that writes `token` in front of each turn."""

    def make(folder: Path) -> list[str]:
        loop = "{% for m in messages %}" + token + "{{ m['content'] }}<|im_end|>{% endfor %}"
        (folder / "mine.jinja").write_text(loop)
        return ["--data.chat_template", str(folder / "mine.jinja")]

    return Case(make, said)


def special_file(make_it: Callable[[Path], object], said: str) -> Case:
    def make(folder: Path) -> list[str]:
        make_it(folder / "rows.json")
        return ["--data.train_file", str(folder / "rows.json")]

    return Case(make, said)


def arguments(said: str, *words: str, **env: str) -> Case:
    return Case(lambda folder: list(words), said, env)


def recipe(content: str | bytes, said: str) -> Case:
    """A recipe file; `content` follows a good one when it begins with +."""

    def make(folder: Path) -> list[str]:
        text = content.encode() if isinstance(content, str) else content
        if text.startswith(b"+"):
            text = (ROOT / "loop" / "recipes" / "debug.yaml").read_bytes() + text[1:]
        (folder / "mine.yaml").write_bytes(text)
        return ["--config", str(folder / "mine.yaml")]

    return Case(make, said)


def run_folder(prepare: Callable[[Path], object], said: str, name: str = "run") -> Case:
    def make(folder: Path) -> list[str]:
        prepare(folder)
        return ["--run_dir", str(folder / name)]

    return Case(make, said)


def deepspeed_file(content: str, said: str) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "ds.json").write_text(content)
        return []

    return Case(make, said, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "{folder}/ds.json"})


def zero(said: str, **block: Any) -> Case:
    return deepspeed_file(json.dumps({"zero_optimization": block, "bf16": {"enabled": True}}), said)


def model(change: Callable[[Path], object], said: str) -> Case:
    """A copy of the embedded model, damaged."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(TINY, folder / "model")
        change(folder / "model")
        return ["--model.name_or_path", str(folder / "model")]

    return Case(make, said)


def config(said: str, *gone: str, **changed: Any) -> Case:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in gone}))

    return model(change, said)


def template(text: str, said: str) -> Case:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return model(change, said)


def tensors(change: Callable[[dict[str, Any]], object], said: str) -> Case:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return model(rewrite, said)


def checkpoint(change: Callable[[Path], object], said: str, resign: bool = False, more: Sequence[str] = ()) -> Case:
    """The last checkpoint of a real run, damaged; with `resign` by someone who mends the manifest as well."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(folder.parent / "a real run", folder / "run")
        (last,) = (folder / "run" / "checkpoints").iterdir()
        change(last)
        if resign:
            files = [path for path in last.iterdir() if path.name != MANIFEST]
            (last / MANIFEST).write_text(json.dumps({path.name: file_fingerprint(path) for path in files}))
        return ["--resume", str(last), *more]

    return Case(make, said)


def state(said: str, **changed: Any) -> Case:
    def change(folder: Path) -> None:
        values = json.loads((folder / STATE).read_text()) | changed
        (folder / STATE).write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))

    return checkpoint(change, said, resign=True)


def retensor(name: str, change: Callable[[dict[str, Any]], object], said: str) -> Case:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name)

    return checkpoint(rewrite, said, resign=True)


def another_base(folder: Path) -> list[str]:
    """A run that is to go on with a base model of which the last weight differs."""
    return [
        *checkpoint(lambda last: None, "").make(folder),
        *tensors(lambda held: held[max(held)].view(-1)[-1].add_(1), "").make(folder),
    ]


def first(held: dict[str, Any]) -> str:
    return min(held)


def flip_bit(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def small_vocabulary(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(values))
    held = load_file(folder / "model.safetensors")
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][:100].clone()
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def few_positions(folder: Path) -> list[str]:
    """A GPT-2, which has an embedding for each of its positions."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=833, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    shutil.copytree(TINY, folder / "model")
    model.save_pretrained(folder / "model")
    return ["--model.name_or_path", str(folder / "model"), "--lora.target_modules", "[c_fc]"]


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(EVIL)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def used_folder(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").touch()


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "x.safetensors"}}')


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def remote_code(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "mine.py").write_text("open('plainloop-was-here', 'w')\nraise SystemExit(0)\n")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

CASES: dict[str, Case] = {
    # --- data files
    "data: empty": data("", "no rows"),
    "data: fields that nothing reads": data(
        '{"instruction": "a", "output": "b", "source": "c"}', "nothing reads 'source'"
    ),
    "data: blanks": data(" \n\t\n", "no rows"),
    "data: BOM alone": data(b"\xef\xbb\xbf", "no rows"),
    "data: empty array": data("[]", "no rows"),
    "data: empty validation file": data("", "no rows", "--data.validation_file"),
    "data: truncated array": data(f"[{GOOD}, {GOOD[:20]}", "not JSON"),
    "data: trailing comma": data(f"[{GOOD},]", "not JSON"),
    "data: truncated UTF-8": data(f"{GOOD}\n".encode() + '{"instruction": "数'.encode()[:-1], "is not UTF-8"),
    "data: UTF-16": data(GOOD.encode("utf-16"), "is not UTF-8"),
    "data: Latin-1": data('{"instruction": "é", "output": "x"}'.encode("latin-1"), "is not UTF-8"),
    "data: zeros": data(bytes(1000), "row 1: not JSON"),
    "data: gzip": data(gzip.compress(GOOD.encode()), "is not UTF-8"),
    "data: CSV": data("instruction,output\n5=,1 + 4\n", "row 1: not JSON"),
    "data: Python's quotes": data("{'instruction': '5=', 'output': '1 + 4'}", "row 1: not JSON"),
    "data: one object over many lines": data(GOOD.replace(",", ",\n"), "give one object a line"),
    "data: CRLF and a bad row": data(f"\ufeff{GOOD}\r\n{{oops\r\n", "row 2: not JSON"),
    "data: two arrays": data(f"[{GOOD}]\n[{GOOD}]", "not JSON"),
    "data: arrays nested without end": data("[" * 100_000, "nested too deeply"),
    "data: objects nested without end": data('{"a":' * 100_000, "nested too deeply"),
    "data: rows in rows": data(f"[[{GOOD}]]", "row 1: is of type list"),
    "data: 100 MB on one line, no JSON": data(b"x" * 100_000_000, "row 1: not JSON"),
    "data: 100 MB in one field": data(
        b'{"instruction": "' + b"x" * 100_000_000 + b'", "output": "y"}', "row 1: 100,000,001 characters"
    ),
    "data: a string for a row": data('["5="]', "row 1: is of type str"),
    "data: NaN for a row": data("[NaN]", "not JSON that can be read"),
    "data: true for a row": data(f"{GOOD}\ntrue", "row 2: is of type bool"),
    "data: a number of 5,000 digits": data("1" * 5000, "row 1: not JSON that can be read"),
    "data: instruction missing": row("the field 'instruction' is missing", output="x"),
    "data: output missing": row("the field 'output' is missing", instruction="x"),
    "data: capital letters in the keys": row("the field 'instruction' is missing", Instruction="x", Output="y"),
    "data: two formats in a file": row("is of the format messages, and the rows before it", **messages(USER, ANSWER)),
    "data: instruction NaN": row("the field 'instruction' is of type float", instruction=float("nan"), output="x"),
    "data: output infinite": row("the field 'output' is of type float", instruction="x", output=float("inf")),
    "data: instruction null": row("the field 'instruction' is of type NoneType", instruction=None, output="x"),
    "data: instruction a list": row("the field 'instruction' is of type list", instruction=["x"], output="x"),
    "data: output an object": row("the field 'output' is of type dict", instruction="x", output={"text": "y"}),
    "data: input a number": row("the field 'input' is of type int", instruction="x", input=5, output="y"),
    "data: instruction empty": row("the field 'instruction' is empty", instruction="", output="y"),
    "data: answer of whitespace": row("the field 'output' is empty", instruction="x", output=" \n\t\u3000"),
    "data: half a surrogate pair": row(
        "the field 'output' has half of a surrogate pair", instruction="x", output="\ud800"
    ),
    "data: longer than max_length": row("217 tokens; shorten it", instruction="5=" * 100, output="y"),
    "data: a folder": special_file(Path.mkdir, "no file in this folder can be read"),
    "data: a pipe nobody writes to": special_file(os.mkfifo, "is not a file"),
    "data: a link to itself": special_file(lambda path: path.symlink_to(path), "cannot be read"),
    "data: not there": arguments("cannot be read", "--data.train_file", "nowhere.json"),
    "data: a path of 5,000 characters": arguments("cannot be read", "--data.train_file", "x" * 5000),
    "data: a path with a zero byte": recipe('+\ndata: {train_file: "a\\0b"}\n', "cannot be read"),
    # --- files of other kinds
    "file: a Parquet file cut short": file("rows.parquet", parquet()[:200], "cannot be read"),
    "file: no Parquet": file("rows.parquet", b"PAR1", "cannot be read"),
    "file: a CSV with a quote that never ends": file("rows.csv", b'instruction,output\n1,"2\n', "line 2 is not CSV"),
    "file: a CSV with a cell too many": file("rows.csv", b"instruction,output\n1,2,3\n", "row 1: has 3 cells"),
    "file: a CSV without a header": file("rows.csv", b"5=,1 + 4\n", "no rows"),
    "file: gzip cut short": file("rows.json.gz", gzip.compress(GOOD.encode())[:-5], "cannot be read"),
    "file: no zstandard": file("rows.json.zst", GOOD.encode(), "cannot be read"),
    "file: no Arrow": file("rows.arrow", b"x" * 100, "cannot be read"),
    "file: the second of two": arguments("cannot be read", "--data.train_file", f'["{MATH}", "nowhere.json"]'),
    "file: none": arguments("at least one file", "--data.train_file", "[]"),
    "file: a negative number of times": arguments("1 or more times", "--data.train_file", f'{{"{MATH}": -1}}'),
    "file: a data set without a name": arguments("is no data set", "--data.train_file", "hub:@main"),
    # --- conversations
    "turns: no list": chat("'messages' is a text that is no JSON", messages="hello"),
    "turns: none": chat("has no turns", messages=[]),
    "turns: a text for a turn": chat("turn 1 of 'messages': is of type str", messages=["hello"]),
    "turns: a number for a text": chat(
        "turn 1 of 'messages': the content is of type int", **messages(USER | {"content": 5})
    ),
    "turns: an empty one": chat("turn 2 is empty", **messages(USER, ANSWER | {"content": ""})),
    "turns: two of the user in a row": chat("turns 1 and 2 are both the user's", **messages(USER, USER, ANSWER)),
    "turns: the assistant's first": chat("turn 1 is the assistant's", **messages(ANSWER, USER, ANSWER)),
    "turns: the user's last": chat("the last turn is the user's", **messages(USER)),
    "turns: a system turn in the middle": chat(
        "turn 3 is a system turn", **messages(USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER)
    ),
    "turns: a tool's without a call": chat(
        "turn 3 is a tool's", **messages(USER, ANSWER, {"role": "tool", "content": "5"}, ANSWER)
    ),
    "turns: a call without tools": chat("calls 'f', which the field 'tools' does not have", **messages(USER, CALLS)),
    "turns: arguments that are no JSON": chat(
        "the arguments of the tool call f are no JSON",
        **messages(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}),
    ),
    "turns: tools that the template does not show": chat(
        "does not show the tool 'f'", tools=[{"name": "f"}], **messages(USER, ANSWER)
    ),
    "turns: a thought that the template does not show": chat(
        "the chat template does not show 'hm'", **messages(USER, ANSWER | {"reasoning_content": "hm"})
    ),
    "turns: an image": chat("a part of the type 'image'", **messages({"role": "user", "content": [{"type": "image"}]})),
    "turns: a role that nobody has": chat("the role is 'wizard'", **messages({"role": "wizard", "content": "x"})),
    "turns: a weight below 0": chat("'weight' is -1", **messages(USER, ANSWER | {"weight": -1})),
    "turns: none is learned": chat("no turn of it is learned", **messages(USER, ANSWER | {"train": False})),
    "turns: ShareGPT of nobody": chat("'from' is 'bot'", conversations=[{"from": "bot", "value": "x"}]),
    "turns: a prompt without completion": chat("the field 'completion' is missing", prompt="x"),
    "turns: a text that is a number": chat("the field 'text' is of type int", text=5),
    "turns: a control token in a text": chat("the text has the control token '<|im_end|>'", text="a<|im_end|>"),
    "turns: 8,000 tokens": chat("tokens; shorten it", more=["--data.max_length", "7999"], text="x " * 8000),
    "turns: a mask for a character": chat("a character for private use", text="\U000f0000"),
    # --- recipes
    "recipe: a template of nobody": arguments("there is no such file", "--data.chat_template", "nowhere.jinja"),
    "recipe: a template whose tokens are not the tokenizer's": template_of("<|turn|>", "has no token <|turn|>"),
    "recipe: a share of all rows": arguments("data.validation_share is 1", "--data.validation_share", "1"),
    "recipe: a day that is none": arguments("data.date is 2026-13-01", "--data.date", "2026-13-01"),
    "recipe: two columns of one name": data(
        '{"a": "x", "b": "y"}', "two columns the name 'output'", more=["--data.columns", "{a: output, b: output}"]
    ),
    "recipe: unknown key": recipe("+\nepoch: 3\n", "epoch"),
    "recipe: unknown inner key": arguments("optim.momentum", "--optim.momentum", "0.9"),
    "recipe: words for a number": arguments("epochs", "--epochs", "two"),
    "recipe: half an epoch": arguments("epochs", "--epochs", "1.5"),
    "recipe: a list for a number": recipe("+\nseed: [1, 2]\n", "seed"),
    "recipe: a number for a section": recipe("+\noptim: 5\n", "optim is 5"),
    "recipe: a section left out": recipe("+\nmodel: null\n", "model.name_or_path"),
    "recipe: zero epochs": arguments("epochs is 0", "--epochs", "0"),
    "recipe: no step": arguments("max_steps is 0", "--max_steps", "0"),
    "recipe: steps in words": arguments("max_steps", "--max_steps", "many"),
    "recipe: more steps than a machine counts": arguments("max_steps is", "--max_steps", "1" + "0" * 30),
    "recipe: nothing but warm-up, cut short": arguments("Give --max_steps 2, or a smaller", "--max_steps", "1"),
    "recipe: no patience": arguments("patience is 0", "--patience", "0"),
    "recipe: patience NaN": recipe("+\npatience: .nan\n", "patience"),
    "recipe: patience without a validation": arguments(
        "patience is 2, but has to be null", "--patience", "2", "--data.validation_file", "null"
    ),
    "recipe: patience where no validation row is left": data(
        json.dumps({"instruction": "x " * 100, "output": "y"}),
        "patience needs validation rows, and none is left",
        "--data.validation_file",
        ["--patience", "2", "--data.too_long", "drop"],
    ),
    "recipe: a choice of nobody": arguments("choose_by", "--choose_by", "the best"),
    "recipe: the lowest of no validation": arguments(
        "choose_by is val/loss, but has to be last", "--choose_by", "val/loss", "--data.validation_file", "null"
    ),
    "recipe: negative batch": arguments("micro_batch_size is -1", "--micro_batch_size", "-1"),
    "recipe: zero accumulation": arguments("grad_accum_steps is 0", "--grad_accum_steps", "0"),
    "recipe: more epochs than a machine counts": arguments("epochs is", "--epochs", "1" + "0" * 30),
    "recipe: a batch beyond all memory": arguments("micro_batch_size is", "--micro_batch_size", "1" + "0" * 30),
    "recipe: learning rate NaN": recipe("+\noptim: {lr: .nan}\n", "optim.lr is nan"),
    "recipe: learning rate infinite": recipe("+\noptim: {lr: .inf}\n", "optim.lr is inf"),
    "recipe: learning rate negative": arguments("optim.lr is -1", "--optim.lr", "-1"),
    "recipe: three betas": arguments("optim.betas", "--optim.betas", "[0.9, 0.99, 0.999]"),
    "recipe: beta of one": arguments("optim.betas is", "--optim.betas", "[0.9, 1]"),
    "recipe: warm-up for ever": arguments("optim.warmup_ratio is 1", "--optim.warmup_ratio", "1"),
    "recipe: nothing but warm-up": data(GOOD, "of the 2 steps would be warm-up", more=["--optim.warmup_ratio", "0.9"]),
    "recipe: dropout of everything": arguments("lora.dropout is 1", "--lora.dropout", "1"),
    "recipe: rank 0": arguments("lora.rank is 0", "--lora.rank", "0"),
    "recipe: no target": arguments("lora.target_modules is", "--lora.target_modules", "[]"),
    "recipe: a seed below zero": arguments("seed is -1", "--seed", "-1"),
    "recipe: an unknown word": arguments("gradient_checkpointing", "--gradient_checkpointing", "sometimes"),
    "recipe: an unknown attention": arguments("attn_implementation", "--model.attn_implementation", "magic"),
    "recipe: not there": arguments("nowhere.yaml", "--config", "nowhere.yaml"),
    "recipe: a folder": arguments("data", "--config", "data"),
    "recipe: empty": recipe("", "mine.yaml: is no recipe"),
    "recipe: a list": recipe("- epochs\n", "mine.yaml: is no recipe"),
    "recipe: no YAML": recipe("model: {name_or_path: [\n", "mine.yaml"),
    "recipe: not UTF-8": recipe(b"+\ntracker: \xff\n", "mine.yaml"),
    "recipe: a Python object": recipe("+\ntracker: !!python/object/apply:os.system [ls]\n", "mine.yaml"),
    "recipe: aliases that explode": recipe(f"+\n{BOMB}", "'a'"),
    "recipe: run folder in use": run_folder(used_folder, "not an empty folder"),
    "recipe: run folder is a file": run_folder(lambda folder: (folder / "run").touch(), "not an empty folder"),
    "recipe: run folder under a file": run_folder(
        lambda folder: (folder / "file").touch(), "cannot be written", "file/run"
    ),
    "recipe: a learning rate that the command line spells wrong": arguments("lr", "--optim.lr", "3e-4e"),
    # --- what the accelerate YAML says, against the recipe or against sense
    "launch: another clipping": arguments("gradient_clipping: 0.5", ACCELERATE_GRADIENT_CLIPPING="0.5"),
    "launch: another accumulation": arguments(
        "gradient_accumulation_steps: 4", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"
    ),
    "launch: fp16 without a GPU": arguments("fp16 needs a GPU", ACCELERATE_MIXED_PRECISION="fp16"),
    "launch: fp8": arguments("fp8 is not supported", ACCELERATE_MIXED_PRECISION="fp8"),
    "launch: FSDP": arguments("FSDP is not supported", ACCELERATE_USE_FSDP="true"),
    "launch: Megatron-LM": arguments("Megatron-LM is not supported", ACCELERATE_USE_MEGATRON_LM="true"),
    "launch: parallelism": arguments("only data parallelism", ACCELERATE_USE_PARALLELISM_CONFIG="true"),
    "launch: a compiler under DeepSpeed": arguments(
        "compiles under", ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_USE_DEEPSPEED="true"
    ),
    "launch: a device": arguments("choose GPUs with", ACCELERATE_TORCH_DEVICE="cuda:1"),
    "launch: one of four tasks of mpirun": arguments("one of 4 tasks", OMPI_COMM_WORLD_SIZE="4"),
    "launch: one of four tasks of srun": arguments("one of 4 tasks", SLURM_STEP_NUM_TASKS="4"),
    "launch: NVMe without a path": arguments("nvme_path", ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme"),
    "launch: DeepSpeed file not there": arguments("nowhere.json", ACCELERATE_DEEPSPEED_CONFIG_FILE="nowhere.json"),
    "launch: DeepSpeed file no JSON": deepspeed_file("{", "ds.json"),
    "launch: DeepSpeed file a list": deepspeed_file("[]", "zero_optimization"),
    "launch: DeepSpeed file without stage": deepspeed_file("{}", "zero_optimization"),
    "launch: optimizer in the DeepSpeed file": deepspeed_file(
        '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}', "remove the block 'optimizer'"
    ),
    "launch: another micro-batch": deepspeed_file(
        '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}', "train_micro_batch_size_per_gpu: 3"
    ),
    "launch: ZeRO-9": zero("stage", stage=9),
    "launch: stage in words": zero("stage", stage="three"),
    "launch: a bucket below zero": zero("reduce_bucket_size", stage=2, reduce_bucket_size=-5),
    # --- models
    "model: not there": arguments("there is no folder", "--model.name_or_path", "./nowhere"),
    "model: empty folder": model(empty_folder, "model.name_or_path"),
    "model: no config": model(lambda folder: (folder / "config.json").unlink(), "config.json"),
    "model: config no JSON": model(lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "model: config a list": model(lambda folder: (folder / "config.json").write_text("[]"), "model.name_or_path"),
    "model: unknown type": config("nonesuch", model_type="nonesuch"),
    "model: no type": config("model_type", "model_type"),
    "model: code of its own": model(remote_code, "trust_remote_code"),
    "model: quantized by a package that is not here": config(
        "model.name_or_path", quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "model: no weights": model(lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "model: weights as pickle": model(only_pickle, "safetensors"),
    "model: weights truncated": model(
        lambda folder: os.truncate(folder / "model.safetensors", 1_000_000), "model.name_or_path"
    ),
    "model: weights emptied": model(lambda folder: os.truncate(folder / "model.safetensors", 0), "model.name_or_path"),
    "model: weights are text": model(
        lambda folder: (folder / "model.safetensors").write_text("hello" * 100), "model.name_or_path"
    ),
    "model: a tensor missing": tensors(lambda held: held.pop("model.layers.1.mlp.up_proj.weight"), "up_proj"),
    "model: a tensor of another shape": tensors(
        lambda held: held.update({"model.norm.weight": held["model.norm.weight"][:5].clone()}), "model.norm.weight"
    ),
    "model: a shard missing": model(shard_missing, "model.name_or_path"),
    "model: no tokenizer": model(no_tokenizer, "no tokenizer could be opened"),
    "model: tokenizer no JSON": model(lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    "model: no chat template": model(lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    "model: chat template no Jinja": template("{% if %}", "chat template"),
    "model: chat template refuses": template("{{ raise_exception('no system turns') }}", "no system turns"),
    "model: chat template reaches out": template("{{ messages.__class__.__mro__ }}", "chat template"),
    "model: chat template forgets the user": template("hello", "chat template"),
    "model: vocabulary smaller than the tokenizer": model(small_vocabulary, "has embeddings for 100 tokens"),
    "model: fewer positions than the longest row": Case(few_positions, "was made for 16, and it has no embedding"),
    "model: LoRA target that is not there": arguments("z_proj", "--lora.target_modules", "[q_proj, z_proj]"),
    "model: LoRA target that is an embedding": arguments(
        "embed_tokens of", "--lora.target_modules", "[q_proj, embed_tokens]"
    ),
    "model: LoRA target that is no layer": arguments("lora.target_modules", "--lora.target_modules", "[self_attn]"),
    # --- checkpoints
    "checkpoint: not there": arguments("there is no such folder", "--resume", "nowhere"),
    "checkpoint: another folder": arguments("manifest.json", "--resume", "data"),
    "checkpoint: truncated": checkpoint(lambda folder: os.truncate(folder / "optimizer.safetensors", 100), "bytes"),
    "checkpoint: one bit": checkpoint(lambda folder: flip_bit(folder / "adapter_model.safetensors"), "SHA-256"),
    "checkpoint: edited": checkpoint(
        lambda folder: (folder / STATE).write_text(re.sub('"step": .', '"step": 0', (folder / STATE).read_text())),
        "SHA-256",
    ),
    "checkpoint: no manifest": checkpoint(lambda folder: (folder / MANIFEST).unlink(), "manifest.json"),
    "checkpoint: a file missing": checkpoint(lambda folder: (folder / "optimizer.safetensors").unlink(), "is missing"),
    "checkpoint: a pickle beside": checkpoint(
        lambda folder: (folder / "optimizer.pt").write_bytes(EVIL), "not written by this program: optimizer.pt"
    ),
    "checkpoint: a pickle for the adapter": checkpoint(
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "adapter_model.bin"
    ),
    "checkpoint: a pickle in the adapter's name": checkpoint(
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(EVIL), "checkpoint", resign=True
    ),
    "checkpoint: a pickle, signed": checkpoint(
        lambda folder: (folder / "optimizer.pt").write_bytes(EVIL), "not written by this program", resign=True
    ),
    "checkpoint: state no JSON": checkpoint(lambda folder: (folder / STATE).write_text("{"), "checkpoint", resign=True),
    "checkpoint: state a list": checkpoint(lambda folder: (folder / STATE).write_text("[]"), "checkpoint", resign=True),
    "checkpoint: step negative": state("trainer_state.json", step=-4),
    "checkpoint: step in words": state("trainer_state.json", step="four"),
    "checkpoint: beyond the end": state("1000 steps are learned", step=1000, updates=1000),
    "checkpoint: more updates than steps": state("trainer_state.json", updates=5),
    "checkpoint: no account of its run": state("trainer_state.json", run="gone"),
    "checkpoint: validations in words": state("trainer_state.json", validations="many"),
    "checkpoint: a validation that is not finite": state("trainer_state.json", validations=[[1, math.nan]]),
    "checkpoint: a validation after its own step": state("trainer_state.json", validations=[[1000, 0.5]]),
    "checkpoint: losses in words": state("trainer_state.json", interval={"nlls": "many", "label_weight": 5}),
    "checkpoint: another model's adapter": retensor(
        "adapter_model.safetensors",
        lambda held: held.update({first(held): held[first(held)][:, :5].clone()}),
        "belongs to another model",
    ),
    "checkpoint: adapter not finite": retensor(
        "adapter_model.safetensors", lambda held: held[first(held)].fill_(float("nan")), "not finite"
    ),
    "checkpoint: moments of another shape": retensor(
        "optimizer.safetensors", lambda held: held.update({first(held): held[first(held)][:1].clone()}), "optimizer"
    ),
    "checkpoint: moments missing": retensor(
        "optimizer.safetensors", lambda held: held.pop(first(held)), "optimizer.safetensors"
    ),
    "checkpoint: another base model": Case(another_base, "is not that of the run's base model"),
    "checkpoint: another learning rate": checkpoint(
        lambda folder: None, "optim.lr: 0.0001 then, 0.5 now", more=["--optim.lr", "0.5"]
    ),
}
