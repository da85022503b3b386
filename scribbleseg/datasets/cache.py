"""Decoded scenes in one memory-mapped file, so that no epoch decodes an image twice.

Two files per data set: `KEY.u8` holds the pixels of every scene one after another, `KEY.json` says
where each begins. The key covers paths, sizes and modification times, so changed data get a cache of
their own and a stale one is simply never opened again. Loader processes of one node share the pages.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from filelock import FileLock
from jaxtyping import UInt8

from scribbleseg.datasets.scenes import Scene, ScenePaths, read_scene
from scribbleseg.errors import InputError

FORMAT = 1
ALIGNMENT = 16
NUM_THREADS = 4

Layer = Literal["image", "scribbles", "mask"]


@dataclass(frozen=True, kw_only=True)
class CachedScene:
    """Where one scene lies in the data file."""

    stem: str
    """Name of the sample."""
    height: int
    """Rows, in pixels."""
    width: int
    """Columns, in pixels."""
    image: int
    """Offset of the image, in bytes."""
    scribbles: int
    """Offset of the scribbles, in bytes."""
    mask: int | None
    """Offset of the mask, in bytes; None: the sample has no mask."""


@dataclass(frozen=True, kw_only=True)
class SceneCache:
    """Decoded scenes, read through a memory map.

    Picklable: another process maps the same file anew.
    """

    path: Path
    """The data file."""
    fingerprint: str
    """sha256 over (stem, content) of all source files; the same on every machine and path."""
    entries: tuple[CachedScene, ...] = field(repr=False)
    """One entry per scene, in the order the scenes were given."""

    @staticmethod
    def open(scenes: Sequence[ScenePaths], folder: str | Path | None = None) -> "SceneCache":
        """Map the cache of `scenes`; build it first if this machine has none.

        Args:
            scenes: the samples, in the order in which the cache will hold them.
            folder: where caches live; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.

        Raises:
            InputError: a source file that cannot be used (see `read_scene`), or a folder that cannot
                be written (permissions, full disk).
        """
        if folder is None:
            folder = os.environ.get("SCRIBBLESEG_CACHE") or Path.home() / ".cache" / "scribbleseg"
        folder = Path(folder)
        path = folder / f"{_key(scenes)}.u8"
        # A whole cache is opened without the lock: its folder may be read-only.
        cache = _open_existing(path)
        if cache is not None:
            return cache
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                # Another process may have built it while this one waited for the lock.
                return _open_existing(path) or _build(scenes, path)
        except OSError as error:
            raise InputError(
                f"{folder}: the cache of decoded images cannot be written ({error.strerror or error}); "
                "free space there, or choose another folder with --data.cache-dir"
            ) from error

    @property
    def stems(self) -> list[str]:
        """Names of the samples, in order."""
        return [entry.stem for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Scene:
        """Return one scene; its arrays are read-only views into the map."""
        entry = self.entries[index]
        size = (entry.height, entry.width)
        return Scene(
            stem=entry.stem,
            image=self._view(entry.image, (*size, 3)),
            scribbles=self._view(entry.scribbles, size),
            mask=None if entry.mask is None else self._view(entry.mask, size),
        )

    def __getstate__(self) -> dict[str, Any]:
        # The map is left behind: pickling it would copy the whole data set.
        return {name: value for name, value in self.__dict__.items() if name != "_bytes"}

    @cached_property
    def _bytes(self) -> UInt8[np.ndarray, "n"]:
        """The memory map."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def _view(self, offset: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """Return a plain array over the map's pages."""
        count = int(np.prod(shape))
        return np.asarray(self._bytes[offset : offset + count]).reshape(shape)


def _key(scenes: Sequence[ScenePaths]) -> str:
    """Name the cache after the paths, sizes and modification times of all source files."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for scene in scenes:
        for path in _files(scene):
            status = path.stat()
            line = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(scene: ScenePaths) -> list[Path]:
    """Return the files of one sample."""
    paths = (scene.image, scene.scribbles, scene.ground_truth)
    return [path for path in paths if path is not None]


def _open_existing(path: Path) -> SceneCache | None:
    """Return the cache at `path`, or None where there is none or it is not whole."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != index["num_bytes"]:
            return None
        return SceneCache(
            path=path,
            fingerprint=index["fingerprint"],
            entries=tuple(CachedScene(**entry) for entry in index["entries"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _build(scenes: Sequence[ScenePaths], path: Path) -> SceneCache:
    """Decode every scene into the data file, then write the index that makes it count."""
    entries: list[dict[str, Any]] = []
    digests: list[tuple[str, str]] = []
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            for scene, digest in _decode(scenes):
                entries.append(_append(file, scene))
                digests.append((scene.stem, digest))
            num_bytes = file.tell()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fingerprint = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
    index = {"num_bytes": num_bytes, "fingerprint": fingerprint, "entries": entries}
    _write_text(path.with_suffix(".json"), json.dumps(index))
    cache = _open_existing(path)
    assert cache is not None
    return cache


def _decode(scenes: Sequence[ScenePaths]) -> Iterator[tuple[Scene, str]]:
    """Yield every scene, decoded, with the digest of its files; in order, a few threads ahead."""
    batch = 8 * NUM_THREADS
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # In batches, so that decoded images do not pile up when the disk is slower than the threads.
        for start in range(0, len(scenes), batch):
            yield from pool.map(_read, scenes[start : start + batch])


def _read(paths: ScenePaths) -> tuple[Scene, str]:
    """Decode one scene and hash its files."""
    digest = hashlib.sha256()
    for path in _files(paths):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return read_scene(paths), digest.hexdigest()


def _append(file: BinaryIO, scene: Scene) -> dict[str, Any]:
    """Write the layers of one scene at aligned offsets; return its index entry."""
    height, width = scene.scribbles.shape
    entry: dict[str, Any] = {"stem": scene.stem, "height": height, "width": width, "mask": None}
    layers = {"image": scene.image, "scribbles": scene.scribbles, "mask": scene.mask}
    for name, pixels in layers.items():
        if pixels is not None:
            file.write(bytes(-file.tell() % ALIGNMENT))
            entry[name] = file.tell()
            file.write(np.ascontiguousarray(pixels).tobytes())
    return entry


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
