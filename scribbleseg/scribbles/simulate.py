"""Simulated strokes: a mask and a generator in, strokes out.

The style `curve` follows the generator that drew the benchmark's strokes (Scribbles for All, arXiv
2408.12489): every connected part of object and background is eroded by an amount that depends on
its area; each piece that is left gets one parabola, between two far points of its rim and bent
through its inside; curves that leave the piece are thrown away. We deviate in this: margins are
fitted to the benchmark (whose strokes keep a wider margin in the background than on objects) and
scale with the image; candidates are tried in one batch, on a thinned grid of pixels; deep pixels
stand in for those of the skeleton; the largest part of a class always gets a stroke.

`skeleton` and `line` are two of the styles of ScribblePrompt (arXiv 2312.07381), drawn inside the
same pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from scipy.ndimage import uniform_filter1d
from scipy.sparse import csgraph, csr_array
from scipy.spatial import KDTree
from skimage.morphology import skeletonize

from scribbleseg.config import StrokeStyle
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, UNLABELLED

# All lengths and areas below are those of an image of this many pixels, the benchmark's.
REFERENCE_PIXELS = 500 * 375
MIN_PART_AREA = 80
MIN_PIECE_AREA = 200
# Curves keep 4 pixels away from the border of small objects, 10 from that of large ones (5 % and
# 25 % of the image), and 20 in the background, whose curves also end another 20 further inside.
OBJECT_MARGINS = (4, 10)
OBJECT_SHARES = (0.05, 0.25)
BACKGROUND_MARGIN = 20
BACKGROUND_EXTRA = 20
# After so many curves that leave the piece, the rim on which they end moves inwards.
NUM_TRIES = 20
RIM_STEP = 2
# The ends of a curve are far apart among so many random points of the rim; 88 % of it are drawn.
NUM_RIM_POINTS = 8
CURVE_SHARE = 0.88

NUM_POINTS = 96
"""Points of a stroke: dense enough that it cannot cross a border between two of them unseen."""
GRID = 96
"""Pieces are searched on every k-th pixel, so that about GRID x GRID pixels are looked at."""

Grid = Float32[np.ndarray, "_ _"]
"""Depth on every k-th pixel of a part's window: distance to the border, 0 outside the piece."""
Points = Float64[np.ndarray, "_ 2"]
"""Points (x, y), in pixels of the part's window or of its grid."""


def simulate(
    mask: UInt8[np.ndarray, "h w"],
    generator: np.random.Generator,
    *,
    style: StrokeStyle = "curve",
    width: float = 3.0,
    length: float = 1.0,
    count: int = 1,
    misplaced: float = 0.0,
) -> UInt8[np.ndarray, "h w"]:
    """Draw strokes on object and background, as a user might.

    A pure function of the mask and the generator. Wherever a class exists it gets a stroke.

    Args:
        mask: 0 background, 1 object, 255 ignore (never drawn on).
        generator: Every draw comes from it.
        style: `curve`: a parabola; `skeleton`: along the middle; `line`: straight or bent; `mixed`:
            one of the three, drawn once per call.
        width: OpenCV's line thickness, rounded, at least 1. The benchmark's strokes are drawn with
            3, which covers 5 pixels: OpenCV's lines are about 2 pixels wider than asked for.
        length: Share of each stroke's length that is kept (0, 1].
        count: Most strokes per piece; their number is drawn from 1 to `count`.
        misplaced: Share of each stroke's length that carries the other label [0, 1).

    Returns:
        0 background stroke, 1 object stroke, 255 unlabelled.
    """
    if style == "mixed":
        styles: tuple[StrokeStyle, ...] = ("curve", "skeleton", "line")
        style = styles[generator.integers(3)]
    strokes = np.full(mask.shape, UNLABELLED, np.uint8)
    for label in (BACKGROUND, OBJECT):
        region = mask == label
        canvas = np.full(mask.shape, UNLABELLED, np.uint8)
        for path in _class_paths(region, label, style, count, generator):
            path = _sub_path(path, length, generator)
            _draw(canvas, path, label, width)
            if misplaced > 0:
                _draw(canvas, _sub_path(path, misplaced, generator), 1 - label, width)
        inside = region & (canvas != UNLABELLED)
        if region.any() and not inside.any():
            # Smoothed, a path can leave what is thin all over: a dot where it is widest.
            widest = np.unravel_index(int(_depth(region).argmax()), region.shape)
            canvas[widest], inside[widest] = label, True
        np.copyto(strokes, canvas, where=inside)
    return strokes


def correct(
    prediction: UInt8[np.ndarray, "h w"],
    mask: UInt8[np.ndarray, "h w"],
    strokes: UInt8[np.ndarray, "h w"],
    generator: np.random.Generator,
    *,
    width: float = 3.0,
) -> UInt8[np.ndarray, "h w"]:
    """Return the strokes with one more, where a user would draw it: in the largest error.

    As in the evaluation of ScribblePrompt (arXiv 2312.07381), the errors are those of both kinds,
    in connected parts; the stroke is a curve inside the largest part, with the true label.

    Args:
        prediction: 0 background, 1 object.
        mask: 0 background, 1 object, 255 ignore.
        strokes: What was drawn before: 0 background, 1 object, 255 unlabelled.
        generator: Every draw comes from it.
        width: OpenCV's line thickness, see `simulate`.

    Returns:
        The strokes, coded alike; the same ones where nothing is wrong.
    """
    wrong = (prediction != mask) & (mask != UNLABELLED)
    regions = [_largest(wrong & (mask == label)) for label in (BACKGROUND, OBJECT)]
    label = int(regions[OBJECT].sum() > regions[BACKGROUND].sum())
    region, strokes = regions[label], strokes.copy()
    path = next(_class_paths(region, OBJECT, "curve", 1, generator), None)
    if path is not None:
        canvas = np.zeros(mask.shape, np.uint8)
        _draw(canvas, path, 1, width)
        strokes[(canvas == 1) & region] = label
    return strokes


def _class_paths(
    region: Bool[np.ndarray, "h w"],
    label: int,
    style: StrokeStyle,
    count: int,
    generator: np.random.Generator,
) -> Iterator[Points]:
    """Yield the strokes of a class, in pixels of the image."""
    # Large images are looked at on every k-th pixel: their strokes are no finer for it.
    stride = max(1, int(np.sqrt(region.size / REFERENCE_PIXELS)))
    thinned = np.ascontiguousarray(region[::stride, ::stride])
    if not thinned.any():
        stride, thinned = 1, region
    for part in _parts(thinned, label):
        origin = (part.window[1].start, part.window[0].start)
        for path in _paths(part, style, count, generator):
            yield stride * (path + origin)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One connected part of a class, and how its strokes are laid. Lengths in pixels."""

    window: tuple[slice, slice]
    """Its bounding box."""
    depth: Float32[np.ndarray, "h w"]
    """City-block distance to the nearest pixel outside the part or the image; 0 outside."""
    margin: int
    """Strokes keep further away from the border than this."""
    rim: int
    """The ends of strokes keep further away from the border than this."""
    min_area: int
    """Smaller pieces get no stroke."""
    essential: bool
    """The largest part of a class gets a stroke, whatever it takes."""

    @property
    def step(self) -> int:
        """Distance between the pixels of the grid."""
        return max(1, round(np.sqrt(self.depth.size) / GRID))

    def holds(self, points: Float64[np.ndarray, "*n 2"]) -> Bool[np.ndarray, "*n"]:
        """Return which points lie inside, off the margin."""
        height, width = self.depth.shape
        x, y = np.rint(points).astype(int).transpose(-1, *range(points.ndim - 1))
        valid = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return valid & (self.depth[y.clip(0, height - 1), x.clip(0, width - 1)] > self.margin)


def _parts(region: Bool[np.ndarray, "h w"], label: int) -> Iterator[_Part]:
    """Yield the connected parts of a class that are large enough; the largest always."""
    pixels = region.view(np.uint8)
    # OpenCV's own statistics take five times as long as finding the parts.
    num, labels = cv2.connectedComponents(pixels, connectivity=8)
    if num == 1:
        return
    depth = _depth(region)
    areas = np.bincount(labels.ravel(), minlength=num)
    largest = 1 + int(areas[1:].argmax())
    scale = np.sqrt(region.size / REFERENCE_PIXELS)
    for part in np.flatnonzero((areas >= MIN_PART_AREA * scale**2) | (np.arange(num) == largest)):
        if part == 0:
            continue
        area = int(areas[part])
        x, y, width, height = cv2.boundingRect((labels == part).view(np.uint8))
        window = (slice(y, y + height), slice(x, x + width))
        if label == OBJECT:
            margin = float(np.interp(area / region.size, OBJECT_SHARES, OBJECT_MARGINS))
            extra = 0
        else:
            margin, extra = BACKGROUND_MARGIN, BACKGROUND_EXTRA
        yield _Part(
            window=window,
            depth=np.where(labels[window] == part, depth[window], np.float32(0)),
            margin=round(scale * margin),
            rim=round(scale * (margin + extra)),
            min_area=round(scale**2 * MIN_PIECE_AREA),
            essential=bool(part == largest),
        )


def _depth(region: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Return the city-block distance to the nearest pixel outside the region or the image."""
    # Zeros around the image make its border a border of the region.
    padded = cv2.copyMakeBorder(region.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.distanceTransform(padded, cv2.DIST_L1, 3)[1:-1, 1:-1]


def _paths(
    part: _Part, style: StrokeStyle, count: int, generator: np.random.Generator
) -> list[Points]:
    """Return the strokes of a part: 1 to `count` for each of its pieces."""
    paths: list[Points] = []
    for piece in _pieces(part):
        for _ in range(generator.integers(1, count + 1)):
            match style:
                case "skeleton":
                    path = _skeleton(piece, part.step, generator)
                case "line":
                    path = _line(piece, part, generator)
                case _:
                    path = _curve(piece, part, generator)
            if path is not None:
                paths.append(path)
    if paths or not part.essential:
        return paths
    if part.rim + part.min_area > 0:
        relaxed = replace(
            part, margin=part.margin // 2, rim=part.rim // 2, min_area=part.min_area // 2
        )
        return _paths(relaxed, style, count, generator)[:1]
    # So thin that it falls between the pixels of the grid: a dot where it is widest.
    y, x = np.unravel_index(int(part.depth.argmax()), part.depth.shape)
    return [np.array([[x, y]], np.float64)]


def _pieces(part: _Part) -> Iterator[Grid]:
    """Yield the pieces into which the margin cuts a part, if their rim encloses enough."""
    depth = np.ascontiguousarray(part.depth[:: part.step, :: part.step])
    num, labels = cv2.connectedComponents((depth > part.margin).view(np.uint8), connectivity=8)
    for label in range(1, num):
        piece = np.where(labels == label, depth, np.float32(0))
        area = np.count_nonzero(piece > part.rim) * part.step**2
        if area >= max(part.min_area, 1):
            yield piece


def _curve(piece: Grid, part: _Part, generator: np.random.Generator) -> Points | None:
    """Return a parabola inside the piece, or None where none is found."""
    rim = part.rim
    while True:
        core = _largest(piece > rim)
        if not core.any():
            return None
        curves = part.step * _parabolas(piece, core, generator)
        fits = np.flatnonzero(part.holds(curves).all(axis=1))
        if fits.size:
            trimmed = round(NUM_POINTS * (1 - CURVE_SHARE) / 2)
            return curves[fits[0], trimmed:-trimmed]
        rim += RIM_STEP


def _parabolas(
    piece: Grid, core: Bool[np.ndarray, "gh gw"], generator: np.random.Generator
) -> Float64[np.ndarray, "k n 2"]:
    """Return candidate curves between points of the core's rim, in pixels of the grid."""
    edge = core & (cv2.erode(core.view(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) == 0)
    first, last = _far_pairs(_points(edge), generator)
    inner = _points(core)
    deep = _points(core & (piece >= np.median(piece[core])))
    jitter = np.sqrt(len(inner)) / 20
    # Three points near the bent line first-centre-last, moved into the core: centre and two more.
    centre = np.broadcast_to(inner.mean(axis=0), first.shape)
    before, after = generator.uniform(0.4, 1, (2, NUM_TRIES, 1))
    waypoints = np.stack(
        [centre, first + before * (centre - first), last + after * (centre - last)], axis=1
    )
    waypoints = waypoints + jitter * generator.standard_normal(waypoints.shape)
    waypoints = _nearest_of_ten(deep, waypoints, generator)
    return _fit_parabolas(np.concatenate([first[:, None], waypoints, last[:, None]], axis=1))


def _fit_parabolas(points: Float64[np.ndarray, "k 5 2"]) -> Float64[np.ndarray, "k n 2"]:
    """Fit x(y) to the points by least squares where the middle one lies between the ends in y.

    Elsewhere fit y(x). The curve runs over the whole range of the points, in NUM_POINTS points.
    """
    y = points[:, :, 1]
    upright = (y[:, 2] - y[:, 0]) * (y[:, 4] - y[:, 2]) > 0
    # Columns: the coordinate that runs, the one that follows.
    ordered = np.where(upright[:, None, None], points[:, :, ::-1], points)
    running, following = ordered[:, :, 0], ordered[:, :, 1:]
    low = running.min(axis=1, keepdims=True)
    spread = np.maximum(running.max(axis=1, keepdims=True) - low, 1e-6)
    coefficients = np.linalg.pinv(_powers((running - low) / spread)) @ following
    along = np.linspace(0, 1, NUM_POINTS)
    curves = np.concatenate(
        [(low + spread * along)[:, :, None], _powers(along) @ coefficients], axis=2
    )
    return np.where(upright[:, None, None], curves[:, :, ::-1], curves)


def _powers(t: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n 3"]:
    """Return 1, t, t^2 in a last dimension."""
    return np.stack([np.ones_like(t), t, t * t], axis=-1)


def _far_pairs(
    points: Points, generator: np.random.Generator
) -> tuple[Float64[np.ndarray, "k 2"], Float64[np.ndarray, "k 2"]]:
    """Return NUM_TRIES pairs of points that are far apart, each among a few random ones."""
    rows = np.arange(NUM_TRIES)
    some = points[generator.integers(len(points), size=(NUM_TRIES, NUM_RIM_POINTS))]
    last = some[rows, np.linalg.norm(some - some[:, :1], axis=2).argmax(axis=1)]
    first = some[rows, np.linalg.norm(some - last[:, None], axis=2).argmax(axis=1)]
    return first, last


def _nearest_of_ten(
    points: Points, targets: Float64[np.ndarray, "k m 2"], generator: np.random.Generator
) -> Float64[np.ndarray, "k m 2"]:
    """Return for each target the nearest of ten random points."""
    some = points[generator.integers(len(points), size=(*targets.shape[:2], 10))]
    nearest = np.linalg.norm(some - targets[:, :, None], axis=3).argmin(axis=2)
    return np.take_along_axis(some, nearest[:, :, None, None], axis=2)[:, :, 0]


def _skeleton(piece: Grid, step: int, generator: np.random.Generator) -> Points:
    """Return the path along the piece's skeleton from a random pixel to the farthest one."""
    points = _points(skeletonize(piece > 0))
    if len(points) == 1:
        return step * points
    neighbours = KDTree(points).query_pairs(1.5, output_type="ndarray")
    first, second = neighbours.T
    distances = np.linalg.norm(points[first] - points[second], axis=1)
    graph = csr_array((distances, (first, second)), shape=(len(points), len(points)))
    start = int(generator.integers(len(points)))
    reached, previous = csgraph.dijkstra(
        graph, directed=False, indices=start, return_predecessors=True
    )
    node = int(np.where(np.isfinite(reached), reached, -1).argmax())
    nodes = [node]
    while node != start:
        node = int(previous[node])
        nodes.append(node)
    return _resample(uniform_filter1d(step * points[nodes], 5, axis=0, mode="nearest"))


def _line(piece: Grid, part: _Part, generator: np.random.Generator) -> Points | None:
    """Return what a line through random points, straight or bent at one, has inside the part."""
    points = _points(piece > 0)
    corners = part.step * points[generator.integers(len(points), size=3)]
    if generator.random() < 0.5:
        corners = corners[:2]
    path = _resample(corners)
    # The longest run of points inside: where it begins and ends in the padded sequence.
    changes = np.flatnonzero(np.diff(part.holds(path).astype(np.int8), prepend=0, append=0))
    begins, ends = changes[::2], changes[1::2]
    if begins.size == 0:
        return None
    longest = int((ends - begins).argmax())
    return path[begins[longest] : ends[longest]]


def _resample(path: Points) -> Points:
    """Return NUM_POINTS points at equal distances along a path."""
    travelled = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
    at = np.linspace(0, travelled[-1], NUM_POINTS)
    return np.stack([np.interp(at, travelled, path[:, i]) for i in range(2)], axis=1)


def _sub_path(path: Points, share: float, generator: np.random.Generator) -> Points:
    """Return a stretch of the path, of this share of its points, from a random place."""
    keep = max(1, round(share * len(path)))
    start = int(generator.integers(len(path) - keep + 1))
    return path[start : start + keep]


def _draw(canvas: UInt8[np.ndarray, "h w"], path: Points, label: int, width: float) -> None:
    """Draw a path onto the canvas."""
    # OpenCV draws nothing for a single point, so the last one stands twice.
    points = np.rint(np.concatenate([path, path[-1:]])).astype(np.int32)
    cv2.polylines(canvas, [points], False, label, max(1, round(width)))


def _largest(region: Bool[np.ndarray, "gh gw"]) -> Bool[np.ndarray, "gh gw"]:
    """Return the largest connected part of a region."""
    num, labels, stats, _ = cv2.connectedComponentsWithStats(region.view(np.uint8), connectivity=8)
    if num <= 2:
        return region
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def _points(region: Bool[np.ndarray, "gh gw"]) -> Points:
    """Return the pixels of a region as points (x, y)."""
    y, x = np.nonzero(region)
    return np.stack([x, y], axis=1).astype(np.float64)
