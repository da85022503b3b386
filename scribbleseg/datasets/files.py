"""Pictures read strictly, and files and folders that appear whole or not at all."""

import contextlib
import io
import os
import shutil
import struct
import zlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from scribbleseg.errors import InputError
from scribbleseg.manifest import make_folder, partial_path, place_of_new

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# More than this Pillow takes for an attack.
MAX_MEGAPIXELS = 178
# EXIF's tag of how a camera was held; 1 is upright.
_ORIENTATION = 0x0112

# Pillow's decoders meet damaged files with all of these.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class NotAPictureError(InputError):
    """A file is no picture of an accepted format, whatever its name says."""


class TooManyPixelsError(InputError):
    """A picture is larger than whoever reads it has memory for."""


@dataclass(frozen=True, kw_only=True)
class FileBytes:
    """A file that lies in memory: it came over a network, and has no place on this machine."""

    name: str
    """What messages call it."""
    content: bytes = field(repr=False)
    """All of it."""

    def open(self, _mode: str = "rb") -> io.BytesIO:
        """Open it as `Path.open("rb")` opens a file."""
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name


File = Path | FileBytes


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return where caches are kept; None: $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg."""
    default = Path.home() / ".cache" / "scribbleseg"
    return Path(folder or os.environ.get("SCRIBBLESEG_CACHE") or default)


@contextlib.contextmanager
def open_picture(path: File, formats: tuple[str, ...]) -> Generator[Image.Image]:
    """Open a picture and decode it whole, in its stored mode.

    Args:
        path: The file.
        formats: Pillow's names of the formats that are accepted, whatever the file's suffix.

    Raises:
        InputError: another format, truncated or otherwise unreadable.
    """
    try:
        with path.open("rb") as file:
            picture = Image.open(file, formats=formats)
            picture.load()
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: found more than {MAX_MEGAPIXELS} megapixels, expected no more; scale it down"
        ) from None
    except DECODE_ERRORS as error:
        kind = NotAPictureError if isinstance(error, UnidentifiedImageError) else InputError
        expected = " or ".join(formats)
        raise kind(
            f"{path}: {reason(error)}; expected a whole {expected} file; save or copy it again"
        ) from None
    with picture:
        yield picture


def require_pixels(path: File, most: int) -> None:
    """Raise a `TooManyPixelsError` where a picture's header announces more than `most` pixels.

    Nothing is decoded, so a small file that would unfold to gigabytes costs nothing. What is no
    picture passes: whoever decodes it says so better.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=("JPEG", "PNG", "WEBP")) as picture:
            width, height = picture.size
            found = f"{width}x{height} pixels"
            too_many = width * height > most
    except Image.DecompressionBombError:
        found, too_many = f"more than {MAX_MEGAPIXELS} megapixels", True
    except Image.DecompressionBombWarning:
        # At half of that, where warnings are errors.
        found, too_many = f"more than {MAX_MEGAPIXELS // 2} megapixels", True
    except DECODE_ERRORS:
        return
    if too_many:
        raise TooManyPixelsError(
            f"{path}: found {found}, expected at most {most / 1e6:g} megapixels; scale it down"
        )


def bits_per_channel(path: File) -> int:
    """Return the bit depth in a PNG's header, and 8 for any other file.

    Pillow decodes a 16-bit colour PNG to 8 bits without a word, so the header has to be asked.
    """
    with path.open("rb") as file:
        header = file.read(25)
    return header[24] if header.startswith(b"\x89PNG") and len(header) == 25 else 8


def eight_bits(picture: Image.Image) -> Image.Image:
    """Return the picture, one of 16-bit grey without the low byte of its values."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def is_turned(picture: Image.Image) -> bool:
    """Return whether viewers show a picture otherwise than its pixels are stored, by its EXIF tag.

    A tag that is nonsense, which viewers ignore, says nothing.
    """
    try:
        return picture.getexif().get(_ORIENTATION, 1) not in (0, 1)
    # Pillow has no one error for what can be wrong in EXIF.
    except Exception:
        return False


def is_turned_file(path: File) -> bool:
    """Return whether viewers show a photograph otherwise than its pixels are stored.

    Its strokes and mask must lie as the pixels do: nothing here turns them.
    """
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            return is_turned(picture)
    except DECODE_ERRORS:
        # Nor do viewers know how to turn it.
        return False


def has_alpha(picture: Image.Image) -> bool:
    """Return whether the picture has an alpha channel or a transparent colour."""
    return picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info


def reason(error: Exception) -> str:
    """Return why a file or folder could not be read, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not such a picture"
    return " ".join(str(error).split()) or type(error).__name__


def write_picture(path: Path, picture: Image.Image, kind: str, **options: Any) -> None:
    """Write a picture in Pillow's format `kind`, whole or not at all; its folder must exist."""
    partial = partial_path(path, os.getpid())
    try:
        picture.save(partial, format=kind, **options)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Give a temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        InputError: `out` exists and is not an empty folder, is where a disk is mounted, or cannot
            be made.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: already there; expected a new folder; name another one")
    place = place_of_new(out)
    partial = partial_path(place, os.getpid())
    try:
        make_folder(partial, asked=out)
        yield partial
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
