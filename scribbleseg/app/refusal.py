"""What the server says no to: a status of HTTP, and one line for the person at the page."""

import errno
from http import HTTPStatus

from scribbleseg.datasets.files import reason


class Refusal(Exception):
    """A request that is not granted.

    Args:
        status: Of the answer.
        message: One line: what was found, what was expected, how to go on.
    """

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


def not_written(error: OSError, path: object) -> Refusal:
    """Return the refusal that belongs to a file or folder that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.FORBIDDEN
    remedy = "free some space" if full else "make the folder writable"
    if error.errno == errno.ENAMETOOLONG:
        remedy = "shorten the name"
    return Refusal(status, f"{path}: not saved ({reason(error)}); {remedy} and try again")
