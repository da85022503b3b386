"""Photographs that come in: none that is too large, and each made to keep the data contract."""

import io

from PIL import Image, ImageOps

from scribbleseg.datasets.files import (
    FileBytes,
    bits_per_channel,
    has_alpha,
    is_turned,
    open_picture,
    require_pixels,
)
from scribbleseg.errors import InputError

MAX_PIXELS = 64_000_000
"""Of one photograph; with its probabilities it takes about 30 bytes of memory for each."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def made_fit(file: FileBytes) -> tuple[str, bytes]:
    """Return the suffix and the content under which a photograph is kept.

    It stays as it is where it keeps the data contract, also with a phone's second picture behind
    it. One that a camera held sideways, a WebP and a transparent picture (on white) become upright
    PNGs.

    Raises:
        TooManyPixelsError: it has more than `MAX_PIXELS`, by its header.
        InputError: not a picture, or one of more than 8 bits or other colours than RGB.
    """
    require_pixels(file, MAX_PIXELS)
    with open_picture(file, ("JPEG", "PNG", "WEBP")) as picture:
        if bits_per_channel(file) > 8 or picture.mode not in _MODES:
            found = "16 bits per channel" if picture.mode in _MODES else f"{picture.mode} pixels"
            raise InputError(f"{file}: found {found}, expected 8-bit RGB; export it so")
        turned = is_turned(picture)
        if picture.format in ("JPEG", "MPO") and not turned:
            return ".jpg", file.content
        if picture.format == "PNG" and not turned and not has_alpha(picture):
            return ".png", file.content
        upright = ImageOps.exif_transpose(picture) if turned else picture
        ground = Image.new("RGBA", upright.size, "white")
        stored = io.BytesIO()
        whole = Image.alpha_composite(ground, upright.convert("RGBA"))
        whole.convert("RGB").save(stored, "PNG")
        return ".png", stored.getvalue()
