"""The networks. A new one is one file here and one line in `build_model`."""

from typing import assert_never

from scribbleseg.config import ModelConfig
from scribbleseg.models.attention_unet import AttentionResUNet
from scribbleseg.models.unet import Output as Output
from scribbleseg.models.unet import ResUNet, UNet

SegmentationModel = UNet | ResUNet | AttentionResUNet


def build_model(config: ModelConfig) -> SegmentationModel:
    """Return a freshly initialised network for `config`; it draws from torch's global generator."""
    match config.architecture:
        case "unet":
            return UNet(config)
        case "resunet":
            return ResUNet(config)
        case "attention_resunet":
            return AttentionResUNet(config)
        case _:
            assert_never(config.architecture)
