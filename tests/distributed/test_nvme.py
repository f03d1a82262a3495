"""accel_configs/nvme/ on a plain folder: it computes what zero3 computes, and a run goes on from its checkpoints."""

import ctypes
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, Run, launch

SHIPPED = CONFIGS / "nvme"
TINY = ROOT / "data" / "tiny_base"
HIDDEN, LAYERS, RANK = 768, 2, 32
SMALLEST = 2**20  # bytes: what DeepSpeed leaves in memory is smaller than this
LOCKED = 2**25  # bytes: more than a process of these tests locks
OPTIMIZER_TOO = {"device": "nvme"}
SERIES = ("train/loss", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of which a half of every matrix, and of the adapters' optimizer state, is more than SMALLEST."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio's headers: apt install libaio-dev")
    if not may_lock(LOCKED):
        pytest.skip(f"{LOCKED // 2**20} MiB of memory may not be locked here: raise ulimit -l")
    AsyncIOBuilder().load(verbose=False)  # takes minutes, which are not to count as a launch's
    folder = tmp_path_factory.mktemp("task")
    set_seed(0)
    heads = HIDDEN // 64
    config = AutoConfig.from_pretrained(
        TINY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        layer_types=["full_attention"] * LAYERS,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    return folder


def may_lock(size: int) -> bool:
    memory = (ctypes.c_char * size)()
    return int(ctypes.CDLL(None).mlock(memory, ctypes.c_size_t(size))) == 0


def train(config: Path, task: Path, folder: Path, *arguments: str, precision: str | None = None) -> Run:
    run = launch(
        config,
        *DEBUG,
        *("--model.name_or_path", str(task / "model"), "--lora.rank", str(RANK), "--optim.lr", "1e-3"),
        *("--epochs", "4", "--save_total_limit", "9", *arguments),
        folder=folder,
        precision=precision,
    )
    assert run.code == 0, run.output
    return run


def nvme(folder: Path, optimizer: dict[str, Any] | None) -> Path:
    """What is shipped, in fp32, with buffers for the small model, on the plain folder `folder`/disk."""
    values = yaml.safe_load((SHIPPED / "zero3.yaml").read_text())
    config = json.loads((ROOT / values["deepspeed_config"]["deepspeed_config_file"]).read_text())
    disk = {"nvme_path": str(folder / "disk")}
    zero = config["zero_optimization"]
    zero["offload_param"] |= disk | {"buffer_size": 500_000}
    if optimizer:
        zero["offload_optimizer"] = optimizer | disk
    config["bf16"]["enabled"] = False
    (folder / "nvme.json").write_text(json.dumps(config))
    values["deepspeed_config"]["deepspeed_config_file"] = str(folder / "nvme.json")
    (folder / "nvme.yaml").write_text(yaml.safe_dump(values))
    return folder / "nvme.yaml"


@pytest.fixture(scope="module")
def judge(task: Path) -> Run:
    return train(CONFIGS / "zero3.yaml", task, task / "judge", precision="no")


@pytest.mark.parametrize("optimizer", [None, OPTIMIZER_TOO], ids=["weights", "weights and optimizer"])
def test_computes_what_zero3_computes(optimizer: dict[str, Any] | None, task: Path, judge: Run, tmp_path: Path) -> None:
    run = train(nvme(tmp_path, optimizer), task, tmp_path / "nvme")
    for key in SERIES:
        assert run.series(key) == pytest.approx(judge.series(key), rel=1e-5)
    assert run.series("train/loss")[-1] < 0.9 * run.series("train/loss")[0], "nothing was learned"
    swapped = {path.relative_to(tmp_path / "disk") for path in (tmp_path / "disk").rglob("*.swp")}
    weights = [path for path in swapped if path.parts[1] == "float32params"]
    assert len(weights) == 2 * (LAYERS * 7 + 2), "on each rank the matrices of every layer, the embeddings and lm_head"
    moments = {path.name.partition("-")[0] for path in swapped if path.parts[1] == "optimizer"}
    assert moments >= {"exp_avg", "exp_avg_sq"} if optimizer else moments == set()


def test_goes_on(task: Path, tmp_path: Path) -> None:
    """With weights and optimizer on disk, from a checkpoint, to the bit."""
    config = nvme(tmp_path, OPTIMIZER_TOO)
    whole = train(config, task, tmp_path / "whole")
    shutil.copytree(whole.folder, tmp_path / "part")
    part = train(config, task, tmp_path / "part", "--resume", str(tmp_path / "part" / "checkpoints" / "step-000002"))
    assert [line["step"] for line in part.metrics] == [1, 2, 3, 4]
    for key in SERIES:
        assert part.series(key) == whole.series(key)
    for file in (
        "adapter/adapter_model.safetensors",
        *(f"checkpoints/step-000004/{name}.safetensors" for name in ("adapter_model", "optimizer")),
    ):
        assert (part.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_buffers_fit_the_reference_model() -> None:
    """By its config.json: a vocabulary of 152,064 and a hidden size of 5,120, on two processes; 7 matrices a layer."""
    config = json.loads((SHIPPED / "deepspeed" / "zero3.json").read_text())
    buffers = config["zero_optimization"]["offload_param"]
    assert buffers["buffer_size"] >= math.ceil(152_064 * 5_120 / 2)
    assert buffers["buffer_count"] >= 7
