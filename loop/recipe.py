"""The recipe, as frozen dataclasses: what a run learns, and the run options, which change nothing of what it learns.

The recipe owns every number that changes the mathematics of a run. RUN_OPTIONS lists the keys that do not change it:
a resumed run may give them other values. The accelerate YAML (accel_configs/) owns the number of processes, the ZeRO
stage, offloading and the precision.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from data.errors import UserError
from data.files import HUB

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = ROOT / "loop" / "recipes" / "tiny.yaml"
JUDGES = ("sums", "exact", "contains", "number", "choice", "json", "regex", "tool_call")  # eval/judging/judges.py
MOST = 1_000_000  # the largest number of epochs, of steps, of rows at once, of rows and of micro-batches of a step
NO_ROWS = "where there are no validation rows (data.validation_file or data.validation_share)"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelRecipe:
    name_or_path: str
    """Folder of a transformers checkpoint, or a name on the model hub."""
    attn_implementation: str = "sdpa"
    """Attention kernel: sdpa, eager, flash_attention_2 …, as transformers calls it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""


@dataclass(frozen=True)
class DataRecipe:
    train_file: str | list[str] | dict[str, int]
    """File or folder of rows (docs/data.md has the formats), or hub:NAME@REVISION:SPLIT for a data set of the hub.
    A list of several, or {file: how many times an epoch has its rows}."""
    validation_file: str | list[str] | None = None
    """File, folder or data set of the rows of val/loss, or a list of several; null for none."""
    validation_share: float = 0.0
    """Share of the training rows that become validation rows, 0 <= share < 1. They are chosen by what they say, so
    adding rows to a file moves none of the others."""
    columns: dict[str, str] = field(default_factory=dict)
    """{column of the file: its name in a format}; the name ignore leaves a column out."""
    system_prompt: str = ""
    """Text of the system turn in front of every row without one of its own; empty for no system turn."""
    chat_template: str | None = None
    """What writes conversations instead of the model's own chat template: chatml, a file, or another model's name."""
    date: str | None = None
    """Today for chat templates that write the date, as YYYY-MM-DD; null for the day on which the run begins."""
    assistant_markup: Literal["parse", "plain"] = "parse"
    """parse reads a thought (<think> … </think>) and tool calls in the text of an answer as such; plain as text."""
    max_length: int = 51
    """Tokens that the model reads of a row at most, the end token included."""
    too_long: Literal["error", "drop", "cut"] = "error"
    """What becomes of a longer row: an error, or it is left out, or its end is cut off."""


@dataclass(frozen=True)
class LoraRecipe:
    rank: int = 8
    """Inner dimension of both LoRA matrices."""
    alpha: float = 64
    """LoRA's output is scaled by alpha / rank."""
    dropout: float = 0.01
    """Probability of dropping an input of LoRA, 0 <= p < 1."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW and its schedule: a linear warm-up, then half a cosine to 0 (build_lr_scheduler in loop/model/build.py)."""

    lr: float = 1e-4
    """Peak learning rate."""
    warmup_ratio: float = 0.03
    """Share of all steps spent warming up, 0 <= ratio < 1."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    max_grad_norm: float = 1.0
    """Gradients whose global 2-norm is larger are scaled down to this norm."""


@dataclass(frozen=True)
class EvalRecipe:
    """What python -m eval.run asks and how it judges, where its options do not say otherwise."""

    data: str | None = None
    """File, folder or data set whose rows are asked; null for the validation file."""
    judge: tuple[str, ...] = ()
    """Judges of the answers, the most important first: sums, exact, contains, number, choice, json, regex, tool_call,
    or FILE.py:FUNCTION (docs/evaluating.md)."""
    max_new_tokens: int | None = None
    """Tokens after which an answer is cut off; null for twice those of the longest answer of the rows, at least 64."""


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe
    data: DataRecipe
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    epochs: int = 1
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps after which the run ends, with the schedule's end there; null for all epochs."""
    patience: int | None = None
    """Validations in a row without a lower val/loss after which the run ends; null for none. The learning rates stay
    those of the whole run: they do not come down to 0 where it ends so."""
    micro_batch_size: int | Literal["auto"] = 16
    """Rows that a process computes at once; auto cuts its share of rows_per_step up as memory and time ask for."""
    rows_per_step: int | None = None
    """Rows of an optimizer step, over all processes; grad_accum_steps then follows from it for any number of processes.
    null: micro_batch_size x grad_accum_steps x the number of processes."""
    grad_accum_steps: int = 1
    """Micro-batches that a process adds up before an optimizer step. Leave it out where rows_per_step is given."""
    batching: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    """How rows share a micro-batch (data/layout.py); auto takes the layout that computes the fewest tokens. Without
    dropout all layouts learn the same; with dropout each layout drops other inputs."""
    gradient_checkpointing: Literal["auto", "none", "non_reentrant", "reentrant"] = "auto"
    """Keep only each layer's input, and compute the rest again in the backward pass; auto does so where a step would
    otherwise not fit into memory."""
    seed: int = 42
    """Seed of the row order, of LoRA's initial weights and of dropout."""
    log_every: int = 5
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between two validations; 0 for one at the end of each epoch. There is always one after the last step."""
    save_every: int = 0
    """Steps between two checkpoints; 0 for one at the end of each epoch, where there is always one, as there is after
    the last step."""
    save_total_limit: int = 3
    """How many of the newest checkpoints are kept; the checkpoint of the lowest val/loss is kept too."""
    choose_by: Literal["last", "val/loss", "judge"] = "last"
    """Which step's weights become adapter/: those of the last step, of the validation with the lowest val/loss, or of
    the checkpoint that is best by the first judge, once python -m eval.run --checkpoints all has asked them. With
    val/loss each validation that is lower than all before it saves a checkpoint."""
    run_dir: str | None = None
    """Run folder, which has to be new or empty; by default runs/<recipe>-<time>."""
    resume: str | None = None
    """Checkpoint to go on from: its folder, a run's folder, or auto for the newest of run_dir (or of this recipe)."""
    rank_timeout: float = 60
    """Seconds after which a rank that shows no sign of life ends the run."""
    tracker: str | None = "swanlab"
    """Name of a tracker that accelerate knows, which gets what metrics.jsonl gets; null for no tracker."""

    @property
    def rows_at_once(self) -> int:
        """micro_batch_size as a number, which it is once auto has been decided."""
        assert self.micro_batch_size != "auto"
        return self.micro_batch_size


# A resumed run may change these keys, because they change neither what is learned nor in which order.
# loop/saving/resume.py reads this table, and compares in another way what some of the keys stand for:
RUN_OPTIONS = frozenset(
    {
        # where a run writes, and how often it tells, validates and saves
        *("run_dir", "resume", "tracker", "log_every", "eval_every", "save_every", "save_total_limit", "rank_timeout"),
        "data.validation_file",
        # when it ends before its last step, and which of its steps becomes adapter/
        *("patience", "choose_by"),
        # the template's text is part of what the rows become, and that is compared
        "data.chat_template",
        # how the batch is cut up: the number of rows of a step is compared
        *("micro_batch_size", "grad_accum_steps", "rows_per_step"),
        # how the same numbers are computed
        *("batching", "gradient_checkpointing", "model.attn_implementation"),
        # where model and rows lie: the contents of the files are compared
        *("model.name_or_path", "model.trust_remote_code", "data.train_file"),
        # what is asked of the model afterwards
        *("eval.data", "eval.judge", "eval.max_new_tokens"),
        # which rows are refused, and not how a row is read
        "data.max_length",
    }
)


def recipe_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="loop/train.py",
        description="LoRA fine-tuning. Without --config: loop/recipes/tiny.yaml.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Recipe (YAML). Options after it override its values.")
    parser.add_class_arguments(Recipe, None)
    return parser


def parse_recipe(argv: Sequence[str]) -> tuple[str, Recipe]:
    """The recipe's name (its file name without .yaml) and the recipe of a command line.

    Raises UserError on an unknown key, a wrong type or a value out of range.
    """
    parser = recipe_parser()
    files = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    files += [file for word, file in pairwise(argv) if word == "--config"]
    for file in files:
        _check_recipe_file(Path(file))
    if not files:
        argv = ["--config", str(DEFAULT_RECIPE), *argv]
    try:
        parsed = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise UserError(f"{error}\nAll keys, with units: python loop/train.py --help") from error
    for key in ("model", "data", "lora", "optim", "eval"):
        if not isinstance(parsed[key], Namespace):
            raise UserError(f"{key} is {parsed[key]!r}, but has to be a section with keys of its own.")
    name = Path(str(parsed.config[-1])).stem
    values = parser.instantiate(parsed).as_dict()
    values.pop("config")
    recipe = Recipe(**values)
    problems = recipe_problems(recipe)
    if problems:
        raise UserError("the recipe has values out of range:\n" + "\n".join(f"  {problem}" for problem in problems))
    return name, recipe


def _check_recipe_file(path: Path) -> None:
    """Raises UserError for a file that cannot be read; the parser would not name the file, or show a traceback."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}. Give a recipe, a YAML file.") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: is no recipe. It needs keys with values, at least model and data.")


def recipe_problems(recipe: Recipe) -> list[str]:
    """One line for every value out of range: the key, its value, and what the value has to be."""
    optim, lora, rows, micro = recipe.optim, recipe.lora, recipe.rows_per_step, recipe.micro_batch_size
    asked, judges = recipe.eval.max_new_tokens, recipe.eval.judge
    files, share, steps = recipe.data.train_file, recipe.data.validation_share, recipe.grad_accum_steps
    most, patience, validates = recipe.max_steps, recipe.patience, bool(recipe.data.validation_file) or share > 0
    rules = [
        ("lora.rank", lora.rank, lora.rank >= 1, "at least 1"),
        ("lora.alpha", lora.alpha, 0 < lora.alpha < math.inf, "above 0"),
        ("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "at least 0 and below 1"),
        ("lora.target_modules", lora.target_modules, len(lora.target_modules) > 0, "at least one name"),
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "above 0"),
        ("optim.warmup_ratio", optim.warmup_ratio, 0 <= optim.warmup_ratio < 1, "at least 0 and below 1"),
        ("optim.weight_decay", optim.weight_decay, 0 <= optim.weight_decay < math.inf, "at least 0"),
        ("optim.betas", optim.betas, all(0 <= beta < 1 for beta in optim.betas), "both at least 0 and below 1"),
        ("optim.eps", optim.eps, 0 < optim.eps < math.inf, "above 0"),
        ("optim.max_grad_norm", optim.max_grad_norm, 0 < optim.max_grad_norm < math.inf, "above 0"),
        ("data.train_file", files, bool(files), "at least one file"),
        ("data.train_file", files, _times_are_positive(files), "1 or more times each"),
        ("data.validation_share", share, 0 <= share < 1, "at least 0 and below 1"),
        ("data.date", recipe.data.date, _is_date(recipe.data.date), "a day, as YYYY-MM-DD"),
        ("data.max_length", recipe.data.max_length, recipe.data.max_length >= 2, "at least 2"),
        ("eval.judge", judges, all(map(_is_judge, judges)), f"of {', '.join(JUDGES)} and FILE.py:FUNCTION"),
        ("eval.max_new_tokens", asked, asked is None or asked >= 1, "at least 1, or null"),
        ("epochs", recipe.epochs, 1 <= recipe.epochs <= MOST, "1 to a million"),
        ("max_steps", most, most is None or 1 <= most <= MOST, "1 to a million, or null"),
        ("patience", patience, patience is None or 1 <= patience <= MOST, "1 to a million, or null"),
        ("patience", patience, patience is None or validates, f"null {NO_ROWS}"),
        ("choose_by", recipe.choose_by, recipe.choose_by != "val/loss" or validates, f"last {NO_ROWS}"),
        ("choose_by", recipe.choose_by, recipe.choose_by != "judge" or judges, "last where there is no eval.judge"),
        ("micro_batch_size", micro, micro == "auto" or 1 <= micro <= MOST, "1 to a million, or auto"),
        ("micro_batch_size", micro, micro != "auto" or rows is not None, "a number where rows_per_step is null"),
        ("grad_accum_steps", steps, micro != "auto" or steps == 1, "left out where micro_batch_size is auto"),
        ("grad_accum_steps", steps, 1 <= steps <= MOST, "1 to a million"),
        ("rows_per_step", rows, rows is None or 1 <= rows <= MOST, "1 to a million, or null"),
        ("seed", recipe.seed, 0 <= recipe.seed < 2**32, "at least 0 and below 2^32"),
        ("log_every", recipe.log_every, recipe.log_every >= 1, "at least 1"),
        ("eval_every", recipe.eval_every, recipe.eval_every >= 0, "at least 0"),
        ("save_every", recipe.save_every, recipe.save_every >= 0, "at least 0"),
        ("rank_timeout", recipe.rank_timeout, 5 <= recipe.rank_timeout < math.inf, "at least 5"),
        ("save_total_limit", recipe.save_total_limit, recipe.save_total_limit >= 1, "at least 1"),
    ]
    return [f"{key} is {value}, but has to be {rule}" for key, value, ok, rule in rules if not ok]


def _times_are_positive(files: str | list[str] | dict[str, int]) -> bool:
    return not isinstance(files, dict) or all(1 <= times <= MOST for times in files.values())


def _is_judge(name: str) -> bool:
    return name.partition(":")[0] in JUDGES or judge_file(name) is not None


def judge_file(name: str) -> str | None:
    """The file of a judge FILE.py:FUNCTION; None for one of JUDGES."""
    file = name.rpartition(":")[0]
    return file if name.partition(":")[0] not in JUDGES and file.endswith(".py") else None


def check_examination(recipe: Recipe) -> None:
    """Raises UserError where a file is missing that the evaluation will need: better now than after the training."""
    files = [("eval.data", recipe.eval.data)] if recipe.eval.data else []
    files += [("eval.judge", file) for judge in recipe.eval.judge if (file := judge_file(judge))]
    for key, file in files:
        if not file.startswith(HUB) and not os.path.exists(find_path(file)):
            raise UserError(f"{key}: there is no file {file}. Correct the path, or leave the key out.")


def _is_date(text: str | None) -> bool:
    try:
        return text is None or date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def data_files(files: str | list[str] | dict[str, int] | None) -> dict[str, int]:
    """The files that a key of the recipe names, in their order, each with how many times an epoch has its rows."""
    if isinstance(files, dict):
        return files
    return {file: 1 for file in ([files] if isinstance(files, str) else files or [])}


def find_data(name: str) -> str:
    """The path of a file or folder that the recipe names; the name itself for a data set of the model hub."""
    return name if name.startswith(HUB) else str(find_path(name))


def find_path(path: str) -> Path:
    """The path that a recipe names: as it stands if it exists, and otherwise inside the project's own folder."""
    here = Path(os.path.expanduser(path))
    if not os.path.exists(here) and os.path.exists(ROOT / path):  # the functions of Path may raise
        return ROOT / path
    return here


def absolute(path: str) -> str:
    """A path that find_path finds from every folder: absolute, but for what lies in the project's own folder.

    A name of the model hub, and everything else that is not there, stays as it is.
    """
    found = find_path(path)
    if not os.path.exists(found):
        return path
    found = Path(os.path.abspath(found))
    return str(found.relative_to(ROOT) if found.is_relative_to(ROOT) else found)


def find_model(name_or_path: str) -> str:
    """The model's folder if there is a folder of that name; otherwise the name itself, for the model hub.

    Raises UserError for a name that looks like a folder where there is no such folder.
    """
    folder = find_path(name_or_path)
    if folder.is_dir():
        return os.path.abspath(folder)
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise UserError(
            f"model.name_or_path: there is no folder {name_or_path}. Give a checkpoint's folder or a hub name."
        )
    return name_or_path


def recipe_as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested values, which is how a recipe file holds them: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    values: dict[str, Any] = plain(asdict(recipe))
    return values
