"""Photographs that come in: none that is too large, and each made to keep the data contract."""

import io
from http import HTTPStatus
from pathlib import Path

from PIL import Image, ImageOps

from scribbleseg.app.refusal import Refusal
from scribbleseg.checkpoint import write_bytes
from scribbleseg.datasets.files import bits_per_channel, has_alpha, open_picture
from scribbleseg.errors import InputError

MAX_PIXELS = 64_000_000
"""Of one photograph; with its probabilities it takes about 30 bytes of memory for each."""
# EXIF's tag of how a camera was held; 1 is upright.
_ORIENTATION = 0x0112


def require_size(name: str, path: Path) -> None:
    """Refuse a picture that would take too much memory; only its header is read."""
    pixels = "too many"
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height <= MAX_PIXELS:
                return
            pixels = f"{picture.width}x{picture.height}"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        pass
    except Exception:
        # Whoever decodes it says what is wrong with it.
        return
    raise Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"{name}: found {pixels} pixels, expected at most {MAX_PIXELS // 10**6} megapixels; scale "
        "it down first",
    )


def made_fit(path: Path, name: str) -> str:
    """Rewrite a picture that does not keep the data contract; return the suffix that fits it."""
    try:
        with open_picture(path, ("JPEG", "PNG", "WEBP")) as picture:
            deep = bits_per_channel(path) > 8 or picture.mode not in (
                ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
            )
            turned = _is_turned(picture)
            if deep:
                raise InputError(
                    f"{name}: found {picture.mode} pixels, expected 8-bit RGB; export it so"
                )
            if picture.format == "JPEG" and not turned:
                return ".jpg"
            if picture.format == "PNG" and not turned and not has_alpha(picture):
                return ".png"
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None
    ground = Image.new("RGBA", upright.size, "white")
    stored = io.BytesIO()
    Image.alpha_composite(ground, upright).convert("RGB").save(stored, "PNG")
    write_bytes(path, stored.getvalue())
    return ".png"


def _is_turned(picture: Image.Image) -> bool:
    """Return whether a camera says that it was not held upright; nonsense says nothing."""
    try:
        return picture.getexif().get(_ORIENTATION, 1) != 1
    except Exception:
        return False
