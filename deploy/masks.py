"""The replica that computes: a network, and the requests that reach it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from torch import Tensor

from deploy.loopback import keep_replica_on_loopback
from deploy.orders import Order, Reply
from scribbleseg.config import Looker
from scribbleseg.datasets.files import (
    FileBytes,
    NotAPictureError,
    TooManyPixelsError,
    require_pixels,
)
from scribbleseg.datasets.scenes import Scene, read_drawn
from scribbleseg.device import prepare_cpu
from scribbleseg.errors import InputError
from scribbleseg.predict import load_as_asked, mask_png, probabilities_png, to_mask


class Masks:
    """A replica: one network, on its own share of a machine."""

    def __init__(
        self,
        *,
        looker: Looker,
        cpus: int,
        gpus: int,
        batch_size: int,
        max_pixels: int,
    ):
        """Load the network.

        Args:
            looker: The network, and how it looks.
            cpus: Threads that compute.
            gpus: Whether a GPU computes.
            batch_size: Requests that are answered together.
            max_pixels: Larger pictures are refused, before they are decoded.
        """
        keep_replica_on_loopback()
        self.predictor = load_as_asked(looker, device="cuda" if gpus else "cpu")
        if not gpus:
            prepare_cpu(cpus)
        self.max_pixels = max_pixels
        self.fault: RuntimeError | None = None
        batching: Any = self._reply_together
        batching.set_max_batch_size(batch_size)

    async def reply(self, order: Order) -> Reply:
        """Answer one request; it may share a forward pass with others that wait."""
        reply: Any = self._reply_together
        return await reply(order)

    # On CPUs the size is 1, and this only lets requests wait for one another. The wait is short:
    # while a batch computes, the next one gathers by itself.
    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.005)
    async def _reply_together(self, orders: list[Order]) -> list[Reply]:
        # In a thread, so that the replica can still be asked whether it is well.
        return await asyncio.to_thread(self.reply_all, orders)

    def reply_all(self, orders: Sequence[Order]) -> list[Reply]:
        """Answer requests; those that cannot be used keep nobody else from an answer."""
        replies: dict[int, Reply] = {}
        scenes: dict[int, Scene] = {}
        for number, order in enumerate(orders):
            try:
                scenes[number] = self._read(order)
            except InputError as error:
                replies[number] = Reply(status=_status(error), body=str(error).encode())
        try:
            found = self.predictor.logits_of(list(scenes.values()))
        except RuntimeError as error:
            self.fault = error
            raise
        self.fault = None
        for (number, scene), logits in zip(scenes.items(), found, strict=True):
            body = _encode(logits, scene, orders[number].probabilities)
            replies[number] = Reply(status=200, body=body)
        return [replies[number] for number in range(len(orders))]

    def check_health(self) -> None:
        """Raise where the last prediction failed: a GPU that has failed once keeps failing.

        Ray Serve then starts another replica in this one's place.
        """
        if self.fault is not None:
            raise self.fault

    def _read(self, order: Order) -> Scene:
        """Decode a request; raise an `InputError` where that cannot be done."""
        image = FileBytes(name="image", content=order.image)
        strokes = FileBytes(name="strokes", content=order.strokes)
        for file in (image, strokes):
            require_pixels(file, self.max_pixels)
        return read_drawn("image", image, strokes)


def _encode(logits: Tensor, scene: Scene, probabilities: bool) -> bytes:
    """Return what a folder's prediction writes."""
    if probabilities:
        return probabilities_png(logits)
    return mask_png(to_mask(logits, scene.scribbles, honour_strokes=True))


def _status(error: InputError) -> int:
    """Return HTTP's word for what is wrong with a picture."""
    match error:
        case TooManyPixelsError():
            return 413
        case NotAPictureError():
            return 415
        case _:
            return 422
