"""The run folder on a local disk and on an object store: whatever happens, what it says is true."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from pyarrow.fs import FileSelector, FileType

from scribbleseg import checkpoint, manifest
from scribbleseg.config import FinetuneConfig, to_dict
from scribbleseg.errors import InputError
from scribbleseg.runs import (
    GOOGLE_PATIENCE,
    RunFolder,
    RunStatus,
    find_checkpoint,
    open_storage,
    pull,
    status,
)
from tests.conftest import disk_full_after


def build(folder: Path, value: float = 0.0) -> Path:
    """A whole checkpoint whose weights are told apart by `value`."""
    weights = {"weight": torch.full((100,), value)}
    checkpoint.write_model(folder, config=FinetuneConfig(), weights=weights, metrics={})
    checkpoint.write_trainer(folder, {"value": value})
    manifest.write_manifest(folder)
    return folder


def save(run: RunFolder, epoch: int, value: float | None = None) -> str:
    """Save a checkpoint as training does."""
    with run.scratch() as folder:
        return run.save_checkpoint(epoch, build(folder, epoch if value is None else value))


def value_of(folder: Path) -> float:
    """The mark that `build` put into a checkpoint."""
    return checkpoint.read_model(folder).weights["weight"][0].item()


def value_in(run: RunFolder, epoch: int, tmp_path: Path) -> float:
    """The mark of a run's checkpoint."""
    copy = run.fetch(epoch, tmp_path / "copy")
    found = value_of(copy)
    shutil.rmtree(copy)
    return found


def one_line(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listing(run: RunFolder) -> list[str]:
    """All files of a run, hidden ones too, relative to it."""
    selector = FileSelector(run.path, recursive=True)
    return sorted(
        info.path.removeprefix(f"{run.path}/")
        for info in run.filesystem.get_file_info(selector)
        if info.type == FileType.File
    )


@pytest.fixture
def run(storage: str) -> RunFolder:
    """A run that has not begun."""
    return RunFolder.at(storage, "cpu-1a2b3c4d")


@pytest.fixture
def local_run(tmp_path: Path) -> RunFolder:
    """A run on the local disk that has not begun."""
    return RunFolder.at(str(tmp_path / "storage"), "cpu-1a2b3c4d")


# Small files.


def test_files_in_folders_of_a_run_come_back_and_are_listed_in_order(run: RunFolder) -> None:
    assert run.list_files("pictures") == [] and run.read_file("pictures/b.jpg") is None
    for name in ("b", "a"):
        run.write_file(f"pictures/{name}.jpg", name.encode())
    run.write_file("pictures/a.jpg", b"again")
    assert run.list_files("pictures") == ["a.jpg", "b.jpg"]
    assert run.read_file("pictures/a.jpg") == b"again"


def test_a_run_that_has_not_begun_is_empty(run: RunFolder) -> None:
    assert run.name == "cpu-1a2b3c4d"
    assert not run.exists()
    assert not run.finished()
    assert run.read_json("run.json") is None
    assert run.read_metrics() == []
    assert run.checkpoints() == []
    assert run.last() is None
    assert run.best() is None
    run.prune(1)


def test_json_and_metrics_come_back(run: RunFolder) -> None:
    run.write_json("run.json", {"finished": False, "recipe": "cpü"})
    assert run.exists()
    assert not run.finished()
    run.write_json("run.json", {"finished": True})
    assert run.finished()
    assert run.read_json("run.json") == {"finished": True}

    history: list[dict[str, Any]] = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    run.write_metrics(history[:1])
    run.write_metrics(history)
    assert run.read_metrics() == history
    run.write_metrics([])
    assert run.read_metrics() == []
    assert listing(run) == ["metrics.jsonl", "run.json"]


def test_metrics_are_one_json_object_per_line(local_run: RunFolder) -> None:
    local_run.write_metrics([{"epoch": 1}, {"epoch": 2}])
    text = (Path(local_run.path) / "metrics.jsonl").read_text()
    assert text == '{"epoch": 1}\n{"epoch": 2}\n'


def test_the_same_run_is_found_again(storage: str, run: RunFolder) -> None:
    run.write_json("run.json", {"a": 1})
    assert RunFolder.open(f"{storage}/cpu-1a2b3c4d").read_json("run.json") == {"a": 1}
    assert RunFolder.open(f"{storage}/cpu-1a2b3c4d/").name == "cpu-1a2b3c4d"
    assert RunFolder.at(f"{storage}/", "cpu-1a2b3c4d").path == run.path
    assert pickle.loads(pickle.dumps(run)).read_json("run.json") == {"a": 1}


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder.at("runs", "a")
    assert run.local_path == tmp_path / "runs" / "a"
    assert RunFolder.open(f"file://{tmp_path}/runs/a") == run


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\\b", "/etc"])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    assert "expected one folder name" in one_line(lambda: RunFolder.at(str(tmp_path), name))


@pytest.mark.parametrize("uri", ["ftp://host/a", "s3://", "://", "s3://a b/c", "s3://a//b"])
def test_a_storage_that_is_none_is_named(uri: str) -> None:
    assert one_line(lambda: RunFolder.open(uri)).startswith(f"{uri}: not a storage")


def test_damaged_files_are_named(local_run: RunFolder) -> None:
    folder = Path(local_run.path)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    assert "run.json" in one_line(local_run.finished)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert "metrics.jsonl, line 2" in one_line(local_run.read_metrics)
    (folder / "best.json").write_bytes(b" " * 2_000_000)
    assert "2000000 bytes" in one_line(local_run.best)


# Checkpoints.


def test_a_checkpoint_is_saved_found_and_fetched(run: RunFolder, tmp_path: Path) -> None:
    path = save(run, 3)
    assert path == run.checkpoint_path(3) == f"{run.path}/checkpoint_0003"
    save(run, 12)
    assert run.checkpoints() == run.checkpoints(hashed=True) == [3, 12]
    assert run.last() == run.last(hashed=True) == 12
    names = ["config.json", "manifest.json", "model.safetensors", "trainer.pt"]
    assert listing(run) == [f"checkpoint_{n}/{name}" for n in ("0003", "0012") for name in names]

    copy = run.fetch(3, tmp_path / "deep" / "copy")
    assert copy == tmp_path / "deep" / "copy"
    assert value_of(copy) == 3
    assert checkpoint.read_trainer(copy) == {"value": 3}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def test_a_checkpoint_of_the_same_epoch_is_replaced(run: RunFolder, tmp_path: Path) -> None:
    save(run, 1, value=0.25)
    run.filesystem.open_output_stream(f"{run.checkpoint_path(1)}/leftover").close()
    save(run, 1, value=0.5)
    assert value_in(run, 1, tmp_path) == 0.5
    assert len(listing(run)) == 4


def test_epochs_beyond_four_digits_sort_as_numbers(local_run: RunFolder) -> None:
    for epoch in (9999, 10000, 0):
        save(local_run, epoch)
    assert local_run.checkpoints() == [0, 9999, 10000]


def test_what_is_not_a_whole_checkpoint_is_not_saved(run: RunFolder) -> None:
    with run.scratch() as folder:
        checkpoint.write_trainer(folder, {})
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            run.save_checkpoint(1, folder)
    assert run.checkpoints() == []


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "manifest.json"])
def test_a_half_written_checkpoint_is_never_chosen(run: RunFolder, name: str) -> None:
    save(run, 1)
    save(run, 2)
    run.filesystem.delete_file(f"{run.checkpoint_path(2)}/{name}")
    assert run.checkpoints() == [1]
    assert run.last() == 1
    assert run.last(hashed=True) == 1


def test_a_shortened_or_tampered_checkpoint_is_refused(run: RunFolder, tmp_path: Path) -> None:
    save(run, 1)
    save(run, 2)
    path = f"{run.checkpoint_path(2)}/trainer.pt"
    with run.filesystem.open_input_stream(path) as stream:
        content = bytearray(stream.read())
    content[len(content) // 2] ^= 1
    with run.filesystem.open_output_stream(path) as stream:
        stream.write(bytes(content))
    assert run.last() == 2
    assert run.last(hashed=True) == 1
    assert run.checkpoints(hashed=True) == [1]
    assert "sha256" in one_line(lambda: run.fetch(2, tmp_path / "copy"))
    with run.filesystem.open_output_stream(path) as stream:
        stream.write(bytes(content[:-1]))
    assert run.last() == 1
    assert "the manifest says" in one_line(lambda: run.fetch(2, tmp_path / "copy"))
    assert "holds no manifest.json" in one_line(lambda: run.fetch(7, tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_hostile_manifest_fetches_nothing(local_run: RunFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    path = Path(save(local_run, 1)) / "manifest.json"
    stamp = {"size": 1, "sha256": "0" * 64}
    path.write_text(json.dumps({"format": 1, "files": {"../../../secret": stamp}}))
    assert "plain file name" in one_line(lambda: local_run.fetch(1, tmp_path / "copy"))
    assert local_run.last() is None
    path.write_bytes(b" " * 2_000_000)
    assert "2000000 bytes" in one_line(lambda: local_run.fetch(1, tmp_path / "copy"))


def test_folders_of_others_are_left_alone(local_run: RunFolder) -> None:
    save(local_run, 1)
    for name in ("checkpoint_final", "checkpoint_01", "tensorboard", "checkpoint_2026-11-23"):
        (Path(local_run.path) / name).mkdir()
    local_run.prune(1)
    assert local_run.checkpoints() == [1]
    assert len(list(Path(local_run.path).iterdir())) == 5


# Pruning.


def test_prune_keeps_the_last_and_the_best(run: RunFolder) -> None:
    for epoch in range(1, 7):
        save(run, epoch)
    run.write_best(2, "miou", 0.8)
    run.prune(2)
    assert run.checkpoints() == [2, 5, 6]
    run.prune(2)
    assert run.checkpoints() == [2, 5, 6]
    run.write_best(6, "miou", 0.9)
    run.prune(1)
    assert run.checkpoints() == [6]
    with pytest.raises(ValueError, match="keep is 0"):
        run.prune(0)


def test_prune_removes_old_remains_but_not_what_may_be_in_the_making(run: RunFolder) -> None:
    for epoch in (1, 2, 3, 4):
        save(run, epoch)
    for epoch in (1, 4):
        run.filesystem.delete_file(f"{run.checkpoint_path(epoch)}/manifest.json")
    run.prune(1)
    assert run.checkpoints() == [3]
    folders = {name.split("/")[0] for name in listing(run)}
    assert folders == {"checkpoint_0003", "checkpoint_0004"}


def test_prune_removes_nothing_while_nothing_is_whole(run: RunFolder) -> None:
    save(run, 1)
    run.filesystem.delete_file(f"{run.checkpoint_path(1)}/manifest.json")
    before = listing(run)
    run.prune(1)
    assert listing(run) == before


# A full disk, a lost connection, a killed process.


@pytest.fixture
def finished_run(local_run: RunFolder) -> RunFolder:
    """A local run with two checkpoints and its small files."""
    save(local_run, 1)
    save(local_run, 2)
    local_run.write_best(1, "miou", 0.5)
    local_run.write_metrics([{"epoch": 1}])
    return local_run


def test_a_full_disk_leaves_all_as_it_was_and_saving_again_works(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    before = listing(finished_run)
    for epoch in (2, 3):
        with pytest.raises(OSError), disk_full_after(1024):
            save(finished_run, epoch, value=9)
    with pytest.raises(OSError), disk_full_after(1024):
        finished_run.write_metrics([{"epoch": n, "loss": 0.5} for n in range(1000)])
    assert listing(finished_run) == before
    assert finished_run.checkpoints(hashed=True) == [1, 2]
    assert value_in(finished_run, 2, tmp_path) == 2
    assert finished_run.read_metrics() == [{"epoch": 1}]
    save(finished_run, 3)
    assert finished_run.last() == 3


def test_a_disk_that_fills_while_copying_leaves_all_as_it_was(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = build(tmp_path / "elsewhere", 9)
    before = listing(finished_run)

    def fill(source: object, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise shutil.Error("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", fill)
        for epoch in (2, 3):
            with pytest.raises(OSError, match="No space"):
                finished_run.save_checkpoint(epoch, elsewhere)
    assert listing(finished_run) == before
    assert manifest.verify(elsewhere) == []
    finished_run.save_checkpoint(2, elsewhere)
    assert value_in(finished_run, 2, tmp_path) == 9
    assert not elsewhere.exists()


def test_a_rename_that_fails_brings_the_old_checkpoint_back(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(finished_run)
    rename = os.replace

    def fail_once_moved_aside(source: Path, target: Path) -> None:
        if Path(source).name == ".incoming_0002":
            raise OSError("No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", fail_once_moved_aside)
        save(finished_run, 2, value=9)
    assert listing(finished_run) == before
    assert value_in(finished_run, 2, tmp_path) == 2


def test_remains_of_a_killed_save_do_no_harm(finished_run: RunFolder, tmp_path: Path) -> None:
    folder = Path(finished_run.path)
    for name in (".scratch", ".incoming_0002", ".outgoing"):
        build(folder / name, 9)
    assert finished_run.checkpoints() == [1, 2]
    save(finished_run, 2, value=3)
    assert value_in(finished_run, 2, tmp_path) == 3
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_scratch_is_empty_and_goes_even_if_its_user_fails(run: RunFolder) -> None:
    lent: list[Path] = []
    with pytest.raises(RuntimeError, match="mine"), run.scratch() as folder:
        lent.append(folder)
        (folder / "file").write_text("x")
        raise RuntimeError("mine")
    with run.scratch() as folder:
        assert list(folder.iterdir()) == []
    assert not lent[0].exists()


def test_an_upload_that_fails_leaves_other_checkpoints_whole(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.at(f"{object_store}/{tmp_path.name}", "run")
    save(run, 1)
    copy, calls = pyarrow.fs.copy_files, 0

    def fail_at_third(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("connection lost")
        copy(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="connection lost"):
        patch.setattr(pyarrow.fs, "copy_files", fail_at_third)
        save(run, 2)
    assert run.checkpoints(hashed=True) == [1]
    assert all(name.startswith("checkpoint_0001/") for name in listing(run))
    save(run, 2)
    assert run.last() == 2


def test_an_upload_puts_the_manifest_last(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.at(f"{object_store}/{tmp_path.name}", "run")
    copy, seen = pyarrow.fs.copy_files, []

    def watch(source: str, target: str, **kwargs: Any) -> None:
        assert run.checkpoints() == []
        copy(source, target, **kwargs)
        seen.append(Path(target).name)

    monkeypatch.setattr(pyarrow.fs, "copy_files", watch)
    save(run, 1)
    assert seen == ["config.json", "model.safetensors", "trainer.pt", "manifest.json"]
    assert run.checkpoints() == [1]


class KilledError(BaseException):
    """Nothing catches this, as nothing catches a SIGKILL."""


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
def test_wherever_a_replacement_is_killed_a_whole_checkpoint_of_the_epoch_remains(
    run: RunFolder, tmp_path: Path, place: int
) -> None:
    from scribbleseg import runs

    save(run, 2)
    left = place

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def die_or_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return call(*args, **kwargs)

        return die_or_call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "replace"), (shutil, "move"), (shutil, "rmtree"), (pyarrow.fs, "copy_files"),
            (runs, "_remove_checkpoint"), (runs, "_upload"), (runs, "_copy_into_place"),
        ):  # fmt: skip
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save(run, 2, value=9)
        except KilledError:
            pass
        else:
            # Enough places were tried: without this one the save comes to its end.
            assert place > 5
    run.finish_save()
    assert run.checkpoints(hashed=True) == [2]
    assert value_in(run, 2, tmp_path) in (2, 9)
    save(run, 2, value=10)
    assert value_in(run, 2, tmp_path) == 10
    assert all(name.startswith("checkpoint_0002/") for name in listing(run))


# Best, pull, status.


def test_pull_brings_the_best_verified(run: RunFolder, storage: str, tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save(run, epoch)
    run.write_best(2, "miou", 0.8125)
    best = {"checkpoint": "checkpoint_0002", "epoch": 2, "metric": "miou", "value": 0.8125}
    assert run.best() == best
    uri = f"{storage}/cpu-1a2b3c4d"
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "empty"):
        assert pull(uri, out) == out
        assert value_of(out) == 2
    assert value_of(pull(f"{uri}/checkpoint_0003", tmp_path / "third")) == 3
    assert value_of(find_checkpoint(uri, tmp_path / "found")) == 2
    assert value_of(find_checkpoint(str(tmp_path / "out"), tmp_path / "unused")) == 2


def test_pull_follows_a_sweep_to_its_best_run(storage: str, tmp_path: Path) -> None:
    sweep = RunFolder.at(storage, "sweep")
    trial = RunFolder.at(f"{storage}/sweep", "trial_0003")
    save(trial, 4)
    sweep.write_json("best.json", {"run": "trial_0003", "checkpoint": "checkpoint_0004"})
    assert value_of(pull(f"{storage}/sweep", tmp_path / "out")) == 4
    # The trial goes on, finds a better one and keeps no other; the sweep hears of it at its end.
    save(trial, 9)
    trial.write_best(9, "miou", 0.9)
    trial.prune(1)
    assert trial.checkpoints() == [9]
    assert value_of(pull(f"{storage}/sweep", tmp_path / "later")) == 9
    found = find_checkpoint(f"{storage}/sweep", tmp_path / "found")
    assert value_of(found) == 9


def test_pull_names_what_it_cannot_use(run: RunFolder, storage: str, tmp_path: Path) -> None:
    uri, out = f"{storage}/cpu-1a2b3c4d", tmp_path / "out"
    assert "holds neither" in one_line(lambda: pull(uri, out))
    save(run, 1)
    assert "holds neither" in one_line(lambda: pull(uri, out))
    run.write_best(1, "miou", 0.5)
    with run.filesystem.open_output_stream(f"{run.checkpoint_path(1)}/config.json") as stream:
        stream.write(b"tampered")
    assert "config.json" in one_line(lambda: pull(uri, out))
    run.write_json("best.json", {"checkpoint": "../../other/checkpoint_0001"})
    assert "best.json" in one_line(lambda: pull(uri, out))
    assert not out.exists()


def test_pull_overwrites_nothing(local_run: RunFolder, tmp_path: Path) -> None:
    save(local_run, 1)
    local_run.write_best(1, "miou", 0.5)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert "not an empty folder" in one_line(lambda: pull(local_run.path, out))
    assert "not an empty folder" in one_line(lambda: pull(local_run.path, out / "thesis.txt"))
    assert (out / "thesis.txt").read_text() == "precious"
    below = out / "thesis.txt" / "best"
    assert "expected a folder that can be written" in one_line(lambda: pull(local_run.path, below))


def test_pull_follows_a_link_and_refuses_a_mounted_disk(
    local_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(local_run, 1)
    local_run.write_best(1, "miou", 0.5)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert pull(local_run.path, tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out").is_symlink() and value_of(tmp_path / "disk") == 1
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mounted")
    assert "mounted there" in one_line(lambda: pull(local_run.path, tmp_path / "mounted"))


def test_status_is_computed_from_storage_alone(run: RunFolder, storage: str) -> None:
    uri = f"{storage}/cpu-1a2b3c4d"
    assert "holds no run.json, nor any folder" in one_line(lambda: status(uri))
    run.write_json("run.json", {"finished": False, "config": to_dict(FinetuneConfig())})
    assert "holds no run.json, but cpu-1a2b3c4d;" in one_line(lambda: status(storage))
    begun = status(uri)
    assert (begun.epoch, begun.epochs, begun.metrics, begun.seconds_left) == (0, 40, {}, None)

    seconds = [500.0, 10.0, 10.0, 10.0, 20.0, 20.0]  # The first epoch was slow: it is forgotten.
    history = [{"epoch": n, "seconds": s, "miou": 0.1 * n} for n, s in enumerate(seconds, start=1)]
    run.write_metrics(history)
    run.write_best(6, "miou", 0.6)
    assert status(uri) == RunStatus(
        name="cpu-1a2b3c4d",
        finished=False,
        epoch=6,
        epochs=40,
        best={"checkpoint": "checkpoint_0006", "epoch": 6, "metric": "miou", "value": 0.6},
        metrics=history[-1],
        seconds_left=34 * 14.0,
    )
    run.write_json("run.json", {"finished": True, "config": to_dict(FinetuneConfig())})
    assert status(uri).finished
    assert status(uri).seconds_left == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("wall_time", "x"), ("config", [1]), ("finished", 1), ("versions", "2.11"), ("kind", None)],
)
def test_a_field_of_run_json_that_no_run_writes_is_named(
    local_run: RunFolder, name: str, value: object
) -> None:
    local_run.write_json("run.json", {"seed": 0, name: value})
    assert f"run.json: {name} is {value!r}" in one_line(lambda: status(local_run.path))


def test_a_wall_time_that_is_no_number_is_named(local_run: RunFolder) -> None:
    local_run.write_json("run.json", {"seed": 0})
    (Path(local_run.path) / "run.json").write_text('{"wall_time": Infinity}')
    assert "run.json: wall_time is inf" in one_line(lambda: status(local_run.path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"loss": 1}', "epoch is None, expected a whole number"),
        ('{"epoch": "one"}', "epoch is 'one'"),
        ('{"epoch": 2, "seconds": null}', "seconds is None, expected a finite number"),
        ('{"epoch": 2, "seconds": [1]}', "seconds is [1]"),
        ('{"epoch": 2, "loss": NaN}', "loss is nan, expected a finite number"),
        ('{"epoch": 2, "seconds": 1' + "0" * 400 + "}", "seconds is 1000"),
    ],
)
def test_a_row_of_metrics_that_no_run_writes_is_named(
    local_run: RunFolder, row: str, message: str
) -> None:
    local_run.write_json("run.json", {"config": {"train": {"epochs": 3}}})
    (Path(local_run.path) / "metrics.jsonl").write_text('{"epoch": 1}\n' + row + "\n")
    line = one_line(lambda: status(local_run.path))
    assert "metrics.jsonl, line 2: " in line and message in line


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"checkpoint": "../../etc", "epoch": 1, "metric": "miou", "value": 0.5},
        {"checkpoint": "checkpoint_0001", "epoch": [1], "metric": "miou", "value": 0.5},
        {"checkpoint": "checkpoint_0001", "epoch": 1, "metric": "miou", "value": "0.5"},
    ],
)
def test_a_hostile_best_json_gives_one_line(local_run: RunFolder, tree: dict[str, Any]) -> None:
    local_run.write_json("best.json", tree)
    assert "best.json: does not say which" in one_line(local_run.best)


def test_pruning_removes_a_link_and_nothing_that_it_leads_to(
    local_run: RunFolder, tmp_path: Path
) -> None:
    outside = build(tmp_path / "outside")
    save(local_run, 2)
    (Path(local_run.path) / "checkpoint_0001").symlink_to(outside)
    local_run.prune(1)
    assert local_run.checkpoints() == [2]
    assert (outside / "model.safetensors").exists()


def test_googles_storage_is_not_tried_for_a_quarter_of_an_hour() -> None:
    def opened(uri: str) -> pyarrow.fs.FileSystem:
        filesystem, path = open_storage(uri)
        assert path == "bucket/run"
        return filesystem

    def limited(seconds: int) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.GcsFileSystem(
            anonymous=True,
            scheme="http",
            default_bucket_location="",
            retry_time_limit=timedelta(seconds=seconds),
        )

    assert opened("gs://anonymous@bucket/run?scheme=http").equals(limited(GOOGLE_PATIENCE))
    own = "gs://anonymous@bucket/run?scheme=http&retry_limit_seconds=5"
    assert opened(own).equals(limited(5)) and not opened(own).equals(limited(6))
