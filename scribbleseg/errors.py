"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the file or field, what was found, what was expected, and how to mend
    it. Commands print it without a traceback and exit with status 2.
    """


class DivergedError(RuntimeError):
    """Training produced a number that is not finite; the last checkpoint is still good."""
