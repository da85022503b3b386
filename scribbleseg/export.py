"""A network as one ONNX file, for programs without PyTorch.

Bytes go in and logits come out: `image` uint8 (b, 3, h, w), RGB; `strokes` uint8 (b, 2, h, w),
object and background as `scribbles.encode` makes them; `logits` float32 (b, 1, h, w), above 0 where
the network's probability is above `predict.threshold`. Batch, height and width are free; the latter
two are multiples of 32 (`predict.pad` says how to extend a picture). The settings that say at which
scales to look, how to encode strokes and which parts to drop (`predict.drop_parts`) stand in the
file's metadata under "scribbleseg": all of that is left to the program.
"""

import json
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from scribbleseg.checkpoint import without_places
from scribbleseg.config import to_dict
from scribbleseg.datasets.transforms import normalise
from scribbleseg.errors import InputError
from scribbleseg.predict import Predictor, log_odds

OPSET = 18
# Largest difference of logits that rounding explains; they are some units large.
TOLERANCE = 1e-3


class BytesToLogits(nn.Module):
    """A network with the steps before it that every user would have to repeat."""

    def __init__(self, model: nn.Module, threshold: float):
        super().__init__()
        self.model = model
        self.line = log_odds(threshold)

    def forward(
        self, image: UInt8[Tensor, "b 3 h w"], strokes: UInt8[Tensor, "b 2 h w"]
    ) -> Float32[Tensor, "b 1 h w"]:
        """Return logits of "object"."""
        return self.model(normalise(image), strokes.float() / 255).logits - self.line


def export_onnx(predictor: Predictor, out: Path) -> None:
    """Write the network to an ONNX file, and hold it against PyTorch at sizes it was not made at.

    Args:
        predictor: The network, on the CPU.
        out: The file; one that is there is replaced once the new one has been checked.

    Raises:
        InputError: The extra `onnx` is not installed, the network cannot be exported, or the file
            cannot be written.
    """
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        raise InputError("ONNX is not installed; install it: pip install '.[onnx]'")
    import onnx

    if out.suffix != ".onnx":
        raise InputError(f"{out}: expected a name that ends in .onnx, which a file of that name is")
    architecture = predictor.config.model.architecture
    if architecture == "vit_unet":
        raise InputError(
            "model.architecture is 'vit_unet': its positions are resampled to each picture in a "
            "way that ONNX does not know; expected one of the convolutional networks"
        )
    network = BytesToLogits(predictor.model, predictor.config.predict.threshold).eval()
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
            file = Path(scratch) / "model.onnx"
            _trace(network, file)
            model: Any = onnx.load(str(file))
            entry = model.metadata_props.add()
            settings = to_dict(without_places(predictor.config))
            entry.key, entry.value = "scribbleseg", json.dumps(settings)
            onnx.save(model, str(file))
            _check(network, file)
            os.replace(file, out)
    except OSError as error:
        raise InputError(
            f"{out}: {(error.strerror or str(error)).lower()}; expected a file that can be written"
        ) from None


def _trace(network: nn.Module, file: Path) -> None:
    """Write the network as it computes on one batch, its sizes left free."""
    free = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        # It warns that it is not the newest exporter (which needs many minutes where height and
        # width are free) and that shapes may have been fixed (they were not: see `_check`).
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                network,
                _inputs(2, 160, 192),
                str(file),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image", "strokes"],
                output_names=["logits"],
                dynamic_axes={"image": free, "strokes": free, "logits": free},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the network cannot be written as ONNX ({reason}); choose another model.encoder"
            ) from None


def _check(network: nn.Module, file: Path) -> None:
    """Raise an `InputError` unless the file gives the network's logits, at other sizes too."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in ((1, 96, 64), (2, 160, 192)):
        image, strokes = _inputs(*size)
        with torch.inference_mode():
            expected = network(image, strokes).numpy()
        (found,) = session.run(None, {"image": image.numpy(), "strokes": strokes.numpy()})
        off = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
        if not off <= TOLERANCE:
            raise InputError(
                f"the exported network differs from PyTorch's by {off:.2g} at {size[1]}x{size[2]}; "
                "nothing was written; please report it with your model settings"
            )


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return random bytes of the right shapes."""
    draws = np.random.default_rng(0)
    image = draws.integers(0, 256, (batch, 3, height, width), dtype=np.uint8)
    strokes = 255 * (draws.random((batch, 2, height, width)) > 0.98).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(strokes)
