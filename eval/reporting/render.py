"""Writes a page as HTML, which needs no other file and no network, and as Markdown."""

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from eval.reporting.charts import Chart
from eval.reporting.conclusions import NOT_MEASURED
from eval.reporting.curves import as_json, curves
from eval.reporting.first_screen import Card
from eval.reporting.markdown import literal, markdown_table
from eval.reporting.page import AnswersBlock, Block, Page

HERE = Path(__file__).parent
UPLOT = HERE / "uplot"  # uPlot 1.6.32: 53 kB that draw a log scale, zoom and find the point under the cursor
# The browser itself refuses what the page does not hold: other scripts, pictures, connections.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def script_of(*names: str) -> str:
    """Returns uPlot with its licence, and the scripts of these names, as one text."""
    licence = (UPLOT / "LICENSE").read_text(encoding="utf-8")
    files = [UPLOT / "uPlot.iife.min.js", *(HERE / name for name in names)]
    return "\n".join([f"/*\n{licence}*/", *(file.read_text(encoding="utf-8") for file in files)])


def style() -> str:
    files = (UPLOT / "uPlot.min.css", HERE / "page.css")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def policy(script: str, connections: str = "'none'") -> str:
    """Returns the content security policy of a page that has this script, and no other, inside it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{POLICY}; connect-src {connections}; script-src " + (f"'sha256-{digest}'" if script else "'none'")


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder. Texts are escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return templates.get_template(template).render(style=style(), as_json=as_json, **values)


def to_html(page: Page, svgs: Mapping[str, str]) -> str:
    """Returns the text of report.html; `svgs` are the drawings of its charts by name."""
    blocks = [block for section in page.sections.values() for block in section]
    drawn = curves(blocks)
    answers = next((block.answers for block in blocks if isinstance(block, AnswersBlock)), None)
    script = script_of("charts.js", "answers.js") if drawn or answers else ""
    return render(
        "report.html.jinja",
        page=page,
        svgs=svgs,
        not_measured=NOT_MEASURED,
        curves=drawn,
        answers=answers,
        script=script,
        policy=policy(script),
    )


def to_markdown(page: Page) -> str:
    """Returns the text of report.md."""
    parts = [f"# {literal(page.title)}", literal(page.about)]
    for title, blocks in page.sections.items():
        parts += [f"## {title}", *map(_block_to_markdown, blocks)] if blocks else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _block_to_markdown(block: Block) -> str:
    if isinstance(block, AnswersBlock):
        return "\n\n".join(map(_block_to_markdown, block.failed))
    if isinstance(block, Card):
        return f"- {literal(block.told())}"
    if isinstance(block, str):
        return f"- {literal(block)}"
    if isinstance(block, Chart):
        title = literal(block.title)
        image = f"![{title}](charts/{block.name}.svg)\n\n[the points as CSV](charts/{block.name}.csv)"
        return image if block.drawn else f"- {title}: {NOT_MEASURED}: {block.missing}."
    head, *rows = ([literal(text) for text in row] for row in (block.head, *block.rows))
    table = markdown_table(head, rows)
    if block.folded:  # a line that begins with HTML is not read as Markdown, so the caption is HTML
        return f"<details><summary>{html.escape(block.caption)}</summary>\n\n{table}\n\n</details>"
    return f"**{literal(block.caption)}**\n\n{table}"
