"""Reads what a model can take: how many positions it knows, and which token ids have an embedding."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from data.errors import UserError
from data.examples import Example, largest_id_of, lengths_of
from loop.model.reach import Reach

SPARE_POSITIONS = 8  # rows that a table of learned positions may have beyond its positions; OPT has 2


def check_limits(base: Any, rows: Sequence[Sequence[Example]]) -> str | None:
    """Compares the rows of each file with the limits of the model `base`, which lies on the meta device.

    Returns a warning where rows are longer than the model was made for but may work, and None otherwise. Raises
    UserError where a row has a token without an embedding, or is longer than a model with learned positions can take.
    """
    for examples in filter(len, rows):
        _check_vocabulary(base, examples)
    longest = max(int(lengths_of(examples).max()) for examples in rows if len(examples))
    most = positions_of(base.config.get_text_config())
    if most is None or longest <= most:
        return None
    said = f"the longest row has {longest:,} tokens, but the model was made for {most:,}"
    if _has_learned_positions(base, most):
        raise UserError(f"{said}, and it has no embedding for a later one. Shorten the rows, or take another model.")
    return f"{said}: it may be weak beyond them, and nothing here checks that"


def positions_of(config: Any) -> int | None:
    """The number of positions that a model was made for; None where its configuration names no limit.

    RoPE's scaling is included: its factor counts from the original number of positions (`rope_parameters` in
    https://huggingface.co/docs/transformers/internal/rope_utils).
    """
    most: int | None = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in scaling.values() if isinstance(kind, dict)] or [scaling]  # one for each kind of layer
    scaled = [
        int(kind["factor"] * (kind.get("original_max_position_embeddings") or most))
        for kind in kinds
        if kind.get("factor")
    ]
    return max([most, *scaled])


def _has_learned_positions(base: Any, most: int) -> bool:
    """Whether the model looks positions up in a table that has one row for each of them."""
    words, called = base.get_input_embeddings(), Reach(base).called
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and most <= module.num_embeddings <= most + SPARE_POSITIONS
        and (called is None or name in called)
        for name, module in base.named_modules()
    )


def _check_vocabulary(base: Any, examples: Sequence[Example]) -> None:
    count = base.get_input_embeddings().num_embeddings
    if largest_id_of(examples) < count:
        return
    example = next(one for one in examples if max(one.ids) >= count)
    token = max(example.ids)
    raise UserError(
        f"row {example.row} has a token with the id {token:,}, but {base.name_or_path} has embeddings for {count:,} "
        "tokens. Take the token out of the rows, or give the model an embedding for it (resize_token_embeddings)."
    )
