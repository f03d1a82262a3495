"""python -m loop.plan: what it says about the reference's hardware, what it recommends, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loop.plan import main
from loop.planning.dry_run import key_rates
from loop.recipe import ROOT, parse_recipe
from tests.distributed.launching import CONFIGS

REFERENCE = ["--config", str(ROOT / "loop" / "recipes" / "qwen2.5-14b.yaml")]
TINY = ["--config", str(ROOT / "loop" / "recipes" / "tiny.yaml")]
ITS_HARDWARE = ["--gpus", "2", "--gpu-memory", "32GB", "--host-memory", "180GB"]


def planned(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main([*argv, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    capture: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: capture.append(text))
        main([*REFERENCE, *ITS_HARDWARE, "--json"])
    result: dict[str, Any] = json.loads(capture[-1])
    return result | {"by_name": {one["name"]: one for one in result["estimates"]}}


@pytest.mark.launches
def test_counts_the_14b_model(reference: dict[str, Any]) -> None:
    """The expected numbers are computed by hand from the model's config.json and LoRA's rank 8."""
    hidden, kv, inner, layers, vocabulary = 5120, 1024, 13824, 48, 152064
    attention = 2 * hidden**2 + 2 * hidden * kv + hidden + 2 * kv  # with the biases of q, k and v
    layer = attention + 3 * hidden * inner + 2 * hidden
    assert reference["base_parameters"] == layers * layer + 2 * vocabulary * hidden + hidden
    lora = 8 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))
    assert reference["trainable_parameters"] == layers * lora == 34_406_400


@pytest.mark.launches
def test_stage_0_just_fits_as_the_reference_saw(reference: dict[str, Any]) -> None:
    """The reference saw 28,317.6 MB after loading, and MB there are 2^20 bytes: the weights take more than 28.3e9."""
    one = reference["by_name"]["zero0"]
    assert one["device"]["base"] / 2**20 == pytest.approx(28_317.6, rel=0.01)
    assert one["fits"] == "tight"
    assert 0.9 * 32 * 2**30 < one["device_peak"] < 32 * 2**30


@pytest.mark.launches
def test_stages_1_and_2_change_almost_nothing(reference: dict[str, Any]) -> None:
    stage0 = reference["by_name"]["reference/stage0"]["device_peak"]
    for name in ("reference/stage1", "reference/stage2_offload", "zero1", "zero2", "zero2_offload"):
        assert reference["by_name"][name]["device_peak"] == pytest.approx(stage0, rel=0.03)


@pytest.mark.launches
def test_stage_3_with_offload_needs_least_gpu_and_most_host_memory(reference: dict[str, Any]) -> None:
    """A process of the reference took 27,213 MB of host memory, more than its half of the weights, which is pinned."""
    ours = reference["by_name"]["reference/stage3_offload"]
    others = [one for one in reference["estimates"] if not one["name"].endswith("3_offload")]
    assert all(ours["device_peak"] < one["device_peak"] for one in others)
    assert all(ours["host_steady"] > one["host_steady"] for one in others)
    assert ours["host_steady"] / 2 == pytest.approx(27_213e6, rel=0.06)


@pytest.mark.launches
def test_recommends_stage_3_without_offload(reference: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert reference["recommended"] == {"name": "zero3", "processes": 2}
    one = reference["by_name"]["zero3"]
    assert one["device"]["base"] == pytest.approx(14.8e9, rel=0.01)
    assert one["traffic"]["host_bus"] == 0
    # Every weight of a layer is gathered twice, forward and backward; half of each from the other rank. Recomputing
    # gathers nothing more, since a layer is fetched as a whole before it is recomputed.
    assert not one["recomputes"]
    assert one["traffic"]["interconnect"] == pytest.approx(2 * 13.2e9 * 2 / 2, rel=0.1)
    zero3 = ["--accel", str(CONFIGS / "zero3.yaml"), "--gradient_checkpointing", "non_reentrant"]
    (recomputing,) = planned([*REFERENCE, *ITS_HARDWARE, *zero3], capsys)["estimates"]
    assert recomputing["recomputes"]
    assert recomputing["traffic"]["interconnect"] == pytest.approx(2 * 13.2e9 * 2 / 2, rel=0.1)


@pytest.mark.launches
def test_steps_tokens_and_rates(reference: dict[str, Any]) -> None:
    one = reference["by_name"]["zero3"]
    assert (one["steps"], one["tokens"]) == (57, 1798 * 51)
    assert [step for step, _ in reference["learning_rates"]][-1] == 57
    assert "no tokenizer" in reference["notes"][0]
    assert reference["contradictions"] == []


def test_learning_rates_are_the_closed_form() -> None:
    recipe = parse_recipe(TINY)[1]
    warm, total, peak = 9, 285, recipe.optim.lr
    for step, rate in key_rates(recipe, total):
        done = step - 1
        expected = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (total - warm))) / 2
        assert rate == pytest.approx(peak * expected, rel=1e-6, abs=1e-12)


def test_time_is_bound_by_the_slowest_part(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = ["--gpu-flops", "1e12", "--interconnect", "1e6", "--host-bus", "1e9", "--gpu-memory", "1GB"]
    configs = [str(CONFIGS / f"{name}.yaml") for name in ("zero0", "zero3")]
    result = planned([*TINY, "--accel", *configs, "--gpus", "2", *speeds], capsys)
    for one in result["estimates"]:
        assert one["seconds"]["compute"] == pytest.approx(one["flops"] / 2 / 1e12)
        assert one["seconds"]["interconnect"] == pytest.approx(one["traffic"]["interconnect"] / 1e6)
        assert one["step_seconds"] == max(one["seconds"].values())
    assert result["recommended"]["name"] == "zero0", "it sends a fraction of what stage 3 gathers"


@pytest.mark.parametrize(
    ("recipe", "micro_batch_size", "rows", "memory", "said"),
    [
        (
            [*TINY, "--gradient_checkpointing", "none"],
            256,
            512,
            "0.75GB",
            "Set gradient_checkpointing to non_reentrant",
        ),
        (TINY, 256, 512, "0.65GB", "Set micro_batch_size to 128 (it is 256): then zero3 fits."),
        pytest.param(*(REFERENCE, 16, 64, "14GB", "Give it --gpus 4: then zero3 fits"), marks=pytest.mark.slow),
        pytest.param(
            *(REFERENCE, 16, 32, "14GB", "Give it --gpus 4 --micro_batch_size 8: then zero3 fits"),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(TINY, 16, 32, "0.1GB", "The least is zero3 with 0.6 GB a GPU"), marks=pytest.mark.launches),
    ],
)
def test_says_which_one_number_to_change(
    recipe: list[str], micro_batch_size: int, rows: int, memory: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ["--micro_batch_size", str(micro_batch_size), "--rows_per_step", str(rows)]
    on_two = ["--accel", str(CONFIGS / "zero3.yaml"), "--gpus", "2", "--gpu-memory", memory]
    result = planned([*recipe, *batch, *on_two], capsys)
    assert result["recommended"] is None
    assert said in result["advice"]


def test_every_number_of_gpus_learns_the_same_rows_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """32 rows a step are 57 steps of 1,798 rows, on one GPU in two micro-batches of 16. Four GPUs cannot share them."""
    zero0 = str(CONFIGS / "zero0.yaml")
    result = planned([*TINY, "--epochs", "1", "--accel", zero0, "--gpus", "1", "2", "--micro_batch_size", "16"], capsys)
    assert [(one["processes"], one["steps"]) for one in result["estimates"]] == [(1, 57), (2, 57)]
    assert [one["launch"]["grad_accum_steps"] for one in result["estimates"]] == [2, 1]
    usual = planned([*TINY, "--epochs", "1", "--micro_batch_size", "16"], capsys)
    assert {one["processes"] for one in usual["estimates"]} == {1, 2}
    assert [note for note in usual["notes"] if note.startswith("4 GPUs are left out: rows_per_step is 32")]
    with pytest.raises(SystemExit):
        main([*TINY, "--accel", zero0, "--gpus", "4"])
    assert "Set --micro_batch_size 8" in capsys.readouterr().out


def test_max_steps_are_the_steps_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """57 steps an epoch. The last learning rate is that of step 60, almost 0 at the end of the cosine over 60 steps."""
    one = [*TINY, "--epochs", "5", "--accel", str(CONFIGS / "zero0.yaml"), "--gpus", "1"]
    result = planned([*one, "--max_steps", "60"], capsys)
    assert [estimate["steps"] for estimate in result["estimates"]] == [60]
    step, rate = result["learning_rates"][-1]
    warmup = math.ceil(0.03 * 60)
    assert (step, rate) == (60, pytest.approx(1.5e-3 * (1 + math.cos(math.pi * (59 - warmup) / (60 - warmup)))))
    longer = planned([*one, "--max_steps", "1000"], capsys)
    assert [estimate["steps"] for estimate in longer["estimates"]] == [5 * 57]
    assert "max_steps is 1000, but there are only 285 steps." in longer["notes"]


def test_dry_run_shows_rows_masks_and_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*TINY, "--accel", str(CONFIGS / "zero3.yaml"), "--gpus", "2"])
    page = capsys.readouterr().out
    assert page.count("  learned ") == page.count("  masked ") == 5
    first = page[page.index("row 1\n") : page.index("row 2\n")]
    assert "1311=<|im_end|>" in first.split("learned")[0]
    assert "王大丫丫的回答是--->370 + 941<|im_end|>" in first.split("learned")[1]
    assert '"stage": 3' in page
    assert "lr: 0.003" in page
    assert list(tmp_path.iterdir()) == [], "it starts nothing and writes nothing"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([*TINY, "--optim.lr", "-1"], "optim.lr is -1"),
        ([*TINY, "--accel", "nowhere.yaml"], "there is no such file"),
        ([*TINY, "--accel", str(ROOT / "Makefile")], "accelerate cannot read it"),
        ([*TINY, "--model.name_or_path", "./nowhere"], "there is no folder ./nowhere"),
        ([*TINY, "--model.name_or_path", "somebody/unknown"], "hf download somebody/unknown"),
        ([*TINY, "--data.train_file", "nowhere.json"], "nowhere.json"),
        ([*TINY, "--lora.target_modules", "[no_such_layer]"], "no layers named no_such_layer"),
        ([*TINY, "--gpus", "0"], "--gpus 0"),
        ([*TINY, "--gpu-memory", "much"], "is no size"),
        ([*TINY, "--no.such.key", "1"], "no.such.key"),
    ],
)
def test_bad_input_ends_with_one_message(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_every_contradiction_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The YAML names another clipping, a file of rows does not exist, and the run folder is taken."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    config = (
        (CONFIGS / "zero3.yaml").read_text().replace("deepspeed_config:", "deepspeed_config:\n  gradient_clipping: 3")
    )
    (tmp_path / "clips.yaml").write_text(config)
    argv = [*TINY, "--accel", str(tmp_path / "clips.yaml"), "--gpus", "2"]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--data.validation_file", "nowhere.json", "--run_dir", str(tmp_path / "run"), "--json"])
    assert end.value.code == 2
    found = "\n".join(json.loads(capsys.readouterr().out)["contradictions"])
    assert "gradient_clipping: 3" in found
    assert "nowhere.json" in found
