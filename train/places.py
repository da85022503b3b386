"""Where runs are and whose: folders made absolute, names, locks, the commit of the code."""

import contextlib
import hashlib
import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scribbleseg.config import (
    PASSING,
    DataConfig,
    FinetuneConfig,
    PretrainConfig,
    config_hash,
    essence,
    flatten,
    from_dict,
    to_dict,
)
from scribbleseg.datasets.remote import inside
from scribbleseg.errors import InputError
from scribbleseg.manifest import shown
from scribbleseg.runs import RUN, RunFolder

# Name of the file in which a command leaves its word for its workers.
MARK = ".driver"
# What to give instead of a folder that another machine does not have.
SHARED = (
    "expected a storage that all machines of the cluster share: s3://BUCKET/PATH, "
    "gs://BUCKET/PATH, or a folder mounted on each of them"
)


def absolute(location: str) -> str:
    """Return a local path made absolute, because workers start elsewhere.

    URIs and released:NAME stay as they are, but for a URI's slashes at its end: what follows would
    otherwise lie in a folder without a name.
    """
    if "://" in location:
        scheme, _, path = location.partition("://")
        return f"{scheme}://{path.rstrip('/')}"
    if location.startswith("released:"):
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
        InputError: the folder holds a run of another configuration or what is no run's, or is none.
    """
    if "://" not in storage and Path(storage).is_file():
        raise InputError(f"{storage}: is a file, expected a folder; choose another --storage")
    wanted = first = name or f"{recipe}-{config_hash(essence(config))}"
    run = RunFolder.at(storage, wanted)
    if fresh:
        number = 2
        while run.exists():
            wanted = f"{first}--{number}"
            run = RunFolder.at(storage, wanted)
            number += 1
    require_own(run, inside(storage, wanted), RUN)
    record = run.read_record()
    if record is not None and not tells_of(record.get("config"), config):
        raise InputError(
            f"{inside(storage, wanted)}: holds a run with other settings"
            f"{_differences(record.get('config'), config)}; choose another --name, or --fresh to "
            "start anew beside it"
        )
    return wanted, run


def require_own(folder: RunFolder, place: str, record: str) -> None:
    """See that a folder holds nobody else's work: a name like checkpoint_0001 is not ours alone.

    Args:
        folder: The folder of a run, sweep or ablation, whether it exists or not.
        place: What people call it.
        record: Which of them: run.json, sweep.json or ablation.json.

    Raises:
        InputError: it is the folder of another kind, or holds what would be replaced or removed.
    """
    found = folder.foreign(record)
    if found is not None:
        wanted = record.removesuffix(".json")
        raise InputError(
            f"{place}: holds {found} of something else, expected a new folder, or one of a "
            f"{wanted} with its {record}; choose another --name"
        )


def _differences(found: Any, config: Any) -> str:
    """Return which settings a record has otherwise, as " (KEY is 0, here 1)"; "" for none known."""
    before = flatten(found) if isinstance(found, dict) else {}
    changed = [
        f"{key} is {shown(before[key])}, here {shown(value)}"
        for key, value in flatten(to_dict(config)).items()
        if key in before and before[key] != value and key not in PASSING
    ]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f" ({'; '.join(changed[:3])}{more})" if changed else ""


def tells_of(found: Any, config: Any) -> bool:
    """Say whether a record's settings are these; one of an older version lacks what came later.

    Those of a run may differ in what it may be given anew, see `config.PASSING`.
    """
    of_a_run = isinstance(config, FinetuneConfig | PretrainConfig)
    try:
        known = from_dict(type(config), found) if isinstance(found, dict) else None
        return essence(known) == essence(config) if known and of_a_run else known == config
    except InputError:
        return False


@contextlib.contextmanager
def marked(folder: RunFolder) -> Generator[str]:
    """Leave a word in a folder for the workers that are to write there, as long as they do.

    A local path is another folder on another machine: what is written there would be lost with it.
    See `require_mark`.

    Raises:
        InputError: the folder cannot be written.
    """
    word = uuid.uuid4().hex
    try:
        folder.write_file(MARK, word.encode())
    except OSError as error:
        raise InputError(
            f"{folder.path}: cannot be written ({error}); expected a folder or bucket in which you "
            "may write"
        ) from None
    try:
        yield word
    finally:
        with contextlib.suppress(OSError):
            folder.filesystem.delete_file(f"{folder.path}/{MARK}")
            if folder.local_path is not None:
                # Only what is empty goes: a job that wrote nothing leaves nothing.
                folder.local_path.rmdir()


def require_mark(folder: RunFolder, word: str) -> None:
    """See that a worker has the folder in which the command left this word.

    Raises:
        InputError: it is another one.
    """
    if folder.read_file(MARK) != word.encode():
        raise InputError(
            f"{folder.path}: is another folder on {platform.node()} than where the command was "
            f"given; {SHARED}"
        )


@contextlib.contextmanager
def sole(place: str) -> Generator[None]:
    """Keep a run or a sweep to this process of the machine: two would write over each other.

    Raises:
        InputError: another process has it.
    """
    # A path and a file:// URI are one place.
    local = RunFolder.open(place).local_path
    digest = hashlib.sha256(str(local or place).encode()).hexdigest()[:16]
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
