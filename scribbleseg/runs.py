"""The run folder on any storage: written, read, pruned and pulled through pyarrow's file systems.

```
STORAGE/NAME/
  run.json            what ran
  metrics.jsonl       one object per epoch, rewritten whole
  best.json           which checkpoint is best, by which metric
  checkpoint_EPOCH/   see `scribbleseg.checkpoint`
  pictures/           what a pretrained encoder sees, one small file per probed epoch
```

STORAGE is a local path or a URI (s3://, gs://; `AWS_ENDPOINT_URL` is honoured). Local files and
folders are written beside their place and renamed into it. Object stores have no rename, but there
a single put is atomic, and a checkpoint's manifest is put last. A checkpoint is replaced only by
one that has arrived whole.

One process writes a run at a time; any number may read it, with nothing but this folder.
"""

# pyarrow ships no types, and most of this file talks to it.

import contextlib
import hashlib
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from scribbleseg.errors import InputError
from scribbleseg.manifest import (
    BEST,
    MANIFEST,
    find_best,
    is_plain_name,
    make_folder,
    parse_json,
    parse_manifest,
    partial_path,
    place_of_new,
    resolve,
    shown,
    to_json,
    verify,
    write_bytes,
)

RUN = "run.json"
METRICS = "metrics.jsonl"
# Each says of what kind a folder is: of a run, a sweep or an ablation.
_RECORDS = (RUN, "sweep.json", "ablation.json")
# What these replace or remove, besides a run's checkpoints.
_WRITTEN = (
    *(METRICS, BEST, "pictures", "report.html", "tensorboard"),
    *("trials.csv", "tune", "tables.csv", "tables.md"),
)

# What run.json holds, where it holds it: who reads a field need not ask what it is.
_RECORD = {
    "kind": str,
    "recipe": str,
    "config": dict,
    "resolved": dict,
    "data_fingerprint": str,
    "versions": dict,
    "started": str,
    "wall_time": (int, float),
    "finished": bool,
}
_CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{4,9})")
# What is to replace a checkpoint of the same epoch is brought there whole under this name first.
_INCOMING_NAME = re.compile(r"\.incoming_(\d{4,9})")
_MAX_FILE_BYTES = 1_000_000
_MAX_METRICS_BYTES = 100_000_000
_EPOCHS_FOR_PACE = 5
GOOGLE_PATIENCE = 60
"""Seconds for which a request to Google's storage is tried again."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run on a storage; picklable, and nothing is touched until a method is called."""

    filesystem: FileSystem
    """pyarrow file system that holds the run."""
    path: str
    """The run's folder on that file system, absolute."""

    @staticmethod
    def at(storage: str, name: str) -> "RunFolder":
        """Return the run `name` on a storage, whether it exists or not.

        Raises:
            InputError: a name that is not one plain folder, or a storage that cannot be reached.
        """
        if not is_plain_name(name):
            raise InputError(f"run name {name!r}: expected one folder name, such as cpu-1a2b3c4d")
        parent = RunFolder.open(storage)
        return RunFolder(filesystem=parent.filesystem, path=f"{parent.path.rstrip('/')}/{name}")

    @staticmethod
    def open(uri: str) -> "RunFolder":
        """Return the run in a folder, given as local path or URI, whether it exists or not.

        Raises:
            InputError: a storage that cannot be reached.
        """
        filesystem, path = open_storage(uri)
        return RunFolder(filesystem=filesystem, path=path)

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.rpartition("/")[2]

    @property
    def local_path(self) -> Path | None:
        """The run's folder on this machine; None on any other storage."""
        return Path(self.path) if isinstance(self.filesystem, LocalFileSystem) else None

    def child(self, name: str) -> "RunFolder":
        """Return the folder `name` in this one, whether it exists or not."""
        return RunFolder(filesystem=self.filesystem, path=f"{self.path}/{name}")

    def exists(self) -> bool:
        """Say whether a run was started here: its run.json is written."""
        return _is_file(self.filesystem, f"{self.path}/{RUN}")

    def foreign(self, record: str) -> str | None:
        """Return the name of what shows that a folder is not of this kind; None where nothing does.

        That is the record of another kind; or, without a record, what would be replaced or removed.

        Args:
            record: run.json, sweep.json or ablation.json.
        """
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        names = sorted(info.base_name for info in infos)
        other = next((name for name in names if name in _RECORDS and name != record), None)
        if other is not None or record in names:
            return other
        return next((n for n in names if n in _WRITTEN or _CHECKPOINT_NAME.fullmatch(n)), None)

    def finished(self) -> bool:
        """Say whether the run came to its end."""
        return (self.read_record() or {}).get("finished") is True

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of the run, atomically; its name may lead into a folder.

        Raises:
            OSError: it cannot be written; an older file stays.
        """
        if self.local_path is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                stream.write(content)
        else:
            path = self.local_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)

    def read_file(self, name: str) -> bytes | None:
        """Read a small file of the run; None where there is none.

        Raises:
            InputError: it is not small.
        """
        return _read(self.filesystem, f"{self.path}/{name}", limit=_MAX_FILE_BYTES)

    def list_files(self, folder: str) -> list[str]:
        """Return the names of the files in a folder of the run, in order."""
        selector = FileSelector(f"{self.path}/{folder}", allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == FileType.File)

    def list_folders(self) -> list[str]:
        """Return the names of the folders in this one, in order."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == FileType.Directory)

    def write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, atomically.

        Raises:
            OSError: it cannot be written; an older file stays.
        """
        self.write_file(name, to_json(tree))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the run; None where there is none.

        Raises:
            InputError: it is not a JSON object.
        """
        path = f"{self.path}/{name}"
        content = _read(self.filesystem, path, limit=_MAX_FILE_BYTES)
        return None if content is None else parse_json(content, path)

    def read_record(self) -> dict[str, Any] | None:
        """Read run.json; None where there is none. Fields may be missing.

        Raises:
            InputError: it is not a JSON object, or a field is not what a run writes.
        """
        record = self.read_json(RUN)
        for name, value in (record or {}).items():
            # Python's reader of JSON knows NaN and Infinity, which no run writes.
            is_finite = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(value, _RECORD.get(name, object)) or not is_finite:
                raise InputError(
                    f"{self.path}/{RUN}: {name} is {shown(value)}, not what a run writes"
                )
        return record

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl: one line per epoch, replacing what it held.

        Raises:
            OSError: it cannot be written; an older file stays.
        """
        self.write_file(METRICS, b"".join(to_json(row, indent=None) for row in history))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; an empty list where there is none.

        Raises:
            InputError: a line is not a JSON object of numbers, or it is far too large.
        """
        path = f"{self.path}/{METRICS}"
        lines = (_read(self.filesystem, path, limit=_MAX_METRICS_BYTES) or b"").splitlines()
        return [
            _parse_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)
        ]

    @contextlib.contextmanager
    def scratch(self) -> Generator[Path]:
        """Lend an empty local folder to build the next checkpoint in; it is removed afterwards.

        On local storage it lies hidden in the run, so that `save_checkpoint` only renames it; else
        among the machine's temporary files. What a killed process left in it is removed first.

        Raises:
            OSError: the folder cannot be made.
        """
        if self.local_path is None:
            with tempfile.TemporaryDirectory(prefix="scribbleseg-") as folder:
                yield Path(folder)
            return
        folder = self.local_path / ".scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def save_checkpoint(self, epoch: int, local_folder: Path) -> str:
        """Put a finished local checkpoint folder into the run, replacing one of the same epoch.

        Args:
            epoch: epoch that the checkpoint belongs to (0 or more).
            local_folder: whole checkpoint, manifest included; on local storage it is moved away.

        Returns:
            The checkpoint's path on `filesystem`.

        Raises:
            OSError: it cannot be written, such as on a full disk. Every other checkpoint stays
                whole, and what was written of this one is removed. An older checkpoint of the same
                epoch stays too, or the new one can be had by `finish_save`.
            ValueError: `local_folder` holds no whole checkpoint.
        """
        faults = verify(local_folder, hashed=())
        if faults:
            raise ValueError(f"not a whole checkpoint: {faults[0]}")
        self.finish_save()
        target, incoming = self.checkpoint_path(epoch), f"{self.path}/.incoming_{epoch:04d}"
        if self.local_path is not None:
            _move_into_place(local_folder, Path(incoming), Path(target))
        elif self.filesystem.get_file_info(target).type == FileType.NotFound:
            _upload(local_folder, self.filesystem, target)
        else:
            _upload(local_folder, self.filesystem, incoming)
            _copy_into_place(self.filesystem, incoming, target)
        return target

    def finish_save(self) -> None:
        """Finish what a process that was killed while it replaced a checkpoint has left.

        The new one is taken if it had arrived whole; else its remains are removed, and the old one
        is still there. Only the process that writes the run may call this.

        Raises:
            OSError: the storage cannot be written.
        """
        for name in self.list_folders():
            match = _INCOMING_NAME.fullmatch(name)
            if match is None:
                continue
            incoming, target = f"{self.path}/{name}", self.checkpoint_path(int(match[1]))
            if not self._is_whole(incoming, hashed=False):
                _remove_checkpoint(self.filesystem, incoming)
            elif self.local_path is not None:
                _put_into_place(Path(incoming), Path(target))
            else:
                _copy_into_place(self.filesystem, incoming, target)

    def checkpoint_path(self, epoch: int) -> str:
        """Return where the checkpoint of an epoch lies on `filesystem`, or would lie."""
        return f"{self.path}/{_checkpoint_name(epoch)}"

    def checkpoints(self, *, hashed: bool = False) -> list[int]:
        """Return the epochs of the whole checkpoints, in order.

        Args:
            hashed: compare the files' content with the manifest too, not only their sizes.
        """
        return [
            epoch
            for epoch in self._epochs()
            if self._is_whole(self.checkpoint_path(epoch), hashed=hashed)
        ]

    def last(self, *, hashed: bool = False) -> int | None:
        """Return the epoch of the last whole checkpoint; None where there is none.

        Args:
            hashed: compare the files' content with the manifest too, not only their sizes.
        """
        for epoch in reversed(self._epochs()):
            if self._is_whole(self.checkpoint_path(epoch), hashed=hashed):
                return epoch
        return None

    def write_best(self, epoch: int, metric: str, value: float) -> None:
        """Record which checkpoint is best; called after the checkpoint is saved.

        Raises:
            OSError: it cannot be written; the older record stays.
        """
        name = _checkpoint_name(epoch)
        self.write_json(
            BEST, {"checkpoint": name, "epoch": epoch, "metric": metric, "value": value}
        )

    def best(self) -> dict[str, Any] | None:
        """Return `checkpoint`, `epoch`, `metric` and `value` of the best; None where there is none.

        Raises:
            InputError: best.json does not say so.
        """
        tree = self.read_json(BEST)
        match tree:
            case None:
                return None
            case {
                "checkpoint": str(),
                "epoch": int(),
                "metric": str(),
                "value": int() | float(),
            } if is_plain_name(tree["checkpoint"]):
                return tree
            case _:
                raise InputError(
                    f"{self.path}/{BEST}: does not say which checkpoint is best; expected "
                    "checkpoint, epoch, metric and value"
                )

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the last `keep` whole ones and the best.

        Remains of unfinished checkpoints older than the last whole one are removed as well.

        Args:
            keep: number of checkpoints to keep besides the best (1 or more).
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected 1 or more")
        whole = self.checkpoints()
        kept = {*whole[-keep:], (self.best() or {}).get("epoch")}
        for epoch in self._epochs():
            if whole and epoch < whole[-1] and epoch not in kept:
                _remove_checkpoint(self.filesystem, self.checkpoint_path(epoch))

    def fetch(self, epoch: int, destination: Path) -> Path:
        """Copy the checkpoint of an epoch to this machine.

        Args:
            epoch: epoch of the checkpoint.
            destination: folder that becomes the copy; missing or empty before.

        Returns:
            `destination`.

        Raises:
            InputError: the checkpoint is not there, not whole, or does not match its manifest.
            OSError: it cannot be read or written.
        """
        return _download(self.filesystem, self.checkpoint_path(epoch), destination)

    def _epochs(self) -> list[int]:
        """Epochs of all checkpoint folders, whole or not, in order."""
        selector = FileSelector(self.path, allow_not_found=True)
        names = [
            _CHECKPOINT_NAME.fullmatch(info.base_name)
            for info in self.filesystem.get_file_info(selector)
        ]
        return sorted(int(match[1]) for match in names if match)

    def _is_whole(self, folder: str, *, hashed: bool) -> bool:
        content = _read(self.filesystem, f"{folder}/{MANIFEST}", limit=_MAX_FILE_BYTES)
        if content is None:
            return False
        try:
            stamps = parse_manifest(content, f"{folder}/{MANIFEST}")
        except InputError:
            return False
        infos = self.filesystem.get_file_info([f"{folder}/{name}" for name in stamps])
        return all(
            info.type == FileType.File
            and info.size == stamp.size
            and (not hashed or _sha256(self.filesystem, info.path) == stamp.sha256)
            for info, stamp in zip(infos, stamps.values(), strict=True)
        )


def open_storage(uri: str) -> tuple[FileSystem, str]:
    """Return the file system of a local path or URI, and the path on it, absolute.

    Raises:
        InputError: a storage that cannot be reached.
    """
    if "://" not in uri:
        return LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = FileSystem.from_uri(_with_patience(uri))
        if not path:
            raise ValueError("it names no bucket")
        if "//" in path:
            raise ValueError("a folder in it has no name: //")
    except (ValueError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{uri}: not a storage that can be reached ({reason}); "
            "expected a local path, s3://BUCKET/PATH or gs://BUCKET/PATH"
        ) from None
    return filesystem, path.rstrip("/")


def _with_patience(uri: str) -> str:
    """Return the URI, one of Google's storage with a limit to how long a request is tried again.

    Without one it would be tried for a quarter of an hour, and nothing said meanwhile.
    """
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE_PATIENCE}"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run is, from its folder alone."""

    name: str
    """The run's name."""
    finished: bool
    """Whether it came to its end."""
    epoch: int
    """Epochs done."""
    epochs: int | None
    """Epochs that its settings ask for; None where run.json does not say."""
    best: dict[str, Any] | None
    """Content of best.json."""
    metrics: dict[str, Any]
    """Last line of metrics.jsonl; empty before the first epoch's end."""
    seconds_left: float | None
    """Time to the end at the pace of the last epochs; None where there is no pace yet."""


def status(uri: str) -> RunStatus:
    """Say how far a run is.

    Args:
        uri: the run folder, as local path or URI.

    Raises:
        InputError: no run is there, or its files are damaged.
    """
    run = RunFolder.open(uri)
    record = run.read_record()
    if record is None:
        inside = ", ".join(run.list_folders()[:3])
        found = f"but {inside}" if inside else "nor any folder"
        raise InputError(
            f"{uri}: holds no {RUN}, {found}; expected the folder of a run, STORAGE/NAME"
        )
    history = run.read_metrics()
    metrics = history[-1] if history else {}
    finished = record.get("finished") is True
    epoch = int(metrics.get("epoch", 0))
    epochs = _num_epochs(record)
    return RunStatus(
        name=run.name,
        finished=finished,
        epoch=epoch,
        epochs=epochs,
        best=run.best(),
        metrics=metrics,
        seconds_left=0.0 if finished else _seconds_left(history, epoch, epochs),
    )


def pull(uri: str, out: Path) -> Path:
    """Copy a run's best checkpoint to this machine, held against its manifest.

    Args:
        uri: a run, a sweep (its best.json names the run as well) or a checkpoint folder, as local
            path or URI.
        out: folder that becomes the checkpoint; missing or empty before.

    Returns:
        `out`.

    Raises:
        InputError: nothing whole is there, or `out` holds files already.
        OSError: it cannot be read or written.
    """
    folder = RunFolder.open(uri)
    source = folder.path
    if not _is_file(folder.filesystem, f"{source}/{MANIFEST}"):
        source = f"{source}/{find_best(folder.read_file, uri)}"
    return _download(folder.filesystem, source, out)


def find_checkpoint(reference: str, scratch: Path) -> Path:
    """Find the checkpoint folder that a user means, on any storage.

    Args:
        reference: as for `manifest.resolve`, or the URI of a checkpoint, run or sweep.
        scratch: local folder, missing or empty, that becomes the copy of a remote checkpoint.

    Raises:
        InputError: nothing of the kind is there.
        OSError: a remote checkpoint cannot be read.
    """
    return pull(reference, scratch) if "://" in reference else resolve(reference)


def _checkpoint_name(epoch: int) -> str:
    return f"checkpoint_{epoch:04d}"


def _move_into_place(folder: Path, incoming: Path, target: Path) -> None:
    """Make `folder` the new `target`, by way of `incoming` in the folder of the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A rename where `folder` comes from `RunFolder.scratch`, a copy from another file system.
        shutil.move(folder, incoming)
        _put_into_place(incoming, target)
    except OSError:
        shutil.rmtree(incoming, ignore_errors=True)
        raise


def _put_into_place(incoming: Path, target: Path) -> None:
    """Rename a folder; the one that it replaces goes only once the new one stands."""
    outgoing = target.with_name(".outgoing")
    shutil.rmtree(outgoing, ignore_errors=True)
    try:
        if target.exists():
            os.replace(target, outgoing)
        os.replace(incoming, target)
    except OSError:
        if outgoing.exists() and not target.exists():
            os.replace(outgoing, target)
        raise
    shutil.rmtree(outgoing, ignore_errors=True)


def _copy_into_place(filesystem: FileSystem, incoming: str, target: str) -> None:
    """Replace a checkpoint on an object store by another one there, manifest last.

    Stores copy their own objects without moving them through here. Until the end either the old
    checkpoint or the incoming one is whole.
    """
    infos = filesystem.get_file_info(FileSelector(incoming))
    names = sorted(info.base_name for info in infos if info.base_name != MANIFEST)
    _remove_checkpoint(filesystem, target)
    for name in [*names, MANIFEST]:
        filesystem.copy_file(f"{incoming}/{name}", f"{target}/{name}")
    _remove_checkpoint(filesystem, incoming)


def _upload(folder: Path, filesystem: FileSystem, target: str) -> None:
    """Copy a checkpoint folder to an object store, the manifest last."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    try:
        for name in [*names, MANIFEST]:
            pyarrow.fs.copy_files(
                str(folder / name),
                f"{target}/{name}",
                source_filesystem=LocalFileSystem(),
                destination_filesystem=filesystem,
            )
    except OSError:
        with contextlib.suppress(OSError):
            _remove_checkpoint(filesystem, target)
        raise


def _download(filesystem: FileSystem, source: str, out: Path) -> Path:
    """Copy a checkpoint folder to this machine, whole and verified or not at all."""
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already and is not an empty folder; give another --out")
    place = place_of_new(out)
    manifest = _read(filesystem, f"{source}/{MANIFEST}", limit=_MAX_FILE_BYTES)
    if manifest is None:
        raise InputError(f"{source}: holds no {MANIFEST}; expected a checkpoint written to its end")
    stamps = parse_manifest(manifest, f"{source}/{MANIFEST}")
    partial = partial_path(place)
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial, asked=out)
    try:
        for name, stamp in stamps.items():
            _require_size(filesystem, f"{source}/{name}", stamp.size)
            pyarrow.fs.copy_files(
                f"{source}/{name}",
                str(partial / name),
                source_filesystem=filesystem,
                destination_filesystem=LocalFileSystem(),
            )
        write_bytes(partial / MANIFEST, manifest)
        faults = verify(partial)
        if faults:
            raise InputError(f"{source}: damaged; after copying, {faults[0]}")
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _require_size(filesystem: FileSystem, path: str, size: int) -> None:
    """Raise unless a file has the manifest's size; asked before it is copied."""
    info = filesystem.get_file_info(path)
    if info.type != FileType.File or info.size != size:
        found = f"{info.size} bytes" if info.type == FileType.File else "missing"
        raise InputError(f"{path}: {found}, the manifest says {size} bytes; it is damaged")


def _remove_checkpoint(filesystem: FileSystem, path: str) -> None:
    """Remove a checkpoint folder, manifest first, so that no reader takes a half-removed one."""
    if _is_file(filesystem, f"{path}/{MANIFEST}"):
        filesystem.delete_file(f"{path}/{MANIFEST}")
    if filesystem.get_file_info(path).type == FileType.Directory:
        filesystem.delete_dir(path)


def _is_file(filesystem: FileSystem, path: str) -> bool:
    return filesystem.get_file_info(path).type == FileType.File


def _read(filesystem: FileSystem, path: str, *, limit: int | None = None) -> bytes | None:
    """Content of a file; None where there is none.

    Raises:
        InputError: the file is over `limit` bytes.
    """
    info = filesystem.get_file_info(path)
    if info.type != FileType.File:
        return None
    if limit is not None and info.size > limit:
        raise InputError(f"{path}: {info.size} bytes, expected a small file")
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def _sha256(filesystem: FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if type(row.get("epoch")) is not int:
        raise InputError(f"{where}: epoch is {shown(row.get('epoch'))}, expected a whole number")
    for name, value in row.items():
        # Neither NaN nor what no float can hold.
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise InputError(f"{where}: {name} is {shown(value)}, expected a finite number")
    return row


def _num_epochs(record: Mapping[str, Any]) -> int | None:
    match record:
        case {"config": {"train": {"epochs": int(epochs)}}}:
            return epochs
        case _:
            return None


def _seconds_left(
    history: Sequence[Mapping[str, Any]], epoch: int, epochs: int | None
) -> float | None:
    pace = [row["seconds"] for row in history[-_EPOCHS_FOR_PACE:] if "seconds" in row]
    if not pace or epochs is None:
        return None
    return max(0, epochs - epoch) * statistics.fmean(pace)
