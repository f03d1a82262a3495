"""Tests what benchmarks/zero_settings.py works out from the usage.json of a run."""

from typing import Any

import pytest

from benchmarks import zero_settings
from benchmarks.zero_settings import STAGES, Cost, Variant, changes, cost, order, table


def usage(**collectives: tuple[int, int]) -> dict[str, Any]:
    """Makes the usage.json of two steps: `collectives` in forward and backward, one all_reduce an update."""
    sent = {kind: {"count": count, "bytes": size} for kind, (count, size) in collectives.items()}
    phases = {
        "load": {"peak_bytes": 999, "collectives": {"broadcast": {"count": 7, "bytes": 7}}},
        "forward": {"peak_bytes": 100, "collectives": sent},
        "backward": {"peak_bytes": 300, "collectives": sent},
        "update": {"peak_bytes": 200, "collectives": {"all_reduce": {"count": 2, "bytes": 16}}},
    }
    seconds = [9.0] * zero_settings.WARM_UP + [3.0, 1.0, 2.0]
    return {"first_step": 4, "last_step": 6, "step_seconds": seconds, "ranks": [{"phases": phases}]}


def test_cost_is_of_a_step_and_without_loading() -> None:
    found = cost(usage(all_gather=(10, 1000)))
    assert found == Cost(2.0, 300, {"all_gather": (10, 1000), "all_reduce": (1, 8)})


def test_changes_names_what_differs() -> None:
    before, after = cost(usage(all_gather=(1, 10**6))), cost(usage(all_gather=(2, 10**6), reduce_scatter=(1, 5)))
    assert changes(before, before) == []
    assert changes(after, before) == ["all_gather 1 → 2, 1.0 → 1.0 MB", "reduce_scatter 0 → 1, 0.0 → 0.0 MB"]


@pytest.mark.parametrize("stage", STAGES)
def test_default_comes_first_in_the_middle_and_last(stage: str) -> None:
    variants = list(order(stage))
    assert [i for i, variant in enumerate(variants) if not variant.setting] == [
        0,
        (len(variants) - 1) // 2,
        len(variants) - 1,
    ]
    assert len({(variant.setting, variant.value) for variant in variants}) == len(variants) - 2


def test_what_lies_within_the_defaults_runs_is_nothing() -> None:
    same: dict[str, tuple[float, float]] = {"all_reduce": (1, 8)}
    runs = [(Variant("stage 2"), Cost(seconds, peak, same)) for seconds, peak in ((1.0, 10**8), (1.2, 11 * 10**7))]
    runs += [(Variant("stage 2", "quiet"), Cost(1.1, 105 * 10**6, same))]
    runs += [(Variant("stage 2", "loud"), Cost(2.2, 15 * 10**7, {"all_reduce": (2, 8)}))]
    quiet, loud = table(runs).splitlines()[-2:]
    assert quiet.endswith("| nothing |")
    assert loud.endswith("| all_reduce 1 → 2, 0.0 → 0.0 MB; time × 2.00; memory +45 MB |")
