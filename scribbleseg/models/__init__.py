"""The networks. A new one is one file here and one line in `build_model`."""

from typing import assert_never

from torch import nn

from scribbleseg.config import ModelConfig
from scribbleseg.models.attention_unet import AttentionResUNet, GuidedDecoder
from scribbleseg.models.blocks import ConvBlock, ResidualBlock
from scribbleseg.models.encoder import Encoder
from scribbleseg.models.pretrained import PretrainedUNet
from scribbleseg.models.unet import Decoder, UNet
from scribbleseg.models.unet import Output as Output
from scribbleseg.models.vit import VitUNet

SegmentationModel = UNet | AttentionResUNet | VitUNet | PretrainedUNet

RECOMPUTED_LEVELS = 4
"""Levels whose activations can be made again: those at strides 1 to 8 take nearly all the memory,
while every level takes about as much time as another."""


def build_model(config: ModelConfig) -> SegmentationModel:
    """Return a freshly initialised network for `config`; it draws from torch's global generator."""
    network = UNet if config.encoder == "own" else PretrainedUNet
    match config.architecture:
        case "unet":
            return network(config, ConvBlock)
        case "resunet":
            return network(config, ResidualBlock)
        case "attention_resunet":
            return AttentionResUNet(config)
        case "vit_unet":
            return VitUNet(config)
        case _:
            assert_never(config.architecture)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Choose whether encoder and decoder make activations again in the backward pass.

    Transformers and encoders of timm keep theirs.
    """
    for module in model.modules():
        if isinstance(module, (Encoder, Decoder, GuidedDecoder)):
            module.recomputed = RECOMPUTED_LEVELS if recompute else 0


def encoder_settings(config: ModelConfig) -> dict[str, object]:
    """Return what decides an encoder's tensors: two networks whose settings agree can share one.

    Attention-ResUNet differs from ResUNet in its decoder alone, so its encoder counts as ResUNet's.
    """
    if config.encoder != "own":
        return {"encoder": config.encoder}
    match config.architecture:
        case "unet":
            family = "unet"
        case "resunet" | "attention_resunet":
            family = "resunet"
        case "vit_unet":
            return {"encoder": "vit", "vit": config.vit, "patch_size": config.patch_size}
        case _:
            assert_never(config.architecture)
    return {"encoder": family, "width": config.width, "depth": config.depth, "norm": config.norm}
