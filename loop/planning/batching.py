"""Chooses the layout of the micro-batches by the tokens that each layout would compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from data.batch import Order, deal, epoch_order
from data.errors import UserError
from data.examples import Example, lengths_of
from data.layout import Layout, collate, shared_prefix
from loop.batch_arithmetic import BatchArithmetic
from loop.internals.transformers_internals import attention_of, lets_attention_be_replaced
from loop.model.attention import BY_ROW, why_not_plain_attention
from loop.model.head import has_plain_head
from loop.recipe import Recipe

COUNTED = 1000  # steps of the first epoch whose tokens are counted
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows in one layout."""

    real: int  # tokens that the rows have
    padding: int  # tokens that are computed beside them
    shared: int  # tokens that are not computed, because another row of the micro-batch has computed them

    @property
    def computed(self) -> int:
        return self.real + self.padding - self.shared


def choose_layout(
    recipe: Recipe, examples: Sequence[Example], base: Any, num_processes: int, validation: Sequence[Example] = ()
) -> tuple[Layout, str]:
    """The recipe's layout; for auto the layout with the fewest tokens to compute that the model `base` can do. And why.

    `base` lies on the meta device. Raises UserError when the model cannot do the layout that the recipe names.
    """
    said = recipe.batching
    longest = max(int(lengths_of(rows).max()) for rows in (examples, validation) if rows)
    problem = None if said == "padded" else why_not_in_one_row(recipe, longest, base)
    if said in ("packed", "shared_prefix") and problem:
        raise UserError(f"batching: {said} does not work here, because {problem}. Use padded, or auto.")
    batch = BatchArithmetic.of(recipe, num_processes, len(examples))
    order = epoch_order(len(examples), recipe.seed, 0)[: COUNTED * batch.rows_per_step]
    possible: tuple[Layout, ...] = LAYOUTS if said == "auto" else ("padded", said)
    possible = ("padded",) if problem else possible
    counts = {layout: count_tokens(batch, examples, order, layout) for layout in possible}
    layout = min(counts, key=lambda name: counts[name].computed) if said == "auto" else said
    found = counts[layout]
    steps = "" if len(order) == len(examples) else f" in the first {COUNTED:,} steps"
    less = 1 - found.computed / counts["padded"].computed
    why = f"{layout}{' (auto)' if said == 'auto' else ''}: {found.computed:,} tokens to compute{steps}"
    why += f" ({found.real:,} real + {found.padding:,} padding - {found.shared:,} shared), {less:.0%} less than padded"
    return layout, why + (f"; {problem}" if problem and said == "auto" else "")


def count_tokens(batch: BatchArithmetic, examples: Sequence[Example], order: Order, layout: Layout) -> Tokens:
    """Counts the tokens of the rows that `order` names, in the micro-batches that `layout` would make of them."""
    real = padding = shared = 0
    for dealt in deal(examples, order, batch.micro_batch_size, batch.micro_batches_per_step, layout):
        for rows in filter(None, dealt):
            lengths = [example.length for example in rows]
            real += sum(lengths)
            if layout == "padded":
                padding += len(rows) * max(lengths) - sum(lengths)
            elif layout == "shared_prefix":
                shared += (len(rows) - 1) * shared_prefix(rows)
    return Tokens(real, padding, shared)


def why_not_in_one_row(recipe: Recipe, longest: int, base: Any) -> str | None:
    """What keeps this model from computing rows of at most `longest` tokens behind one another; None where it can."""
    if recipe.model.attn_implementation != "sdpa":
        return f"model.attn_implementation is {recipe.model.attn_implementation}, and only sdpa keeps rows apart"
    if not lets_attention_be_replaced(base) or not has_plain_head(base):
        return f"{type(base).__name__} does not let its attention be replaced"
    if limit := why_not_plain_attention(base, longest):
        return limit
    return None if _keeps_apart(base) else f"{type(base).__name__} does not tell its attention which rows to keep apart"


def _keeps_apart(base: Any) -> bool:
    """Tries out whether every attention layer learns which rows to keep apart; some decoders do not pass that on."""
    before = attention_of(base)
    rows = [Example.of(1, [0, 1], [2]), Example.of(2, [0, 3], [4, 5])]
    batch = collate(rows, "shared_prefix", pad_token_id=0).to(torch.device("meta"))
    try:
        base.set_attn_implementation(BY_ROW)
        with torch.no_grad():
            getattr(base, base.base_model_prefix)(**batch.inputs, use_cache=False)
    except Exception:  # a layer was not told, or the model asks for an input that is not given here
        return False
    finally:
        base.set_attn_implementation(before)
    return True
