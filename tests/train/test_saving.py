"""Checkpoints of a run: what is kept, what is best, what training may do meanwhile, a full disk."""

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train.saving
from scribbleseg.checkpoint import read_model, read_trainer
from scribbleseg.config import FinetuneConfig, PretrainConfig, override
from scribbleseg.loops import pretrain
from scribbleseg.loops.segment import train_step
from scribbleseg.loops.state import init_state
from scribbleseg.loops.steps import SaveDue
from scribbleseg.runs import RunFolder
from tests.loops.test_gpu_ready import batch
from tests.loops.test_segment import same
from train.saving import Saver, Snapshot, note_best, write_checkpoint

CPU = torch.device("cpu")
CONFIG = override(FinetuneConfig(), {"model.width": 8, "model.depth": 2, "train.keep": 2})


@pytest.fixture
def run(tmp_path):
    return RunFolder.at(str(tmp_path), "run")


@pytest.fixture
def state():
    return init_state(CONFIG, CPU, None)


@pytest.fixture
def saver(run):
    with Saver(run, CONFIG, None) as saver:
        yield saver


def finish_epoch(state, epoch, **metrics):
    state.progress.history.append({"epoch": epoch, **metrics})


def save(saver, state, epoch, *, final=False):
    """Save and wait; return whether the checkpoint is whole."""
    saver.save(SaveDue(epoch=epoch, final=final), state)
    return saver.wait()


def test_the_best_and_the_last_are_kept(run, state, saver):
    for epoch, miou in enumerate([0.5, 0.9, 0.6, 0.7, 0.8], start=1):
        finish_epoch(state, epoch, miou=miou)
        assert save(saver, state, epoch)
        assert saver.saved_epoch == epoch
    assert run.checkpoints(hashed=True) == [2, 4, 5]
    assert run.best() == {
        "checkpoint": "checkpoint_0002", "epoch": 2, "metric": "miou", "value": 0.9
    }  # fmt: skip


def test_the_best_is_recorded_later_if_it_could_not_be_at_once(run, state, saver, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_best", full)
        finish_epoch(state, 1, miou=0.9)
        assert not save(saver, state, 1)
    assert run.best() is None and run.last(hashed=True) == 1
    # As a run does that is resumed.
    note_best(run, CONFIG, 1, read_model(run.local_path / "checkpoint_0001").metrics)
    assert run.best()["value"] == 0.9


def test_a_checkpoint_between_validations_is_not_judged(run, state):
    config = override(CONFIG, {"train.validate_every": 2, "train.epochs": 4})
    with Saver(run, config, None) as saver:
        for epoch, metrics in enumerate(({}, {"miou": 0.5}, {}, {"miou": 0.6}), start=1):
            finish_epoch(state, epoch, **metrics)
            assert save(saver, state, epoch)
    assert run.best()["epoch"] == 4


def test_without_validation_the_last_is_the_best(run, state, saver):
    for epoch in (1, 2):
        finish_epoch(state, epoch, loss=1.0 / epoch)
        save(saver, state, epoch)
    assert run.best()["epoch"] == 2


def test_a_checkpoint_inside_an_epoch_is_never_the_best(run, state, saver):
    finish_epoch(state, 1, miou=0.5)
    save(saver, state, 1)
    save(saver, state, 2)
    assert run.checkpoints() == [1, 2] and run.best()["epoch"] == 1


def test_training_goes_on_while_a_checkpoint_is_written(run, state, saver, monkeypatch):
    go, write = threading.Event(), train.saving.write_checkpoint

    def slow(*arguments):
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(train.saving, "write_checkpoint", slow)
    finish_epoch(state, 1, miou=0.5)
    # A gradient step before, so that the optimiser has a state to copy.
    sum(p.sum() for p in state.model.parameters()).backward()
    state.optimizer.step()
    weights = {name: tensor.clone() for name, tensor in state.weights().items()}
    trainer = Snapshot.take(state, 1).trainer
    saver.save(SaveDue(epoch=1), state)
    assert saver.saved_epoch is None and run.last() is None
    state.optimizer.step()
    state.update_ema(0.9)
    state.progress.step = 7
    finish_epoch(state, 2, miou=0.6)
    go.set()
    assert saver.wait() and saver.saved_epoch == 1
    folder = run.local_path / "checkpoint_0001"
    assert same(dict(read_model(folder).weights), weights)
    assert same(read_trainer(folder), trainer)
    assert not same(trainer["model"], dict(state.model.state_dict()))
    assert read_model(folder).metrics == {"epoch": 1, "miou": 0.5}


def test_one_checkpoint_is_written_at_a_time_and_leaving_waits_for_it(run, state, monkeypatch):
    write, busy, seen = train.saving.write_checkpoint, threading.Lock(), []

    def alone(run, config, snapshot):
        assert busy.acquire(blocking=False)
        write(run, config, snapshot)
        seen.append(snapshot.epoch)
        busy.release()

    monkeypatch.setattr(train.saving, "write_checkpoint", alone)
    with Saver(run, CONFIG, None) as saver:
        for epoch in range(1, 5):
            saver.save(SaveDue(epoch=epoch), state)
    assert seen == [1, 2, 3, 4]
    assert run.last(hashed=True) == 4


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
    monkeypatch.setattr(train.saving, "SECONDS_BEFORE_SAVING_AGAIN", 0)


def test_a_full_disk_leaves_the_last_whole_checkpoint_and_training_goes_on(
    run, state, saver, monkeypatch, caplog
):
    finish_epoch(state, 1, miou=0.5)
    save(saver, state, 1)
    full_for(monkeypatch, 1)
    finish_epoch(state, 2, miou=0.6)
    assert not save(saver, state, 2)
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert saver.saved_epoch == 1
    assert run.checkpoints(hashed=True) == [1] and run.best()["epoch"] == 1
    finish_epoch(state, 3, miou=0.7)
    assert save(saver, state, 3)
    assert run.last(hashed=True) == 3 and run.best()["epoch"] == 3


def test_the_final_save_is_tried_again_and_only_its_failure_ends_the_run(
    run, state, saver, monkeypatch
):
    full_for(monkeypatch, 1)
    saver.save(SaveDue(epoch=1, final=True), state)
    assert run.last() == saver.saved_epoch == 1
    full_for(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        saver.save(SaveDue(epoch=2, final=True), state)
    assert run.last(hashed=True) == 1


def test_a_damaged_record_of_the_best_is_no_answer_of_one_rank(run, state, saver, caplog):
    """Given back as an answer, it would leave the other ranks waiting."""
    finish_epoch(state, 1, miou=0.5)
    save(saver, state, 1)
    run.write_json("best.json", {})
    finish_epoch(state, 2, miou=0.6)
    assert not save(saver, state, 2)
    assert "best.json" in caplog.records[-1].message
    with pytest.raises(OSError, match="best.json"):
        saver.save(SaveDue(epoch=2, final=True), state)


def test_what_is_no_fault_of_the_disk_ends_the_run(state, saver, monkeypatch):
    def broken(*_):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(train.saving, "write_checkpoint", broken)
    saver.save(SaveDue(epoch=1), state)
    with pytest.raises(ValueError, match="a fault of ours"):
        saver.save(SaveDue(epoch=2), state)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_the_thread_that_writes_leaves_computing_in_parallel_to_training(run):
    """More OpenMP threads than cores slow all of them down: see `Snapshot.take`."""
    config = override(FinetuneConfig(), {"model.width": 16, "model.depth": 5})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        snapshot = Snapshot.take(init_state(config, CPU, None), 1)

        def threads_started():
            num_threads = len(os.listdir("/proc/self/task"))
            write_checkpoint(run, config, snapshot)
            return len(os.listdir("/proc/self/task")) - num_threads

        with ThreadPoolExecutor(max_workers=1) as thread:
            assert thread.submit(threads_started).result() == 0
    finally:
        torch.set_num_threads(before)
    assert run.last(hashed=True) == 1


def training(kind):
    """Return what makes a run's state, and what takes a step of it."""
    changes = {"model.width": 8, "model.depth": 3, "train.batch_size": 4}
    if kind == "segmentation":
        config = override(FinetuneConfig(), changes)

        def step(state):
            train_step(state, state.model, batch(), config, device=CPU, precision=None, num_steps=9)

        return lambda: init_state(config, CPU, None), step
    sizes = {"dino.out_dim": 32, "dino.hidden_dim": 16, "dino.bottleneck_dim": 8}
    resolved = pretrain.resolve(override(PretrainConfig(), changes | sizes), 100)
    views = batch()["image"][:, None].expand(-1, 4, -1, -1, -1)
    crops = {"global": views[:, :2], "local": views[:, 2:, :, :32, :32], "stem": [""] * 4}
    schedule = pretrain.Schedule.at(5, 10, resolved)

    def pretrain_step(state):
        pretrain.pretrain_step(
            state, state.student, crops, resolved, schedule,
            device=CPU, precision=None, hold_prototypes=False,
        )  # fmt: skip

    return lambda: pretrain.init_state(resolved, CPU, None), pretrain_step


@pytest.mark.parametrize("kind", ["segmentation", "dino"])
def test_a_written_state_goes_on_as_the_one_in_memory(kind, run):
    """In whatever memory order: an optimiser pairs weights and moments by where they lie."""
    make, step = training(kind)
    state, resumed = make(), make()
    step(state)
    write_checkpoint(run, CONFIG, Snapshot.take(state, 1))
    resumed.load_dict(read_trainer(run.local_path / "checkpoint_0001"))
    for each in (state, resumed):
        step(each)
    assert same(state.to_dict(), resumed.to_dict())
