"""DeepSpeed's configuration from the launcher's variables, and the errors where launcher and recipe disagree."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from loop.engine.deepspeed_config import deepspeed_config
from loop.recipe import ROOT, parse_recipe

PREFIX = "ACCELERATE_"


def config(monkeypatch: pytest.MonkeyPatch, *arguments: str, **said: str) -> dict[str, Any]:
    for key, value in said.items():
        monkeypatch.setenv(PREFIX + key, value)
    return deepspeed_config(parse_recipe(list(arguments))[1], num_processes=2)


def test_numbers_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    got = config(monkeypatch, "--grad_accum_steps", "4", "--optim.max_grad_norm", "0.5", DEEPSPEED_ZERO_STAGE="1")
    assert got["gradient_accumulation_steps"] == 4
    assert got["gradient_clipping"] == 0.5
    assert got["train_micro_batch_size_per_gpu"] == 16
    assert got["train_batch_size"] == 16 * 4 * 2
    assert got["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "offloaded"),
    [
        ("0", "none", "none", set()),
        ("2", "cpu", "none", {"offload_optimizer"}),
        ("2", "cpu", "cpu", {"offload_optimizer"}),
        ("3", "cpu", "cpu", {"offload_optimizer", "offload_param"}),
        ("3", "none", "cpu", {"offload_param"}),
    ],
)
def test_offload(monkeypatch: pytest.MonkeyPatch, stage: str, optimizer: str, param: str, offloaded: set[str]) -> None:
    zero = config(
        monkeypatch,
        DEEPSPEED_ZERO_STAGE=stage,
        DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=optimizer,
        DEEPSPEED_OFFLOAD_PARAM_DEVICE=param,
    )["zero_optimization"]
    assert {key for key in zero if key.startswith("offload")} == offloaded


@pytest.mark.parametrize(
    ("said", "both"),
    [
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, ("gradient_accumulation_steps: 4.0", "grad_accum_steps is 1")),
        ({"GRADIENT_CLIPPING": "0.3"}, ("gradient_clipping: 0.3", "optim.max_grad_norm is 1")),
    ],
)
def test_yaml_against_recipe(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], both: tuple[str, str]) -> None:
    with pytest.raises(UserError) as error:
        config(monkeypatch, **said)
    assert all(part in str(error.value) for part in both)


def test_a_yaml_that_cuts_the_batch_up_contradicts_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"gradient_accumulation_steps: 1\.0, but the recipe.s micro_batch_size is auto"
    ):
        config(monkeypatch, "--micro_batch_size", "auto", GRADIENT_ACCUMULATION_STEPS="1")
    monkeypatch.delenv(PREFIX + "GRADIENT_ACCUMULATION_STEPS")
    got = config(monkeypatch, "--micro_batch_size", "auto")
    assert (got["train_micro_batch_size_per_gpu"], got["train_batch_size"]) == (16, 32), "the whole share, for now"


def test_yaml_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    got = config(monkeypatch, GRADIENT_ACCUMULATION_STEPS="1", GRADIENT_CLIPPING="1.0")
    assert (got["gradient_accumulation_steps"], got["gradient_clipping"]) == (1, 1.0)


def test_nvme_needs_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nvme_path"):
        config(monkeypatch, DEEPSPEED_ZERO_STAGE="3", DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "deepspeed_config_file"),
        ("[]", "zero_optimization"),
        ("{}", "zero_optimization"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}', "remove the block 'optimizer'"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}', "remove the block 'scheduler'"),
        (
            '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}',
            "says train_micro_batch_size_per_gpu: 4, but the recipe's micro_batch_size is 16",
        ),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 16}', "train_batch_size: 16"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": "much"}', "gradient_clipping: much"),
    ],
)
def test_json_against_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        config(monkeypatch, DEEPSPEED_CONFIG_FILE=str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_missing_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        config(monkeypatch, DEEPSPEED_CONFIG_FILE=str(tmp_path / "nowhere.json"))


def test_the_references_four_say_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "accel_configs" / "reference" / "deepspeed"
    zero = {path.stem: json.loads(path.read_text())["zero_optimization"] for path in folder.glob("*.json")}
    assert {name: block["stage"] for name, block in zero.items()} == {
        "stage0": 0,
        "stage1": 1,
        "stage2_offload": 2,
        "stage3_offload": 3,
    }
    two, three = zero["stage2_offload"], zero["stage3_offload"]
    assert two["offload_optimizer"] == three["offload_optimizer"] == three["offload_param"]
    assert two["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert two["allgather_bucket_size"] == two["reduce_bucket_size"] == 2e8
    assert three["stage3_max_live_parameters"] == three["stage3_max_reuse_distance"] == three["sub_group_size"] == 1e9
    for name in zero:
        got = config(monkeypatch, DEEPSPEED_CONFIG_FILE=f"accel_configs/reference/deepspeed/{name}.json")
        assert got["train_batch_size"] == 32
