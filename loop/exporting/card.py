"""Writes the model card of an export from what stands in the folder of its run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loop.exporting.source import Source
from loop.recipe import data_files, recipe_as_dict
from loop.saving.content import INPUTS

NOT_THERE = "not in the run folder"


def write_card(source: Source, about: str, export: Sequence[str], library: str, folder: Path) -> None:
    """Writes README.md. `about` says in a sentence what the folder holds, and `export` what the export has found.

    It names files without their folders, so that it tells nothing of the machine.
    """
    base = _bare(source.recipe.model.name_or_path)
    is_on_hub = base == source.recipe.model.name_or_path and base.count("/") == 1
    head = ["---", *([f"base_model: {base}"] if is_on_hub else []), f"library_name: {library}", "tags: [lora]", "---"]
    parts = [
        "\n".join(head),
        f"# {base}, fine-tuned\n\n{about}",
        _asking(source),
        "## Data\n\n" + _data(source),
        "## Scores\n\n" + _scores(_read(source.run / "eval.json")),
        "## Export\n\n" + "\n".join(f"- {line}" for line in export),
        "## Recipe\n\n```yaml\n" + _recipe(source) + "```",
        "## Versions\n\n" + _table(("package", "version"), sorted(_read(source.run / "versions.json").items())),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _read(file: Path) -> Mapping[str, Any]:
    """The content of a JSON file; nothing where it is missing or no object, because a card does not need it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bare(name: str) -> str:
    """A name without its folders; a data set or a model of the hub keeps its whole name."""
    return Path(name).name if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def _asking(source: Source) -> str:
    prompt = source.recipe.data.system_prompt
    said = "An answer ends at the tokens that generation_config.json names. The chat template is that of the training."
    if prompt:
        said += " All rows were learned behind this system turn, so send it too:\n\n" + "\n".join(
            f"> {line}" for line in prompt.splitlines()
        )
    return f"## How to ask it\n\n{said}"


def _data(source: Source) -> str:
    counted = _read(source.run / INPUTS).get("files", {})
    rows: list[tuple[object, ...]] = [
        (_bare(name), one.get("rows"), one.get("examples"), one.get("dropped"), one.get("cut"))
        for name, one in counted.items()
        if isinstance(one, dict)
    ]
    if not rows:
        rows = [(_bare(name), *["not counted"] * 4) for name in data_files(source.recipe.data.train_file)]
    return _table(("file", "rows", "examples learned", "dropped", "cut"), rows)


def _scores(found: Mapping[str, Any]) -> str:
    """The table of eval.json, in its present or an older format."""
    scores = found.get("scores", found)
    rows = [
        (label, f"{score['accuracy']:.3f}")
        for label, score in (scores.items() if isinstance(scores, dict) else ())
        if isinstance(score, dict) and isinstance(score.get("accuracy"), int | float)
    ]
    if not rows:
        return "The run was not evaluated."
    asked = found.get("asked", {})
    about = ""
    if isinstance(asked, dict) and asked.get("data"):
        judges = ", ".join(map(str, asked.get("judges", ())))
        about = f"{asked.get('num_questions', 'The')} questions of {_bare(str(asked['data']))}"
        about += f", judged by {judges}.\n\n" if judges else ".\n\n"
    return about + _table(("model", "accuracy"), rows)


def _recipe(source: Source) -> str:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {bare(key): bare(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [bare(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    return yaml.safe_dump(bare(recipe_as_dict(source.recipe)), allow_unicode=True, sort_keys=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return f"{NOT_THERE.capitalize()}."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
