"""The command a user types, on a real local Ray: one short run, and what happens around it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.fs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scribbleseg.checkpoint import read_trainer
from scribbleseg.cli import exit_status
from scribbleseg.device import num_cores
from scribbleseg.runs import RunFolder
from tests.loops.test_segment import same
from train.finetune import main

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--data.long-side=64", "--data.crop-size=64", "--model.width=8", "--model.depth=3",
    "--model.norm=group", "--train.batch-size=4", "--train.validate-every=1",
    "--train.precision=fp32",
]  # fmt: skip


def command(data, storage, name, *arguments):
    return [
        sys.executable, "-m", "train.finetune", "demo", f"--data.root={data}",
        f"--storage={storage}", f"--name={name}", *TINY, *arguments,
    ]  # fmt: skip


def run(*arguments, timeout=280):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def run_here(*arguments):
    """The exit status of a command that is answered before anything is trained."""
    return exit_status(lambda: main(command(*arguments)[3:]))


def final_state(storage, name):
    folder = RunFolder.at(str(storage), name)
    return read_trainer(Path(folder.checkpoint_path(folder.last())))


@pytest.fixture(scope="module")
def single(tiny_data, tmp_path_factory):
    """A run of two epochs by one worker, named a: its storage, and what the command said."""
    storage = tmp_path_factory.mktemp("single")
    return storage, run(tiny_data, storage, "a", "--train.epochs=2")


def test_a_run_from_command_line_to_folder(tiny_data, single, capsys):
    storage, done = single
    assert done.returncode == 0, done.stderr
    assert "epoch    2/2" in done.stderr and "mIoU" in done.stderr
    assert f"on cpu with {num_cores()} threads" in done.stderr or torch.cuda.is_available()
    assert "Traceback" not in done.stderr
    assert (storage / "a" / "report.html").stat().st_size > 10_000
    folder = RunFolder.at(str(storage), "a")
    assert folder.finished() and folder.checkpoints(hashed=True) == [1, 2]
    assert [row["epoch"] for row in folder.read_metrics()] == [1, 2]
    assert folder.best()["metric"] == "miou"
    record = folder.read_json("run.json")
    assert record["recipe"] == "demo" and record["world_size"] == 1
    assert len(record["data_fingerprint"]) == 64
    assert list((storage / "a" / "tensorboard").iterdir())

    assert run_here(tiny_data, storage, "a", "--train.epochs=2") == 0
    assert "is finished" in capsys.readouterr().out
    assert run_here(tiny_data, f"file://{storage}?x=1", "a", "--train.epochs=2") == 0
    assert f"file://{storage}/a?x=1 is finished" in capsys.readouterr().out
    assert run_here(tiny_data, storage, "a", "--train.epochs=3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other settings" in error


@pytest.mark.slow
def test_a_run_on_data_from_an_object_store(bucket_data, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRIBBLESEG_CACHE", str(tmp_path / "cache"))
    done = run(bucket_data, tmp_path, "a", "--train.epochs=1")
    assert done.returncode == 0, done.stderr
    # Strokes, images and masks of the split, once, for the check, the training and the report.
    assert done.stderr.count(f"{bucket_data}/train: fetching 42 files") == 1
    assert done.stderr.count("fetching") == 1
    assert f"--data {bucket_data} --split train" in done.stdout
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000
    none = run(f"{bucket_data}-none", tmp_path, "b")
    assert none.returncode == 2 and none.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "workers", [pytest.param(1, id="here"), pytest.param(2, id="ray", marks=pytest.mark.slow)]
)
def test_what_a_worker_finds_wrong_is_one_line_and_status_2(tiny_data, tmp_path, workers):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(tiny_data), str(data)], check=True)
    victim = next((data / "train" / "ground_truth").iterdir())
    victim.write_bytes(victim.read_bytes()[:60])
    done = run(data, tmp_path / "runs", "bad", f"--launch.num-workers={workers}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert victim.name in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "bad" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, id="here"), pytest.param(2, id="ray")])
def test_a_killed_run_started_again_equals_the_undisturbed_one(tiny_data, tmp_path, workers):
    settings = ("--train.epochs=40", f"--launch.num-workers={workers}")
    undisturbed = run(tiny_data, tmp_path, "undisturbed", *settings)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = RunFolder.at(str(tmp_path), "killed")
    with driving(command(tiny_data, tmp_path, "killed", *settings), tmp_path / "log") as driver:
        wait_for(lambda: (killed.last() or 0) >= 5, driver)
        ray_workers = train_workers(driver)
        assert len(ray_workers) == (workers if workers > 1 else 0)
    # The block's end killed the driver. Ray's processes notice it; until then a worker may still
    # write.
    wait_for(lambda: not any(worker.is_running() for worker in ray_workers), None)
    assert not killed.finished()
    resumed = run(tiny_data, tmp_path, "killed", *settings)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step" in resumed.stderr
    assert [row["epoch"] for row in killed.read_metrics()] == list(range(1, 41))
    assert same(final_state(tmp_path, "undisturbed"), final_state(tmp_path, "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, id="here"), pytest.param(2, id="ray")])
def test_ctrl_c_is_one_word_and_status_130(tiny_data, tmp_path, workers):
    settings = ("--train.epochs=1000", f"--launch.num-workers={workers}")
    stopped, log = RunFolder.at(str(tmp_path), "stopped"), tmp_path / "log"
    # A shell starts what it puts in the background with Ctrl-C ignored, and so do its children.
    heeding = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('train.finetune', run_name='__main__', alter_sys=True)"
    )
    words = command(tiny_data, tmp_path, "stopped", *settings)
    with driving([sys.executable, "-c", heeding, *words[3:]], log) as driver:
        wait_for(lambda: (stopped.last() or 0) >= 1, driver)
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(timeout=120) == 130, log.read_text()
    assert (
        log.read_text().endswith("the same command goes on\nstopped\n")
        and "Traceback" not in log.read_text()
    )


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    tiny_data, tmp_path
):
    settings = ("--train.epochs=40", "--launch.num-workers=2")
    assert run(tiny_data, tmp_path, "undisturbed", *settings).returncode == 0
    disturbed = RunFolder.at(str(tmp_path), "disturbed")
    log = tmp_path / "log"
    with driving(command(tiny_data, tmp_path, "disturbed", *settings), log) as driver:
        wait_for(lambda: (disturbed.last() or 0) >= 5, driver)
        train_workers(driver)[0].kill()
        assert driver.wait(timeout=280) == 0, log.read_text()
    assert [row["epoch"] for row in disturbed.read_metrics()] == list(range(1, 41))
    assert same(final_state(tmp_path, "undisturbed"), final_state(tmp_path, "disturbed"))


def test_two_workers_train_the_same_run(tiny_data, single, tmp_path):
    storage, one = single
    two = run(tiny_data, tmp_path, "two", "--train.epochs=2", "--launch.num-workers=2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    runs = RunFolder.at(str(storage), "a"), RunFolder.at(str(tmp_path), "two")
    for a, b in zip(*(run.read_metrics() for run in runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
        assert a["miou"] == pytest.approx(b["miou"], abs=1e-2)
    assert runs[1].read_json("run.json")["world_size"] == 2


@contextlib.contextmanager
def driving(
    words: list[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A command that may have a Ray of its own; the end of the block kills them.

    What it says goes to a file, because a pipe that nobody reads would stop it, and is shown where
    the block fails.
    """
    with (
        log.open("w") as stream,
        subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=stream, stderr=stream, start_new_session=True
        ) as driver,
    ):
        try:
            yield driver
        except BaseException:
            sys.stderr.write(log.read_text())
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)


def train_workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """The training processes of the Ray that `driver` started."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in family if "TrainWorker" in " ".join(process.cmdline())]


def wait_for(condition, driver, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver is None or driver.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_a_run_on_an_object_store_is_whole_and_can_be_watched(tiny_data, object_store, tmp_path):
    storage = f"{object_store}/{tmp_path.name}"
    done = run(tiny_data, storage, "a", "--train.epochs=2")
    assert done.returncode == 0, done.stderr
    folder = RunFolder.open(f"{storage}/a")
    assert folder.finished() and folder.checkpoints(hashed=True) == [1, 2]

    selector = pyarrow.fs.FileSelector(f"{folder.path}/tensorboard")
    (events,) = folder.filesystem.get_file_info(selector)
    (tmp_path / events.base_name).write_bytes(folder.read_file(f"tensorboard/{events.base_name}"))
    seen = EventAccumulator(str(tmp_path)).Reload().Scalars("miou")
    assert [scalar.step for scalar in seen] == [1, 2]
    assert [scalar.value for scalar in seen] == pytest.approx(
        [row["miou"] for row in folder.read_metrics()]
    )
