"""Recipes: named settings of a whole run; a new one changes a few lines of another.

A recipe belongs to a machine and a purpose, so it lives beside the library and not in it.
"""

from collections.abc import Callable
from dataclasses import replace

from scribbleseg.config import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    StrokesConfig,
    TrainConfig,
)


def demo() -> FinetuneConfig:
    """The demo data in about two minutes on 2 cores: a small UNet at 160 pixels."""
    return FinetuneConfig(
        data=DataConfig(long_side=160, crop_size=160),
        augment=AugmentConfig(strength=0.5),
        model=ModelConfig(depth=5),
        optim=OptimConfig(learning_rate=3e-3, ema_decay=0.98),
        train=TrainConfig(epochs=60, validate_every=5),
    )


def cpu() -> FinetuneConfig:
    """The benchmark on 2 cores within the hour; see the README for what it reaches."""
    return FinetuneConfig(
        data=DataConfig(long_side=256, crop_size=224),
        augment=AugmentConfig(strength=0.5),
        optim=OptimConfig(learning_rate=2e-3, ema_decay=0.995),
        train=TrainConfig(epochs=120, batch_size=8, validate_every=4),
    )


def report() -> FinetuneConfig:
    """The 2025 report's setting: AdamW, strong augmentation, 1,000 epochs at full size.

    The report reached 0.679 / 0.623 / 0.659 mIoU (UNet / ResUNet / Attention-ResUNet).
    """
    return FinetuneConfig(
        data=DataConfig(long_side=512, crop_size=384, num_workers=4),
        augment=AugmentConfig(strength=1.0),
        model=ModelConfig(width=32),
        loss=LossConfig(dice=1.0, bce=1.0),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.999),
        train=TrainConfig(epochs=1000, batch_size=16, validate_every=10),
    )


def gpu() -> FinetuneConfig:
    """One or more GPUs: the report's size, wider, with a schedule of 300 epochs."""
    base = report()
    return replace(
        base,
        strokes=StrokesConfig(encoding="disc", radius=5),
        model=ModelConfig(width=48),
        train=replace(base.train, epochs=300, validate_every=5, compile=True),
    )


RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "demo": demo,
    "cpu": cpu,
    "report": report,
    "gpu": gpu,
}
