"""The way of a new user: every command of README's part on one's own data, as it stands there, in a fresh folder.

The folder is a copy of the project, with a recipe and 200 conversations of the user's own.
"""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.launching import ROOT
from tests.warm import clean_environment

QUESTIONS = ("Spell {}", "How is {} spelt?")


def commands() -> list[str]:
    """The commands of the code block behind the sentence with which README begins this way."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"Look at the rows as the model gets them.*?```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def conversation(number: int, rng: random.Random) -> dict[str, object]:
    turns = [("user", rng.choice(QUESTIONS).format(number)), ("assistant", "-".join(str(number)))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user") / "plainloop"
    for name in ("accel_configs", "data", "eval", "loop"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    rng = random.Random(3)
    rows = [json.dumps(conversation(number, rng)) for number in rng.sample(range(100, 1000), 240)]
    (folder / "mine.jsonl").write_text("\n".join(rows[:200]) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join(rows[200:]) + "\n")
    recipe = yaml.safe_load((folder / "loop/recipes/tiny.yaml").read_text(encoding="utf-8"))
    recipe["data"] = {"train_file": "mine.jsonl", "validation_share": 0.1, "max_length": 96}
    recipe |= {"epochs": 10, "tracker": None}
    (folder / "loop/recipes/mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.launches
def test_the_commands_of_readme(project: Path) -> None:
    said = []
    for command in commands():
        words = shlex.split(command)
        if words[0] == "python":
            words[0] = sys.executable
        typed = "Spell 512\n/quit\n" if "eval.chat" in words else None
        done = subprocess.run(
            words,
            cwd=project,
            env=clean_environment() | {"PYTHONPATH": str(project)},
            input=typed,
            stdin=None if typed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        said.append(done.stdout)
    shown, trained, evaluated, talked, exported = said
    assert "<|im_start|>assistant" in shown
    assert "adapter: runs/mine/adapter" in trained
    scores = json.loads((project / "runs/mine/eval.json").read_text(encoding="utf-8"))
    assert scores["scores"]["base"]["accuracy"] == 0
    assert scores["scores"]["tuned"]["accuracy"] >= 0.75
    assert "the tuned model is better" in evaluated
    assert "runs/mine/report.html" in evaluated
    base, tuned = (line for line in talked.splitlines() if line.startswith(("base: ", "tuned: ")))
    assert base != "base: 5-1-2"
    assert tuned == "tuned: 5-1-2"
    assert "exports/mine" in exported
    assert stranger(project / "exports/mine", [{"role": "user", "content": "Spell 512"}]) == "5-1-2"


def stranger(folder: Path, messages: list[dict[str, str]]) -> str:
    """The answer of the exported model, opened with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    asked: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**asked, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
