"""loop/train.py, which also writes down what each rank holds while the optimizer makes an update: held.json.

Every tensor that lives in the process is found through Python's garbage collector and put into a category by what
refers to its storage; nothing of loop/planning/zero_memory.py is used. `gathered` is what all-gathers of the next
step's forward and backward pass bring together.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import gather_object

import loop.train
from loop.engine.accelerator import prepare
from loop.guard.process import end_process
from loop.measure.phases import ACCOUNT

UPDATE = 3  # by then moments exist, and ZeRO-3 knows the order of the modules
SMALL = 100  # bytes: counters, norms, sums
GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer", "offload_gradient_dict", "accumulated_grads_in_cpu")
BUFFERS = (
    *("ipg_buckets", "temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"),
    "param_buffer_of_bit16_for_cpu_offload_groups",
)


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for inner in value:
            yield from tensors_in(inner, depth - 1)
    elif depth and hasattr(value, "buffer"):  # a bucket of gradients
        yield from tensors_in(value.buffer, depth - 1)


def categories(model: torch.nn.Module, optimizers: Sequence[Any]) -> dict[int, str]:
    """By address of storage; the first that names one wins."""
    known: dict[int, str] = {}

    def put(category: str, value: Any) -> None:
        for tensor in tensors_in(value):
            if tensor.numel():
                known.setdefault(tensor.untyped_storage().data_ptr(), category)

    for parameter in model.parameters():
        kind = "adapters" if parameter.requires_grad else "base"
        put(kind, getattr(parameter, "ds_tensor", parameter.data))  # ZeRO-3's share, where there is one
        put("buffers", parameter.data)  # ZeRO-3's whole copy
        put("gradients", parameter.grad)
    for optimizer in optimizers:
        for name, value in vars(optimizer).items():
            if name in GRADIENTS:
                put("gradients", value)
            elif name in BUFFERS:
                put("buffers", value)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    put("gradients", parameter.grad)
                    put("optimizer", parameter)  # the fp32 master, where it is not the model's own
                    put("optimizer", optimizer.state[parameter])
    return known


def holdings(model: torch.nn.Module, optimizers: Sequence[Any]) -> dict[str, int]:
    """Bytes of every storage, by category; what is none of them and small is left out."""
    gc.collect()
    known = categories(model, optimizers)
    sizes: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and not found.is_meta:
            sizes[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    total: Counter[str] = Counter()
    for address, size in sizes.items():
        category = known.get(address, "other")
        if size > SMALL or category in ("base", "adapters"):
            total[category] += size
    return dict(total)


def gathered_bytes() -> int:
    """By all-gathers of forward and backward passes up to now, on this rank."""
    costs = [ACCOUNT.costs[phase] for phase in ("forward", "backward") if phase in ACCOUNT.costs]
    return sum(cost.collectives["all_gather"].bytes for cost in costs if "all_gather" in cost.collectives)


def main(argv: Sequence[str]) -> None:
    folder = Path(argv[argv.index("--run_dir") + 1])

    def prepare_and_look(model: Any, optimizer: Any, accelerator: Any) -> Any:
        engine, wrapped = prepare(model, optimizer, accelerator)
        held: list[dict[str, int]] = []
        chain = [wrapped]
        while getattr(chain[-1], "optimizer", None) is not None:
            chain.append(chain[-1].optimizer)
        update, updates = chain[-1].step, 0

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal updates
            updates += 1
            result = update(*args, **kwargs)
            if updates == UPDATE:
                held.append({**holdings(model, chain), "gathered": -gathered_bytes()})
            elif updates == UPDATE + 1:
                held[0]["gathered"] += gathered_bytes()
                everywhere = gather_object(held)
                if accelerator.is_main_process:
                    (folder / "held.json").write_text(json.dumps(everywhere))
            return result

        chain[-1].step = step
        return engine, wrapped

    with patch("loop.train.prepare", prepare_and_look):
        loop.train.main(argv)


if __name__ == "__main__":
    end_process(main)
