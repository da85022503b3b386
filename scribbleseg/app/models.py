"""Checkpoints as the page uses them: a quick look for every stroke, a careful one to keep."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from torch import nn

from scribbleseg.config import FinetuneConfig
from scribbleseg.device import autocast_dtype
from scribbleseg.manifest import RELEASED
from scribbleseg.predict import Predictor, load, predict_logits
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, UNLABELLED


@runtime_checkable
class Looks(Protocol):
    """What looks at a photograph and its strokes."""

    def probabilities(
        self, image: UInt8[np.ndarray, "h w 3"], strokes: UInt8[np.ndarray, "h w"]
    ) -> Float32[np.ndarray, "h w"]:
        """Return the probability of "object", in [0, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained network, looked through in two ways."""

    name: str
    """What the page calls it: the checkpoint as it was named."""
    quick: Looks
    """One look at the picture: what follows every stroke."""
    careful: Looks
    """As the checkpoint's own settings say: what is saved once a mask is accepted."""
    config: FinetuneConfig | None
    """Its settings; None where they are on another machine."""


def load_model(checkpoint: str) -> Model:
    """Load a checkpoint.

    Raises:
        InputError: it cannot be used.
    """
    careful = load(checkpoint)
    return Model(
        name=checkpoint, quick=QuickLook(predictor=careful), careful=careful, config=careful.config
    )


@dataclass(frozen=True, kw_only=True)
class QuickLook:
    """One look at a picture, in half precision where the processor multiplies it itself."""

    predictor: Predictor
    """The network."""

    def probabilities(
        self, image: UInt8[np.ndarray, "h w 3"], strokes: UInt8[np.ndarray, "h w"]
    ) -> Float32[np.ndarray, "h w"]:
        """Return the probability of "object", in [0, 1]."""
        config, device = self.predictor.config, self.predictor.device
        once = replace(config.predict, flip=False, scales=(1.0,), edges=False)
        logits = predict_logits(
            self.predictor.model,
            image,
            strokes,
            config=replace(config, predict=once),
            device=device,
            precision=autocast_dtype("auto", device),
        )
        return logits.sigmoid().cpu().numpy()


def interruptible(looks: Looks, check: Callable[[], None]) -> Looks:
    """Return a predictor that calls `check` before each of its looks, which may raise."""
    if not isinstance(looks, Predictor):
        return looks
    return replace(looks, model=_Checked(looks.model, check).eval())


class _Checked(nn.Module):
    """Calls a function before each pass."""

    def __init__(self, model: nn.Module, check: Callable[[], None]):
        super().__init__()
        self.model = model
        self.check = check

    def forward(self, *given: Any) -> Any:
        self.check()
        return self.model(*given)


def list_released() -> list[str]:
    """Return the checkpoints that come with the package."""
    return sorted(f"released:{path.name}" for path in RELEASED.iterdir() if path.is_dir())


def to_grey(
    probabilities: Float32[np.ndarray, "h w"], strokes: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w"]:
    """Return 255 x the probabilities, with those under a stroke made certain.

    128 and more is what `to_mask` calls object.
    """
    # The object is what lies above one half; 127.5 itself is background.
    grey = np.ceil(probabilities * 255 - 0.5).clip(0, 255).astype(np.uint8)
    grey[strokes == OBJECT] = 255
    grey[strokes == BACKGROUND] = 0
    return grey


def to_mask(grey: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Return 1 for object and 0 for background from what `to_grey` gave."""
    return (grey > 127).astype(np.uint8)


def mean_entropy(looks: Looks, image: UInt8[np.ndarray, "h w 3"]) -> float:
    """Return how unsure a network is of a picture without strokes: mean entropy, in bits."""
    blank = np.full(image.shape[:2], UNLABELLED, np.uint8)
    p = looks.probabilities(image, blank).clip(1e-6, 1 - 1e-6)
    return float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean())
