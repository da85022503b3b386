"""Saving from a worker: what is kept, what is best, and a disk that is full for a while."""

import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.worker
from scribbleseg.config import FinetuneConfig, override
from scribbleseg.loops.state import init_state
from scribbleseg.loops.steps import EpochDone
from scribbleseg.runs import RunFolder
from tests.conftest import disk_full_after
from train.worker import RunRecord, save

CPU = torch.device("cpu")
CONFIG = override(FinetuneConfig(), {"model.width": 8, "model.depth": 2, "train.keep": 2})


@pytest.fixture
def run(tmp_path):
    return RunFolder.at(str(tmp_path), "run")


@pytest.fixture
def state():
    return init_state(CONFIG, CPU, None)


def finish_epoch(state, epoch, **metrics):
    state.progress.history.append({"epoch": epoch, **metrics})


def test_the_best_and_the_last_are_kept(run, state):
    for epoch, miou in enumerate([0.5, 0.9, 0.6, 0.7, 0.8], start=1):
        finish_epoch(state, epoch, miou=miou)
        assert save(run, state, CONFIG, epoch, final=False, device=CPU)
    assert run.checkpoints(hashed=True) == [2, 4, 5]
    assert run.best() == {
        "checkpoint": "checkpoint_0002", "epoch": 2, "metric": "miou", "value": 0.9
    }  # fmt: skip


def test_without_validation_the_last_is_the_best(run, state):
    for epoch in (1, 2):
        finish_epoch(state, epoch, loss=1.0 / epoch)
        save(run, state, CONFIG, epoch, final=False, device=CPU)
    assert run.best()["epoch"] == 2


def test_a_checkpoint_inside_an_epoch_is_never_the_best(run, state):
    finish_epoch(state, 1, miou=0.5)
    save(run, state, CONFIG, 1, final=False, device=CPU)
    save(run, state, CONFIG, 2, final=False, device=CPU)
    assert run.checkpoints() == [1, 2] and run.best()["epoch"] == 1


def full_for(monkeypatch, times):
    """Make the next `times` attempts to put a checkpoint into place fail as on a full disk."""
    original = RunFolder.save_checkpoint
    left = [times]

    def failing(self, epoch, folder):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return original(self, epoch, folder)

    monkeypatch.setattr(RunFolder, "save_checkpoint", failing)
    monkeypatch.setattr(train.worker, "SECONDS_BEFORE_SAVING_AGAIN", 0)


def test_a_full_disk_leaves_the_last_whole_checkpoint_and_training_goes_on(run, state, monkeypatch):
    finish_epoch(state, 1, miou=0.5)
    save(run, state, CONFIG, 1, final=False, device=CPU)
    full_for(monkeypatch, 1)
    finish_epoch(state, 2, miou=0.6)
    assert not save(run, state, CONFIG, 2, final=False, device=CPU)
    assert run.checkpoints(hashed=True) == [1] and run.best()["epoch"] == 1
    finish_epoch(state, 3, miou=0.7)
    assert save(run, state, CONFIG, 3, final=False, device=CPU)
    assert run.last(hashed=True) == 3 and run.best()["epoch"] == 3


def test_the_final_save_is_tried_again_and_only_its_failure_ends_the_run(run, state, monkeypatch):
    full_for(monkeypatch, 1)
    assert save(run, state, CONFIG, 1, final=True, device=CPU)
    assert run.last() == 1
    full_for(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        save(run, state, CONFIG, 2, final=True, device=CPU)
    assert run.last(hashed=True) == 1


# TensorBoard's writing thread says why it ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_full_disk_tensorboard_has_every_epoch(run):
    folder = run.local_path / "tensorboard"
    record = RunRecord(
        run=run, facts={}, draw=None, began=time.monotonic(), num_shown=0, folder=folder
    )
    history = []

    def epoch(number):
        history.append({"epoch": number, "loss": 1.0 / number})
        record.epoch(EpochDone(epoch=number, metrics=history[-1]), history)

    with record:
        epoch(1)
        with disk_full_after(0):
            epoch(2)
            epoch(3)
        epoch(4)
        with disk_full_after(0):
            epoch(5)
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (number, pytest.approx(1.0 / number)) for number in (1, 2, 3, 4)
    ]
