"""A block of memory that is really taken, whatever the allocator of this process still holds."""

import mmap

import torch
from torch import Tensor


def block_of(size: int, device: str) -> Tensor:
    """A tensor of `size` bytes, each of them written. On a CPU the system gives them, and gets them back with it.

    malloc would not do: in a process that has freed much it hands out memory that is resident already.
    """
    if device != "cpu":
        return torch.ones(size, dtype=torch.uint8, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
