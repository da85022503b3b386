"""Which picture to draw on next: the one that the network is least sure of without strokes.

Every untouched picture is looked at once, while nobody waits for a mask.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from scribbleseg.app.folder import Folder, Progress
from scribbleseg.app.models import Model, mean_entropy
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.sheets import shown_size
from scribbleseg.errors import InputError

# How long a picture is left alone that a network failed on: the memory, or a server, may come back.
_REST_SECONDS = 60.0


@dataclass(kw_only=True)
class Proposals:
    """Mean entropies of pictures, under one checkpoint."""

    folder: Folder
    """Where the pictures are."""
    scores: dict[str, float] = field(default_factory=dict[str, float])
    """Mean entropy in bits by stem; pictures that cannot be read have -1."""
    failed: dict[str, float] = field(default_factory=dict[str, float])
    """When the network failed on a picture, in seconds of `time.monotonic`, by stem."""

    def unscored(self, pictures: Mapping[str, Progress]) -> list[str]:
        """Return the untouched pictures that are to be looked at."""
        resting = time.monotonic() - _REST_SECONDS
        return [
            stem
            for stem in _untouched(pictures)
            if stem not in self.scores and self.failed.get(stem, -math.inf) < resting
        ]

    def score(self, model: Model, stem: str) -> None:
        """Look at one picture."""
        try:
            image = shown_size(self.folder.read_image(stem))
        except (InputError, Refusal, OSError, MemoryError):
            # Whoever opens it is told why.
            self.scores[stem] = -1.0
            return
        try:
            self.scores[stem] = mean_entropy(model.quick, image)
        except Exception:
            # No memory, or no server: whoever draws on a picture is told.
            self.failed[stem] = time.monotonic()

    def next(self, pictures: Mapping[str, Progress], after: str | None) -> str | None:
        """Return the picture to draw on after another one; None when none is left.

        Untouched ones come first, the least sure of them before the others; then those that were
        drawn on. Pictures that cannot be read are left out.
        """
        scores = {stem: self.scores.get(stem, 0.0) for stem in _untouched(pictures)}
        readable = [stem for stem in scores if stem != after and scores[stem] >= 0]
        if readable:
            return max(readable, key=scores.__getitem__)
        open_ones = [stem for stem in pictures if pictures[stem] in ("drawn", "changed")]
        others = [stem for stem in open_ones if stem != after]
        later = [stem for stem in others if after is not None and stem > after]
        return next(iter(later or others), None)


def _untouched(pictures: Mapping[str, Progress]) -> list[str]:
    return [stem for stem, progress in pictures.items() if progress == "untouched"]
