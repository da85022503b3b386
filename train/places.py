"""Where runs are and whose: folders made absolute, names, locks, the commit of the code."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scribbleseg.config import DataConfig, PretrainConfig, config_hash, from_dict
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder


def absolute(location: str) -> str:
    """Return a local path made absolute, because workers start elsewhere.

    URIs and released:NAME stay as they are.
    """
    if "://" in location or location.startswith("released:"):
        return location
    return str(Path(location).expanduser().resolve())


def absolute_pretraining(config: PretrainConfig) -> PretrainConfig:
    """Return the settings of a pretraining with its folders made absolute."""
    data, probe = config.data, config.probe
    data = replace(
        data,
        roots=tuple(map(absolute, data.roots)),
        cache_dir=None if data.cache_dir is None else absolute(data.cache_dir),
    )
    root = None if probe.root is None else absolute(probe.root)
    return replace(config, data=data, probe=replace(probe, root=root))


def absolute_data(data: DataConfig) -> DataConfig:
    """Return the settings of the data with its folders made absolute."""
    return replace(
        data,
        root=absolute(data.root),
        extra=tuple(map(absolute, data.extra)),
        cache_dir=None if data.cache_dir is None else absolute(data.cache_dir),
    )


def choose_run(
    config: Any, storage: str, *, recipe: str, name: str | None, fresh: bool
) -> tuple[str, RunFolder]:
    """Return the name and the folder of the run to start or to continue.

    Raises:
        InputError: the folder holds a run of another configuration, or is none.
    """
    if "://" not in storage and Path(storage).is_file():
        raise InputError(f"{storage}: is a file, expected a folder; choose another --storage")
    wanted = first = name or f"{recipe}-{config_hash(config)}"
    run = RunFolder.at(storage, wanted)
    if fresh:
        number = 2
        while run.exists():
            wanted = f"{first}--{number}"
            run = RunFolder.at(storage, wanted)
            number += 1
    record = run.read_record()
    if record is not None and not _tells_of(record.get("config"), config):
        raise InputError(
            f"{storage}/{wanted}: holds a run with other settings; choose another --name, "
            "or --fresh to start anew beside it"
        )
    return wanted, run


def _tells_of(found: Any, config: Any) -> bool:
    """Say whether a record's settings are these; one of an older version lacks what came later."""
    try:
        return isinstance(found, dict) and from_dict(type(config), found) == config
    except InputError:
        return False


@contextmanager
def sole(place: str) -> Generator[None]:
    """Keep a run or a sweep to this process of the machine: two would write over each other.

    Raises:
        InputError: another process has it.
    """
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    # Not in the folder: that may be a bucket, or not be there yet.
    lock = FileLock(Path(tempfile.gettempdir()) / f"scribbleseg-{os.getuid()}-{digest}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{place}: another process on this machine is at work on it; wait for its end or stop "
            "it, or choose another --name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def git_commit() -> str | None:
    """Return the commit of this code, with "+changes" if it was edited; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Installed somewhere below another project's folder, it is not of that project's commits.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
