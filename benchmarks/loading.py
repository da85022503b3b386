"""The loader alone: ours, and a data set class as tutorials write it.

Both give the same thing: images, strokes and masks, cropped, flipped and recoloured by the same
albumentations at the same strength, in batches, with the same number of workers. The tutorial's
decodes JPEG and PNG for every sample, augments at the image's own size, then resizes; ours reads
decoded pixels from a memory map, crops first, and keeps bytes until the device. Recipe `cpu` also
simulates strokes for half the samples, which no tutorial does: a line of its own:

    python -m benchmarks.loading --root DATA
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Measured, tell, to_markdown
from scribbleseg.cli import exit_status
from scribbleseg.config import override, parse_arguments
from scribbleseg.datasets.scenes import ScenePaths, list_scenes
from scribbleseg.datasets.workers import worker_init
from scribbleseg.loops.batches import open_data
from train.recipes import cpu

OURS, SIMULATING, TUTORIAL = "ours", "ours, half the strokes simulated", "tutorial's data set"


@dataclass(frozen=True, kw_only=True)
class LoadingBench:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    workers: int = 1
    """Loader processes."""
    epochs: int = 3
    """Epochs of each that count, every one of a loader that is opened for it."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""


class TutorialData(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """What a tutorial on binary segmentation writes."""

    def __init__(self, scenes: list[ScenePaths], side: int):
        import albumentations

        self.scenes = scenes
        self.transform: Any = albumentations.Compose(
            [
                albumentations.ColorJitter(0.2, 0.2, 0.2, 0.05, p=0.4),
                albumentations.ToGray(p=0.05),
                albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 0.8), p=0.1),
                albumentations.Sharpen(alpha=(0.0, 0.2), lightness=(1.0, 1.0), p=0.05),
                albumentations.GaussNoise(std_range=(0.0, 0.025), p=0.1),
                albumentations.CoarseDropout(num_holes_range=(1, 3), p=0.1),
                albumentations.HorizontalFlip(p=0.5),
                albumentations.RandomResizedCrop((side, side), scale=(0.5, 1.0), p=1.0),
                albumentations.Normalize(),
            ]
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (3, s, s), strokes (2, s, s) and mask (1, s, s), all float32."""
        paths = self.scenes[index]
        image = np.array(Image.open(paths.image).convert("RGB"))
        strokes = np.array(Image.open(paths.scribbles).convert("L"))
        assert paths.ground_truth is not None
        mask = np.array(Image.open(paths.ground_truth))
        changed = self.transform(image=image, masks=[strokes, mask])
        drawn, truth = changed["masks"]
        channels = np.stack([drawn == 1, drawn == 0]).astype(np.float32)
        return (
            torch.from_numpy(changed["image"].transpose(2, 0, 1).copy()),
            torch.from_numpy(channels),
            torch.from_numpy(truth[None].astype(np.float32)),
        )


def tutorial_batches(bench: LoadingBench, side: int, batch_size: int, count: int) -> Iterator[Any]:
    """Yield batches for ever, of as many images as ours has."""
    scenes = list_scenes(bench.root, "train", need_masks=True)[:count]
    loader = DataLoader(
        TutorialData(scenes, side),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=bench.workers,
        multiprocessing_context="forkserver" if bench.workers else None,
        persistent_workers=bench.workers > 0,
        worker_init_fn=worker_init,
    )
    while True:
        yield from loader


def epoch_seconds(batches: Iterator[Any], steps: int) -> float:
    """Return how long a loader that has just been opened takes for its second epoch.

    The first starts its workers, and takes what they had loaded before anybody waited for it.
    """
    for _ in range(steps):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    bench: LoadingBench = parse_arguments(
        LoadingBench, sys.argv[1:], prog="python -m benchmarks.loading"
    )
    config = override(cpu(), {"data.root": bench.root, "data.num_workers": bench.workers})
    config = replace(config, train=replace(config.train, epochs=10_000))
    simulating = open_data(config)
    plain = override(config, {"strokes.simulate_probability": 0})
    steps = simulating.plan(config).steps_per_epoch
    batch_size = config.train.batch_size
    count = len(simulating.samples)
    kinds: dict[str, Callable[[], Iterator[Any]]] = {
        OURS: lambda: iter(open_data(plain).loader(plain, 0, torch.device("cpu"))),
        SIMULATING: lambda: iter(simulating.loader(config, 0, torch.device("cpu"))),
        TUTORIAL: lambda: tutorial_batches(bench, config.data.crop_size, batch_size, count),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(bench.epochs):
        # One loader at a time: another would load ahead meanwhile.
        for name, opened in kinds.items():
            times[name].append(epoch_seconds(opened(), steps))
    items = steps * batch_size
    lines = [Measured(name=name, seconds=tuple(times[name]), items=items) for name in kinds]
    title = f"loader, {bench.workers} worker(s), recipe cpu"
    tell(to_markdown(title, lines, "images"), lines, bench.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
