"""What a person at the driver sees of a run, wherever it computes.

Rank 0 posts to a board; a thread of the driver reads the board and draws a live bar where there is
a terminal, or plain lines where there is none. The board is an object where training runs in the
driver itself, and a small actor where it runs elsewhere.
"""

import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm


@dataclass(kw_only=True)
class Board:
    """The latest state of a run, and the lines that nobody has read yet."""

    step: int = 0
    num_steps: int = 0
    text: str = ""
    # A deque, because one thread adds while another takes.
    lines: deque[str] = field(default_factory=lambda: deque[str]())

    def post(self, step: int, num_steps: int, text: str) -> None:
        """Replace the live state."""
        self.step, self.num_steps, self.text = step, num_steps, text

    def say(self, line: str) -> None:
        """Add a line that stays on the screen."""
        self.lines.append(line)

    def take(self) -> tuple[int, int, str, list[str]] | None:
        """Return the live state and the unread lines, which then count as read.

        None: the board does not answer at the moment.
        """
        lines = [self.lines.popleft() for _ in range(len(self.lines))]
        return self.step, self.num_steps, self.text, lines


class RemoteBoard:
    """A board in an actor on the driver's node; picklable, and gone when the driver ends."""

    def __init__(self):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # It runs beside the driver, so that it is not lost with a worker's node.
        here = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(here, soft=True)
        actor: Any = ray.remote(Board)
        self.actor = actor.options(num_cpus=0, scheduling_strategy=strategy).remote()

    def post(self, step: int, num_steps: int, text: str) -> None:
        """See `Board.post`; does not wait."""
        self.actor.post.remote(step, num_steps, text)

    def say(self, line: str) -> None:
        """See `Board.say`; does not wait."""
        self.actor.say.remote(line)

    def take(self) -> tuple[int, int, str, list[str]] | None:
        """See `Board.take`."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self.actor.take.remote(), timeout=10)
        except RayError:
            # The picture of a run must never be what ends it.
            return None


class Watcher:
    """A thread that shows a board until it is stopped; use it as a context."""

    def __init__(self, board: Board | RemoteBoard, stream: TextIO = sys.stderr):
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
        while not self.stopped.wait(1.0):
            self._show()

    def _show(self) -> None:
        seen = self.board.take()
        if seen is None:
            return
        step, num_steps, text, lines = seen
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
