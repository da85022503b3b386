"""What passes between the door and the replicas that compute; the door never loads torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client asks for."""

    image: bytes = field(repr=False)
    """The photograph's file, JPEG or PNG."""
    strokes: bytes = field(repr=False)
    """The strokes' file, PNG: 0 background, 1 object, 255 unlabelled."""
    probabilities: bool = False
    """Send probabilities, 8-bit grey, in place of the mask."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client gets."""

    status: int
    """HTTP's: 200, 413, 415 or 422."""
    body: bytes
    """A PNG file; or, unless the status is 200, one line that says what is wrong."""
