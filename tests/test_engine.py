"""The distributed world has to be the one that was launched."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from loop import engine
from loop.recipe import parse_recipe


@pytest.mark.parametrize(
    ("sees", "kind", "fits"),
    [
        (2, DistributedType.MULTI_CPU, True),
        (1, DistributedType.NO, False),  # what accelerate makes of DeepSpeed's processes on a CPU, left to itself
        (2, DistributedType.DEEPSPEED, False),
    ],
)
def test_world(sees: int, kind: DistributedType, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    world = SimpleNamespace(num_processes=sees, distributed_type=kind)
    monkeypatch.setattr(engine, "Accelerator", lambda **_: world)
    if fits:
        assert engine.build_accelerator(parse_recipe([])[1]) is world
    else:
        with pytest.raises(RuntimeError, match="2 processes were launched"):
            engine.build_accelerator(parse_recipe([])[1])
