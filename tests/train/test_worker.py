"""What a worker records of its run: one that ends in between, other data, a full disk."""

import shutil
import threading
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scribbleseg.checkpoint import read_trainer
from scribbleseg.config import to_dict
from scribbleseg.errors import InputError
from scribbleseg.loops.steps import EpochDone, StepDone
from scribbleseg.runs import RunFolder
from tests.conftest import disk_full_after, make_doubtful, write_scenes
from tests.loops.test_segment import same, settings
from train.progress import Board
from train.worker import (
    RunRecord,
    Screen,
    assemble_finetune,
    check_data,
    train_run,
    train_worker,
)

DOUBTS = ("strokes cover more than half", "viewers turn", "of the strokes contradicts")


@pytest.fixture
def run(tmp_path):
    return RunFolder.at(str(tmp_path), "run")


def test_a_run_that_ends_in_between_is_not_finished_and_goes_on(tiny_data, tmp_path):
    config = settings(tiny_data, train__epochs=3, train__keep=3)

    def go(name, **until):
        payload = {
            "config": to_dict(config), "recipe": "cpu", "git_commit": None, "board": Board(),
            "storage": str(tmp_path), "name": name, "cpus": 1, "gpus": 0,
        }  # fmt: skip
        reported = []
        train_run(
            payload | until,
            assemble_finetune,
            lambda run, history, saved: reported.append((history[-1]["epoch"], saved)),
        )
        return RunFolder.at(str(tmp_path), name), [epoch for epoch, _ in reported]

    whole, _ = go("whole")
    for until, epochs, reported in ((1, [1], [1]), (1, [1], []), (2, [1, 2], [2])):
        run, told = go("legs", until=until)
        assert told == reported and not run.finished()
        assert run.checkpoints(hashed=True) == epochs
        assert [row["epoch"] for row in run.read_metrics()] == epochs
    run, told = go("legs", until=None)
    assert told == [3] and run.finished() and whole.finished()
    trainers = [read_trainer(each.fetch(3, tmp_path / each.name / "got")) for each in (whole, run)]
    assert same(*trainers)


def test_what_is_doubtful_about_the_data_is_said_before_the_start(tmp_path):
    write_scenes(tmp_path / "data", "train", 10)
    make_doubtful(tmp_path / "data" / "train")
    board = Board()
    payload = {
        "config": to_dict(settings(tmp_path / "data", train__epochs=1)), "recipe": "cpu",
        "git_commit": None, "board": board, "storage": str(tmp_path), "name": "run", "cpus": 1,
        "gpus": 0,
    }  # fmt: skip
    train_run(payload, assemble_finetune, lambda *_: None)
    told = [line for line in board.lines if line.startswith("warning: ")]
    assert [words in line for words, line in zip(DOUBTS, told, strict=True)] == [True] * 3


def test_a_run_goes_on_with_the_data_that_it_began_with(tiny_data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    payload = {
        "config": to_dict(settings(root, train__epochs=2)), "recipe": "cpu", "git_commit": None,
        "board": Board(), "storage": str(tmp_path), "name": "run", "cpus": 1, "gpus": 0,
    }  # fmt: skip

    def go(until=None):
        train_run(payload | {"until": until}, assemble_finetune, lambda *_: None)

    go(until=1)
    run = RunFolder.at(str(tmp_path), "run")
    before = run.read_json("run.json")
    write_scenes(root, "train", 3, seed=7)
    with pytest.raises(InputError, match="have changed since the run began.*--fresh"):
        go()
    assert run.read_json("run.json") == before and run.checkpoints() == [1]
    for added in root.rglob("scene_7_*"):
        added.unlink()
    go()
    assert run.finished()


def test_a_storage_that_is_another_folder_here_is_refused(tiny_data, tmp_path):
    payload = {
        "config": to_dict(settings(tiny_data)), "recipe": "cpu", "git_commit": None,
        "board": Board(), "storage": str(tmp_path / "runs"), "name": "run", "cpus": 1, "gpus": 0,
        "mark": "left on another machine",
    }  # fmt: skip
    assert "is another folder on" in train_worker(payload)["input_error"]
    assert not (tmp_path / "runs").exists()


def test_ranks_that_have_different_data_are_refused(run):
    with pytest.raises(InputError, match="copies differ.*one, other.*same files on every node"):
        check_data(["one", "one", "other"], run, resumed=False)


@pytest.mark.parametrize(
    ("num_steps", "said"),
    [(5, []), (125, ["about 4 min to go, by its first steps; validation on top"])],
)
def test_how_long_a_run_takes_is_said_once_after_its_first_steps(monkeypatch, num_steps, said):
    screen = Screen(board=Board(), num_epochs=1, num_steps=num_steps)
    for step in range(1, 6):
        # The first one took longer.
        monkeypatch.setattr("train.worker.time.monotonic", lambda step=step: 90 + 2 * (step - 1))
        loss = torch.ones(())
        screen.step(StepDone(step=step, epoch=1, loss=loss, wait_seconds=0.0, step_seconds=0.0))
    assert list(screen.board.lines) == said


# TensorBoard's writing thread says why it ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_full_disk_tensorboard_has_every_epoch(run):
    folder = run.local_path / "tensorboard"
    record = RunRecord(
        run=run, facts={}, draw=None, began=time.monotonic(), num_shown=0, folder=folder
    )
    history = []
    before = set(threading.enumerate())

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
    for thread in set(threading.enumerate()) - before:
        if "AsyncWriter" in type(thread).__name__:
            thread.join(60)
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (number, pytest.approx(1.0 / number)) for number in (1, 2, 3, 4)
    ]
