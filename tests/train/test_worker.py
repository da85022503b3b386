"""What a worker records of its run, on a disk that is full for a while."""

import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scribbleseg.loops.steps import EpochDone
from scribbleseg.runs import RunFolder
from tests.conftest import disk_full_after
from train.worker import RunRecord


@pytest.fixture
def run(tmp_path):
    return RunFolder.at(str(tmp_path), "run")


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
    # TensorBoard's threads tell pytest why they end, which on a busy machine may last into the next
    # test, where nothing is ignored.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "AsyncWriter" in type(thread).__name__:
            thread.join(60)
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (number, pytest.approx(1.0 / number)) for number in (1, 2, 3, 4)
    ]
