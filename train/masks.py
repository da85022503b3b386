"""Masks for a part of many photographs: what one worker of `train.predict` does."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import torch
from pyarrow.fs import FileSystem, FileType

from scribbleseg.datasets.doubts import Doubt, find_doubts
from scribbleseg.datasets.files import FileBytes, reason, require_pixels
from scribbleseg.datasets.scenes import Scene, read_drawn
from scribbleseg.device import pick_device, prepare_cpu
from scribbleseg.errors import InputError
from scribbleseg.predict import Predictor, answer
from scribbleseg.runs import RunFolder, open_storage
from train.places import require_mark

ItemT = TypeVar("ItemT")
ReadT = TypeVar("ReadT")

# Decoded pictures that wait for the network; their number is what bounds a worker's memory.
SCENES_AHEAD = 4


class Drawn(NamedTuple):
    """A photograph and its strokes, as file names in their folders."""

    image: str
    """STEM.jpg or STEM.png."""
    scribbles: str
    """STEM.png."""

    @property
    def stem(self) -> str:
        """The image's file name without its suffix."""
        return PurePosixPath(self.image).stem


class Failure(NamedTuple):
    """A photograph that gets no mask."""

    file: str
    """The file that is to blame, with its folder."""
    reason: str
    """Why, on one line."""


Outcome = Failure | Doubt | None
"""What became of a photograph; None: its mask is there. So it is where there is a doubt."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """What is read and written, each a local path or URI; picklable, opened where it is used."""

    images: str
    """Folder of the photographs."""
    scribbles: str
    """Folder of the strokes."""
    out: str
    """Folder of the masks."""

    @cached_property
    def target(self) -> RunFolder:
        """The folder of the masks, whose files appear whole or not at all."""
        return RunFolder.open(self.out)

    def read(self, drawn: Drawn, max_pixels: int) -> tuple[Scene, Doubt | None]:
        """Read and decode a photograph and its strokes; say what makes its mask doubtful.

        Raises:
            InputError: a file is missing, breaks the data contract, or has too many pixels.
        """
        image = _fetch(self._places[0], self.images, drawn.image)
        scribbles = _fetch(self._places[1], self.scribbles, drawn.scribbles)
        for file in (image, scribbles):
            require_pixels(file, max_pixels)
        scene = read_drawn(drawn.stem, image, scribbles)
        return scene, next(iter(find_doubts(scene, image, scribbles)), None)

    def is_done(self, stem: str, probabilities: bool) -> bool:
        """Return whether what is wanted of a photograph has been written, whole."""
        names = [f"{stem}.png"] + ([f"probabilities/{stem}.png"] if probabilities else [])
        found = self.target.filesystem.get_file_info([f"{self.target.path}/{n}" for n in names])
        return all(is_whole(info) for info in found)

    @cached_property
    def _places(self) -> tuple[tuple[FileSystem, str], tuple[FileSystem, str]]:
        return open_storage(self.images), open_storage(self.scribbles)


def is_whole(info: Any) -> bool:
    """Return whether a listed file holds anything; what is written here is never left half."""
    return info.type == FileType.File and info.size > 0


def _fetch(place: tuple[FileSystem, str], folder: str, name: str) -> FileBytes:
    """Read a file whole."""
    filesystem, path = place
    try:
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            content = stream.read()
    except OSError as error:
        raise InputError(f"{folder}/{name}: cannot be read ({reason(error)[:300]})") from None
    return FileBytes(name=f"{folder}/{name}", content=content)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How masks are made."""

    probabilities: bool
    """Also write OUT/probabilities/STEM.png."""
    honour_strokes: bool
    """Pixels under a stroke take the stroke's label."""
    sure: float
    """Pixels whose label is less probable become 255, ignore [0.5, 1)."""
    max_pixels: int
    """Photographs with more are not read."""


class MaskMaker:
    """A network, and the folders that it works on."""

    def __init__(
        self, predictor: Predictor, folders: Folders, wishes: Wishes, *, cpus: int, gpus: int
    ):
        device = pick_device(gpus=gpus > 0)
        if device.type == "cpu":
            prepare_cpu(cpus)
        self.predictor = replace(predictor, model=predictor.model.to(device), device=device)
        self.folders = folders
        self.wishes = wishes

    def make(self, batch: Iterable[Drawn]) -> Iterator[Outcome]:
        """Write one mask after the other; yield what became of each.

        Raises:
            OSError: a mask cannot be written.
            RuntimeError: a GPU failed.
        """
        for drawn, found in _ahead(self._read, batch, SCENES_AHEAD):
            if found is None or isinstance(found, Failure):
                yield found
                continue
            scene, doubt = found
            yield self._make_one(drawn, scene) or doubt

    def _read(self, drawn: Drawn) -> tuple[Scene, Doubt | None] | Failure | None:
        """Return what is read; why there is nothing; or None where the mask was made before.

        That is asked here too, because a worker whose node was lost has written a part of its work.
        """
        if self.folders.is_done(drawn.stem, self.wishes.probabilities):
            return None
        try:
            return self.folders.read(drawn, self.wishes.max_pixels)
        except InputError as error:
            return self._blame(drawn, str(error))

    def _blame(self, drawn: Drawn, message: str) -> Failure:
        """Tell the file that a message begins with from the rest: names may hold a colon too."""
        photograph = f"{self.folders.images}/{drawn.image}"
        strokes = f"{self.folders.scribbles}/{drawn.scribbles}"
        file = strokes if message.startswith(f"{strokes}: ") else photograph
        return Failure(file, message.removeprefix(f"{file}: "))

    def _make_one(self, drawn: Drawn, scene: Scene) -> Failure | None:
        """Predict a scene and write its mask, last of all: it says that all is there.

        Raises:
            RuntimeError: a GPU failed; nothing that follows could be computed on it.
        """
        try:
            made = answer(
                self.predictor,
                scene,
                probabilities=self.wishes.probabilities,
                honour_strokes=self.wishes.honour_strokes,
                sure=self.wishes.sure,
            )
        except RuntimeError as error:
            # One photograph is no reason to stop, such as one that there is no memory for. But
            # after most other faults of a GPU, this process cannot use it any more.
            on_gpu = self.predictor.device.type == "cuda"
            if on_gpu and not isinstance(error, torch.OutOfMemoryError):
                raise
            return Failure(f"{self.folders.images}/{drawn.image}", reason(error)[:300])
        if made.probabilities is not None:
            self.folders.target.write_file(f"probabilities/{drawn.stem}.png", made.probabilities)
        self.folders.target.write_file(f"{drawn.stem}.png", made.mask)
        return None


class MaskActor:
    """A `MaskMaker` as Ray Data holds it: tables of file names in, tables of outcomes out."""

    def __init__(
        self,
        held: Sequence[Any],
        folders: Folders,
        wishes: Wishes,
        mark: str,
        *,
        cpus: int,
        gpus: int,
    ):
        """Take the network from Ray's object store.

        Args:
            held: The reference of the predictor, which the driver holds: an actor that is started
                anew after a loss finds it there. In a list, since Ray would resolve it otherwise.
            folders: See `MaskMaker`.
            wishes: See `MaskMaker`.
            mark: What the command left in the folder of the masks, see `train.places.marked`.
            cpus: See `MaskMaker`.
            gpus: See `MaskMaker`.
        """
        import ray

        self.mark = mark
        self.maker = MaskMaker(ray.get(held[0]), folders, wishes, cpus=cpus, gpus=gpus)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Make the masks of a table's rows; return what became of each: see `outcome_of`.

        Where masks cannot be written at all,
        that is a single row without a stem: Ray would try again what it sees raised. If that is
        because the folder is another one here, it is without a file as well.
        """
        drawn = [Drawn(**row) for row in batch.to_pylist()]
        try:
            require_mark(self.maker.folders.target, self.mark)
            outcomes = list(self.maker.make(drawn))
        except OSError as error:
            return _outcomes([""], [Failure(self.maker.folders.out, reason(error))])
        except InputError as error:
            return _outcomes([""], [Failure("", str(error))])
        return _outcomes([each.stem for each in drawn], outcomes)


def _outcomes(stems: Sequence[str], outcomes: Sequence[Outcome]) -> pa.Table:
    files, reasons = zip(*((each or ("", "")) for each in outcomes), strict=True)
    doubtful = [isinstance(each, Doubt) for each in outcomes]
    return pa.table({"stem": stems, "file": files, "reason": reasons, "doubtful": doubtful})


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """Return what a row of `MaskActor`'s says of its stem."""
    if not row["file"]:
        return None
    return (Doubt if row["doubtful"] else Failure)(row["file"], row["reason"])


def _ahead(
    read: Callable[[ItemT], ReadT], items: Iterable[ItemT], most: int
) -> Iterator[tuple[ItemT, ReadT]]:
    """Yield each item with what `read` makes of it, in order; threads are at most `most` ahead."""
    waiting: deque[tuple[ItemT, Future[ReadT]]] = deque()
    with ThreadPoolExecutor(most) as pool:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
