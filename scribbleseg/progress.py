"""What the library has to say while it is busy for long, brought to whoever shows it.

It is logged, under the package's name; a command writes it to the terminal, a training worker sends
it to the driver.
"""

import contextlib
import logging
from collections.abc import Callable, Generator


class _Lines(logging.Handler):
    """Hands each line to a function."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line over."""
        self.say(record.getMessage())


@contextlib.contextmanager
def narrated(say: Callable[[str], None]) -> Generator[None]:
    """Hand every line that the library logs to `say` within the block, and to nobody else."""
    logger = logging.getLogger("scribbleseg")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [_Lines(say)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, _, logger.propagate = before
        logger.setLevel(before[1])
