"""A checkpoint folder from outside: which files it has, whether it is whole, and where one is.

Nothing here knows what a tensor is: `scribbleseg status` and `pull` do without the seconds that
importing torch takes. What a checkpoint holds is in `scribbleseg.checkpoint`.
"""

import contextlib
import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from scribbleseg.errors import InputError

FORMAT = 1
"""Layout of the folder; a reader refuses every other number."""
MODEL = "model.safetensors"
CONFIG = "config.json"
TRAINER = "trainer.pt"
MANIFEST = "manifest.json"
BEST = "best.json"
RELEASED = Path(__file__).parent / "released"
"""Folder of the checkpoints that ship with the package."""

_MAX_JSON_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """What a manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of the content, 64 hexadecimal digits."""


def write_manifest(folder: Path) -> None:
    """Write the size and sha256 of every file in the folder; done last, it makes a checkpoint.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    write_bytes(folder / MANIFEST, to_json({"format": FORMAT, "files": files}))


def parse_manifest(text: str | bytes, where: str) -> dict[str, FileStamp]:
    """Return what a manifest says of each file.

    Args:
        text: content of manifest.json.
        where: its path, for the error.

    Raises:
        InputError: not a manifest, one of another format number, or one with unsafe file names.
    """
    tree = parse_json(text, where)
    require_format(tree, where)
    files = tree.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{where}: lists no files, expected a name, size and sha256 of each")
    stamps: dict[str, FileStamp] = {}
    for name, entry in cast(dict[str, Any], files).items():
        match entry:
            case {"size": int(size), "sha256": str(digest)} if is_plain_name(name):
                stamps[name] = FileStamp(size=size, sha256=digest)
            case _:
                raise InputError(
                    f"{where}: entry {shown(name)} is not a plain file name with size and sha256"
                )
    return stamps


def verify(folder: Path, *, hashed: Collection[str] | None = None) -> list[str]:
    """Hold a folder against its manifest.

    Args:
        folder: the checkpoint folder.
        hashed: files whose content is compared too; None: all. Sizes always are.

    Returns:
        One line per fault; an empty list means that the checkpoint is whole.
    """
    try:
        stamps = _read_manifest(folder)
    except InputError as error:
        return [str(error)]
    faults: list[str] = []
    for name, stamp in stamps.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing, although the manifest lists it")
        elif path.stat().st_size != stamp.size:
            faults.append(f"{path}: {path.stat().st_size} bytes, the manifest says {stamp.size}")
        elif (hashed is None or name in hashed) and _sha256(path) != stamp.sha256:
            faults.append(f"{path}: its content does not match the manifest's sha256")
    return faults


def require_whole(folder: Path, *names: str) -> None:
    """Raise unless the folder is a whole checkpoint that holds `names`, whose content is hashed."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a checkpoint folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: holds no {MANIFEST}, so it is no checkpoint or an unfinished one; "
            "give a folder that a training run finished writing"
        )
    faults = verify(folder, hashed=names)
    if faults:
        raise InputError(f"{faults[0]}; the checkpoint is damaged, fetch or train it again")
    for name in names:
        if name not in _read_manifest(folder):
            raise InputError(f"{folder}: its manifest lists no {name}; expected one that does")


def require_format(tree: Mapping[str, Any], where: str) -> None:
    """Raise unless what was read has this version's format number."""
    found = tree.get("format")
    if type(found) is not int or found != FORMAT:
        raise InputError(
            f"{where}: format is {shown(found)}, expected {FORMAT}; "
            "read it with the scribbleseg version that wrote it"
        )


def resolve(reference: str) -> Path:
    """Find the checkpoint folder that a user means.

    Args:
        reference: a checkpoint folder, a run or sweep folder (its best checkpoint is taken), or
            `released:NAME`. Local only: `runs.find_checkpoint` takes URIs as well.

    Raises:
        InputError: nothing of the kind is there.
    """
    if reference.startswith("released:"):
        return _resolve_released(reference.removeprefix("released:"))
    if "://" in reference:
        raise InputError(f"{reference}: on remote storage; fetch it with `scribbleseg pull` first")
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{reference}: no such folder; expected a checkpoint, a run, or released:NAME"
        )
    if (folder / MANIFEST).is_file():
        return folder

    def read(name: str) -> bytes | None:
        path = folder / name
        return read_small(path) if path.is_file() else None

    return folder / find_best(read, reference)


def find_best(read: Callable[[str], str | bytes | None], where: str) -> str:
    """Return where a run or sweep has its best checkpoint: a path below its folder, with slashes.

    A run's best.json names a `checkpoint`; a sweep's names the `run` that holds it. A run that has
    gone on since may have another one, so its own best.json is asked.

    Args:
        read: returns the content of a file below the folder, None if there is none.
        where: the folder, for errors.

    Raises:
        InputError: no best.json, or one that points outside its folder.
    """
    text, folder = read(BEST), ""
    if text is None:
        raise InputError(
            f"{where}: holds neither {BEST} nor {MANIFEST}; expected a run or sweep that has saved "
            "its best checkpoint, or a checkpoint folder"
        )
    tree = parse_json(text, f"{where}/{BEST}")
    if "run" in tree:
        folder = f"{_plain(tree, 'run', f'{where}/{BEST}')}/"
        own = read(f"{folder}{BEST}")
        tree = tree if own is None else parse_json(own, f"{where}/{folder}{BEST}")
    return folder + _plain(tree, "checkpoint", f"{where}/{folder}{BEST}")


def _plain(tree: dict[str, Any], key: str, where: str) -> str:
    name = tree.get(key)
    if not isinstance(name, str) or not is_plain_name(name):
        raise InputError(f"{where}: does not name a {key} folder; expected '{key}': NAME")
    return name


def is_plain_name(name: object) -> bool:
    """Say whether a name is one file or folder, and nowhere else: no separators, no "..", no drive.

    Hidden names are refused too, since nothing in a checkpoint or run that others read is hidden.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 255 or name.startswith("."):
        return False
    return name.isprintable() and not set(name) & set('/\\:*?"<>|')


def partial_path(path: Path, process: int | None = None) -> Path:
    """Return the hidden name beside a file or folder under which it is written, to be renamed.

    It is short, since the name itself may be as long as file systems allow, and the same every
    time, so that what a killed process left is written over.

    Args:
        path: The file or folder.
        process: Who writes, where several may write the same at once.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    owner = "" if process is None else f".{process}"
    return path.with_name(f".{digest}{owner}.partial")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed.

    Raises:
        InputError: a folder is where the file has to go.
        OSError: it cannot be written; nothing is left behind and an older file stays.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: found a folder where a file has to go; rename or remove it, or give another "
            "place for what is written"
        )
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # A full disk names no file by itself, and nobody knows the temporary name.
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(folder: Path, *, asked: Path | None = None) -> None:
    """Make a folder that results go to, and those above it, unless it is there; write into it.

    Whoever is told beforehand that nothing can be written there loses no work.

    Args:
        folder: The folder.
        asked: What the user called it; None: the same.

    Raises:
        InputError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{asked or folder}: {(error.strerror or str(error)).lower()}; expected a folder that "
            "can be written: give another --out"
        ) from None


def place_of_new(folder: Path) -> Path:
    """Return where a finished folder is to be put, which is renamed to `folder`: links followed.

    A folder cannot take the place of a link, nor of a disk: whoever hears so beforehand loses no
    work.

    Raises:
        InputError: it is where a disk is mounted.
    """
    place = Path(os.path.realpath(folder))
    if os.path.ismount(place):
        raise InputError(
            f"{folder}: a disk is mounted there; expected a folder that can be made anew: name one "
            "inside it"
        )
    return place


def to_json(tree: Mapping[str, Any], *, indent: int | None = 2) -> bytes:
    """Return JSON that ends in a line break; `indent` None: on one line.

    Raises:
        ValueError: a number is not finite; JSON has no such numbers.
    """
    return (json.dumps(tree, indent=indent, allow_nan=False) + "\n").encode()


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the object that a JSON text of scribbleseg's writing holds.

    Args:
        text: the JSON.
        where: its path, for the error.

    Raises:
        InputError: not JSON, or not an object.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not readable as JSON ({one_line(error)}); it was written whole, and changed "
            "since: restore it from a copy"
        ) from None
    if not isinstance(tree, dict):
        raise InputError(
            f"{where}: holds {type(tree).__name__}, expected a JSON object; restore it from a copy"
        )
    return cast(dict[str, Any], tree)


def read_small(path: Path) -> bytes:
    """Read a JSON file that is never large, so that a hostile one cannot fill the memory."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MAX_JSON_BYTES:
        raise InputError(f"{path}: over {_MAX_JSON_BYTES} bytes, expected a small JSON file")
    return content


def shown(value: object) -> str:
    """A value for an error message, cut short: the file that holds it may be hostile."""
    return " ".join(reprlib.repr(value).split())[:80]


def one_line(error: Exception) -> str:
    """Return what an error says, without line breaks, cut short."""
    return " ".join(str(error).split())[:200]


def _resolve_released(name: str) -> Path:
    available = sorted(path.parent.name for path in RELEASED.glob(f"*/{MANIFEST}"))
    if name not in available:
        listed = ", ".join(available) or "none ships with this version"
        raise InputError(f"released:{name}: no such released checkpoint; available: {listed}")
    return RELEASED / name


def _read_manifest(folder: Path) -> dict[str, FileStamp]:
    path = folder / MANIFEST
    return parse_manifest(read_small(path), str(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
