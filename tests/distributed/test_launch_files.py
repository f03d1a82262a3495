"""The reference's configurations, and files that `accelerate config` wrote, each run through every phase."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, launch

WRITTEN = ROOT / "tests" / "accel_configs"
ALL_OFFLOADED = "2 DeepSpeed ZeRO-3, optimizer offloaded to cpu, param offloaded to cpu bf16"
ENGINES = {
    CONFIGS / "reference" / "stage0.yaml": "2 DeepSpeed ZeRO-0 bf16",
    CONFIGS / "reference" / "stage1.yaml": "2 DeepSpeed ZeRO-1 bf16",
    CONFIGS / "reference" / "stage2_offload.yaml": "2 DeepSpeed ZeRO-2, optimizer offloaded to cpu bf16",
    CONFIGS / "reference" / "stage3_offload.yaml": ALL_OFFLOADED,
    WRITTEN / "ddp_gpus.yaml": "2 PyTorch DDP bf16",
    WRITTEN / "ddp_gpus_dynamo.yaml": "2 PyTorch DDP bf16",
    WRITTEN / "deepspeed_json.yaml": "2 DeepSpeed ZeRO-2, optimizer offloaded to cpu bf16",
    WRITTEN / "deepspeed_single.yaml": "1 DeepSpeed ZeRO-2 no",
    WRITTEN / "deepspeed_zero0.yaml": "2 DeepSpeed ZeRO-0 bf16",
    WRITTEN / "deepspeed_zero1_clip.yaml": "2 DeepSpeed ZeRO-1 bf16",
    WRITTEN / "deepspeed_zero2_offload_both.yaml": "2 DeepSpeed ZeRO-2, optimizer offloaded to cpu bf16",
    WRITTEN / "deepspeed_zero3_defaults.yaml": "2 DeepSpeed ZeRO-3 bf16",
    WRITTEN / "deepspeed_zero3_offload_init.yaml": ALL_OFFLOADED,
    WRITTEN / "single.yaml": "1 plain PyTorch bf16",
    WRITTEN / "single_cpu.yaml": "1 plain PyTorch no",
}


def test_every_written_file_is_tried() -> None:
    assert set(WRITTEN.glob("*.yaml")) < ENGINES.keys()
    assert set((CONFIGS / "reference").glob("*.yaml")) < ENGINES.keys()


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.slow) if "dynamo" in path.stem else path for path in ENGINES],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_launches(config: Path, tmp_path: Path) -> None:
    # Its answer is inductor, which compiles for five minutes on a CPU; everything around it is the same.
    options = ["--dynamo_backend", "eager"] if "dynamo" in config.stem else []
    run = launch(config, *DEBUG, "--grad_accum_steps", "1", folder=tmp_path / "run", options=options)
    assert run.code == 0, run.output
    page = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in run.output.splitlines() if "  " in line}
    processes, precision = page["processes"].split()[0], page["precision"].split(",")[0]
    engine = page["engine"].split("_size ")[0].rpartition(",")[0] if "_size" in page["engine"] else page["engine"]
    assert f"{processes} {engine} {precision}" == ENGINES[config]
    assert len(run.metrics) == 2 * -(-7 // (2 * int(processes)))
    assert [folder.name for folder in (run.folder / "checkpoints").iterdir()] == [f"step-{len(run.metrics):06d}"]
    assert len(load_file(run.folder / "adapter" / "adapter_model.safetensors")) == 56
    written = {path.name for path in run.folder.iterdir()}
    assert written == {
        "adapter",
        "checkpoints",
        "deepspeed_config.json",
        "inputs.json",
        "metrics.jsonl",
        "recipe.yaml",
        "usage.json",
        "versions.json",
    }
