"""What makes a scene doubtful: it can be used, but is likely not what its maker meant.

`check` lists such scenes one by one. Whoever predicts, trains or scores goes on, and tells of them
once for each reason.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from scribbleseg.datasets.files import File, is_turned_file
from scribbleseg.datasets.scenes import BACKGROUND, OBJECT, UNLABELLED, Scene

# What is told of files for which it holds; {} is their number.
COVERED = (
    "strokes cover more than half of the photograph, as in {} file(s); unlabelled is 255, "
    "background strokes are 0: `scribbleseg data convert --strokes` recodes them"
)
TURNED = (
    "viewers turn this photograph (EXIF), as they do {} file(s); strokes and masks are taken to "
    "lie as its pixels are stored: store photographs upright before strokes are drawn"
)
CONTRADICTED = (
    "more than a tenth of the strokes contradicts the mask, as in {} file(s): background is called "
    "object, or the object background; `scribbleseg data check` lists them: mend strokes or masks"
)
# Hands slip over an object's edge: up to this share of a scene's strokes it is no mistake.
SLIPS = 0.1


class Doubt(NamedTuple):
    """One reason to doubt a scene."""

    file: str
    """The file that is to blame."""
    reason: str
    """`COVERED`, `TURNED` or `CONTRADICTED`."""


def find_doubts(scene: Scene, image: File, scribbles: File) -> list[Doubt]:
    """Return all that makes a scene doubtful; it was read from these files."""
    found: list[Doubt] = []
    if is_covered(scene.scribbles):
        found.append(Doubt(str(scribbles), COVERED))
    if is_turned_file(image):
        found.append(Doubt(str(image), TURNED))
    if num_contradicting(scene) > SLIPS * np.count_nonzero(scene.scribbles != UNLABELLED):
        found.append(Doubt(str(scribbles), CONTRADICTED))
    return found


def is_covered(scribbles: UInt8[np.ndarray, "h w"]) -> bool:
    """Return whether strokes cover more than half of a photograph, as nobody's do."""
    return bool(np.count_nonzero(scribbles != UNLABELLED) > scribbles.size / 2)


def num_contradicting(scene: Scene) -> int:
    """Return the number of stroke pixels that the mask calls otherwise; 0 without a mask."""
    if scene.mask is None:
        return 0
    strokes, mask = scene.scribbles, scene.mask
    wrong = ((strokes == OBJECT) & (mask == BACKGROUND)) | (
        (strokes == BACKGROUND) & (mask == OBJECT)
    )
    return int(np.count_nonzero(wrong))


def describe_doubts(doubts: Iterable[Doubt]) -> list[str]:
    """Return a line for each reason: the first file, and how many there are."""
    files: dict[str, list[str]] = {COVERED: [], TURNED: [], CONTRADICTED: []}
    # Each once, though a scene may be trained on and validated on.
    for file, reason in dict.fromkeys(doubts):
        files[reason].append(file)
    return [f"{those[0]}: {reason.format(len(those))}" for reason, those in files.items() if those]
