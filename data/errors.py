"""The error that every room of this project raises for a user's mistake."""


class UserError(ValueError):
    """A user's mistake: its text says what is wrong, where, and how to correct it. The exit code is 2."""
