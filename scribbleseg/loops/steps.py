"""The loop that fine-tuning and pretraining share: events, counters, and `run_steps`.

`run_steps` decides nothing about files, screens or clusters. Whoever iterates it (a Ray Train
worker, a Tune trial, a plain loop) sees the same events in the same order on every rank and acts on
them.
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scribbleseg.config import TrainConfig
from scribbleseg.distributed import (
    DataParallel,
    all_reduce_sum,
    broadcast_float,
    gather,
    world_size,
)
from scribbleseg.errors import DivergedError
from scribbleseg.loops.batches import Batch, BatchPlan
from scribbleseg.stopwatch import Stopwatch, moment

# Reading a flag from the device waits for it, and ranks that agree on something wait for one
# another, so both are done only every so many steps, or seconds where steps are slow.
STEPS_BETWEEN_CHECKS = 25
# Of the samples seen between two checks, which may be thousands, a message names the first.
SAMPLES_NAMED = 8
SECONDS_BETWEEN_CHECKS = 5.0

# An epoch's line of metrics.jsonl.
Row = dict[str, float | int]


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step has been taken."""

    step: int
    """Steps done, from 1."""
    epoch: int
    """Epoch in progress, from 1."""
    loss: Tensor
    """This rank's loss, on the device; reading it waits for the step."""
    wait_seconds: float
    """Time spent waiting for the loader."""
    step_seconds: float
    """Time of the whole step, the waiting included."""


@dataclass(frozen=True, kw_only=True)
class SaveDue:
    """A checkpoint is wanted now; the state is consistent until the iteration goes on."""

    epoch: int
    """Epoch in progress or just finished, from 1: the checkpoint's number."""
    final: bool = False
    """No step follows."""


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch has ended; its checkpoint, if one was due, was asked for just before."""

    epoch: int
    """The epoch, from 1."""
    metrics: Row
    """Its row of metrics.jsonl."""
    warning: str | None = None
    """What a person should know now, in one line."""


Event = StepDone | SaveDue | EpochDone


@dataclass(kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimiser steps done."""
    samples_seen: int = 0
    """Training samples seen, over all ranks."""
    epoch_seconds: float = 0.0
    """Wall time spent in the present epoch before the last interruption."""
    sums: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """Sums of this rank's figures per step since the epoch began, on the device."""
    history: list[Row] = field(default_factory=lambda: list[Row]())
    """One row of metrics per finished epoch."""

    def add(self, figures: dict[str, Tensor]) -> None:
        """Add the figures of one step, without waiting for the device."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def means(self, num_steps: int) -> Row:
        """Return the figures' means over `num_steps` steps and all ranks; waits for the device."""
        return {
            name: float(all_reduce_sum(total)) / (num_steps * world_size())
            for name, total in self.sums.items()
        }

    def even_out(self) -> None:
        """Give every rank the ranks' mean of the sums, so that one rank's can stand for all.

        A checkpoint holds those of rank 0, and may be resumed by another number of ranks.
        """
        for name, total in self.sums.items():
            self.sums[name] = all_reduce_sum(total) / world_size()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as tensors and plain types."""
        return dict(vars(self))

    def load_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Put back what `to_dict` returned."""
        self.step = saved["step"]
        self.samples_seen = saved["samples_seen"]
        self.epoch_seconds = saved["epoch_seconds"]
        self.sums = {name: total.to(device) for name, total in saved["sums"].items()}
        self.history = saved["history"]


@dataclass(kw_only=True)
class LossWatch:
    """Notices a loss that is not finite, and remembers which samples may have caused it."""

    finite: Tensor
    """On the device: whether every loss since the last check was finite."""
    stems: list[str] = field(default_factory=lambda: list[str]())
    """Samples of this rank seen since the last check."""

    def see(self, loss: Tensor, stems: list[str]) -> None:
        """Take in one step without waiting for the device."""
        self.finite &= loss.isfinite()
        self.stems += stems

    def check(self, step: int) -> None:
        """Wait for the device, and raise on every rank if any rank's loss was not finite."""
        num_bad = all_reduce_sum((~self.finite).float())
        if num_bad.item() > 0:
            stems = sorted({stem for stems in gather(self.stems) for stem in stems})
            more = len(stems) - SAMPLES_NAMED
            raise DivergedError(
                f"the loss became NaN or infinite within the {STEPS_BETWEEN_CHECKS} steps up to "
                f"step {step}; samples seen since: {', '.join(stems[:SAMPLES_NAMED])}"
                f"{f' and {more} more' if more > 0 else ''}; look at them with "
                "`scribbleseg data check`, or lower --optim.learning-rate"
            )
        self.stems.clear()


@dataclass(kw_only=True)
class Waits:
    """What this rank waited for since the epoch began, or since the run was started within it."""

    steps: Stopwatch = field(default_factory=Stopwatch)
    """Whole steps, from the wait for a batch to the end of the optimiser's work."""
    data: Stopwatch = field(default_factory=Stopwatch)
    """Of these, waiting for the loader; on a GPU only what left the device without work."""
    gradients: Stopwatch | None
    """Of these, waiting for sums of gradients; None on one process."""

    def settle(self) -> None:
        """Add up what was measured so far, so that it does not pile up; waits for the device."""
        for watch in (self.steps, self.data, self.gradients):
            if watch is not None:
                watch.seconds()

    def take(self, device: torch.device) -> Row:
        """Return the shares of a step, 0 to 1, as means over ranks, and begin anew."""
        whole = self.steps.take()
        shares = {"waiting": self.data.take() / whole}
        if self.gradients is not None:
            shares["all_reduce"] = self.gradients.take() / whole
        means = all_reduce_sum(torch.tensor(list(shares.values()), device=device)) / world_size()
        return dict(zip(shares, means.tolist(), strict=True))


def no_notice() -> bool:
    """Say that this machine stays."""
    return False


class Checks:
    """When ranks look up from their steps, to see the loss and to agree whether to save."""

    def __init__(
        self, step: int, config: TrainConfig, device: torch.device, notice: Callable[[], bool]
    ):
        self.config = config
        self.device = device
        self.notice = notice
        self.step = step
        # How slow steps are is not known before the first.
        self.next_step = step + 1
        self.time = self.saved = time.perf_counter()

    def due(self, step: int) -> bool:
        """Return whether to look up after this step; the same on every rank."""
        return step >= self.next_step or self.save_by_steps(step)

    def save_by_steps(self, step: int) -> bool:
        """Return whether `train.save_steps` asks for a checkpoint after this step."""
        return self.config.save_steps is not None and step % self.config.save_steps == 0

    def agree_to_save(self, step: int) -> bool:
        """Return whether any rank wants a checkpoint now, and agree on when to look up next."""
        now = time.perf_counter()
        late = now - self.saved > 60 * self.config.save_minutes
        wanted = self.notice() or late or self.save_by_steps(step)
        # Rank 0's, because ranks that count differently would wait for one another for ever.
        pace = broadcast_float((now - self.time) / (step - self.step), self.device)
        num_steps = int(SECONDS_BETWEEN_CHECKS / pace)
        self.step, self.time = step, now
        self.next_step = step + min(max(num_steps, 1), STEPS_BETWEEN_CHECKS)
        return all_reduce_sum(torch.tensor(float(wanted), device=self.device)).item() > 0


def run_steps(
    progress: Progress,
    batches: Iterable[Batch],
    plan: BatchPlan,
    config: TrainConfig,
    *,
    network: nn.Module,
    device: torch.device,
    take_step: Callable[[Batch], dict[str, Tensor]],
    finish_epoch: Callable[[Row, bool], str | None],
    notice: Callable[[], bool],
    until: int | None,
) -> Generator[Event]:
    """Take the remaining steps of a run, yielding the same events on every rank.

    Per step `StepDone`; per epoch `EpochDone`, and just before it `SaveDue` if the epoch was
    validated or is the last one; within long epochs `SaveDue` every `train.save_minutes` and every
    `train.save_steps`, and when a rank has notice that its machine will go.

    Args:
        progress: Counters of the run, changed in place.
        batches: The remaining ones, each with the names of its samples under "stem".
        plan: What they follow.
        config: Length of the run and times of its checkpoints.
        network: What the steps train; where it is wrapped in DDP, it tells what it waited for.
        device: Where figures are.
        take_step: Takes an optimiser step; returns its detached figures on the device, "loss"
            among them.
        finish_epoch: Adds to the row of an epoch (which holds the means of the figures), and
            validates if told to; may return a warning.
        notice: Says whether this rank's machine will soon be taken away, once per notice; asked
            between steps, at the same steps on every rank.
        until: Epoch to end after; None: that of the run's end.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    last = config.epochs if until is None else min(until, config.epochs)
    num_left = max(0, last * plan.steps_per_epoch - progress.step)
    watch = LossWatch(finite=torch.ones((), dtype=torch.bool, device=device))
    waits = Waits(gradients=network.waited if isinstance(network, DataParallel) else None)
    began = time.perf_counter() - progress.epoch_seconds
    checks = Checks(progress.step, config, device, notice)
    ready = time.perf_counter()
    idle = moment(device)
    for batch in itertools.islice(batches, num_left):
        arrived = time.perf_counter()
        waits.data.add(idle, moment(device))
        epoch = progress.step // plan.steps_per_epoch + 1
        figures = take_step(batch)
        progress.step += 1
        progress.samples_seen += plan.batch_size
        progress.add(figures)
        watch.see(figures["loss"], batch["stem"])
        now = time.perf_counter()
        waits.steps.add(idle, moment(device))
        yield StepDone(
            step=progress.step,
            epoch=epoch,
            loss=figures["loss"],
            wait_seconds=arrived - ready,
            step_seconds=now - ready,
        )
        epoch_ended = progress.step % plan.steps_per_epoch == 0
        if epoch_ended or checks.due(progress.step):
            watch.check(progress.step)
            waits.settle()
        if epoch_ended:
            row: Row = {
                "epoch": epoch,
                **progress.means(plan.steps_per_epoch),
                "samples": progress.samples_seen,
                **waits.take(device),
            }
            validated = config.validates(epoch)
            warning = finish_epoch(row, validated)
            row["seconds"] = time.perf_counter() - began
            progress.history.append(row)
            progress.sums = {}
            progress.epoch_seconds = 0.0
            began = time.perf_counter()
            if validated or epoch == last:
                checks.saved = began
                yield SaveDue(epoch=epoch, final=epoch == last)
            yield EpochDone(epoch=epoch, metrics=row, warning=warning)
        saved = epoch_ended and (config.validates(epoch) or epoch == last)
        if not saved and checks.due(progress.step) and checks.agree_to_save(progress.step):
            progress.even_out()
            checks.saved = time.perf_counter()
            progress.epoch_seconds = checks.saved - began
            yield SaveDue(epoch=epoch)
        ready = time.perf_counter()
        idle = moment(device)
