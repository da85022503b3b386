"""Decoded scenes in one memory-mapped file, so that no epoch decodes an image twice.

Two files per set of scenes: KEY.u8 holds the pixels of all scenes, one after another, and KEY.json
says where each begins. The key covers paths, sizes and modification times, so changed data get
another cache; the old one is never opened again. Processes on one node share the pages in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from jaxtyping import UInt8

from scribbleseg.datasets.scenes import Scene, ScenePaths, read_scene
from scribbleseg.errors import InputError

FORMAT = 1
ALIGNMENT = 16
NUM_THREADS = 4
SCENES_AHEAD = 32


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Where one scene lies in the data file."""

    stem: str
    """Name of the sample."""
    height: int
    """Rows, in pixels."""
    width: int
    """Columns, in pixels."""
    image: int
    """Where the image begins, in bytes."""
    scribbles: int
    """Where the scribbles begin, in bytes."""
    mask: int | None
    """Where the mask begins, in bytes; None: the sample has no mask."""


@dataclass(frozen=True, kw_only=True)
class SceneCache:
    """Decoded scenes behind a memory map; picklable: another process maps the file anew."""

    path: Path
    """The data file."""
    fingerprint: str
    """sha256 over stems and contents of all source files; the same on every machine and path."""
    entries: tuple[CacheEntry, ...] = field(repr=False)
    """One per scene, in the order asked for."""

    @staticmethod
    def open(scenes: Sequence[ScenePaths], folder: str | Path | None) -> "SceneCache":
        """Return the cache of these scenes; the first process to ask builds it, others wait.

        The file does not depend on the order of the scenes: all folds of a data set share one.

        Args:
            scenes: The samples, in the order in which the cache will give them.
            folder: Where caches are kept; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.

        Raises:
            InputError: No scenes; a file that does not keep the data contract (see `read_scene`);
                a folder that cannot be written (permissions, full disk).
        """
        if not scenes:
            raise InputError("no scenes to cache; expected at least one sample")
        if folder is None:
            folder = os.environ.get("SCRIBBLESEG_CACHE") or Path.home() / ".cache" / "scribbleseg"
        folder = Path(folder)
        in_file_order = sorted(range(len(scenes)), key=lambda i: str(scenes[i].image))
        stored = [scenes[i] for i in in_file_order]
        path = folder / f"{_key(stored)}.u8"
        # A whole cache is opened without the lock: the folder may be read-only.
        cache = _open_whole(path) or _build_locked(stored, path)
        entries = dict(zip(in_file_order, cache.entries, strict=True))
        return SceneCache(
            path=path,
            fingerprint=cache.fingerprint,
            entries=tuple(entries[i] for i in range(len(scenes))),
        )

    @property
    def stems(self) -> list[str]:
        """Names of the samples, in order."""
        return [entry.stem for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Scene:
        """Return one scene; its arrays are read-only views of the map."""
        entry = self.entries[index]
        size = (entry.height, entry.width)
        return Scene(
            stem=entry.stem,
            image=self._view(entry.image, (*size, 3)),
            scribbles=self._view(entry.scribbles, size),
            mask=None if entry.mask is None else self._view(entry.mask, size),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Without the map: pickling it would copy every pixel.
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    @cached_property
    def _pixels(self) -> UInt8[np.ndarray, " n"]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def _view(self, offset: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w *c"]:
        return np.ndarray(shape, np.uint8, buffer=self._pixels, offset=offset)


def _key(scenes: Sequence[ScenePaths]) -> str:
    """Name a cache after paths, sizes and modification times of all source files."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for scene in scenes:
        for path in _files(scene):
            status = path.stat()
            line = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(scene: ScenePaths) -> list[Path]:
    """Return the files of a sample."""
    paths = (scene.image, scene.scribbles, scene.ground_truth)
    return [path for path in paths if path is not None]


def _open_whole(path: Path) -> SceneCache | None:
    """Return the cache in a file, or None where there is none or it is not whole."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != index["num_bytes"]:
            return None
        entries = tuple(CacheEntry(**entry) for entry in index["entries"])
        return SceneCache(path=path, fingerprint=index["fingerprint"], entries=entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_locked(scenes: Sequence[ScenePaths], path: Path) -> SceneCache:
    """Build a cache unless another process has just done so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            return _open_whole(path) or _build(scenes, path)
    except OSError as error:
        raise InputError(
            f"{path.parent}: the decoded images cannot be cached here "
            f"({(error.strerror or str(error)).lower()}); make room, or choose another folder with "
            "--data.cache-dir"
        ) from error


def _build(scenes: Sequence[ScenePaths], path: Path) -> SceneCache:
    """Decode all scenes into the data file, then write the index that makes it count."""
    entries: list[CacheEntry] = []
    digests: list[tuple[str, str]] = []
    # One fixed name: the lock is held, and what a killed process left is overwritten.
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            for scene, digest in _decode(scenes):
                entries.append(_append(file, scene))
                digests.append((scene.stem, digest))
            num_bytes = file.tell()
        os.replace(partial, path)
        fingerprint = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
        index = {
            "num_bytes": num_bytes,
            "fingerprint": fingerprint,
            "entries": [asdict(entry) for entry in entries],
        }
        partial.write_text(json.dumps(index))
        os.replace(partial, path.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)
    return SceneCache(path=path, fingerprint=fingerprint, entries=tuple(entries))


def _decode(scenes: Sequence[ScenePaths]) -> Iterator[tuple[Scene, str]]:
    """Yield each scene, decoded, and the digest of its files; in order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # In rounds, so that decoded scenes do not pile up in memory where the disk is slow.
        for start in range(0, len(scenes), SCENES_AHEAD):
            yield from pool.map(_read, scenes[start : start + SCENES_AHEAD])


def _read(paths: ScenePaths) -> tuple[Scene, str]:
    """Decode a scene and hash its files."""
    scene = read_scene(paths)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(paths)]
    return scene, " ".join(hashes)


def _append(file: BinaryIO, scene: Scene) -> CacheEntry:
    """Write the pixels of a scene."""
    height, width = scene.scribbles.shape
    return CacheEntry(
        stem=scene.stem,
        height=height,
        width=width,
        image=_write_aligned(file, scene.image),
        scribbles=_write_aligned(file, scene.scribbles),
        mask=None if scene.mask is None else _write_aligned(file, scene.mask),
    )


def _write_aligned(file: BinaryIO, pixels: UInt8[np.ndarray, "h w *c"]) -> int:
    """Write pixels at the next aligned position of a file; return the position."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(pixels.tobytes())
    return offset
