"""What a person at the driver sees of a run that computes elsewhere.

Rank 0 posts to a board, a small actor; a thread of the driver reads the board and draws a live bar
where there is a terminal, or plain lines where there is none.
"""

import sys
import threading
from dataclasses import dataclass, field
from typing import Any, TextIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm


@dataclass(kw_only=True)
class Board:
    """The latest state of a run, and the lines that nobody has read yet."""

    step: int = 0
    num_steps: int = 0
    text: str = ""
    lines: list[str] = field(default_factory=list)

    def post(self, step: int, num_steps: int, text: str) -> None:
        """Replace the live state."""
        self.step, self.num_steps, self.text = step, num_steps, text

    def say(self, line: str) -> None:
        """Add a line that stays on the screen."""
        self.lines.append(line)

    def take(self) -> tuple[int, int, str, list[str]]:
        """Return the live state and the unread lines, which then count as read."""
        lines, self.lines = self.lines, []
        return self.step, self.num_steps, self.text, lines


def make_board() -> Any:
    """Return a handle of a new board actor on the driver's node; it ends with the driver."""
    # It runs beside the driver, so that it is not lost with a worker's node.
    here = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(here, soft=True)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=strategy).remote()


class Watcher:
    """A thread that shows a board until it is stopped; use it as a context."""

    def __init__(self, board: Any, stream: TextIO = sys.stderr):
        self.board = board
        self.stream = stream
        self.bar: tqdm[Any] | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._show()
        if self.bar is not None:
            self.bar.close()

    def _watch(self) -> None:
        while not self.stopped.wait(0.5):
            self._show()

    def _show(self) -> None:
        try:
            step, num_steps, text, lines = ray.get(self.board.take.remote(), timeout=10)
        except RayError:
            # The picture of a run must never be what ends it.
            return
        for line in lines:
            tqdm.write(line, file=self.stream)
        if not self.stream.isatty() or num_steps == 0:
            return
        if self.bar is None:
            self.bar = tqdm(
                total=num_steps, initial=step, unit="step", file=self.stream, dynamic_ncols=True
            )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
