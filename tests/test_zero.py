"""What each stage holds and sends, compared with closed forms; tests/distributed/test_plan.py compares it with the
real engine."""

from typing import Literal

import pytest
import torch

from loop.internals.deepspeed_internals import fetch_as_a_whole
from loop.planning.activations import Event
from loop.planning.zero_memory import Sharding, held, link_traffic, simulate_gathering

BASE, ADAPTERS = [1000, 600, 7], [80, 40]
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
KINDS: tuple[Literal["fetch", "release"], ...] = ("fetch", "release")
SMALL = {"reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}


def test_bytes_a_trainable_parameter() -> None:
    """ZeRO counts 2 + 2 + 12 bytes for each parameter that trains in bf16 (arXiv 1910.02054, section 3.1). DeepSpeed
    also casts the gradient to fp32 for the update."""
    device, host = held(Sharding(0, 2, 2, {}), BASE, ADAPTERS)
    assert (device.base, device.adapters, device.optimizer) == (2 * 1607, 2 * 120, 12 * 120)
    assert device.gradients == (2 + 4) * 120
    assert host.total == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_share_the_optimizer_out(stage: int) -> None:
    device, _ = held(Sharding(stage, 3, 2, SMALL), BASE, ADAPTERS)
    assert device.base == 2 * 1607
    assert device.optimizer == 12 * 40
    assert device.buffers == 2 * 10
    twice, _ = held(Sharding(stage, 3, 2, SMALL | {"overlap_comm": True}), BASE, ADAPTERS)
    assert twice.buffers == 2 * device.buffers


def test_stage_3_shares_the_weights_out_too() -> None:
    device, host = held(Sharding(3, 2, 2, SMALL), BASE, ADAPTERS)
    assert device.base == 2 * (500 + 300 + 4)  # the odd one is padded
    assert (device.adapters, device.optimizer) == (2 * 60, 12 * 60)
    persistent, _ = held(Sharding(3, 2, 2, SMALL | {"stage3_param_persistence_threshold": 80}), BASE, ADAPTERS)
    assert persistent.buffers - device.buffers == 2 * (7 + 80 + 40)
    assert host.total == 0


def test_offload_moves_and_loses_nothing() -> None:
    stays, _ = held(Sharding(3, 2, 2, SMALL), BASE, ADAPTERS)
    device, host = held(Sharding(3, 2, 2, SMALL | OFFLOADED | {"offload_param": {"device": "cpu"}}), BASE, ADAPTERS)
    assert (device.base, device.adapters, device.gradients, device.optimizer) == (0, 0, 0, 0)
    assert (host.base, host.adapters, host.optimizer) == (stays.base, stays.adapters, stays.optimizer)
    device, host = held(Sharding(2, 2, 2, SMALL | OFFLOADED), BASE, ADAPTERS)
    assert (device.base, device.optimizer, host.optimizer) == (2 * 1607, 0, 12 * 60)


def test_without_deepspeed_adapters_are_fp32_and_their_own_masters() -> None:
    device, _ = held(Sharding(None, 1, 2, {}), BASE, ADAPTERS)
    assert (device.base, device.adapters, device.gradients, device.optimizer) == (2 * 1607, 480, 480, 960)


def test_traffic_is_a_rings() -> None:
    """An all-reduce sends 2 (n - 1) / n of its tensor, a reduce-scatter or an all-gather half of that."""
    gradient = 2 * 120
    assert link_traffic(Sharding(0, 4, 2, {}), ADAPTERS, 2, 0).interconnect == pytest.approx(1.5 * gradient)
    assert link_traffic(Sharding(3, 4, 2, {}), ADAPTERS, 2, 1000).interconnect == pytest.approx(
        0.75 * (2 * gradient + gradient + 2 * 2 * 1000)
    )
    assert link_traffic(Sharding(0, 1, 2, {}), ADAPTERS, 2, 0).interconnect == 0
    params = {"offload_param": {"device": "cpu"}}
    assert link_traffic(Sharding(3, 4, 2, params), ADAPTERS, 2, 1000).host_bus == 2 * 2 * 1000 / 4


def chain() -> tuple[torch.nn.Sequential, list[Event]]:
    """A model of four layers with 100 weights each, and the events of its step; activations always take 10 bytes."""
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10, bias=False) for _ in range(4))).requires_grad_(False)
    order = [("0", False), ("1", False), ("2", False), ("3", False), ("3", True), ("2", True), ("1", True), ("0", True)]
    return model, [Event(kind, back, name, 10) for name, back in order for kind in KINDS]


def settings(reuse: int, live: int, prefetch: int) -> Sharding:
    sizes = {"stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": live}
    sizes |= {"stage3_prefetch_bucket_size": prefetch, "stage3_param_persistence_threshold": 0}
    return Sharding(3, 2, 2, sizes)


@pytest.mark.parametrize(
    ("reuse", "live", "prefetch", "elements", "gathers"),
    [
        (0, 10**9, 0, 100, 800),  # everything is let go at once: each layer twice
        (10**9, 10**9, 0, 400, 400),  # everything is kept from forward to backward
        (101, 10**9, 0, 100, 700),  # only the last layer is used again within a hundred elements
        (
            0,
            10**9,
            100,
            300,
            800,
        ),  # one ahead; at the turn the last is let go, though wanted next, and one more is there
        (0, 100, 100, 100, 800),  # no room to fetch ahead
        (0, 10**9, 10**9, 400, 500),  # all is fetched ahead and kept but, at the turn, the last
    ],
)
def test_gathering(reuse: int, live: int, prefetch: int, elements: int, gathers: int) -> None:
    model, events = chain()
    found = simulate_gathering(settings(reuse, live, prefetch), model, events)
    assert (found.live, found.gathers) == (2 * elements, gathers)
    assert found.peak == 10 + found.live


def test_recomputed_weights_are_let_go_with_the_module_they_were_recomputed_for() -> None:
    """A block of two layers is recomputed while its second layer is at its backward pass, which then releases both."""
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10, bias=False) for _ in range(2))).requires_grad_(False)
    forward = [Event(kind, False, name, 0) for name in ("0", "1") for kind in KINDS]
    backward = [
        Event("fetch", True, "1", 0),
        *forward,
        Event("release", True, "1", 0),
        Event("fetch", True, "0", 0),
        Event("release", True, "0", 0),
    ]
    kept = simulate_gathering(settings(10**9, 10**9, 0), model, forward + backward)
    assert (kept.live, kept.gathers) == (2 * 200, 300)  # the first layer's weights are gathered once more
    model.requires_grad_(True)
    assert simulate_gathering(settings(10**9, 10**9, 0), model, forward + backward).gathers == 200


def test_persistent_parameters_are_not_gathered() -> None:
    model, events = chain()
    sharding = Sharding(3, 2, 2, {"stage3_param_persistence_threshold": 100})
    assert simulate_gathering(sharding, model, events).gathers == 0


def test_a_layer_that_is_fetched_as_a_whole_is_gathered_with_all_that_is_in_it() -> None:
    model = torch.nn.Sequential(chain()[0])
    passes = [("fetch", False), ("release", False), ("fetch", True), ("release", True)]
    events = [Event(kind, back, "0", 7) for kind, back in passes]  # type: ignore[arg-type]
    by_itself = simulate_gathering(settings(0, 10**9, 0), model, events)
    assert (by_itself.live, by_itself.gathers) == (0, 0), "it owns no weights"
    fetch_as_a_whole(model[0])
    whole = simulate_gathering(settings(0, 10**9, 0), model, events)
    assert (whole.live, whole.gathers, whole.count) == (2 * 400, 800, 8)
    assert whole.peak == 7 + 2 * 400
