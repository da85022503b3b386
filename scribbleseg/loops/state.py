"""What a segmentation run remembers between steps, and how it goes in and out of a checkpoint."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scribbleseg import checkpoint as checkpoints
from scribbleseg.config import FinetuneConfig, OptimConfig
from scribbleseg.models import build_model
from scribbleseg.runs import find_checkpoint
from scribbleseg.schedules import ema_decay

# An epoch's line of metrics.jsonl.
Row = dict[str, float | int]


@dataclass(kw_only=True)
class TrainState:
    """Bare modules (never a DDP or compiled wrapper), optimiser and counters of one run."""

    model: nn.Module
    """The network that is trained."""
    ema: AveragedModel
    """Average of its weights and normalisation statistics; this is what is validated and shipped.
    """
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales fp16 losses; does nothing in other precisions."""
    loss_sum: Tensor
    """Sum of this rank's losses since the epoch began, on the device."""
    step: int = 0
    """Optimiser steps done."""
    samples_seen: int = 0
    """Training samples seen, over all ranks."""
    epoch_seconds: float = 0.0
    """Wall time spent in the present epoch before the last interruption."""
    history: list[Row] = field(default_factory=list)
    """One row of metrics per finished epoch."""

    def update_ema(self, decay: float) -> None:
        """Move the averaged weights towards the present ones; call once per optimiser step."""
        # The decay warms up with the step, so PyTorch's averaging function is made anew each time.
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(self.step, decay=decay))
        self.ema.update_parameters(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as tensors and plain types."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "epoch_seconds": self.epoch_seconds,
            "history": self.history,
        }

    def load_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `to_dict` returned."""
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.loss_sum.copy_(saved["loss_sum"])
        self.step = saved["step"]
        self.samples_seen = saved["samples_seen"]
        self.epoch_seconds = saved["epoch_seconds"]
        self.history = saved["history"]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) that decays kernels but not biases and normalisation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        fused=True,
    )


def init_state(
    config: FinetuneConfig, device: torch.device, precision: torch.dtype | None
) -> TrainState:
    """Return the state of a run before its first step; its weights follow from the seed alone.

    Raises:
        InputError: `config.init_from` names no checkpoint, or one of another network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
    if config.init_from is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = find_checkpoint(config.init_from, Path(scratch) / "start")
            checkpoints.transfer(model, checkpoints.read_model(folder).weights)
    model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return TrainState(
        model=model,
        ema=AveragedModel(model, use_buffers=True),
        optimizer=make_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        loss_sum=torch.zeros((), device=device),
    )
