"""Pictures of what a network did: image with strokes, truth, prediction with its mistakes.

Drawing functions take and return uint8 RGB of one size; `to_data_uri` makes it small. Large scenes
are scaled down first: drawing takes 65 bytes of memory for each pixel.
The colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from scribbleseg.datasets.scenes import (
    BACKGROUND,
    OBJECT,
    UNLABELLED,
    Scene,
    ScenePaths,
    read_scene,
)
from scribbleseg.datasets.sheet import BACKGROUND_COLOUR, OBJECT_COLOUR
from scribbleseg.datasets.transforms import fitted_size
from scribbleseg.evaluate import Row
from scribbleseg.predict import Predictor, network_inputs, pad
from scribbleseg.scribbles.encode import shrink

Rgb = UInt8[np.ndarray, "h w 3"]

RED, YELLOW = (213, 94, 0), (240, 228, 66)
WHITE = (255, 255, 255)
JPEG_QUALITY = 85
PANEL_SIDE = 480
# Lines that are drawn at twice the size that is shown are smooth.
DRAWN_SIDE = 2 * PANEL_SIDE


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture."""

    title: str
    """What it shows."""
    uri: str
    """The picture as a data: URI."""


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """Everything the page shows of one image."""

    row: Row
    """Its name and scores."""
    panels: list[Panel]
    """Image with strokes, truth, prediction."""
    attention: list[Panel]
    """Attention maps, finest first, for the first image of a group; empty without gates."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that stand together: the best, the median or the worst."""

    title: str
    """Best, median or worst."""
    exhibits: list[Exhibit]
    """Highest score first."""


def choose(rows: Sequence[Row], count: int) -> dict[str, list[Row]]:
    """Return up to `count` best, median and worst rows by mIoU, each sorted from high to low.

    No row is in two groups; with fewer than 3 x count rows the groups shrink, the median first.
    """
    ordered = sorted(rows, key=lambda row: (-row.miou, row.stem))
    count = min(count, max(1, len(ordered) // 3))
    best = ordered[:count]
    worst = ordered[count:][-count:]
    between = ordered[count : len(ordered) - count]
    start = (len(between) - count) // 2
    median = between[start : start + count] if between else []
    groups = {"Best": best, "Median": median, "Worst": worst}
    return {title: group for title, group in groups.items() if group}


def hang(
    predictor: Predictor,
    scenes: Sequence[ScenePaths],
    rows: Sequence[Row],
    *,
    count: int,
    honour_strokes: bool = True,
) -> list[Group]:
    """Predict and draw the best, median and worst images.

    Args:
        predictor: The network.
        scenes: Where the images are; holds every stem of `rows`.
        rows: The images' scores.
        count: Images per group.
        honour_strokes: Pixels under a stroke take its label, as the scores were made.
    """

    def exhibit(row: Row, gates: bool) -> Exhibit:
        scene = read_scene(paths[row.stem])
        prediction = predictor.predict(scene.image, scene.scribbles, honour_strokes=honour_strokes)
        attention = draw_attention(predictor, scene) if gates else []
        return Exhibit(row=row, panels=draw_panels(scene, prediction), attention=attention)

    paths = {scene.stem: scene for scene in scenes}
    return [
        Group(title=title, exhibits=[exhibit(row, row is group[0]) for row in group])
        for title, group in choose(rows, count).items()
    ]


def draw_panels(scene: Scene, prediction: UInt8[np.ndarray, "h w"]) -> list[Panel]:
    """Draw image with strokes, truth and prediction of a scene that has a mask."""
    assert scene.mask is not None
    image, scribbles, mask = scene.image, scene.scribbles, scene.mask
    if max(mask.shape) > DRAWN_SIDE:
        height, width = fitted_size(mask.shape[0], mask.shape[1], DRAWN_SIDE)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        scribbles = shrink(scribbles, height, width)
        mask, prediction = (_shrink_mask(each, height, width) for each in (mask, prediction))
    pictures = {
        "Image and strokes": draw_strokes(image, scribbles),
        "Truth": draw_truth(image, mask),
        "Prediction": draw_prediction(image, mask, prediction),
    }
    return [Panel(title=name, uri=to_data_uri(rgb, PANEL_SIDE)) for name, rgb in pictures.items()]


def draw_strokes(image: Rgb, scribbles: UInt8[np.ndarray, "h w"]) -> Rgb:
    """Draw object strokes blue, background strokes orange, cased in white, wide enough to see."""
    picture = image.copy()
    width = _line_width(image)
    picture[_grow(scribbles != UNLABELLED, 2 * width)] = WHITE
    picture[_grow(scribbles == BACKGROUND, width)] = BACKGROUND_COLOUR
    picture[_grow(scribbles == OBJECT, width)] = OBJECT_COLOUR
    return picture


def draw_truth(image: Rgb, mask: UInt8[np.ndarray, "h w"]) -> Rgb:
    """Fade what is not object towards white, and outline the object; ignored pixels turn grey."""
    picture = image.copy()
    picture[mask == BACKGROUND] = _mix(image, WHITE, 0.72)[mask == BACKGROUND]
    picture[mask == UNLABELLED] = _mix(image, (128, 128, 128), 0.8)[mask == UNLABELLED]
    return _outline(picture, mask == OBJECT, OBJECT_COLOUR)


def draw_prediction(
    image: Rgb, mask: UInt8[np.ndarray, "h w"], prediction: UInt8[np.ndarray, "h w"]
) -> Rgb:
    """Colour a grey image: found object blue, false alarms red, missed object yellow."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    picture = _mix(grey, WHITE, 0.35)
    claimed = prediction != 0
    for region, colour, strength in (
        (claimed & (mask == OBJECT), OBJECT_COLOUR, 0.55),
        (claimed & (mask == BACKGROUND), RED, 0.75),
        (~claimed & (mask == OBJECT), YELLOW, 0.75),
    ):
        picture[region] = _mix(picture, colour, strength)[region]
    return _outline(picture, claimed, WHITE)


def draw_attention(predictor: Predictor, scene: Scene) -> list[Panel]:
    """Draw every attention map, finest first; dark is ignored, bright is passed on.

    Each is stretched between its own extremes, which the title tells.
    """
    maps_of = getattr(predictor.model, "attention_maps", None)
    if maps_of is None:
        return []
    config = predictor.config
    image, strokes = network_inputs(
        scene.image,
        scene.scribbles,
        config.data.long_side,
        config.strokes,
        predictor.device,
    )
    padded = pad(image, strokes)
    panels: list[Panel] = []
    with torch.inference_mode():
        for attention in maps_of(*padded):
            stride = padded[0].shape[-1] // attention.shape[-1]
            rows, columns = (-(-size // stride) for size in image.shape[-2:])
            values = attention[0, 0, :rows, :columns].float().cpu().numpy()
            title = f"scale 1/{stride}: {values.min():.2f} to {values.max():.2f}"
            panels.append(Panel(title=title, uri=to_data_uri(_heat(values), 240)))
    return panels


def _heat(values: Float32[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return a map as colours from dark blue (its lowest value) to yellow, enlarged to be seen."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-6) * 255
    heat = cv2.applyColorMap(scaled.astype(np.uint8), cv2.COLORMAP_CIVIDIS)
    scale = max(1, 240 // max(values.shape))
    heat = cv2.resize(heat, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(heat, cv2.COLOR_BGR2RGB)


def to_data_uri(picture: Rgb, long_side: int) -> str:
    """Return a JPEG of at most `long_side` pixels as a data: URI, to stand inside a page."""
    scale = min(1.0, long_side / max(picture.shape[:2]))
    height, width = (max(1, round(size * scale)) for size in picture.shape[:2])
    if scale < 1:
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return "data:image/jpeg;base64," + base64.b64encode(to_jpeg(picture)).decode()


def to_jpeg(picture: Rgb) -> bytes:
    """Return a picture as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _shrink_mask(
    mask: UInt8[np.ndarray, "h w"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2"]:
    """Return a smaller mask in which no object vanishes for being thin."""
    small = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    share = cv2.resize(
        (mask == OBJECT).astype(np.float32), (width, height), interpolation=cv2.INTER_AREA
    )
    small[share > 0] = OBJECT
    return small


def _line_width(image: Rgb) -> int:
    """Return how far lines grow to either side, in pixels, so that the small picture shows them."""
    return max(1, round(max(image.shape[:2]) / 350))


def _grow(region: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Return the pixels within a disc of `radius` around a region."""
    size = 2 * radius + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.dilate(region.astype(np.uint8), disc).astype(bool)


def _mix(picture: Rgb, colour: tuple[int, int, int], share: float) -> Rgb:
    """Return the picture with `share` of one colour in it."""
    return (picture * (1 - share) + np.array(colour) * share).round().astype(np.uint8)


def _outline(picture: Rgb, region: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]) -> Rgb:
    """Draw a line around a region, just outside it, so that thin objects stay visible."""
    picture[_grow(region, 2 * _line_width(picture)) & ~region] = colour
    return picture
