"""What a segmentation run remembers between steps, and how it goes in and out of a checkpoint."""

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scribbleseg import checkpoint as checkpoints
from scribbleseg.config import FinetuneConfig, OptimConfig, to_dict
from scribbleseg.errors import InputError
from scribbleseg.loops.steps import Progress
from scribbleseg.models import SegmentationModel, build_model, encoder_settings
from scribbleseg.models.pretrained import PretrainedEncoder
from scribbleseg.runs import find_checkpoint
from scribbleseg.schedules import ema_decay


@dataclass(kw_only=True)
class TrainState:
    """Bare modules (never a DDP or compiled wrapper), optimiser and counters of one run."""

    model: SegmentationModel
    """The network that is trained."""
    ema: SegmentationModel
    """Average of its weights and normalisation statistics; this is what is validated and shipped.
    """
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales fp16 losses; does nothing in other precisions."""
    progress: Progress = field(default_factory=Progress)
    """How far the run is."""

    def update_ema(self, decay: float) -> None:
        """Move the averaged weights towards the present ones; call once per optimiser step."""
        # PyTorch's AveragedModel asks the device in every step whether it is the first.
        average = get_ema_multi_avg_fn(ema_decay(self.progress.step, decay=decay))
        average(_averaged(self.ema), _averaged(self.model), 0)

    def weights(self) -> dict[str, Tensor]:
        """Return what prediction uses: the state of the averaged network."""
        return self.ema.state_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as tensors and plain types."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.to_dict(),
        }

    def load_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `to_dict` returned."""
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        device = next(self.model.parameters()).device
        self.progress.load_dict(saved["progress"], device)


def _averaged(model: nn.Module) -> tuple[Tensor, ...]:
    """Return the weights and statistics; counters of batches seen are no use to anybody."""
    buffers = (buffer for buffer in model.buffers() if buffer.is_floating_point())
    return (*model.parameters(), *buffers)


def make_optimizer(model: SegmentationModel, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) that spares biases and normalisation from decay.

    Each group carries a "scale", by which its learning rate is multiplied: the encoder has its own.
    """
    encoder = list(model.encoder.parameters())
    known = set(encoder)
    others = [parameter for parameter in model.parameters() if parameter not in known]
    groups = [
        *decay_groups(encoder, config.weight_decay, scale=config.encoder_scale),
        *decay_groups(others, config.weight_decay, scale=1.0),
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def decay_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, *, scale: float
) -> list[dict[str, Any]]:
    """Return two groups for an optimiser: vectors do not decay, all else does.

    That is kernels, and the few other tensors of more dimensions: a ViT's positions and class
    token, and the scales of stroke matching.
    """
    kept = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in kept if p.ndim > 1], "weight_decay": weight_decay, "scale": scale},
        {"params": [p for p in kept if p.ndim <= 1], "weight_decay": 0.0, "scale": scale},
    ]


def hand_over(model: SegmentationModel, config: FinetuneConfig, folder: Path) -> None:
    """Load what a run starts from: all of a segmentation network, or a pretrained encoder.

    Of a pretrained encoder every tensor is accounted for, the statistics of its normalisation
    among them; the strokes' side path, the decoder and the head stay as they are.

    Raises:
        InputError: a checkpoint that is damaged, holds NaN or infinity, or is of another network.
    """
    found = checkpoints.read_model(folder)
    broken = checkpoints.list_broken(found.weights)
    if broken:
        raise InputError(
            f"init_from is {config.init_from}: found NaN or infinity in {broken}, which training "
            "would spread; choose another checkpoint, or pull this one again from its run"
        )
    if isinstance(found.config, FinetuneConfig):
        try:
            checkpoints.transfer(model, found.weights)
        except InputError:
            theirs, ours = to_dict(found.config.model), to_dict(config.model)
            differing = [key for key in ours if theirs[key] != ours[key]]
            if not differing:
                raise
            raise InputError(
                f"init_from is {config.init_from}: found a network of "
                f"{_shown({f'model.{key}': theirs[key] for key in differing})}, expected "
                f"{_shown({f'model.{key}': ours[key] for key in differing})}; change them to fit "
                f"it, or take all of its settings: python -m train.finetune {config.init_from}"
            ) from None
        return
    wanted, given = encoder_settings(config.model), encoder_settings(found.config.model)
    if wanted != given:
        raise InputError(
            f"init_from is {config.init_from}: found an encoder pretrained as {_shown(given)}, "
            f"expected {_shown(wanted)}; change the settings of model to fit it, or pretrain this "
            "network"
        )
    checkpoints.transfer(model.encoder, found.weights)


def _shown(settings: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def init_state(
    config: FinetuneConfig,
    device: torch.device,
    precision: torch.dtype | None,
    *,
    resumed: bool = False,
) -> TrainState:
    """Return the state of a run before its first step; its weights follow from the seed alone.

    Args:
        config: Settings.
        device: Where the model will be.
        precision: Autocast dtype; None computes in float32.
        resumed: All weights will come from the run's own checkpoint: what it once started from is
            not looked for, and may be gone by now.

    Raises:
        InputError: `config.init_from` names no checkpoint, or one of another network; or the
            weights of a pretrained encoder are not to be had.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
    if resumed:
        pass
    elif config.init_from is not None:
        with tempfile.TemporaryDirectory() as scratch:
            hand_over(model, config, find_checkpoint(config.init_from, Path(scratch) / "start"))
    elif isinstance(model.encoder, PretrainedEncoder):
        model.encoder.load_imagenet()
    model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return TrainState(
        model=model,
        ema=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=make_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )
