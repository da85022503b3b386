"""Time between two moments of a step, as the device lives through it.

On a GPU the host runs ahead: it queues work and goes on. A moment there is a CUDA event, which the
device passes in its own time; so the host need not wait for it within a step, and a loader that is
slow while the GPU still has work to do counts as no loss. On a CPU a moment is a reading of the
clock.
"""

import time
from dataclasses import dataclass, field

import torch

Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Return the present, or, on a GPU, when it will have done all that is queued by now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass
class Stopwatch:
    """A sum of spans of time, kept without waiting for the device until it is read."""

    total: float = 0.0
    """Seconds that have been added up."""
    spans: list[tuple[Moment, Moment]] = field(
        default_factory=lambda: list[tuple[Moment, Moment]]()
    )
    """Beginnings and ends that have not."""

    def add(self, begin: Moment, end: Moment) -> None:
        """Add a span; does not wait."""
        self.spans.append((begin, end))

    def seconds(self) -> float:
        """Return the sum of all spans; waits until the device has passed the last of them."""
        for begin, end in self.spans:
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                self.total += begin.elapsed_time(end) / 1000
            elif isinstance(begin, float) and isinstance(end, float):
                self.total += end - begin
        self.spans.clear()
        return self.total

    def take(self) -> float:
        """Return the sum of all spans and begin anew."""
        total = self.seconds()
        self.total = 0.0
        return total
