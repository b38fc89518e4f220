"""Errors that a user can mend: one line on the terminal, exit code 2. Every other exception is a fault of ours."""


class BadInput(ValueError):
    """Input that cannot be used; the message says what was given, what is expected, and which flag or file."""


class UnsupportedModel(BadInput):
    """A model that cannot be pruned correctly, with the reason."""
