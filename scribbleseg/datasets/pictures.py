"""Any folders of images, labels unused: what pretraining reads.

Unlike the data contract, nothing here has to match anything. One file among many that cannot be
used is therefore no reason to stop: it is skipped, and the cache tells which and why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
from jaxtyping import UInt8

from scribbleseg.datasets.cache import (
    Index,
    PixelMap,
    Write,
    data_path,
    fingerprint_of,
    hash_file,
    open_or_build,
    read_ahead,
)
from scribbleseg.datasets.files import IMAGE_SUFFIXES, reason
from scribbleseg.datasets.remote import local_copy
from scribbleseg.datasets.scenes import read_image
from scribbleseg.errors import InputError

FORMAT = 1
LABEL_FOLDERS = ("scribbles", "ground_truth")


def list_images(
    roots: Sequence[str | Path],
    cache_dir: str | Path | None = None,
    *,
    option: str = "--data.roots",
) -> list[Path]:
    """Return all images below some folders, sorted; no file is opened.

    Hidden files and folders and the data contract's folders of labels are passed over; links are
    followed; a folder that is reached twice counts once.

    Args:
        roots: Folders or URIs; remote ones are fetched first.
        cache_dir: Where remote images are kept; see `remote.local_copy`.
        option: What names the folders on the command line, for messages.

    Raises:
        InputError: no roots, a root that is missing or holds no image, or an unreadable folder;
            remote images cannot be fetched.
    """
    if not roots:
        name = option.removeprefix("--")
        raise InputError(f"{name} is not set; expected folders of images: {option} DIR ...")
    images: dict[tuple[str, str], Path] = {}
    for root in roots:
        # The first name under which a file is found stays.
        images = _list_below(local_copy(root, cache_dir), option) | images
    return sorted(images.values())


class Skipped(NamedTuple):
    """A file that is not used."""

    path: Path
    """The file."""
    reason: str
    """Why, on one line."""


class ImageEntry(NamedTuple):
    """Where one image lies in the data file."""

    name: str
    """Its path, as it was asked for."""
    height: int
    """Rows, in pixels."""
    width: int
    """Columns, in pixels."""
    offset: int
    """Where it begins, in bytes."""


@dataclass(frozen=True, kw_only=True)
class ImageCache:
    """Decoded images behind a memory map; picklable: another process maps the file anew."""

    path: Path
    """The data file."""
    fingerprint: str
    """sha256 over names and contents of the files used; the same on every machine and path."""
    entries: tuple[ImageEntry, ...] = field(repr=False)
    """One per image, in the order asked for."""
    skipped: tuple[Skipped, ...] = ()
    """Files that could not be used, in the order asked for."""

    @staticmethod
    def open(
        images: Sequence[Path], folder: str | Path | None, *, max_short_side: int
    ) -> "ImageCache":
        """Return the cache of these images; the first process to ask builds it, others wait.

        Args:
            images: The files, from `list_images`.
            folder: Where caches are kept; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.
            max_short_side: Images whose shorter side is longer are stored scaled down to it, by
                area averages, in pixels (1 or more): the size that the views need.

        Raises:
            InputError: no images, none that can be used, or a folder that cannot be written.
        """
        if not images:
            raise InputError("no images to cache; expected at least one")
        path = data_path(f"images {FORMAT}, short side {max_short_side}", images, folder)

        def load(index: Index) -> ImageCache:
            # The index holds positions, not paths: two spellings of a path share one cache.
            return ImageCache(
                path=path,
                fingerprint=index["fingerprint"],
                entries=tuple(
                    ImageEntry(str(images[position]), *place)
                    for position, *place in index["entries"]
                ),
                skipped=tuple(Skipped(images[position], why) for position, why in index["skipped"]),
            )

        return open_or_build(path, load, partial(_build, images, max_short_side))

    @property
    def names(self) -> list[str]:
        """Paths of the images, in order."""
        return [entry.name for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return one image, RGB; a read-only view of the map."""
        entry = self.entries[index]
        return self._pixels.view(entry.offset, (entry.height, entry.width, 3))

    @cached_property
    def _pixels(self) -> PixelMap:
        return PixelMap(self.path)


def scale_down(image: UInt8[np.ndarray, "h w 3"], scale: float) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Scale an image by area averages; with a scale of 1 or more it stays as it is."""
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def why_not(path: Path, error: InputError | OSError) -> str:
    """Return why a file is skipped, on one line."""
    if isinstance(error, OSError):
        return reason(error)
    # Without the path and without the remedy: the file may stay as it is.
    return str(error).removeprefix(f"{path}: ").rpartition("; ")[0]


def _list_below(root: Path, option: str) -> dict[tuple[str, str], Path]:
    """Return the images below a folder, by the folder's one true path and the file's name."""
    expected = f"expected a folder of {', '.join(IMAGE_SUFFIXES)} files"

    def refuse(error: OSError) -> NoReturn:
        raise InputError(
            f"{error.filename}: found {reason(error)}; {expected}; "
            f"make it readable, or name other folders with {option}"
        )

    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise InputError(f"{root}: found {found}; {expected}; correct {option}")
    images: dict[tuple[str, str], Path] = {}
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        here = os.path.realpath(folder)
        if here in visited:
            # A link has led back here; to follow it again would never end.
            subfolders.clear()
            continue
        visited.add(here)
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != "." and name not in LABEL_FOLDERS
        )
        images |= {(here, name): Path(folder, name) for name in files if _is_image(folder, name)}
    if not images:
        raise InputError(
            f"{root}: found no image; {expected} (subfolders are searched); correct {option}"
        )
    return images


def _is_image(folder: str, name: str) -> bool:
    """Return whether a file is to be read; a dead link is, so that it is reported as skipped."""
    path = Path(folder, name)
    named_so = name[0] != "." and path.suffix.lower() in IMAGE_SUFFIXES
    return named_so and (path.is_file() or not path.exists())


def _build(images: Sequence[Path], max_short_side: int, write: Write) -> Index:
    """Decode all images and write their pixels; return the index."""
    entries: list[tuple[int, int, int, int]] = []
    skipped: list[tuple[int, str]] = []
    digests: list[tuple[str, str]] = []
    for position, read in enumerate(read_ahead(partial(_read, max_short_side), images)):
        if isinstance(read, str):
            skipped.append((position, read))
            continue
        pixels, digest = read
        height, width = pixels.shape[:2]
        entries.append((position, height, width, write(pixels)))
        digests.append((images[position].name, digest))
    if not entries:
        first, why = skipped[0]
        raise InputError(
            f"{images[first]}: {why}; none of the {len(images)} images can be used; replace them, "
            "or name other folders with --data.roots"
        )
    return {"fingerprint": fingerprint_of(digests), "entries": entries, "skipped": skipped}


def _read(max_short_side: int, path: Path) -> tuple[UInt8[np.ndarray, "h w 3"], str] | str:
    """Decode an image, scale it down and hash its file; or return why that cannot be done."""
    try:
        pixels, digest = read_image(path), hash_file(path)
    except (InputError, OSError) as error:
        return why_not(path, error)
    return scale_down(pixels, max_short_side / min(pixels.shape[:2])), digest
