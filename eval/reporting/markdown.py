"""Writes Markdown: tables, and text in which no character has a meaning to Markdown."""

import re
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table: one line for `head`, one for the rule under it, and one for each of `rows`."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def literal(text: str) -> str:
    """Returns `text` as one line in which no character has a meaning to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$&!])", r"\\\1", " ".join(text.split()))
