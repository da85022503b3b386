"""What the routes do: pictures, strokes and masks, with the checkpoints that are loaded.

The networks run in one thread of their own: torch keeps a pool of threads for every thread that
calls it, and two looks at once would only make both late.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from scribbleseg.app.folder import Folder
from scribbleseg.app.models import (
    Model,
    interruptible,
    list_released,
    load_model,
    to_grey,
    to_mask,
)
from scribbleseg.app.proposals import Proposals
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.sheets import SHOWN_SIDE, Sheet, Sheets, Stroke
from scribbleseg.app.training import finetune_command
from scribbleseg.datasets.transforms import fitted_size
from scribbleseg.scribbles.encode import OBJECT, UNLABELLED

Place = Literal["main", "other"]

# How long nobody must have waited for a mask before pictures are looked at unasked.
_IDLE_SECONDS = 1.0
# Masks kept in memory, so that undo and redo show them at once.
_MASKS_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class Masked:
    """What a network makes of a picture and its strokes."""

    grey: UInt8[np.ndarray, "h w"]
    """255 x the probability of "object"; strokes are certain."""
    seconds: float
    """How long the network took."""
    kept: bool = False
    """Whether another mask stood where this one was saved, and was kept; see `Folder.accept`."""

    def at_shown_size(self) -> "Masked":
        """Return it at the size that is shown, which no picture but a large one exceeds."""
        height, width = self.grey.shape
        if max(height, width) <= SHOWN_SIDE:
            return self
        height, width = fitted_size(height, width, SHOWN_SIDE)
        small = cv2.resize(self.grey, (width, height), interpolation=cv2.INTER_AREA)
        return replace(self, grey=small)


class Studio:
    """A folder that is drawn into, and one or two checkpoints.

    Args:
        folder: It is made where it is missing.
        models: By place: "main", and "other" to compare with.
    """

    def __init__(self, folder: Folder, models: dict[Place, Model]):
        self.folder = folder
        self.models = models
        self.sheets = Sheets(folder)
        self.proposals = Proposals(folder=folder)
        self.given = {model.name: model for model in models.values()}
        """What the command line named, by name: a server is none that could be loaded again."""
        self._lock = threading.Lock()
        self._adding = threading.Lock()
        self._kept: OrderedDict[tuple[str, tuple[int, ...], str, Place, bool], Future[Masked]] = (
            OrderedDict()
        )
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._last_asked = 0.0
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop what runs unasked."""
        self._closed.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def checkpoints(self) -> list[str]:
        """Return the checkpoints that the page may load."""
        return list(dict.fromkeys([*self.given, *list_released(), *self.folder.list_runs()]))

    def load(self, place: Place, checkpoint: str | None) -> None:
        """Put a checkpoint in a place; None empties the place "other".

        Raises:
            Refusal: it is not among `checkpoints()`.
            InputError: it cannot be used; the one before stays.
        """
        if checkpoint is None and place == "other":
            with self._lock:
                self.models.pop(place, None)
                self._kept.clear()
            return
        if checkpoint not in self.checkpoints():
            raise Refusal(
                HTTPStatus.NOT_FOUND,
                f"{str(checkpoint)[:200]!r}: not among the checkpoints that this page may load; "
                "name it on the command line",
            )
        model = self.given.get(checkpoint)
        if model is None:
            model = self._worker.submit(load_model, checkpoint).result()
        with self._lock:
            self.models[place] = model
            self._kept.clear()
        if place == "main":
            self.proposals = Proposals(folder=self.folder)

    def add(self, name: str, content: bytes) -> str:
        """Keep a photograph; see `Folder.add`."""
        with self._adding:
            return self.folder.add(name, content)

    def draw(self, stem: str, revision: str, stroke: Stroke) -> Sheet:
        """Save a stroke, and begin to look before anybody asks; see `Sheets.draw`."""
        sheet = self.sheets.draw(stem, revision, stroke)
        if (sheet.strokes != UNLABELLED).any():
            self._begin(sheet, "main", carefully=False)
        return sheet

    def look(self, stem: str, revision: str, place: Place, *, carefully: bool = False) -> Masked:
        """Return the mask that follows a stroke; `carefully`, the one that would be saved.

        Raises:
            Refusal: newer strokes came in, which are all that matters; or no such checkpoint.
        """
        return self._look(stem, revision, place, carefully).at_shown_size()

    def saved(self, stem: str) -> Masked:
        """Return the mask that was accepted.

        Raises:
            Refusal: there is none.
        """
        sheet = self.sheets.open(stem)
        mask = self.folder.read_labels("ground_truth", stem, sheet.image)
        if mask is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"{stem}: no mask was accepted yet")
        return Masked(grey=(mask == OBJECT).astype(np.uint8) * 255, seconds=0.0).at_shown_size()

    def accept(self, stem: str, revision: str) -> Masked:
        """Save the careful mask, at the photograph's own size.

        Raises:
            Refusal: the strokes on disk are others, before or after the look; none is on the
                object; or the mask cannot be saved.
        """
        sheet = self.sheets.open(stem)
        if sheet.revision != revision:
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"{stem}: was changed in another tab or by another program; nothing was saved; "
                "reload this page to see it",
            )
        if not (sheet.strokes == OBJECT).any():
            raise Refusal(
                HTTPStatus.CONFLICT, f"{stem}: no object stroke; draw one on the object first"
            )
        found = self._look(stem, revision, "main", carefully=True)
        kept = self.sheets.accept(stem, revision, to_mask(found.grey))
        return replace(found.at_shown_size(), kept=kept)

    def _look(self, stem: str, revision: str, place: Place, carefully: bool) -> Masked:
        """Return a mask at the size that it is made at; see `look`."""
        sheet = self.sheets.open(stem)
        if sheet.revision != revision:
            raise _outdated()
        self._last_asked = time.monotonic()
        try:
            return self._begin(sheet, place, carefully).result()
        finally:
            self._last_asked = time.monotonic()

    def _begin(self, sheet: Sheet, place: Place, carefully: bool) -> Future[Masked]:
        """Return what will become of a picture and its strokes, in the networks' own thread."""
        key = (sheet.stem, sheet.image_state, sheet.revision, place, carefully)
        with self._lock:
            if key not in self._kept or _failed(self._kept[key]):
                looking = partial(self._compute, sheet, self._model(place), carefully)
                self._kept[key] = self._worker.submit(looking)
            while len(self._kept) > _MASKS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _compute(self, sheet: Sheet, model: Model, carefully: bool) -> Masked:
        def check() -> None:
            if not self.sheets.is_current(sheet.stem, sheet.revision):
                raise _outdated()

        check()
        began = time.perf_counter()
        if carefully:
            image, strokes = sheet.image, sheet.strokes
            looks = interruptible(model.careful, check)
        else:
            image, strokes, looks = sheet.shown, sheet.shown_strokes(), model.quick
        grey = to_grey(looks.probabilities(image, strokes), strokes)
        return Masked(grey=grey, seconds=time.perf_counter() - began)

    def finetune_command(self) -> tuple[str, int]:
        """Return the command that trains on what was accepted, and on how many samples."""
        return finetune_command(self.folder, self._model("main"))

    def score_when_idle(self) -> None:
        """Look at untouched pictures for as long as the studio is open; runs in a thread."""
        while not self._closed.wait(0.2):
            if time.monotonic() - self._last_asked < _IDLE_SECONDS:
                continue
            model, proposals = self.models["main"], self.proposals
            try:
                waiting = proposals.unscored(self.folder.pictures())
            except Exception:
                # A folder that cannot be read is told of where somebody asks for it.
                waiting = []
            if not waiting:
                self._closed.wait(2.0)
                continue
            # It is cancelled, or refused, once the studio is closed.
            with contextlib.suppress(CancelledError, RuntimeError):
                self._worker.submit(proposals.score, model, waiting[0]).result()

    def _model(self, place: Place) -> Model:
        if place not in self.models:
            raise Refusal(HTTPStatus.NOT_FOUND, f"no checkpoint is loaded as {place!r}")
        return self.models[place]


def _outdated() -> Refusal:
    """Return the refusal of a mask that nobody waits for any more."""
    return Refusal(HTTPStatus.GONE, "there are newer strokes")


def _failed(looking: Future[Masked]) -> bool:
    return looking.done() and (looking.cancelled() or looking.exception() is not None)
