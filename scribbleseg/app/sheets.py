"""The pictures that are open: decoded once, with their strokes and these strokes' past.

What lies on disk is the truth. Every change names the revision that it was made on; if another tab
or program has been there first, nothing is written.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus

import cv2
import numpy as np
from jaxtyping import UInt8

from scribbleseg.app.folder import BLANK, Folder
from scribbleseg.app.refusal import Refusal
from scribbleseg.datasets.transforms import fitted_size
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, UNLABELLED, shrink

SHOWN_SIDE = 1600
"""Longer side of what a browser gets to see and draw on, in pixels."""
MAX_POINTS = 20_000
MAX_WIDTH = 4000
# Decoded pictures kept, and what each may have of a past: strokes take some kilobytes per step.
_OPEN = 4
_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """One stroke of the pen."""

    label: int
    """0 background, 1 object, 255 erases."""
    width: float
    """Of the pen, in pixels of the photograph."""
    points: Sequence[tuple[float, float]]
    """Where it went: (x, y) in pixels of the photograph, from its upper left corner."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        good = (
            self.label in (BACKGROUND, OBJECT, UNLABELLED)
            and 1 <= self.width <= MAX_WIDTH
            and 0 < len(self.points) <= MAX_POINTS
            and all(math.isfinite(x) and abs(x) < 1e5 for point in self.points for x in point)
        )
        if not good:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"a stroke of label {self.label}, width {self.width}, {len(self.points)} points; "
                f"expected label 0, 1 or 255, width 1 to {MAX_WIDTH}, 1 to {MAX_POINTS} points",
            )

    def onto(self, strokes: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
        """Return strokes with this one on top."""
        drawn = strokes.copy()
        points = np.floor(np.array(self.points, np.float64)).astype(np.int32)
        # OpenCV draws nothing for a line from a point to itself.
        if len(np.unique(points, axis=0)) == 1:
            cv2.circle(
                drawn, points[0].tolist(), max(0, round(self.width / 2 - 0.5)), self.label, -1
            )
        else:
            cv2.polylines(drawn, [points], False, self.label, max(1, round(self.width)))
        return drawn


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A photograph and its strokes at one moment."""

    stem: str
    """Its file's name without suffix."""
    image: UInt8[np.ndarray, "h w 3"]
    """RGB, at its own size."""
    shown: UInt8[np.ndarray, "h2 w2 3"]
    """RGB, at most `SHOWN_SIDE` on the longer side."""
    strokes: UInt8[np.ndarray, "h w"]
    """0 background, 1 object, 255 unlabelled, at the photograph's own size."""
    revision: str
    """Stands for these strokes."""
    image_state: tuple[int, ...]
    """Stands for the photograph's file, see `Folder.image_state`."""

    def shown_strokes(self) -> UInt8[np.ndarray, "h2 w2"]:
        """Return the strokes at the size that is shown; none vanishes for being thin."""
        height, width = self.shown.shape[:2]
        if self.strokes.shape == (height, width):
            return self.strokes
        return shrink(self.strokes, height, width)


def shown_size(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return a photograph at the size that is shown."""
    height, width = image.shape[:2]
    if max(height, width) <= SHOWN_SIDE:
        return image
    height, width = fitted_size(height, width, SHOWN_SIDE)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


class Sheets:
    """Opens pictures of a folder, and changes what was drawn on them, one change at a time."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._lock = threading.RLock()
        self._open: OrderedDict[str, Sheet] = OrderedDict()
        self._past: dict[str, OrderedDict[str, bytes | None]] = {}

    def open(self, stem: str) -> Sheet:
        """Return a picture and its strokes as they are on disk now.

        Raises:
            Refusal: no such picture, or one that may not be read.
            InputError: a file that does not keep the data contract.
        """
        with self._lock:
            sheet = self._open.pop(stem, None)
            if sheet is None or sheet.image_state != self.folder.image_state(stem):
                sheet = self._read(stem)
            revision = self.folder.revision(stem)
            if revision != sheet.revision:
                sheet = self._with_strokes(sheet)
            self._open[stem] = sheet
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
            return sheet

    def is_current(self, stem: str, revision: str) -> bool:
        """Return whether these are still the newest strokes that came in."""
        # Without the lock: it is asked by whoever is about to compute, and must not wait.
        sheet = self._open.get(stem)
        return sheet is None or sheet.revision == revision

    def draw(self, stem: str, revision: str, stroke: Stroke) -> Sheet:
        """Put a stroke on top and save; return the picture after it.

        Raises:
            Refusal: the strokes on disk are not those of `revision`, or they cannot be saved.
        """
        with self._lock:
            sheet = self._at(stem, revision)
            drawn = stroke.onto(sheet.strokes)
            if np.array_equal(drawn, sheet.strokes):
                # Written again, it might be another file, and the mask accepted for it outdated.
                return sheet
            if (drawn == UNLABELLED).all():
                self.folder.write_strokes_file(stem, None)
            else:
                self.folder.write_strokes(stem, drawn)
            return self._keep(replace(sheet, strokes=drawn, revision=self.folder.revision(stem)))

    def restore(self, stem: str, revision: str, earlier: str) -> Sheet:
        """Go to other strokes of this picture's past (or to none at all) and save them.

        Raises:
            Refusal: as `draw`; or the server has not seen those strokes since it started.
        """
        with self._lock:
            sheet = self._at(stem, revision)
            past = {BLANK: None, **self._past.get(stem, {})}
            if earlier not in past:
                raise Refusal(
                    HTTPStatus.GONE,
                    f"{stem}: those strokes are no longer known, because {_STEPS} came after "
                    "them or the server was started anew; what is on the page is what is saved",
                )
            self.folder.write_strokes_file(stem, past[earlier])
            return self._keep(self._with_strokes(sheet))

    def accept(self, stem: str, revision: str, mask: UInt8[np.ndarray, "h w"]) -> bool:
        """Save the mask that belongs to the strokes of `revision`; see `Folder.accept`.

        Raises:
            Refusal: newer strokes came in while it was made, or it cannot be saved.
        """
        with self._lock:
            if self.folder.revision(stem) != revision:
                raise Refusal(
                    HTTPStatus.GONE, f"{stem}: there are newer strokes; accept their mask instead"
                )
            return self.folder.accept(stem, revision, mask)

    def _at(self, stem: str, revision: str) -> Sheet:
        """Return a picture if its strokes are those of `revision`; keep them as its past."""
        sheet = self.open(stem)
        if sheet.revision != revision:
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"{stem}: was changed in another tab or by another program; nothing was "
                "overwritten; reload this page to go on from there",
            )
        self._remember(sheet)
        return sheet

    def _keep(self, sheet: Sheet) -> Sheet:
        self._open[sheet.stem] = sheet
        self._remember(sheet)
        return sheet

    def _remember(self, sheet: Sheet) -> None:
        past = self._past.setdefault(sheet.stem, OrderedDict())
        if sheet.revision not in past:
            past[sheet.revision] = self.folder.read_strokes_file(sheet.stem)
        while len(past) > _STEPS:
            past.popitem(last=False)

    def _read(self, stem: str) -> Sheet:
        state = self.folder.image_state(stem)
        image = self.folder.read_image(stem)
        return Sheet(
            stem=stem,
            image=image,
            shown=shown_size(image),
            strokes=np.full(image.shape[:2], UNLABELLED, np.uint8),
            revision=BLANK,
            image_state=state,
        )

    def _with_strokes(self, sheet: Sheet) -> Sheet:
        """Return the picture with the strokes that are on disk."""
        revision = self.folder.revision(sheet.stem)
        strokes = self.folder.read_labels("scribbles", sheet.stem, sheet.image)
        if strokes is None:
            strokes = np.full(sheet.image.shape[:2], UNLABELLED, np.uint8)
        return replace(sheet, strokes=strokes, revision=revision)
