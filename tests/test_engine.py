"""The start of a process: its distributed world is the one that was launched, and bad launches end with one message."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from data.errors import UserError
from loop.engine import accelerator as engine
from loop.engine.extensions import announce_builds
from loop.recipe import parse_recipe
from tests.distributed.launching import ROOT, start


@pytest.mark.parametrize(
    ("deepspeed", "sees", "kind", "fits"),
    [
        ("false", 2, DistributedType.MULTI_CPU, True),
        ("true", 2, DistributedType.DEEPSPEED, True),
        ("false", 1, DistributedType.NO, False),
        ("false", 2, DistributedType.DEEPSPEED, False),
        ("true", 1, DistributedType.DEEPSPEED, False),  # what accelerate makes of two on a CPU, left to itself
        ("true", 2, DistributedType.MULTI_CPU, False),  # and what `use_cpu: true` makes of them
    ],
)
def test_world(deepspeed: str, sees: int, kind: DistributedType, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", deepspeed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    world = SimpleNamespace(num_processes=sees, distributed_type=kind)
    monkeypatch.setattr(engine, "Accelerator", lambda **_: world)
    if fits:
        assert engine.build_accelerator(parse_recipe([])[1]) is world
    else:
        with pytest.raises(RuntimeError, match="2 processes were launched"):
            engine.build_accelerator(parse_recipe([])[1])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "another launcher. Use accelerate launch"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "another launcher. Use accelerate launch"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_launches_that_cannot_work(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        engine.build_accelerator(parse_recipe([])[1])


@pytest.mark.launches
def test_fp16_norm_is_unscaled() -> None:
    """DeepSpeed's real stage-0 optimizer for fp16 gets gradients (3, 4), scaled by 1024. Their norm is 5.

    DeepSpeed makes its own tensors on the GPU where there is one, so the parameter has to lie there too.
    """
    script = """
import deepspeed, torch
from types import SimpleNamespace
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from loop.internals.deepspeed_internals import keep_grad_norm
device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(backend, dist_init_required=False)
parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device).half())
optimizer = FP16_UnfusedOptimizer(torch.optim.AdamW([parameter]), static_loss_scale=1024.0, clip_grad=1.0)
keep_grad_norm(SimpleNamespace(optimizer=optimizer))
parameter.grad = torch.tensor([3.0, 4.0], device=device).half() * 1024
optimizer.step()
print("norm", float(optimizer._global_grad_norm))
"""
    run = start([sys.executable, "-c", script], ROOT, cold=True)
    assert run.output.splitlines()[-1] == "norm 5.0", run.output


@pytest.mark.parametrize("age", [0, 60])
def test_a_lock_that_a_killed_build_left_is_named(
    age: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch waits for the lock to go away, and says nothing meanwhile."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - age,) * 2)
    announce_builds({"offload_optimizer": {"device": "cpu"}})
    assert (f"waiting for {folder / 'lock'}: " in capsys.readouterr().out) == (age > 0)


@pytest.mark.launches
def test_a_start_compiles_nothing(tmp_path: Path) -> None:
    """DeepSpeed imports its Muon optimizer, which would compile functions then and take two seconds of every start."""
    script = f"""
import sys, loop.train
def fit(*_):
    print("loaded:", [name for name in ("deepspeed", "torch._inductor.compile_fx") if name in sys.modules], flush=True)
    raise KeyboardInterrupt
loop.train.fit = fit
loop.train.main(["--config", "loop/recipes/debug.yaml", "--run_dir", {str(tmp_path / "run")!r}])
"""
    run = start([sys.executable, "-c", script], ROOT, cold=True)
    assert "loaded: ['deepspeed']" in run.output, run.output
