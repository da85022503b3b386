"""Fine-tuning: one optimiser step, one validation, and `fit`, the generator of events.

`fit` decides nothing about files, screens or clusters. Whoever iterates it (a Ray Train worker, a
Tune trial, a plain loop) sees the same events in the same order on every rank and acts on them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scribbleseg.config import FinetuneConfig
from scribbleseg.datasets.transforms import normalise
from scribbleseg.distributed import (
    all_reduce_sum,
    broadcast_flag,
    data_parallel,
    gather,
    share_buffers,
    world_size,
)
from scribbleseg.errors import DivergedError
from scribbleseg.evaluate import score_scenes
from scribbleseg.loops.batches import Batch, RunData
from scribbleseg.loops.state import Row, TrainState
from scribbleseg.losses.segmentation import segmentation_loss
from scribbleseg.metrics import SegmentationMetrics
from scribbleseg.schedules import warmup_cosine

# Reading a flag from the device waits for it, so the loss is looked at only every so many steps.
STEPS_BETWEEN_CHECKS = 25


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


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch has ended; its checkpoint, if one was due, was asked for just before."""

    epoch: int
    """The epoch, from 1."""
    metrics: Row
    """Its row of metrics.jsonl."""


Event = StepDone | SaveDue | EpochDone


def train_step(
    state: TrainState,
    network: nn.Module,
    batch: Batch,
    config: FinetuneConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    num_steps: int,
) -> Tensor:
    """Take one optimiser step and return the loss, detached, on the device.

    Args:
        state: Changed in place.
        network: The state's model, or a DDP or compiled wrapper of it.
        batch: uint8 "image" (b, 3, h, w), "strokes" (b, 2, h, w) and "mask" (b, h, w).
        config: Weights of the loss and settings of the optimiser.
        device: Where the model is.
        precision: Autocast dtype; None computes in float32.
        num_steps: Steps of the whole run, for the learning rate.
    """
    image = normalise(batch["image"].to(device, non_blocking=True))
    image = image.contiguous(memory_format=torch.channels_last)
    strokes = batch["strokes"].to(device, non_blocking=True).float() / 255
    target = batch["mask"].to(device, non_blocking=True)

    rate = learning_rate(config, state.step, num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
        output = network(image, strokes)
    loss = segmentation_loss(output.logits, output.side_logits, target, config.loss)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.update_ema(config.optim.ema_decay)

    state.step += 1
    state.samples_seen += config.train.batch_size
    state.loss_sum += loss.detach()
    return loss.detach()


def learning_rate(config: FinetuneConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of the step after `step` steps."""
    factor = warmup_cosine(step, num_steps=num_steps, warmup=config.optim.warmup)
    return config.optim.learning_rate * factor


def validate(
    model: nn.Module,
    data: RunData,
    config: FinetuneConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
) -> dict[str, float]:
    """Return the metrics of all ranks' validation scenes, each scored at its own size."""
    # Normalisation statistics differ between ranks; rank 0's are the ones that are saved.
    share_buffers(model)
    metrics = SegmentationMetrics()
    scenes = (data.cache[index] for index in data.validation)
    for _ in score_scenes(model, scenes, config, device, metrics=metrics, precision=precision):
        pass
    metrics.reduce(device)
    return metrics.compute()


@dataclass(kw_only=True)
class LossWatch:
    """Notices a loss that is not finite, and remembers which samples may have caused it."""

    finite: Tensor
    """On the device: whether every loss since the last check was finite."""
    stems: list[str] = field(default_factory=list)
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
            raise DivergedError(
                f"the loss became NaN or infinite within the {STEPS_BETWEEN_CHECKS} steps up to "
                f"step {step}; samples seen since: {', '.join(stems)}; look at them with "
                "`scribbleseg data check`, or lower --optim.learning-rate"
            )
        self.stems.clear()


def fit(
    state: TrainState,
    data: RunData,
    config: FinetuneConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
) -> Iterator[Event]:
    """Train from `state` to the end of the run, yielding the same events on every rank.

    Per step `StepDone`; per validated epoch `SaveDue`, then `EpochDone`; within long epochs
    `SaveDue` every `train.save_minutes`, decided by rank 0.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    plan = data.plan(config, state.step)
    network = data_parallel(state.model, device)
    if config.train.compile:
        network.compile()
    watch = LossWatch(finite=torch.ones((), dtype=torch.bool, device=device))
    began = time.perf_counter() - state.epoch_seconds
    saved = ready = time.perf_counter()
    state.model.train()
    for batch in data.loader(config, state.step, device):
        arrived = time.perf_counter()
        epoch = state.step // plan.steps_per_epoch + 1
        loss = train_step(
            state,
            network,
            batch,
            config,
            device=device,
            precision=precision,
            num_steps=plan.num_steps,
        )
        watch.see(loss, batch["stem"])
        now = time.perf_counter()
        yield StepDone(
            step=state.step,
            epoch=epoch,
            loss=loss,
            wait_seconds=arrived - ready,
            step_seconds=now - ready,
        )
        epoch_ended = state.step % plan.steps_per_epoch == 0
        if epoch_ended or state.step % STEPS_BETWEEN_CHECKS == 0:
            watch.check(state.step)
        if epoch_ended:
            row = _epoch_row(state, config, plan.steps_per_epoch, plan.num_steps, epoch)
            validated = epoch % config.train.validate_every == 0 or epoch == config.train.epochs
            if validated and data.num_validation:
                row |= validate(state.ema.module, data, config, device=device, precision=precision)
            row["seconds"] = time.perf_counter() - began
            state.history.append(row)
            state.loss_sum.zero_()
            state.epoch_seconds = 0.0
            began = saved = time.perf_counter()
            if validated:
                yield SaveDue(epoch=epoch)
            yield EpochDone(epoch=epoch, metrics=row)
        elif state.step % STEPS_BETWEEN_CHECKS == 0:
            late = time.perf_counter() - saved > 60 * config.train.save_minutes
            if broadcast_flag(late, device):
                state.epoch_seconds = time.perf_counter() - began
                saved = time.perf_counter()
                yield SaveDue(epoch=epoch)
        ready = time.perf_counter()


def _epoch_row(
    state: TrainState, config: FinetuneConfig, steps_per_epoch: int, num_steps: int, epoch: int
) -> Row:
    """Return the training half of an epoch's metrics."""
    mean_loss = all_reduce_sum(state.loss_sum) / (steps_per_epoch * world_size())
    return {
        "epoch": epoch,
        "loss": float(mean_loss),
        "learning_rate": learning_rate(config, state.step - 1, num_steps),
        "samples": state.samples_seen,
    }
