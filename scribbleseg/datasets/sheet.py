"""Contact sheets: many photographs on one page, with their strokes and their mask's outline."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from scribbleseg.datasets.scenes import BACKGROUND, OBJECT, Scene

# Colours of Okabe and Ito, which stay apart for colour-blind eyes.
OBJECT_COLOUR = (0, 114, 178)
BACKGROUND_COLOUR = (230, 159, 0)
OUTLINE_COLOUR = (204, 121, 167)

TILE_WIDTH, TILE_HEIGHT, CAPTION_HEIGHT, MARGIN, HEADER_HEIGHT = 300, 225, 22, 8, 30
NUM_COLUMNS = 6

_PAPER, _INK, _ALARM = (255, 255, 255), (40, 40, 40), (200, 30, 30)


def draw_tile(scene: Scene, caption: str, remark: str = "") -> Image.Image:
    """Draw one scene, fitted into a tile of fixed size, over its caption and a remark in red."""
    tile = Image.new(
        "RGB", (TILE_WIDTH + MARGIN, TILE_HEIGHT + CAPTION_HEIGHT + MARGIN), color=_PAPER
    )
    picture = Image.fromarray(draw_scene(scene, TILE_WIDTH, TILE_HEIGHT))
    tile.paste(picture, ((TILE_WIDTH - picture.width) // 2, TILE_HEIGHT - picture.height))
    pen = ImageDraw.Draw(tile)
    font = ImageFont.load_default(13)
    # A file's name may hold any character; what cannot be printed has no place on a line.
    caption = "".join(each if each.isprintable() else "?" for each in caption)
    pen.text((2, TILE_HEIGHT + 3), caption, fill=_INK, font=font)
    if remark:
        start = 2 + pen.textlength(caption, font=font) + 8
        pen.text((start, TILE_HEIGHT + 3), remark, fill=_ALARM, font=font)
    return tile


def draw_scene(scene: Scene, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Draw image, strokes and mask outline, as large as fits into `width` x `height` pixels."""
    rows, columns = scene.scribbles.shape
    scale = min(width / columns, height / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    canvas = _resize(scene.image, size)
    if scene.mask is not None:
        inside = (_resize(scene.mask == OBJECT, size) > 0.5).astype(np.uint8)
        halo = cv2.dilate(inside, np.ones((5, 5), np.uint8)) - inside
        line = cv2.dilate(inside, np.ones((3, 3), np.uint8)) - inside
        canvas = _blend(canvas, 0.4 * halo, _INK)
        canvas = _blend(canvas, line.astype(np.float32), OUTLINE_COLOUR)
    for value, colour in ((BACKGROUND, BACKGROUND_COLOUR), (OBJECT, OBJECT_COLOUR)):
        # Area resampling thins strokes; doubling their coverage keeps a 1-px stroke visible.
        canvas = _blend(canvas, 2 * _resize(scene.scribbles == value, size), colour)
    return canvas.round().astype(np.uint8)


def draw_sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """Arrange tiles in rows under a legend."""
    num_columns = min(NUM_COLUMNS, max(2, len(tiles)))
    num_rows = -(-len(tiles) // num_columns)
    width, height = TILE_WIDTH + MARGIN, TILE_HEIGHT + CAPTION_HEIGHT + MARGIN
    sheet = Image.new(
        "RGB",
        (num_columns * width + MARGIN, num_rows * height + HEADER_HEIGHT + MARGIN),
        color=_PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    x = MARGIN
    for colour, meaning in (
        (OBJECT_COLOUR, "object stroke"),
        (BACKGROUND_COLOUR, "background stroke"),
        (OUTLINE_COLOUR, "outline of the mask"),
    ):
        pen.rectangle((x, 9, x + 14, 23), fill=colour, outline=_INK)
        pen.text((x + 20, 7), meaning, fill=_INK, font=font)
        x += 44 + int(pen.textlength(meaning, font=font))
    for position, tile in enumerate(tiles):
        row, column = divmod(position, num_columns)
        sheet.paste(tile, (MARGIN + column * width, HEADER_HEIGHT + MARGIN + row * height))
    return sheet


def _resize(array: np.ndarray, size: tuple[int, int]) -> Float[np.ndarray, "h w *c"]:
    """Resample to (width, height), averaging over the area of each new pixel."""
    return cv2.resize(array.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _blend(
    canvas: Float[np.ndarray, "h w 3"], opacity: Float[np.ndarray, "h w"], colour: tuple[int, ...]
) -> Float[np.ndarray, "h w 3"]:
    """Paint a colour over the canvas; opacity above 1 counts as 1."""
    weight = np.clip(opacity, 0, 1)[..., None]
    return canvas * (1 - weight) + np.asarray(colour, np.float32) * weight
