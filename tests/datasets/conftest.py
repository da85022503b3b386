"""A tiny folder that keeps the data contract."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

STEMS = ("a", "b", "c")


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """ROOT/train with three samples of 12 x 8 pixels, images as PNG, written with Pillow alone."""
    root = tmp_path / "tiny"
    for folder in ("images", "scribbles", "ground_truth"):
        (root / "train" / folder).mkdir(parents=True)
    for number, stem in enumerate(STEMS):
        image = np.random.default_rng(number).integers(0, 256, (8, 12, 3), np.uint8)
        mask = np.zeros((8, 12), np.uint8)
        mask[2:6, 3:9] = 1
        scribbles = np.full((8, 12), 255, np.uint8)
        scribbles[4, 4:8] = 1
        scribbles[0, 1:11] = 0
        Image.fromarray(image).save(root / "train" / "images" / f"{stem}.png")
        Image.fromarray(scribbles).save(root / "train" / "scribbles" / f"{stem}.png")
        Image.fromarray(mask).save(root / "train" / "ground_truth" / f"{stem}.png")
    return root
