"""Data on an object store: copied to this machine once, and looked after from then on.

A root may be a URI (s3://, gs://, whatever pyarrow reads; `AWS_ENDPOINT_URL` is honoured). What it
holds is mirrored below the cache folder, CACHE/remote/KEY/BUCKET/PREFIX/..., by the first process
of the node to ask; others wait for it and share the copy. Each file keeps the size and the time of
its original, so whenever a root is opened its listing alone says what to fetch: what a killed
process left out, what has changed, what was damaged here, and nothing at all otherwise.

Verified are the sizes. Stores have no checksum in common (an S3 ETag is an MD5 of some objects
only); that a picture is whole is seen by whoever decodes it.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from scribbleseg.datasets.files import IMAGE_SUFFIXES, cache_folder, reason
from scribbleseg.errors import InputError
from scribbleseg.manifest import partial_path
from scribbleseg.runs import open_storage

# A picture is fetched in two round trips, so the time goes into waiting and not into computing.
NUM_THREADS = 16
CHUNK_BYTES = 1 << 20
SECONDS_BETWEEN_LINES = 5.0

logger = logging.getLogger(__name__)

Listing = Mapping[Path, FileInfo]
"""The pictures of a root, by the place of their copies."""


def inside(place: str, name: str) -> str:
    """Return where a folder inside another one is; what follows a URI's "?" stays at its end."""
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def outside(place: str) -> tuple[str, str]:
    """Return the folder that a place is in, and its name there: the opposite of `inside`."""
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    root, _, name = path.rstrip("/").rpartition("/")
    return f"{root or '.'}{mark}{options}", name


def local_copy(root: str | Path, folder: str | Path | None = None, *, below: str = "") -> Path:
    """Return the folder on this machine that holds what `root` holds; local ones as they are.

    Pictures are copied (.jpg, .jpeg, .png), hidden files and all others passed over. Progress is
    logged as lines for people.

    Args:
        root: Local folder, or URI.
        folder: Where caches are kept; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.
        below: Only this folder of the root is needed; the copy may lack all others.

    Raises:
        InputError: The store cannot be reached or read, nothing is there, or the copy cannot be
            written (permissions, full disk).
    """
    if "://" not in str(root):
        return Path(root)
    filesystem, path = open_storage(str(root))
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    mirror = _mirror(str(root), cache_folder(folder))
    uri, source, target = str(root).rstrip("/"), path, mirror / path
    if below:
        uri, source, target = f"{uri}/{below}", f"{source}/{below}", target / below
    if ".." in source.split("/"):
        raise InputError(f"{uri}: found .. in it, expected a plain address, s3://BUCKET/PREFIX")
    listing = _list(filesystem, source, target, uri)
    # What is up to date is used without the lock: another root of the bucket may be on its way.
    if _stale(listing) or _strays(listing, target):
        try:
            mirror.mkdir(parents=True, exist_ok=True)
            with FileLock(mirror.with_suffix(".lock")):
                _update(filesystem, listing, target, uri)
        except OSError as error:
            raise InputError(
                f"{mirror}: {uri} cannot be copied here ({reason(error)}); make room, or choose "
                "another folder with --data.cache-dir or $SCRIBBLESEG_CACHE"
            ) from error
    return mirror / path


def _mirror(uri: str, cache: Path) -> Path:
    """Return the folder of a store's copies; one bucket name may stand for several stores."""
    parts = urlsplit(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    key = "\0".join((parts.scheme, parts.netloc, parts.query, endpoint))
    return cache / "remote" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _list(filesystem: FileSystem, source: str, target: Path, uri: str) -> Listing:
    """Return the pictures of a remote folder, by the place of their copies below `target`."""
    try:
        infos = filesystem.get_file_info(FileSelector(source, recursive=True))
    except FileNotFoundError:
        infos = []
    except OSError as error:
        raise _unreadable(uri, error) from None
    listing = {
        target / name: info
        for info in infos
        if info.type == FileType.File and _is_picture(name := info.path[len(source) + 1 :])
    }
    if not listing:
        raise InputError(
            f"{uri}: found no {', '.join(IMAGE_SUFFIXES)} file; expected a bucket and prefix that "
            "hold the data; correct the address"
        )
    return listing


def _is_picture(name: str) -> bool:
    """Return whether a file is wanted; a key like a/../../b must not lead out of the copy."""
    parts = re.split(r"[/\\]", name)
    hidden = any(not part or part.startswith(".") for part in parts)
    return not hidden and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _stale(listing: Listing) -> Listing:
    """Return those whose copies are missing, or differ in size or time."""
    return {path: info for path, info in listing.items() if not _is_current(path, info)}


def _is_current(path: Path, info: FileInfo) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (info.size, info.mtime_ns or 0)


def _strays(listing: Listing, target: Path) -> list[Path]:
    """Return the files of a copy whose originals are gone, and what a killed process left."""
    here = (Path(folder, name) for folder, _, names in os.walk(target) for name in names)
    return [path for path in here if path not in listing]


def _update(filesystem: FileSystem, listing: Listing, target: Path, uri: str) -> None:
    """Make the copy agree with the listing; the lock is held."""
    for stray in _strays(listing, target):
        stray.unlink()
    # Another process may have just fetched them.
    stale = _stale(listing)
    target.mkdir(parents=True, exist_ok=True)
    num_bytes, free = sum(info.size for info in stale.values()), shutil.disk_usage(target).free
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC, f"{num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
    if stale:
        logger.info("%s: fetching %s, %.2f GB", uri, f"{len(stale):,} files", num_bytes / 1e9)
    began = told = time.monotonic()
    fetched = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # An error ends the loop, which cancels what has not begun.
        for number, size in enumerate(pool.map(partial(_fetch, filesystem), stale.items()), 1):
            fetched += size
            now = time.monotonic()
            if now - told >= SECONDS_BETWEEN_LINES:
                told = now
                left = (now - began) * (num_bytes - fetched) / max(1, fetched)
                logger.info(
                    f"{uri}: {number:,} of {len(stale):,} files, {fetched / 1e9:.2f} of "
                    f"{num_bytes / 1e9:.2f} GB, about {left / 60:.0f} min left"
                )


def _fetch(filesystem: FileSystem, item: tuple[Path, FileInfo]) -> int:
    """Fetch one file, whole or not at all; return its size in bytes."""
    path, info = item
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: the lock is held, and what a killed process left is overwritten.
    unfinished = partial_path(path)
    with unfinished.open("wb") as file:
        for chunk in _read(filesystem, info.path):
            file.write(chunk)
        size = file.tell()
    if size != info.size:
        raise InputError(
            f"{info.path}: {size} bytes came, the listing says {info.size}; if it is being "
            "written at the moment, run the command again"
        )
    time_ns = info.mtime_ns or 0
    os.utime(unfinished, ns=(time_ns, time_ns))
    os.replace(unfinished, path)
    return size


def _read(filesystem: FileSystem, path: str) -> Generator[bytes]:
    """Yield the content of a remote file, so that its errors are told from those of the disk."""
    try:
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(place: str, error: OSError) -> InputError:
    return InputError(
        f"{place}: cannot be read ({reason(error)[:300]}); check the address, the network and the "
        "credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL or the machine's role)"
    )
