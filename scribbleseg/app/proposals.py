"""Which picture to draw on next: the one that the network is least sure of without strokes.

Every untouched picture is looked at once, while nobody waits for a mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scribbleseg.app.folder import Folder, Progress
from scribbleseg.app.models import Model, mean_entropy
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.sheets import shown_size
from scribbleseg.errors import InputError


@dataclass(kw_only=True)
class Proposals:
    """Mean entropies of pictures, under one checkpoint."""

    folder: Folder
    """Where the pictures are."""
    scores: dict[str, float] = field(default_factory=dict[str, float])
    """Mean entropy in bits by stem; pictures that cannot be read have -1."""

    def unscored(self, pictures: Mapping[str, Progress]) -> list[str]:
        """Return the untouched pictures that were not looked at yet."""
        return [stem for stem in _untouched(pictures) if stem not in self.scores]

    def score(self, model: Model, stem: str) -> None:
        """Look at one picture."""
        try:
            self.scores[stem] = mean_entropy(model.quick, shown_size(self.folder.read_image(stem)))
        except (InputError, Refusal, OSError):
            # Whoever opens it is told why.
            self.scores[stem] = -1.0

    def next(self, pictures: Mapping[str, Progress], after: str | None) -> str | None:
        """Return the picture to draw on after another one; None when all masks are accepted.

        Untouched ones come first, the least sure of them before the others; then those that were
        drawn on.
        """
        untouched = [stem for stem in _untouched(pictures) if stem != after]
        if untouched:
            return max(untouched, key=lambda stem: self.scores.get(stem, 0.0))
        open_ones = [stem for stem in pictures if pictures[stem] in ("drawn", "changed")]
        others = [stem for stem in open_ones if stem != after]
        later = [stem for stem in others if after is not None and stem > after]
        return next(iter(later or others), None)


def _untouched(pictures: Mapping[str, Progress]) -> list[str]:
    return [stem for stem, progress in pictures.items() if progress == "untouched"]
