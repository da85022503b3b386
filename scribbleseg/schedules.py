"""Schedules: a step in, a float out."""

import math


def warmup_cosine(step: int, *, num_steps: int, warmup: float) -> float:
    """Return the factor of the learning rate: linear rise, then half a cosine down to 0.

    Args:
        step: Optimiser steps done so far, from 0.
        num_steps: Optimiser steps of the whole run.
        warmup: Share of the steps over which the factor rises, [0, 1).

    Returns:
        A factor in [0, 1]; it reaches 1 at the end of the warm-up and never starts at 0.
    """
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(step: int, *, decay: float) -> float:
    """Return the decay of the averaged weights after `step` steps, warmed up from 0.1 to `decay`.

    A fixed decay would keep the random initial weights in the average for thousands of steps, and
    early validation would score noise.
    """
    return min(decay, (1 + step) / (10 + step))


def cosine(step: int, *, num_steps: int, start: float, end: float) -> float:
    """Return half a cosine from `start` at step 0 to `end` at `num_steps`, and `end` after that."""
    progress = min(1.0, step / max(1, num_steps))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, *, num_warmup: int, start: float, end: float) -> float:
    """Return a line from `start` at step 0 to `end` at `num_warmup`, and `end` after that.

    Without warm-up steps it is `end` from the beginning.
    """
    return start + (end - start) * step / num_warmup if step < num_warmup else end
