"""How long a run will take here, by a few of its own steps."""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from scribbleseg.config import FinetuneConfig, PretrainConfig, override, to_dict
from scribbleseg.device import pick_device, prepare_cpu
from scribbleseg.loops.steps import StepDone
from train.launch import Resources

NUM_TIMED = 2


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a few steps of a run took."""

    epochs: int
    steps_per_epoch: int
    seconds_per_step: float
    """Computing alone: loading and validating come on top."""

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return self.epochs * self.steps_per_epoch * self.seconds_per_step


def time_steps(config: FinetuneConfig | PretrainConfig, resources: Resources) -> Pace:
    """Take a few steps of a run in this process, after a first one that is slower.

    Args:
        config: The run's settings.
        resources: What its worker will have.

    Raises:
        InputError: the data cannot be used.
    """
    device = pick_device(gpus=resources.gpus > 0)
    if device.type == "cpu":
        prepare_cpu(resources.cpus)
    share = config.strokes.correct_probability if isinstance(config, FinetuneConfig) else 0.0
    if share in (0, 1):
        return _time(config, device)
    # So few steps cannot show a probability: some are timed without corrections, some with.
    without, corrected = (
        _time(override(config, {"strokes.correct_probability": each}), device)
        for each in (0.0, 1.0)
    )
    seconds = (1 - share) * without.seconds_per_step + share * corrected.seconds_per_step
    return replace(without, seconds_per_step=seconds)


def _time(config: FinetuneConfig | PretrainConfig, device: torch.device) -> Pace:
    from train.worker import assemble_finetune, assemble_pretrain

    # No epoch is validated before the timed steps are done, and no loader has to start.
    epochs, timed = config.train.epochs, NUM_TIMED + 2
    changes: dict[str, Any] = {"train.epochs": max(epochs, timed), "train.validate_every": timed}
    trial = override(config, changes | {"train.compile": False, "data.num_workers": 0})
    assemble = assemble_finetune if isinstance(config, FinetuneConfig) else assemble_pretrain
    job = assemble(to_dict(trial), device, resumed=False)
    steps = (event for event in job.events() if isinstance(event, StepDone))
    seconds: list[float] = []
    for _ in range(NUM_TIMED + 1):
        began = time.perf_counter()
        event = next(steps)
        # Reading the loss waits for the device.
        event.loss.item()
        seconds.append(time.perf_counter() - began - event.wait_seconds)
    return Pace(
        epochs=epochs,
        steps_per_epoch=job.plan.steps_per_epoch,
        seconds_per_step=statistics.fmean(seconds[1:]),
    )
