"""Which samples a run trains and validates on, in which order, and each rank's share of them."""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from scribbleseg.config import FinetuneConfig, TrainConfig, require_shares
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.datasets.remote import outside
from scribbleseg.datasets.scenes import ScenePaths, choose_stems, list_scenes
from scribbleseg.datasets.transforms import TrainSamples
from scribbleseg.datasets.workers import prepare_workers, worker_init
from scribbleseg.distributed import rank, world_size
from scribbleseg.errors import InputError

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchPlan(Sampler[list[tuple[int, int]]]):
    """Every remaining batch of a run, for one rank, as lists of (epoch, sample).

    The samples of a global batch are dealt to the ranks in turn, so that any number of workers
    sees the same global batches; some ranks may get one more than others. The last samples of a
    shuffled epoch that do not fill a batch are left out of that epoch.
    """

    num_samples: int
    batch_size: int
    """Images per step over all ranks."""
    epochs: int
    seed: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    num_parts: int = 1
    """Parts that each rank cuts its share into, one after the other (gradient accumulation)."""

    def __post_init__(self) -> None:
        """Check that batches can be filled and dealt."""
        if self.num_samples < self.batch_size:
            raise InputError(
                f"train.batch_size is {self.batch_size}; expected at most {self.num_samples}, "
                f"the number of training samples: give --train.batch-size {self.num_samples}"
            )
        require_shares(self.batch_size, self.world_size, self.num_parts)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return self.num_samples // self.batch_size

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run, from its beginning."""
        return self.steps_per_epoch * self.epochs

    def __len__(self) -> int:
        """Return the number of batches that remain."""
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's share of each remaining global batch."""
        first, position = divmod(self.start_step, self.steps_per_epoch)
        for epoch in range(first, self.epochs):
            order = sample_order(self.num_samples, self.seed, epoch)
            while position < self.steps_per_epoch:
                batch = order[position * self.batch_size : (position + 1) * self.batch_size]
                yield [(epoch, int(sample)) for sample in batch[self.rank :: self.world_size]]
                position += 1
            position = 0


def make_plan(num_samples: int, config: TrainConfig, start_step: int = 0) -> BatchPlan:
    """Return this rank's batches from `start_step` on."""
    return BatchPlan(
        num_samples=num_samples,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        start_step=start_step,
        rank=rank(),
        world_size=world_size(),
        num_parts=config.accumulate,
    )


@dataclass(frozen=True)
class Part:
    """Part of one rank's share of a global batch."""

    batch: Batch
    weight: float
    """What its mean loss counts, so that the mean over ranks of the sum over parts is the mean over
    the samples of the global batch, whatever share each rank has.
    """
    is_last: bool
    """Whether the optimiser's step comes next."""


def cut(batch: Batch, config: TrainConfig) -> Iterator[Part]:
    """Yield the parts of this rank's share of a batch, as equal as they can be made."""
    size, num_parts = len(batch["stem"]), config.accumulate
    for index in range(num_parts):
        begin, end = size * index // num_parts, size * (index + 1) // num_parts
        yield Part(
            batch={key: values[begin:end] for key, values in batch.items()},
            weight=(end - begin) * world_size() / config.batch_size,
            is_last=index == num_parts - 1,
        )


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the samples that `epoch` (from 0) goes through."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The samples of one run on this rank: training samples, and scenes to validate on."""

    samples: TrainSamples
    """Augmented training samples, keyed by (epoch, sample)."""
    validation: tuple[int, ...]
    """Positions in `cache` of this rank's share of the validation scenes."""
    cache: SceneCache
    """Decoded scenes, training and validation."""
    num_validation: int
    """Validation scenes over all ranks; 0: the run does not validate."""
    warnings: tuple[str, ...]
    """What a person should know of the samples, one line each."""

    def plan(self, config: FinetuneConfig, start_step: int = 0) -> BatchPlan:
        """Return this rank's batches from `start_step` on."""
        return make_plan(len(self.samples), config.train, start_step)

    def loader(
        self, config: FinetuneConfig, start_step: int, device: torch.device
    ) -> DataLoader[Any]:
        """Return a loader of all remaining batches."""
        return make_loader(
            self.samples, self.plan(config, start_step), config.data.num_workers, device
        )


def make_loader(
    samples: Dataset[dict[str, Any]],
    plan: BatchPlan,
    num_workers: int | None,
    device: torch.device,
) -> DataLoader[Any]:
    """Return one loader for all remaining epochs, so that workers never stop in between.

    Args:
        samples: What is loaded.
        plan: In which order.
        num_workers: Processes that load; None: see `DataConfig.num_workers`.
        device: Where batches will go.
    """
    if num_workers is None:
        # A loader would take its time from the only core, and seconds of it to start.
        num_workers = 0 if device.type == "cpu" and torch.get_num_threads() == 1 else 1
    # Listing the data made objects for every file. Python keeps spare ones of those that are gone
    # until it collects, and with them all the memory around them. Half a million objects of
    # imported modules stay, and need not be searched while training goes on; what an earlier run
    # of this process left among them is searched now.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if num_workers:
        prepare_workers(type(samples).__module__)
    return DataLoader(
        samples,
        batch_sampler=plan,
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=worker_init,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )


def open_data(config: FinetuneConfig) -> RunData:
    """Read, check and cache the samples that `config` names.

    Raises:
        InputError: whatever is wrong with them, with the file and the remedy.
    """
    data = config.data
    if not data.root:
        raise InputError("data.root is not set; expected the folder of your data: --data.root DIR")
    need_masks = config.loss.supervision == "mask" or data.fold is not None
    scenes = list_scenes(data.root, data.split, need_masks=need_masks, cache_dir=data.cache_dir)
    by_stem = {scene.stem: scene for scene in scenes}
    trained, held_out = choose_stems(list(by_stem), data)
    scenes = [by_stem[stem] for stem in trained]
    validation = [by_stem[stem] for stem in held_out]
    if data.val_split is not None:
        validation = list_scenes(
            data.root, data.val_split, need_masks=True, cache_dir=data.cache_dir
        )
    for folder in data.extra:
        root, split = outside(folder)
        scenes += list_scenes(root, split, need_masks=need_masks, cache_dir=data.cache_dir)
    cache = SceneCache.open([*scenes, *validation], data.cache_dir)
    positions = range(len(scenes), len(scenes) + len(validation))
    return RunData(
        samples=TrainSamples(
            cache=cache,
            indices=range(len(scenes)),
            crop_size=data.crop_size,
            strokes=config.strokes,
            augment=config.augment,
            seed=config.train.seed,
            supervision=config.loss.supervision,
        ),
        validation=tuple(positions[rank() :: world_size()]),
        cache=cache,
        num_validation=len(validation),
        warnings=(*cache.doubts, *_warn_of_known(scenes, validation)),
    )


def _warn_of_known(scenes: Sequence[ScenePaths], validation: Sequence[ScenePaths]) -> list[str]:
    """Return a line if images that are validated are trained on, by whatever paths."""
    trained = {os.path.realpath(scene.image) for scene in scenes} if validation else set[str]()
    known = [scene.image for scene in validation if os.path.realpath(scene.image) in trained]
    if not known:
        return []
    return [
        f"{known[0]}: trained on and validated on, as {len(known)} of the {len(validation)} "
        "validation images are: their scores flatter; take them out of data.extra, or validate on "
        "others (data.fold, data.val_split)"
    ]
