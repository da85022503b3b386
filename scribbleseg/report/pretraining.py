"""What the page says of a pretraining run alone, above all what its encoder saw, epoch by epoch.

A picture of that is drawn while the encoder learns, and some are put in line afterwards. It has one
row per scene: the image on the left, what the encoder makes of it on the right. Cells are alike, so
that the pictures of several epochs stand beside one another row by row.
"""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import nn

from scribbleseg.config import ProbeConfig, flatten
from scribbleseg.datasets.scenes import Scene
from scribbleseg.loops.pretrain import SHARE_BEFORE_ALARM, collapse
from scribbleseg.models.vit import VitEncoder
from scribbleseg.probe import attention_picture, choose_evenly, feature_picture
from scribbleseg.report.gallery import Panel, Rgb, to_data_uri, to_jpeg
from scribbleseg.report.records import Record
from scribbleseg.report.tables import last
from scribbleseg.runs import RunFolder

NUM_SCENES = 4
"""Scenes that are drawn of those the probe scores."""
NUM_SHOWN = 6
"""Epochs that the page shows at most."""
CELL = (162, 216)
"""Height and width of each picture's place, in pixels."""
GAP = 6
WHITE, WASH = 255, 246

FOLDER = "pictures"
_PICTURE_NAME = re.compile(r"features_(\d{4,9})\.jpg")

FEATURES = (
    "On the left the probe's images, then what the encoder makes of them: the three directions in "
    "which its features vary most, as red, green and blue. Places of like colour look alike to it; "
    "which colour they get is another matter in every picture."
)
ATTENTION = (
    "On the left the probe's images, then where the transformer's CLS token looks in its last "
    "block, on average over the heads: the brighter, the more."
)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """What there is to say of a pretraining run and of no other."""

    num_prototypes: int | None
    """Of its head; None where the run does not say."""
    headline: list[tuple[str, str]]
    """Its figures and what they are, the most important one first."""
    warning: str
    """How it collapsed, if it did."""
    panels: list[Panel]
    """What its encoder saw: the images first, then one picture per epoch; empty without any."""
    explanation: str
    """What the pictures show."""


def picture_name(epoch: int) -> str:
    """Return the file of an epoch's picture, relative to the run's folder."""
    return f"{FOLDER}/features_{epoch:04d}.jpg"


def draw_picture(
    encoder: nn.Module, scenes: Iterable[Scene], config: ProbeConfig, device: torch.device | str
) -> bytes:
    """Return an epoch's picture as a JPEG: a transformer's attention, or another one's features.

    Args:
        encoder: Is being pretrained; see `probe`.
        scenes: One row each, at least one.
        config: Gives the scale.
        device: Where the encoder is.
    """
    rows: list[Rgb] = []
    for scene in scenes:
        if isinstance(encoder, VitEncoder):
            seen = attention_picture(encoder, scene, config, device)
        else:
            seen = feature_picture(encoder, scene, config, device)
        gap = np.full((CELL[0], GAP, 3), WHITE, np.uint8)
        rows += [np.hstack([_cell(scene.image), gap, _cell(seen)])]
        rows += [np.full((GAP, rows[-1].shape[1], 3), WHITE, np.uint8)]
    return to_jpeg(np.vstack(rows[:-1]))


def look_back(record: Record) -> Pretraining:
    """Return what a pretraining run's folder says beyond what every run's says."""
    num_prototypes = flatten(record.info.get("resolved", {})).get("dino.out_dim")
    is_transformer = record.settings.get("model.architecture") == "vit_unet"
    return Pretraining(
        num_prototypes=num_prototypes,
        headline=_headline(record, num_prototypes),
        warning=_warning(record, num_prototypes),
        panels=_read_panels(record),
        explanation=ATTENTION if is_transformer else FEATURES,
    )


def _headline(record: Record, num_prototypes: int | None) -> list[tuple[str, str]]:
    """Return the last epoch's figures, and what to hold them against."""
    probed = [row for row in record.history if isinstance(row.get("probe_miou"), float)]
    figures: list[tuple[str, str]] = []
    if probed:
        label = f"probe mIoU after epoch {probed[-1]['epoch']}"
        if len(probed) > 1:
            label += f"; {probed[0]['probe_miou']:.3f} after epoch {probed[0]['epoch']}"
        figures.append((f"{probed[-1]['probe_miou']:.3f}", label))
    loss, spread = (last(record.history, key) for key in ("loss", "deviation"))
    if loss is not None:
        label = "loss"
        if num_prototypes is not None:
            nothing = math.log(num_prototypes)
            label += f"; nothing is learned at ln({num_prototypes}) = {nothing:.2f}"
        figures.append((f"{loss:.2f}", label))
    if spread is not None:
        figures.append((f"{spread:.2f}", "spread of features; 0 is a collapse"))
    return figures


def _warning(record: Record, num_prototypes: int | None) -> str:
    """Return what the last epoch says of a collapse, as the training said on the screen."""
    row = record.history[-1] if record.history else {}
    too_early = row.get("epoch", 0) < SHARE_BEFORE_ALARM * record.settings.get("train.epochs", 0)
    if num_prototypes is None or too_early or not {"loss", "entropy", "deviation"} <= row.keys():
        return ""
    found = collapse(row, num_prototypes)
    return f"After epoch {row['epoch']}, {found}." if found else ""


def _read_panels(record: Record) -> list[Panel]:
    """Read the pictures of at most `NUM_SHOWN` epochs; what cannot be read is left out."""
    run = RunFolder.open(record.uri)
    matches = [_PICTURE_NAME.fullmatch(name) for name in run.list_files(FOLDER)]
    epochs = sorted(int(match[1]) for match in matches if match)
    scores = {row["epoch"]: row.get("probe_miou") for row in record.history}
    panels: list[Panel] = []
    for epoch in choose_evenly(epochs, NUM_SHOWN):
        picture = _decode(run.read_file(picture_name(epoch)))
        if picture is None:
            continue
        half = (picture.shape[1] - GAP) // 2
        images, seen = picture[:, :half], picture[:, -half:]
        if not panels:
            panels.append(Panel(title="image", uri=to_data_uri(images, max(images.shape))))
        score = scores.get(epoch)
        title = f"epoch {epoch}" + (f" · {score:.3f}" if isinstance(score, float) else "")
        panels.append(Panel(title=title, uri=to_data_uri(seen, max(seen.shape))))
    return panels


def _cell(picture: Rgb) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Fit a picture into the middle of its place."""
    scale = min(place / size for place, size in zip(CELL, picture.shape[:2], strict=True))
    height, width = (max(1, round(size * scale)) for size in picture.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    cell = np.full((*CELL, 3), WASH, np.uint8)
    top, left = (CELL[0] - height) // 2, (CELL[1] - width) // 2
    cell[top : top + height, left : left + width] = cv2.resize(
        picture, (width, height), interpolation=how
    )
    return cell


def _decode(content: bytes | None) -> Rgb | None:
    """Return a picture's pixels; None where there is none, or none that can be read."""
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
