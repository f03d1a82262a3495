"""The private parts of PyTorch that this project uses or replaces, and the reason for each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITTEN_AGAINST = "2.13.0"

# PyTorch's notes on extending it document TorchDispatchMode under this private module; it has no public one.
# tree_leaves lists the tensors in nested results of operators; torch has no public module for such trees.
__all__ = ["WRITTEN_AGAINST", "TorchDispatchMode", "attention_replaced_by", "tree_leaves"]


@contextmanager
def attention_replaced_by(function: Callable[..., Any]) -> Iterator[None]:
    """Within this context torch.nn.functional.scaled_dot_product_attention is `function`.

    On the meta device PyTorch writes all attention weights out, which no kernel on a real device does. The public way
    to replace a function, TorchFunctionMode, is not active in the backward pass, where layers are recomputed.
    """
    with patch("torch.nn.functional.scaled_dot_product_attention", function):
        yield
