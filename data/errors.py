"""Defines the error that every folder of this project raises for a user's mistake."""


class UserError(ValueError):
    """Says what a user did wrong, where, and how to correct it. A command that fails with it has the exit code 2."""
