"""Checkpoints that are written while training goes on."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scribbleseg import checkpoint as checkpoints
from scribbleseg import manifest
from scribbleseg.config import FinetuneConfig, PretrainConfig
from scribbleseg.distributed import rank
from scribbleseg.errors import InputError
from scribbleseg.loops.pretrain import PretrainState
from scribbleseg.loops.state import TrainState
from scribbleseg.loops.steps import Row, SaveDue
from scribbleseg.runs import RunFolder

SECONDS_BEFORE_SAVING_AGAIN = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds, as it was at one step: training no longer changes it."""

    epoch: int
    """Epoch in progress or just finished: the checkpoint's number."""
    weights: dict[str, Tensor]
    trainer: dict[str, Any]
    metrics: Row
    """Row of the last finished epoch; empty in the first."""

    @staticmethod
    def take(state: TrainState | PretrainState, epoch: int) -> "Snapshot":
        """Copy a run's state into the machine's memory."""
        history = state.progress.history
        return Snapshot(
            epoch=epoch,
            # In the order that files have. The thread that writes them must leave every parallel
            # computation to this one: OpenMP counts the threads of both, and once they are more
            # than cores it puts training's to sleep wherever they wait for one another.
            weights=_copy(state.weights(), memory_format=torch.contiguous_format),
            # In the order that they have: an optimiser's moments must lie as its weights do.
            trainer=_copy(state.to_dict(), memory_format=torch.preserve_format),
            metrics=dict(history[-1]) if history else {},
        )


def _copy(tree: Any, *, memory_format: torch.memory_format) -> Any:
    """Return a tree of dictionaries and lists with copies of its tensors on the CPU."""
    match tree:
        case torch.Tensor():
            return tree.detach().to("cpu", copy=True, memory_format=memory_format)
        case dict():
            return {k: _copy(value, memory_format=memory_format) for k, value in tree.items()}
        case list():
            return [_copy(value, memory_format=memory_format) for value in tree]
        case _:
            return tree


class Saver:
    """Writes a run's checkpoints from rank 0, in a thread, one at a time; use it as a context.

    Training waits only for the copy in memory, and for a checkpoint before that is still being
    written. One that cannot be written, such as on a full disk, is logged and left out: the last
    whole one stays, and the next is due soon enough.
    """

    def __init__(
        self, run: RunFolder, config: FinetuneConfig | PretrainConfig, saved_epoch: int | None
    ):
        self.run = run
        self.config = config
        self.saved_epoch = saved_epoch
        """Epoch of the last whole checkpoint that this process knows of."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._writing: Future[bool] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def save(self, event: SaveDue, state: TrainState | PretrainState) -> None:
        """Save a run's state as it is now; the final one is whole on return.

        Raises:
            OSError: the final checkpoint could not be written, nor a while later.
        """
        if rank() != 0:
            return
        self.wait()
        snapshot = Snapshot.take(state, event.epoch)
        self._writing = self._thread.submit(self._try, snapshot)
        if event.final and not self.wait():
            time.sleep(SECONDS_BEFORE_SAVING_AGAIN)
            self._write(snapshot)

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; return whether the last one is whole."""
        return self._writing is None or self._writing.result()

    def _try(self, snapshot: Snapshot) -> bool:
        return attempt(lambda: self._write(snapshot))

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self.run, self.config, snapshot)
        except InputError as error:
            # A damaged record of the best: as an answer of rank 0 alone, it would leave the others
            # waiting.
            raise OSError(str(error)) from error
        self.saved_epoch = snapshot.epoch


def attempt(write: Callable[[], None]) -> bool:
    """Call `write`; return whether it worked, and log why not. A disk may be full for a while."""
    try:
        write()
    except OSError as error:
        logger.warning("could not be written, will be tried again: %s", error)
        return False
    return True


def write_checkpoint(
    run: RunFolder, config: FinetuneConfig | PretrainConfig, snapshot: Snapshot
) -> None:
    """Write one checkpoint, then the record of the best, then remove what is no longer kept.

    Raises:
        OSError: it cannot be written; the last whole one stays.
    """
    epoch, metrics = snapshot.epoch, snapshot.metrics
    with run.scratch() as folder:
        checkpoints.write_model(folder, config=config, weights=snapshot.weights, metrics=metrics)
        checkpoints.write_trainer(folder, snapshot.trainer)
        manifest.write_manifest(folder)
        run.save_checkpoint(epoch, folder)
    note_best(run, config, epoch, metrics)
    run.prune(config.train.keep)


def note_best(
    run: RunFolder, config: FinetuneConfig | PretrainConfig, epoch: int, metrics: Mapping[str, Any]
) -> None:
    """Record a whole checkpoint as the best one, if it is.

    Args:
        run: Its run.
        config: Says which epochs are judged.
        epoch: The checkpoint's number.
        metrics: Row of the last epoch that was finished when it was taken.
    """
    if metrics.get("epoch") != epoch or not config.train.validates(epoch):
        return
    # Without validation the last checkpoint is the best one.
    metric = "miou" if "miou" in metrics else "epoch"
    best = run.best()
    if best is None or metrics[metric] > best["value"]:
        run.write_best(epoch, metric, float(metrics[metric]))
