"""How long a run will take here, by a few of its own steps."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

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
    from train.worker import assemble_finetune, assemble_pretrain

    device = pick_device(gpus=resources.gpus > 0)
    if device.type == "cpu":
        prepare_cpu(resources.cpus)
    # No epoch is validated before the timed steps are done, and no loader has to start.
    epochs, timed = config.train.epochs, NUM_TIMED + 2
    changes: dict[str, Any] = {"train.epochs": max(epochs, timed), "train.validate_every": timed}
    if isinstance(config, FinetuneConfig) and config.strokes.correct_probability > 0:
        # Two steps cannot show a probability: all of them count as corrected.
        changes["strokes.correct_probability"] = 1.0
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
