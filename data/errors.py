"""The error that every room of this project raises for a user's mistake."""


class UserError(ValueError):
    """Something a user got wrong. The text says what is wrong, where, and how to mend it. Exit code 2."""
