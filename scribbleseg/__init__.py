"""scribbleseg: a photograph and a few strokes in, a full-resolution mask out.

`scribbleseg.load(checkpoint)` returns a `Predictor`; `Predictor.predict(image, strokes)` a mask.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scribbleseg.predict import Predictor as Predictor
    from scribbleseg.predict import load as load

__all__ = ["Predictor", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `scribbleseg --help` and the settings do without it.
    if name in __all__:
        from scribbleseg import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
