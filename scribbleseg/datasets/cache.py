"""Decoded pictures in one memory-mapped file, so that no epoch decodes a picture twice.

Two files per set of pictures: KEY.u8 holds all pixels, one picture after another, and KEY.json says
where each begins. The key covers paths, sizes and modification times, so changed data get another
cache; one that nobody has opened for `DAYS_KEPT` days is removed when another is built. Processes
on one node share the pages in memory.

`SceneCache` holds the samples of the data contract; `pictures.ImageCache` shares everything below.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, Int64, Shaped, UInt8

from scribbleseg.datasets.doubts import Doubt, describe_doubts, find_doubts
from scribbleseg.datasets.files import cache_folder
from scribbleseg.datasets.scenes import Scene, ScenePaths, read_scene
from scribbleseg.errors import InputError

FORMAT = 3
ALIGNMENT = 16
DAYS_KEPT = 30
NUM_THREADS = 4
# Whatever waits to be taken is held in memory whole, 120 MB for a photograph of 24 megapixels and
# its labels.
ITEMS_AHEAD = NUM_THREADS + 2

Index = dict[str, Any]
"""What KEY.json holds; plain values."""
Write = Callable[[UInt8[np.ndarray, "h w *c"]], int]
"""Appends pixels to a data file and returns where they begin, in bytes."""

CacheT = TypeVar("CacheT")
ItemT = TypeVar("ItemT")
ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class PixelMap:
    """The pixels of a data file; picklable: another process maps the file anew."""

    path: Path
    """The data file."""

    def view(self, offset: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w *c"]:
        """Return the pixels that begin at a byte of the file, read-only and without a copy."""
        return np.ndarray(shape, np.uint8, buffer=self._pixels, offset=offset)

    def __getstate__(self) -> dict[str, Any]:
        # Without the map: pickling it would copy every pixel.
        return {"path": self.path}

    @cached_property
    def _pixels(self) -> UInt8[np.ndarray, " n"]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")


@dataclass(frozen=True, kw_only=True)
class SceneCache:
    """Decoded scenes behind a memory map; picklable: another process maps the file anew."""

    path: Path
    """The data file."""
    fingerprint: str
    """sha256 over stems and contents of all source files; the same on every machine and path."""
    # Arrays, because there may be a million samples: an object for each would keep whatever memory
    # stands around it when it was made.
    stems: Shaped[np.ndarray, " n"] = field(repr=False, compare=False)
    """Names of the samples, in the order asked for."""
    places: Int64[np.ndarray, "n 5"] = field(repr=False, compare=False)
    """Of each: height and width in pixels, and where image, scribbles and mask begin, in bytes; -1
    where there is no mask.
    """
    doubts: tuple[str, ...]
    """What is doubtful about the samples, a line for each reason: see `doubts.describe_doubts`."""

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
        in_file_order = sorted(range(len(scenes)), key=lambda i: str(scenes[i].image))
        stored = [scenes[i] for i in in_file_order]
        # The names too: links by other names to the same files are other samples.
        kind = "\0".join([f"format {FORMAT}", *(scene.stem for scene in stored)])
        path = data_path(kind, (p for scene in stored for p in _files(scene)), folder)

        def load(index: Index) -> SceneCache:
            stems = np.array(index["stems"])
            places = np.array(index["places"], np.int64).reshape(len(stems), 5)
            as_asked = np.argsort(in_file_order)
            return SceneCache(
                path=path,
                fingerprint=index["fingerprint"],
                stems=stems[as_asked],
                places=places[as_asked],
                doubts=tuple(index["doubts"]),
            )

        return open_or_build(path, load, partial(_build, stored))

    @property
    def have_masks(self) -> Bool[np.ndarray, " n"]:
        """Which samples have a mask."""
        return self.places[:, 4] >= 0

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> Scene:
        """Return one scene; its arrays are read-only views of the map."""
        height, width, image, scribbles, mask = self.places[index].tolist()
        size = (height, width)
        return Scene(
            stem=str(self.stems[index]),
            image=self._pixels.view(image, (*size, 3)),
            scribbles=self._pixels.view(scribbles, size),
            mask=None if mask < 0 else self._pixels.view(mask, size),
        )

    @cached_property
    def _pixels(self) -> PixelMap:
        return PixelMap(self.path)


def data_path(kind: str, sources: Iterable[Path], folder: str | Path | None) -> Path:
    """Return the data file of a cache, named after what it holds.

    Args:
        kind: Format of the cache, and whatever else decides which pixels it holds.
        sources: Files that are decoded: their paths, sizes and modification times count.
        folder: Where caches are kept; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.
    """
    digest = hashlib.sha256(kind.encode())
    for source in sources:
        state = "unreadable"
        # Permissions are mended without a trace in size or time, so they count too.
        if os.access(source, os.R_OK):
            status = source.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        line = f"{os.path.realpath(source)}\0{state}\0"
        digest.update(line.encode(errors="surrogateescape"))
    return cache_folder(folder) / f"{digest.hexdigest()[:16]}.u8"


def open_or_build(
    path: Path, load: Callable[[Index], CacheT], build: Callable[[Write], Index]
) -> CacheT:
    """Return the cache in a data file; the first process to ask builds it, others wait.

    Args:
        path: The data file, from `data_path`.
        load: Makes the cache out of its index; whatever is missing there makes it fail.
        build: Writes all pixels and returns the index.

    Raises:
        InputError: The folder cannot be written (permissions, full disk), or whatever `build` says.
    """
    # A whole cache is opened without the lock: the folder may be read-only.
    cache = _open_whole(path, load)
    if cache is not None:
        return cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have just built it.
            cache = _open_whole(path, load)
            if cache is not None:
                return cache
            _remove_old(path.parent)
            return load(_write_files(path, build))
    except OSError as error:
        raise InputError(
            f"{path.parent}: the decoded images cannot be cached here "
            f"({(error.strerror or str(error)).lower()}); make room, or choose another folder with "
            "--data.cache-dir"
        ) from error


def read_ahead(read: Callable[[ItemT], ReadT], items: Sequence[ItemT]) -> Iterator[ReadT]:
    """Yield what `read` makes of each item, in order; threads read at most `ITEMS_AHEAD` ahead."""
    waiting: deque[Future[ReadT]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) == ITEMS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint_of(digests: Iterable[tuple[str, str]]) -> str:
    """Return one sha256 over names and digests, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def _open_whole(path: Path, load: Callable[[Index], CacheT]) -> CacheT | None:
    """Return the cache in a file, or None where there is none or it is not whole."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != index["num_bytes"]:
            return None
        cache = load(index)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # For `_remove_old`; others may read what only its owner may touch.
    with contextlib.suppress(OSError):
        os.utime(path.with_suffix(".json"))
    return cache


def _remove_old(folder: Path) -> None:
    """Remove the caches that were last opened too long ago, and what killed builds have left.

    A process that has mapped one keeps its pixels.
    """
    opened: dict[Path, float] = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{16}\.(json|u8|partial)", path.name):
                cache = path.with_suffix("")
                opened[cache] = max(opened.get(cache, 0.0), path.stat().st_mtime)
        for cache, last in opened.items():
            if last < time.time() - DAYS_KEPT * 86400:
                # The index first: a cache without it does not count. Whoever is about to build it
                # again holds the lock, which stays.
                for suffix in (".json", ".u8", ".partial"):
                    cache.with_suffix(suffix).unlink(missing_ok=True)


def _write_files(path: Path, build: Callable[[Write], Index]) -> Index:
    """Write the data file, then the index that makes it count; return the index."""
    # One fixed name: the lock is held, and what a killed process left is overwritten.
    unfinished = path.with_suffix(".partial")
    try:
        with unfinished.open("wb") as file:
            index = build(partial(_write_aligned, file))
            index = {"num_bytes": file.tell(), **index}
        os.replace(unfinished, path)
        unfinished.write_text(json.dumps(index))
        os.replace(unfinished, path.with_suffix(".json"))
    finally:
        unfinished.unlink(missing_ok=True)
    return index


def _write_aligned(file: BinaryIO, pixels: UInt8[np.ndarray, "h w *c"]) -> int:
    """Write pixels at the next aligned position of a file; return the position."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(pixels.tobytes())
    return offset


def _files(scene: ScenePaths) -> list[Path]:
    """Return the files of a sample."""
    paths = (scene.image, scene.scribbles, scene.ground_truth)
    return [path for path in paths if path is not None]


def _build(scenes: Sequence[ScenePaths], write: Write) -> Index:
    """Decode all scenes and write their pixels; return the index."""
    stems: list[str] = []
    places: list[int] = []
    digests: list[tuple[str, str]] = []
    doubts: list[Doubt] = []
    for scene, digest, doubtful in read_ahead(_read, scenes):
        stems.append(scene.stem)
        places += _append(write, scene)
        digests.append((scene.stem, digest))
        doubts += doubtful
    return {
        "fingerprint": fingerprint_of(digests),
        "stems": stems,
        "places": places,
        "doubts": describe_doubts(doubts),
    }


def _read(paths: ScenePaths) -> tuple[Scene, str, list[Doubt]]:
    """Decode a scene, hash its files, and look for what is doubtful."""
    scene = read_scene(paths)
    digest = " ".join(hash_file(path) for path in _files(paths))
    return scene, digest, find_doubts(scene, paths.image, paths.scribbles)


def _append(write: Write, scene: Scene) -> tuple[int, int, int, int, int]:
    """Write the pixels of a scene; return its place, see `SceneCache.places`."""
    height, width = scene.scribbles.shape
    image, scribbles = write(scene.image), write(scene.scribbles)
    mask = -1 if scene.mask is None else write(scene.mask)
    return height, width, image, scribbles, mask
