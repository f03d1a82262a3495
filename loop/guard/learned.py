"""Finds adapters that a run has left as they were, so that no run ends well without having learned."""

import torch
from accelerate import Accelerator
from peft import PeftModel

from loop.engine.accelerator import on_main_process
from loop.guard.process import RunError
from loop.saving.checkpoint import gather_adapter

SHOWN = 5  # names of adapters that a message lists


def check_learned(model: PeftModel, accelerator: Accelerator) -> None:
    """Raises RunError on every rank, with the names, where an adapter changes nothing after the run's last step; every
    rank enters.

    Of the two matrices of an adapter one begins with zeros. Where it still holds only zeros, its gradient has been
    exactly zero in every step, or the learning rate has.
    """
    adapter = gather_adapter(model, accelerator)

    def check() -> None:
        same = [name for name, tensor in adapter.items() if not torch.any(tensor)]
        if not same:
            return
        names = ", ".join(name.removeprefix("base_model.model.") for name in same[:SHOWN])
        raise RunError(
            f"the run has ended, but {len(same)} of its {len(adapter) // 2} adapters are as they were at its start: "
            f"every step gave them a gradient of exactly zero, or a learning rate of zero. They are {names}"
            f"{' …' if len(same) > SHOWN else ''}. Name only layers that the rows reach in lora.target_modules, or "
            "raise optim.lr. What was learned is saved."
        )

    on_main_process(check, accelerator)
