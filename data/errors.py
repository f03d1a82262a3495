"""Defines the error that every folder of this project raises for a user's mistake, and makes it of other errors."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager

import yaml


class UserError(ValueError):
    """Says what a user did wrong, where, and how to correct it. A command that fails with it has the exit code 2."""


# These exceptions say that the content of a file is not what it should be.
DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    csv.Error,
    yaml.YAMLError,
)

UNREADABLE = (OSError, *DAMAGE)


@contextmanager
def user_error(said: str, advice: str, kinds: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Turns an exception of one of `kinds` into a UserError: `said`, the error in one line, and `advice`.

    A UserError, which is a ValueError, passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        text = _one_line(error)
        raise UserError(f"{said}: {text}. {advice}") from error


def _one_line(error: Exception) -> str:
    """Returns what the error says, in one line."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
