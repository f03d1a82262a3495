"""Runs a judge that the user has written: a function of a file, which gets a row and an answer."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.conversation import Row
from data.errors import UserError
from eval.check import Verdict
from loop.recipe import find_path

RETURNS = "True or False, or a score from 0 to 1, alone or in a pair with the reason"


class NotJudgeable(ValueError):
    """Says why no answer to a row can be judged; the caller knows the file and the row's number."""


def own_judge(file: str, function: str) -> Callable[[Row, str], Verdict]:
    """Returns the judge `function` of the Python file. Raises UserError where there is none.

    It is called as function(row, answer). `row` is a Row of data/conversation.py: row.question, row.answer, row.turns.
    The judge raises UserError, which names the file, the line and the row, where the function fails.
    """
    path = find_path(file)
    judged = getattr(_module(path), function, None)
    if not callable(judged):
        raise UserError(f"--judge {file}:{function}: the file has no function {function!r}. Give FILE.py:FUNCTION.")

    def judge(row: Row, answer: str) -> Verdict:
        try:
            said = judged(row, answer)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{_place(path, error)}: row {row.number}: the judge {function} fails: {_text(error)}. Correct it."
            ) from error
        return _verdict(said, f"{path}: row {row.number}: the judge {function}")

    return judge


def _module(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"--judge: there is no file {path}. Give FILE.py:FUNCTION.")
    name = f"judge_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))  # the file may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place(path, error)}: the judge cannot be read: {_text(error)}. Correct it.") from error
    return module


def _text(error: BaseException) -> str:
    said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _place(path: Path, error: BaseException) -> str:
    """Returns the file and the line of it in which the error arose."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _verdict(said: Any, who: str) -> Verdict:
    score, reason = said if isinstance(said, tuple) and len(said) == 2 else (said, "")
    if isinstance(score, np.bool_):
        score = bool(score)
    if not isinstance(score, int | float | np.number) or not 0 <= score <= 1 or not isinstance(reason, str):
        raise UserError(f"{who} returns {said!r}. It has to return {RETURNS}.")
    wrong = "wrong" if score == 0 else f"score {float(score):.3g}"
    return Verdict(float(score), "" if score >= 1 else reason or wrong)
