"""The networks. A new one is one file here and one line in `build_model`."""

from typing import assert_never

from scribbleseg.config import ModelConfig
from scribbleseg.models.attention_unet import AttentionResUNet
from scribbleseg.models.blocks import ConvBlock, ResidualBlock
from scribbleseg.models.unet import Output as Output
from scribbleseg.models.unet import UNet

SegmentationModel = UNet | AttentionResUNet


def build_model(config: ModelConfig) -> SegmentationModel:
    """Return a freshly initialised network for `config`; it draws from torch's global generator."""
    match config.architecture:
        case "unet":
            return UNet(config, ConvBlock)
        case "resunet":
            return UNet(config, ResidualBlock)
        case "attention_resunet":
            return AttentionResUNet(config)
        case _:
            assert_never(config.architecture)
