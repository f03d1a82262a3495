"""Makes the questions of an evaluation from a run or a recipe: which models are asked which rows, and who judges."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from data.chat import prompt_ids
from data.conversation import Row
from data.errors import UserError
from data.examples import Example
from data.rows import read_rows
from data.template import ChatTemplate
from eval.answers.ask import Question
from eval.answers.settings import Settings
from eval.judging.judges import Judge, build_judge
from eval.judging.scores import check_rows, own_answer
from loop.model.build import build_template, build_tokenizer, check_model
from loop.model.limits import check_limits
from loop.recipe import Recipe, data_files, find_data, parse_recipe
from loop.saving.checkpoint import list_checkpoints
from loop.saving.finished import check_adapter, check_content, finished_recipe

BASE, TUNED = "base", "tuned"
FEWEST = 64  # tokens that an answer may have where neither the user nor the rows ask for more


@dataclass(frozen=True)
class Examination:
    """Holds what is asked: a question for each model, the judges, and what to warn of."""

    data: str
    questions: list[Question]
    judges: list[Judge]
    warnings: list[str]
    checkpoints: list[Path]  # that are asked, and of which the best becomes adapter/; empty where none does


def examination(args: argparse.Namespace) -> Examination:
    """Makes the examination that the options of eval.run ask for.

    Raises UserError when the run, recipe, model, rows or a judge is missing or does not fit.
    """
    recipe = asked_recipe(args)
    judges = [build_judge(name) for name in args.judge or recipe.eval.judge]
    names = files_to_ask(args.data, recipe)
    rows = [row for name in names for row in asked_rows(read_rows(name, recipe.data.columns), name)][: args.limit]
    if args.system is not None:
        rows = [replace(row, turns=tuple(turn for turn in row.turns if turn.role != "system")) for row in rows]
    warnings = check_rows(rows, judges, ", ".join(names))
    tokenizer = build_tokenizer(recipe)
    settings = _settings(args, recipe, rows, tokenizer)
    adapted = check_model(recipe)  # a bad recipe fails here rather than in a worker
    warnings += _check_prompts(
        adapted.get_base_model(), rows, build_template(recipe, tokenizer), settings.max_new_tokens
    )
    adapters = _adapters(args, recipe, adapted)
    choosing = bool(args.checkpoints) and recipe.choose_by == "judge" and bool(judges)
    if choosing:
        adapters.pop(TUNED)  # it will be one of the checkpoints
    return Examination(
        ", ".join(names),
        [
            Question(
                label=label,
                recipe=recipe,
                adapter=adapter,
                merge=not args.no_merge,
                rows=rows,
                batch_size=args.batch_size,
                settings=settings,
                backend=args.backend,
                verify=args.verify,
            )
            for label, adapter in adapters.items()
        ],
        judges,
        warnings,
        [folder for folder in adapters.values() if folder is not None] if choosing else [],
    )


def asked_recipe(args: argparse.Namespace) -> Recipe:
    """Returns the recipe of the run, or the recipe, that the options name, with what other options put in its place.

    Raises UserError when it cannot be, or when the run has no adapter.
    """
    if args.run:
        recipe = finished_recipe(args.run, args.model)
    else:
        moved = ["--model.name_or_path", args.model] if args.model else []
        recipe = parse_recipe(["--config", str(args.config), *moved])[1]
    if args.system is not None:
        recipe = replace(recipe, data=replace(recipe.data, system_prompt=args.system))
    return recipe


def _adapters(args: argparse.Namespace, recipe: Recipe, adapted: PeftModel) -> dict[str, Path | None]:
    """Returns the adapter of each model to ask, by its label; the base has none."""
    found: dict[str, Path | None] = {} if args.adapter_only else {BASE: None}
    if not args.run:
        return found
    check_content(args.run, recipe)
    if args.checkpoints:
        found |= {folder.name: folder for folder in list_checkpoints(args.run)}
    found[TUNED] = args.run / "adapter"
    for folder in found.values():
        if folder is not None:
            check_adapter(folder, adapted)
    return found


def files_to_ask(asked: str | None, recipe: Recipe) -> list[str]:
    """Returns the files, folders and data sets whose rows are asked."""
    named = asked or recipe.eval.data or recipe.data.validation_file
    if not named:
        raise UserError("--data is missing: the recipe has neither eval.data nor a validation file. Give rows to ask.")
    return list(map(find_data, data_files(named)))


def asked_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns a row for each answer that is asked for: each trained turn of a conversation, given what came before it.

    Raises UserError for a text without a prompt.
    """
    found = []
    for row in rows:
        if row.plain is not None:
            if not row.plain[0].strip():
                raise UserError(f"{name}: row {row.number} is a text, which asks nothing. Give rows with a question.")
            found.append(row)
        found += [
            replace(row, turns=row.turns[: place + 1])
            for place, turn in enumerate(row.turns)
            if turn.role == "assistant" and turn.weight
        ]
    return found


def _settings(
    args: argparse.Namespace, recipe: Recipe, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Settings:
    """Returns how the answers are generated. An answer may be twice as long as the longest of the rows' own."""
    most = args.max_new_tokens or recipe.eval.max_new_tokens
    if most is None:
        texts = [f"{row.turns[-1].reasoning if row.turns else ''}{own_answer(row)}" for row in rows]
        most = max(FEWEST, *(2 * len(ids) for ids in tokenizer(texts)["input_ids"]))
    return Settings(most, args.temperature, args.top_p, args.top_k, args.seed, args.samples, tuple(args.stop))


def _check_prompts(base: Any, rows: Sequence[Row], template: ChatTemplate, max_new_tokens: int) -> list[str]:
    """Returns a warning where a prompt with its answer may be too long for the model.

    Raises UserError where it is, or where a prompt has a token that the model does not know.
    """
    prompts = [prompt_ids(row, template) for row in rows]
    # The first token stands for each of the answer's.
    examples = [Example.of(row.number, ids, ids[:1] * max_new_tokens) for row, ids in zip(rows, prompts, strict=True)]
    warning = check_limits(base, [examples])
    return [f"{warning}."] if warning else []
