"""The data-contract folder that is drawn into.

    ROOT/SPLIT/images/STEM.jpg|png      the photographs
    ROOT/SPLIT/scribbles/STEM.png       strokes, from the first one on
    ROOT/SPLIT/ground_truth/STEM.png    masks that a person accepted
    ROOT/SPLIT/ground_truth/replaced/   masks of other making that stood there before
    ROOT/accepted/...                   links to the samples that have all three, to train on

Names come from a browser, and files may be links: no path outside ROOT is ever read or written.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from scribbleseg.app.arrivals import MAX_PIXELS, made_fit
from scribbleseg.app.refusal import Refusal, not_written
from scribbleseg.datasets.files import IMAGE_SUFFIXES, FileBytes, require_pixels
from scribbleseg.datasets.scenes import (
    FOLDERS,
    LABEL_SUFFIXES,
    encode_png,
    is_predicted,
    list_files,
    read_image,
    read_mask,
    read_scribbles,
    require_same_size,
    revision_accepted_for,
    write_png,
)
from scribbleseg.errors import InputError
from scribbleseg.manifest import is_plain_name, partial_path, write_bytes

ACCEPTED = "accepted"
"""The split that samples are linked into once their masks are accepted."""
MARK = "made-by-scribbleseg-app.txt"
"""Stands in ROOT/accepted once the page has made it: no other folder of that name is touched."""
RUNS = "runs"
"""Where trainings on what was drawn are kept."""
REPLACED = "replaced"
"""Folder among the masks that no reader of data looks into."""
BLANK = "blank"
"""The revision of strokes that do not exist."""

# Revisions and notes of files that have not changed since are remembered, of so many.
_FILES_KNOWN = 1 << 17

Kind = Literal["scribbles", "ground_truth"]
Progress = Literal["untouched", "drawn", "changed", "accepted"]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One split of a data folder, read and written for the page."""

    root: Path
    """Folder that holds the splits."""
    split: str
    """The split that is drawn into."""

    def make(self) -> None:
        """Make the folder of images where there is none.

        Raises:
            InputError: the names cannot be used, or a folder of loose photographs was given.
            Refusal: a link leads out of `root`.
        """
        if not is_plain_name(self.split) or self.split in (ACCEPTED, RUNS):
            raise InputError(
                f"--split is {self.split!r}; expected one folder name, such as train, other than "
                f"{ACCEPTED} and {RUNS}, which the page writes itself"
            )
        images = self._folder("images")
        loose = self.root.is_dir() and list_files(self.root, IMAGE_SUFFIXES)
        if loose and not images.is_dir():
            raise InputError(
                f"{self.root}: holds {len(loose)} photograph(s), expected them in {images}; move "
                "them there, or name another folder and drop them on the page"
            )
        try:
            images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{images}: cannot be made ({error.strerror}); name another --data"
            ) from None

    def pictures(self) -> dict[str, Progress]:
        """Return the stems of all photographs, sorted, and how far each is."""
        images = list_files(self._folder("images"), IMAGE_SUFFIXES)
        drawn, masks = self._labels("scribbles"), self._labels("ground_truth")
        return {
            stem: self._progress(drawn.get(stem), masks.get(stem))
            for stem in filter(is_plain_name, images)
        }

    def hidden(self) -> list[str]:
        """Return the photographs that are not shown: their names would not be files elsewhere."""
        images = list_files(self._folder("images"), IMAGE_SUFFIXES)
        return [path.name for stem, path in images.items() if not is_plain_name(stem)]

    def progress(self, stem: str) -> Progress:
        """Return how far one photograph is."""
        drawn, mask = self._path("scribbles", stem), self._path("ground_truth", stem)
        return self._progress(drawn if drawn.is_file() else None, mask if mask.is_file() else None)

    def image_path(self, stem: str) -> Path:
        """Return where a photograph lies.

        Raises:
            Refusal: no plain name, no such photograph, or a link that leads out of `root`.
        """
        images = self._folder("images")
        _require_plain(stem)
        for suffix in IMAGE_SUFFIXES:
            for path in (images / f"{stem}{suffix}", images / f"{stem}{suffix.upper()}"):
                if path.is_file():
                    return self._inside(path)
        # Written otherwise, such as .Jpg: few are, and listing a large folder takes time.
        if (path := list_files(images, IMAGE_SUFFIXES).get(stem)) is not None:
            return self._inside(path)
        raise Refusal(HTTPStatus.NOT_FOUND, f"{stem}: no such photograph in {images}")

    def image_state(self, stem: str) -> tuple[int, ...]:
        """Return what changes whenever the file of a photograph does.

        Raises:
            Refusal: it is not there, or leads out of `root`.
        """
        return _state(self.image_path(stem))

    def read_image(self, stem: str) -> UInt8[np.ndarray, "h w 3"]:
        """Decode a photograph.

        Raises:
            Refusal: it is not there, or leads out of `root`.
            InputError: it has more than `MAX_PIXELS`, or does not keep the data contract.
        """
        path = self.image_path(stem)
        require_pixels(path, MAX_PIXELS)
        return read_image(path)

    def revision(self, stem: str) -> str:
        """Return what stands for the strokes as they are on disk: a hash of the file, or BLANK."""
        path = self._path("scribbles", stem)
        return _hash(path.read_bytes()) if path.is_file() else BLANK

    def read_labels(
        self, kind: Kind, stem: str, image: UInt8[np.ndarray, "h w 3"]
    ) -> UInt8[np.ndarray, "h w"] | None:
        """Decode strokes or mask of a photograph; None where there is no file.

        Raises:
            Refusal: a link that leads out of `root`.
            InputError: it does not keep the data contract.
        """
        path = self._path(kind, stem)
        if not path.is_file():
            return None
        require_pixels(path, MAX_PIXELS)
        labels = read_scribbles(path) if kind == "scribbles" else read_mask(path)
        require_same_size(path, labels, self.image_path(stem), image)
        return labels

    def read_strokes_file(self, stem: str) -> bytes | None:
        """Return the file of strokes as it is; None where there is none."""
        path = self._path("scribbles", stem)
        return path.read_bytes() if path.is_file() else None

    def write_strokes_file(self, stem: str, content: bytes | None) -> None:
        """Write a file that `read_strokes_file` gave, whole or not at all; None removes it."""
        path = self._path("scribbles", stem)
        try:
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)
        except OSError as error:
            raise not_written(error, path) from None

    def write_strokes(self, stem: str, strokes: UInt8[np.ndarray, "h w"]) -> None:
        """Write strokes, whole or not at all; an older file is replaced.

        Raises:
            Refusal: it cannot be written; the older file stays.
        """
        path = self._path("scribbles", stem)
        try:
            path.parent.mkdir(exist_ok=True)
            write_png(path, strokes, palette=True)
        except OSError as error:
            raise not_written(error, path) from None

    def accept(self, stem: str, revision: str, mask: UInt8[np.ndarray, "h w"]) -> bool:
        """Write a mask that a person accepted for strokes of a revision, whole or not at all.

        A mask that stood there and is no network's may be the work of hours: it is kept.

        Returns:
            Whether there was one.

        Raises:
            Refusal: it cannot be written; the older file stays.
        """
        path = self._path("ground_truth", stem)
        kept = path.is_file() and revision_accepted_for(path) is None and not is_predicted(path)
        try:
            path.parent.mkdir(exist_ok=True)
            if kept:
                old = path.read_bytes()
                # Whatever else was kept before stays, too.
                copy = self._inside(path.parent / REPLACED / f"{stem}-{_hash(old)}.png")
                copy.parent.mkdir(exist_ok=True)
                write_bytes(copy, old)
            write_bytes(path, encode_png(mask, palette=True, accepted_for=revision))
        except OSError as error:
            raise not_written(error, path) from None
        return kept

    def add(self, name: str, content: bytes) -> str:
        """Keep a photograph, made to keep the data contract; return its stem.

        Another photograph of that name is never replaced, unless two come in at the same moment.

        Raises:
            Refusal: no plain name, or it cannot be written.
            InputError: not a picture, or one that cannot be used; see `made_fit`.
        """
        stem = os.path.splitext(name)[0]
        _require_plain(stem)
        suffix, content = made_fit(FileBytes(name=name, content=content))
        images = self._folder("images")
        # Many disks hold IMG.jpg and img.jpg to be one file.
        listed = list_files(images, IMAGE_SUFFIXES)
        taken = {other.casefold(): path for other, path in listed.items()}
        number, wanted = 1, stem
        while (there := taken.get(wanted.casefold())) is not None:
            if self._inside(there).read_bytes() == content:
                return there.stem
            number += 1
            wanted = f"{stem}-{number}"
        try:
            write_bytes(images / f"{wanted}{suffix}", content)
        except OSError as error:
            raise not_written(error, images) from None
        return wanted

    @property
    def runs(self) -> Path:
        """Where trainings on what was drawn are kept, so that the page may load them."""
        return self._inside(self.root / RUNS)

    def list_runs(self) -> list[str]:
        """Return the trainings in `runs` that have a checkpoint, sorted."""
        found = sorted(path.parent for path in self.runs.glob("*/best.json"))
        return [str(path) for path in found if self._is_inside(path)]

    def collect(self) -> tuple[str, dict[str, int]]:
        """Bring the samples with accepted masks together.

        Training wants strokes and a mask for every photograph of a split. Where some lack them, the
        others are linked into a split of their own, which takes no space; what was linked before
        and is not among them any more is taken out of it.

        Returns:
            Their split, and when each mask was accepted, in ns, by stem.

        Raises:
            Refusal: it cannot be written, or ROOT/accepted is not of the page's making.
        """
        pictures, masks = self.pictures(), self._labels("ground_truth")
        drawn = self._labels("scribbles")
        accepted = [stem for stem, how in pictures.items() if how == "accepted"]
        done = {stem: masks[stem].stat().st_mtime_ns for stem in accepted}
        # Training reads the photographs that the page hides, too, and refuses labels of others.
        whole = done.keys() == drawn.keys() == masks.keys()
        if not done or (whole and len(done) == len(pictures) + len(self.hidden())):
            return self.split, done
        there = Folder(root=self.root, split=ACCEPTED)
        mark = self._inside(self.root / ACCEPTED / MARK)
        if not mark.is_file() and mark.parent.is_dir() and any(mark.parent.iterdir()):
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"{mark.parent}: was not made by the page, which links there what was accepted; "
                "give it another name",
            )
        for made in (mark.parent, *map(mark.parent.joinpath, FOLDERS)):
            # What is linked there no more is removed, and must not be somebody's photographs.
            if made.is_symlink():
                raise Refusal(
                    HTTPStatus.CONFLICT,
                    f"{made}: is a link, expected a folder that the page makes; remove it",
                )
        try:
            mark.parent.mkdir(exist_ok=True)
            write_bytes(mark, b"What stands here is linked anew for every training.\n")
            _link_all([self.image_path(stem) for stem in done], there._folder("images"))
            for kind in ("scribbles", "ground_truth"):
                _link_all([self._path(kind, stem) for stem in done], there._folder(kind))
        except OSError as error:
            raise not_written(error, self.root / ACCEPTED) from None
        return ACCEPTED, done

    def _labels(self, kind: Kind) -> dict[str, Path]:
        """Return the files of labels by stem."""
        folder = self._folder(kind)
        return list_files(folder, LABEL_SUFFIXES) if folder.is_dir() else {}

    def _progress(self, drawn: Path | None, mask: Path | None) -> Progress:
        """Return how far a photograph is, by the files of its strokes and its mask, if any."""
        if mask is None:
            return "untouched" if drawn is None else "drawn"
        # Without the strokes that it was accepted with, a mask is nothing to train on.
        if drawn is None:
            return "changed"
        revision = None
        # Their folders are inside.
        if all(not path.is_symlink() or self._is_inside(path) for path in (drawn, mask)):
            revision = _accepted_for(mask, _state(mask))
        if revision is None:
            # Of a mask of other making, only the times are known.
            same = drawn.stat().st_mtime_ns <= mask.stat().st_mtime_ns
        else:
            same = _revision(drawn, _state(drawn)) == revision
        return "accepted" if same else "changed"

    def _path(self, kind: Kind, stem: str) -> Path:
        """Return where the labels of a photograph lie, or would."""
        _require_plain(stem)
        path, upper = (self._folder(kind) / f"{stem}{suffix}" for suffix in (".png", ".PNG"))
        return self._inside(upper if upper.is_file() and not path.is_file() else path)

    def _folder(self, kind: Kind | Literal["images"]) -> Path:
        return self._inside(self.root / self.split / kind)

    def _inside(self, path: Path) -> Path:
        """Return the path, or refuse one that a link leads out of `root`."""
        if not self._is_inside(path):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"{path}: a link that leads out of {self.root}; put the file itself there",
            )
        return path

    def _is_inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))


def _hash(content: bytes) -> str:
    """Return 16 hexadecimal digits that stand for a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes whenever a file does."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(_FILES_KNOWN)
def _revision(path: Path, _state: tuple[int, ...]) -> str:
    """Return the revision of strokes, whose file is read once for each of its states."""
    return _hash(path.read_bytes())


@functools.lru_cache(_FILES_KNOWN)
def _accepted_for(path: Path, _state: tuple[int, ...]) -> str | None:
    """Return what `revision_accepted_for` does; the file is read once for each of its states."""
    return revision_accepted_for(path)


def _require_plain(stem: str) -> None:
    """Refuse what is not the name of one file."""
    if not is_plain_name(stem):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            f"{stem[:80]!r}: expected a plain file name without folders; rename it",
        )


def _link_all(paths: Sequence[Path], folder: Path) -> None:
    """Let a folder hold links to these files, and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in paths}
    for left in folder.iterdir():
        if left.name not in names and left.is_file():
            left.unlink()
    for path in paths:
        _link(path, folder / path.name)


def _link(path: Path, target: Path) -> None:
    """Let `target` be the same file, or a copy where the file system knows no links."""
    if target.exists() and os.path.samefile(path, target):
        return
    partial = partial_path(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, target)
