"""Shows rows as the model gets them: what it only reads, what it learns, and what the chat template writes itself."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data.conversation import Row
from data.examples import Example, label_lengths_of, lengths_of
from data.load import Tally
from data.template import ChatTemplate, parting

MASKED, LEARNED = "\x1b[2m", "\x1b[1;32m"  # of a terminal: faint, and bold green
RESET = "\x1b[0m"
QUANTILES = (0, 0.5, 0.9, 0.99, 1)
NEAR = 30  # characters that are shown before and behind a difference
STYLE = "body{font:14px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;color:#777}mark{color:#000}"


def summary(examples: Sequence[Example], tallies: Mapping[str, Tally]) -> list[str]:
    """A few lines about all rows: their number, their lengths, the share of labels, and what was not simply learned."""
    lengths, labels = lengths_of(examples), label_lengths_of(examples)
    tokens, learned = int(lengths.sum()), int(labels.sum())
    quantiles = ", ".join(f"{int(np.quantile(lengths, q, method='nearest'))} ({q:.0%})" for q in QUANTILES)
    lines = [
        f"{len(examples):,} rows, {tokens:,} tokens, {learned:,} of them labels ({learned / tokens:.0%})",
        f"tokens of a row (share of rows that have at most so many): {quantiles}",
    ]
    return lines + [f"{file}: {said}" for file, tally in tallies.items() if (said := tally.told())]


def pieces(example: Example) -> list[tuple[str, list[int]]]:
    """The tokens of an example in their order: those that are masked and those that are learned, in turns."""
    found, at = [], 0
    for start, end, _ in example.spans:
        found += [("masked", example.ids[at:start]), ("learned", example.ids[start:end])]
        at = end
    return [(kind, ids) for kind, ids in [*found, ("masked", example.ids[at:])] if ids]


def shown(example: Example, template: ChatTemplate, colour: bool = False) -> str:
    """An example as lines of text, a line for each piece; control tokens and line breaks are visible."""
    lines = [f"row {example.row}"]
    for kind, ids in pieces(example):
        text = json.dumps(str(template.tokenizer.decode(ids)), ensure_ascii=False)[1:-1].replace('\\"', '"')
        if colour:
            text = f"{LEARNED if kind == 'learned' else MASKED}{text}{RESET}"
        lines.append(f"  {kind:<7} {len(ids):>4} tokens  {text}")
    weights = {span.weight for span in example.spans}
    if weights != {1.0}:
        lines.append(f"  weights {', '.join(f'{span.weight:g}' for span in example.spans)}")
    return "\n".join(lines)


def beside(row: Row, examples: Sequence[Example], template: ChatTemplate) -> list[str]:
    """Compares each example with what the template writes of the row, as it is; a line for each that says the result.

    A difference is no fault where the row spells control tokens, or where the template drops earlier thoughts.
    """
    if row.plain is not None:
        return ["plain text: no template"] * len(examples)
    own = template.own_rendering(row)
    lines = []
    for example in examples:
        text = str(template.tokenizer.decode(example.ids))
        same = parting(text, own)
        if same == len(text):
            rest = own[same:]
            lines.append(f"as the template writes it{f', which goes on with {rest[:NEAR]!r}' if rest else ''}")
        else:
            near = slice(max(0, same - NEAR), same + NEAR)
            lines.append(f"the template writes the whole row otherwise: {own[near]!r} where this has {text[near]!r}")
    return lines


def as_html(lines: Iterable[str], rows: Iterable[tuple[Row, Sequence[Example]]], template: ChatTemplate) -> str:
    """The same as a page; what is learned is marked."""
    parts = [f"<p>{html.escape(line)}</p>" for line in lines]
    for row, examples in rows:
        for example, compared in zip(examples, beside(row, examples, template), strict=True):
            text = "".join(
                f"<{'mark' if kind == 'learned' else 'span'}>{html.escape(str(template.tokenizer.decode(ids)))}"
                f"</{'mark' if kind == 'learned' else 'span'}>"
                for kind, ids in pieces(example)
            )
            parts.append(f"<h2>row {example.row}: {example.length} tokens, {example.num_labels} labels</h2>")
            parts.append(f"<pre>{text}</pre><p>{html.escape(compared)}</p>")
    page = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>rows</title><style>{STYLE}</style>\n{page}\n'
