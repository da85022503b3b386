"""The routes of the page, and how what goes wrong becomes a status and a line for the person."""

import json
import math
from collections.abc import Collection
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

import cv2
import numpy as np
from anyio import to_thread
from jaxtyping import UInt8
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scribbleseg.app.guard import Guard
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.sheets import Sheet, Stroke
from scribbleseg.app.studio import Masked, Studio
from scribbleseg.datasets.files import TooManyPixelsError
from scribbleseg.errors import InputError

T = TypeVar("T")

MAX_BYTES = 64_000_000
"""Of a photograph's file."""
MAX_JSON_BYTES = 1_000_000
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_THUMBNAIL = 208
# Colours of strokes on the page, as OpenCV has them: blue, green, red, opacity.
_BACKGROUND, _OBJECT = (255, 140, 91, 255), (36, 178, 255, 255)


def create_app(studio: Studio, *, hosts: Collection[str] = (), token: str | None = None) -> Any:
    """Return the ASGI application; see `Guard` for whom it serves."""
    routes = Routes(studio)
    return Guard(
        Starlette(
            routes=[
                Route("/", routes.page),
                Route("/page/{name}", routes.page),
                Route("/api/state", routes.state),
                Route("/api/next", routes.propose),
                Route("/api/models", routes.load_model, methods=["POST"]),
                Route("/api/finetune", routes.finetune, methods=["POST"]),
                Route("/api/pictures", routes.add, methods=["POST"]),
                Route("/api/pictures/{stem}", routes.open),
                Route("/api/pictures/{stem}/photo", routes.photo),
                Route("/api/pictures/{stem}/thumbnail", routes.thumbnail),
                Route("/api/pictures/{stem}/strokes", routes.strokes),
                Route("/api/pictures/{stem}/strokes", routes.draw, methods=["POST"]),
                Route("/api/pictures/{stem}/mask", routes.mask),
                Route("/api/pictures/{stem}/mask", routes.accept, methods=["POST"]),
            ],
            exception_handlers={
                Refusal: refused,
                TooManyPixelsError: too_large,
                InputError: unusable,
                MemoryError: out_of_memory,
                OSError: unreadable,
                Exception: failed,
            },
        ),
        hosts=hosts,
        token=token,
    )


class Routes:
    """One method per route; what takes time runs in threads."""

    def __init__(self, studio: Studio):
        self.studio = studio

    async def page(self, request: Request) -> Response:
        """Answer with a file of the page."""
        name = request.path_params.get("name", "index.html")
        # Only names that are listed here are ever opened.
        for file in files("scribbleseg.app").joinpath("page").iterdir():
            kind = _TYPES.get(Path(file.name).suffix)
            if file.name == name and kind is not None:
                return Response(file.read_bytes(), media_type=kind)
        raise Refusal(HTTPStatus.NOT_FOUND, f"{name[:80]!r}: no such file")

    async def state(self, request: Request) -> Response:
        """Tell of the folder, its pictures, and the checkpoints."""
        return JSONResponse(await to_thread.run_sync(self._state))

    def _state(self) -> dict[str, Any]:
        studio = self.studio
        pictures = studio.folder.pictures()
        waiting = studio.proposals.unscored(pictures)
        return {
            "folder": str(studio.folder.root / studio.folder.split),
            "pictures": [{"stem": stem, "progress": pictures[stem]} for stem in pictures],
            "unscored": len(waiting),
            "models": {place: model.name for place, model in studio.models.items()},
            "checkpoints": studio.checkpoints(),
        }

    async def propose(self, request: Request) -> Response:
        """Name the picture to draw on next."""

        def propose() -> str | None:
            pictures = self.studio.folder.pictures()
            return self.studio.proposals.next(pictures, request.query_params.get("after"))

        return JSONResponse({"stem": await to_thread.run_sync(propose)})

    async def load_model(self, request: Request) -> Response:
        """Load a checkpoint, or put away the one that is compared with."""
        wanted = await read_json(request)
        place, checkpoint = wanted.get("place"), wanted.get("checkpoint")
        if place not in ("main", "other") or not (
            checkpoint is None or isinstance(checkpoint, str)
        ):
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "expected a place, main or other, and a checkpoint"
            )
        await to_thread.run_sync(self.studio.load, place, checkpoint)
        return await self.state(request)

    async def finetune(self, request: Request) -> Response:
        """Write the settings of a training on what was accepted, and tell its command."""
        command, number = await to_thread.run_sync(self.studio.finetune_command)
        return JSONResponse({"command": command, "samples": number})

    async def add(self, request: Request) -> Response:
        """Keep a photograph that was dropped."""
        name = request.query_params.get("name", "")
        content = await read_body(request, MAX_BYTES, name[:80] or "the photograph")
        stem = await to_thread.run_sync(self.studio.add, name, content)
        return JSONResponse({"stem": stem}, HTTPStatus.CREATED)

    async def open(self, request: Request) -> Response:
        """Tell of one picture."""
        stem = request.path_params["stem"]
        return JSONResponse(self._told(await to_thread.run_sync(self.studio.sheets.open, stem)))

    def _told(self, sheet: Sheet) -> dict[str, Any]:
        height, width = sheet.image.shape[:2]
        return {
            "stem": sheet.stem,
            "width": width,
            "height": height,
            "shown": {"width": sheet.shown.shape[1], "height": sheet.shown.shape[0]},
            "revision": sheet.revision,
            "progress": self.studio.folder.progress(sheet.stem),
        }

    async def photo(self, request: Request) -> Response:
        """Answer with the photograph, at the size that is shown."""

        def encode() -> bytes:
            shown = self.studio.sheets.open(request.path_params["stem"]).shown
            return _encoded(".jpg", shown[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 94)

        return Response(await to_thread.run_sync(encode), media_type="image/jpeg")

    async def thumbnail(self, request: Request) -> Response:
        """Answer with a small picture for the list."""

        def encode() -> bytes:
            image = self.studio.folder.read_image(request.path_params["stem"])
            scale = _THUMBNAIL / min(image.shape[:2])
            size = [max(1, round(side * min(1.0, scale))) for side in image.shape[1::-1]]
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            return _encoded(".jpg", small[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 85)

        content = await to_thread.run_sync(encode)
        return Response(content, media_type="image/jpeg")

    async def strokes(self, request: Request) -> Response:
        """Answer with the strokes as a picture to lay over the photograph."""

        def encode() -> bytes:
            strokes = self.studio.sheets.open(request.path_params["stem"]).shown_strokes()
            colours = np.zeros((256, 4), np.uint8)
            colours[0], colours[1] = _BACKGROUND, _OBJECT
            return _encoded(".png", colours[strokes], cv2.IMWRITE_PNG_COMPRESSION, 1)

        return Response(await to_thread.run_sync(encode), media_type="image/png")

    async def draw(self, request: Request) -> Response:
        """Save a stroke, or go back or forth to other strokes; tell the new revision."""
        wanted = await read_json(request)
        revision, earlier = wanted.get("revision"), wanted.get("restore")
        if not isinstance(revision, str) or not (earlier is None or isinstance(earlier, str)):
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected the revision that was drawn on")
        stem = request.path_params["stem"]
        if earlier is not None:
            sheet = await to_thread.run_sync(self.studio.sheets.restore, stem, revision, earlier)
        else:
            stroke = parse_stroke(wanted.get("stroke"))
            sheet = await to_thread.run_sync(self.studio.draw, stem, revision, stroke)
        return JSONResponse(self._told(sheet))

    async def mask(self, request: Request) -> Response:
        """Answer with what a network makes of the strokes, or with the mask that was accepted."""
        stem, asked = request.path_params["stem"], request.query_params
        if asked.get("place") == "saved":
            return await to_thread.run_sync(lambda: _picture(self.studio.saved(stem)))
        place = asked.get("place", "main")
        if place not in ("main", "other"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected a place: main, other or saved")
        revision, carefully = asked.get("revision", ""), asked.get("carefully") == "true"

        def look() -> Response:
            found = self.studio.look(stem, revision, place, carefully=carefully)
            return _picture(found)

        return await to_thread.run_sync(look)

    async def accept(self, request: Request) -> Response:
        """Save the mask."""
        revision = (await read_json(request)).get("revision")
        stem = request.path_params["stem"]
        return await to_thread.run_sync(lambda: _picture(self.studio.accept(stem, str(revision))))


def parse_stroke(tree: Any) -> Stroke:
    """Return the stroke that a request describes.

    Raises:
        Refusal: it does not describe one.
    """
    try:
        return Stroke(
            label=int(tree["label"]),
            width=float(tree["width"]),
            points=[(float(x), float(y)) for x, y in tree["points"]],
        )
    except (TypeError, KeyError, ValueError, OverflowError):
        raise Refusal(
            HTTPStatus.BAD_REQUEST, "expected a stroke: its label, its width and its points"
        ) from None


async def read_json(request: Request) -> dict[str, Any]:
    """Return the object that a request holds.

    Raises:
        Refusal: it is too large, or not a JSON object.
    """
    content = await read_body(request, MAX_JSON_BYTES, "the request")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, "expected a JSON object")
    return cast(dict[str, Any], tree)


async def read_body(request: Request, limit: int, name: str) -> bytes:
    """Return a request's content, of which no more is read than may be kept.

    Raises:
        Refusal: it is larger than `limit` bytes.
    """
    refusal = Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"{name}: larger than {math.ceil(limit / 1e6)} MB; make it smaller",
    )
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > limit:
        raise refusal
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise refusal
    return bytes(content)


def _picture(found: Masked) -> Response:
    """Return a mask as a small PNG, with the time that it took and whether one before was kept."""
    content = _encoded(".png", found.grey, cv2.IMWRITE_PNG_COMPRESSION, 1)
    headers = {"x-seconds": f"{found.seconds:.4f}", "x-kept": str(int(found.kept))}
    return Response(content, media_type="image/png", headers=headers)


def _encoded(suffix: str, pixels: UInt8[np.ndarray, "h w *c"], *options: int) -> bytes:
    """Return the file that holds some pixels."""
    done, content = cv2.imencode(suffix, np.ascontiguousarray(pixels), options)
    assert done
    return content.tobytes()


async def refused(request: Request, error: Exception) -> Response:
    """Answer what a `Refusal` says."""
    assert isinstance(error, Refusal)
    return JSONResponse({"error": str(error)}, error.status)


async def unusable(request: Request, error: Exception) -> Response:
    """Answer that something given cannot be used."""
    return JSONResponse({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)


async def too_large(request: Request, error: Exception) -> Response:
    """Answer that a picture has too many pixels."""
    return JSONResponse({"error": str(error)}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


async def out_of_memory(request: Request, error: Exception) -> Response:
    """Answer that this picture is too much for this machine."""
    message = "not enough memory for a picture of this size; scale it down first"
    return JSONResponse({"error": message}, HTTPStatus.INSUFFICIENT_STORAGE)


async def unreadable(request: Request, error: Exception) -> Response:
    """Answer that the folder cannot be used, which is nothing that the page did wrong."""
    assert isinstance(error, OSError)
    message = f"{error.filename or 'the folder'}: {error.strerror or error}"
    return JSONResponse({"error": message}, HTTPStatus.INTERNAL_SERVER_ERROR)


async def failed(request: Request, error: Exception) -> Response:
    """Answer that this is a fault of the server; uvicorn tells of it in the terminal."""
    message = "the server failed; its terminal says how; what was saved before is safe"
    return JSONResponse({"error": message}, HTTPStatus.INTERNAL_SERVER_ERROR)
