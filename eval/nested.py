"""Turns nested settings, a recipe for example, into one dictionary with keys like `optim.lr`."""

from typing import Any


def without_nesting(values: Any, prefix: str = "", open_lists: bool = False) -> dict[str, Any]:
    """Returns one dictionary for nested dictionaries. The keys of an outer and an inner dictionary are joined by a dot.

    With `open_lists`, a list of dictionaries counts as a dictionary whose keys are 0, 1, 2 …; other lists are values.
    """
    if open_lists and isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= without_nesting(value, f"{prefix}.{key}".lstrip("."), open_lists)
    return flat
