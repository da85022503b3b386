"""Fine-tuning: one optimiser step, one validation, and `fit`, the generator of events."""

from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor, nn

from scribbleseg.checkpoint import list_broken
from scribbleseg.config import FinetuneConfig
from scribbleseg.datasets.transforms import normalise
from scribbleseg.distributed import data_parallel, reduce_gradients, share_buffers
from scribbleseg.errors import DivergedError
from scribbleseg.evaluate import score_scenes
from scribbleseg.loops.batches import Batch, RunData, cut
from scribbleseg.loops.state import TrainState
from scribbleseg.loops.steps import Event, Row, no_notice, run_steps
from scribbleseg.losses.segmentation import segmentation_loss
from scribbleseg.metrics import SegmentationMetrics
from scribbleseg.models import set_recompute
from scribbleseg.schedules import warmup_cosine
from scribbleseg.scribbles.corrections import corrected

# Part of the key of the draws that decide which steps are corrected.
CORRECTIONS = 1


def train_step(
    state: TrainState,
    network: nn.Module,
    batch: Batch,
    config: FinetuneConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    num_steps: int,
    num_frozen_steps: int = 0,
) -> Tensor:
    """Take one optimiser step and return the loss, detached, on the device.

    Args:
        state: Changed in place, except for its progress.
        network: The state's model, or a DDP or compiled wrapper of it.
        batch: uint8 "image" (b, 3, h, w), "strokes" (b, 2, h, w) and "mask" (b, h, w).
        config: Weights of the loss and settings of the optimiser.
        device: Where the model is.
        precision: Autocast dtype; None computes in float32.
        num_steps: Steps of the whole run, for the learning rate.
        num_frozen_steps: First steps, in which the encoder's weights stay as they are.
    """
    step = state.progress.step
    rate = learning_rate(config, step, num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    # The same on every rank, and when the run is resumed; a stream that nothing else draws from.
    draw = np.random.default_rng([config.train.seed, step, 0, CORRECTIONS]).random()
    is_corrected = draw < config.strokes.correct_probability
    loss = torch.zeros((), device=device)
    for part in cut(batch, config.train):
        image = normalise(part.batch["image"].to(device, non_blocking=True))
        image = image.contiguous(memory_format=torch.channels_last)
        strokes = part.batch["strokes"].to(device, non_blocking=True).float() / 255
        target = part.batch["mask"].to(device, non_blocking=True)
        if is_corrected:
            with torch.no_grad(), _autocast(device, precision):
                logits = state.ema(image, strokes).logits
            radius = config.strokes.radius if config.strokes.encoding == "disc" else 0
            strokes = corrected(strokes, logits, target, radius)
        with reduce_gradients(network, part.is_last):
            with _autocast(device, precision):
                output = network(image, strokes)
            part_loss = segmentation_loss(output.logits, output.side_logits, target, config.loss)
            part_loss = part_loss * part.weight
            state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    if step < num_frozen_steps:
        for parameter in state.model.encoder.parameters():
            parameter.grad = None
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.update_ema(config.optim.ema_decay)
    return loss


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


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
    """Return the metrics of all ranks' validation scenes, each scored at its own size.

    Raises:
        DivergedError: the weights hold NaN or infinity. A loss need not show it: training
            normalises by the batch, and only the averaged statistics may have left the numbers.
    """
    # Normalisation statistics differ between ranks; rank 0's are the ones that are saved.
    share_buffers(model)
    broken = list_broken(model.state_dict())
    if broken:
        raise DivergedError(
            f"the averaged weights became NaN or infinite in {broken}; go on from an earlier "
            "checkpoint with --init-from, at a lower --optim.learning-rate"
        )
    metrics = SegmentationMetrics()
    scenes = (data.cache[index] for index in data.validation)
    for _ in score_scenes(model, scenes, config, device, metrics=metrics, precision=precision):
        pass
    metrics.reduce(device)
    return metrics.compute()


def fit(
    state: TrainState,
    data: RunData,
    config: FinetuneConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    notice: Callable[[], bool] = no_notice,
    until: int | None = None,
) -> Generator[Event]:
    """Train from `state` to the end of the run, or of the epoch `until`; see `run_steps`.

    Raises:
        DivergedError: the loss, or the averaged weights, became NaN or infinite.
    """
    plan = data.plan(config, state.progress.step)
    set_recompute(state.model, config.train.recompute)
    network = data_parallel(state.model, device)
    if config.train.compile:
        network.compile()

    def take_step(batch: Batch) -> dict[str, Tensor]:
        loss = train_step(
            state,
            network,
            batch,
            config,
            device=device,
            precision=precision,
            num_steps=plan.num_steps,
            num_frozen_steps=config.optim.frozen_encoder_epochs * plan.steps_per_epoch,
        )
        return {"loss": loss}

    def finish_epoch(row: Row, validated: bool) -> None:
        row["learning_rate"] = learning_rate(config, state.progress.step - 1, plan.num_steps)
        if validated and data.num_validation:
            row |= validate(state.ema, data, config, device=device, precision=precision)

    state.model.train()
    yield from run_steps(
        state.progress,
        data.loader(config, state.progress.step, device),
        plan,
        config.train,
        network=network,
        device=device,
        take_step=take_step,
        finish_epoch=finish_epoch,
        notice=notice,
        until=until,
    )
