"""The replica that clients reach: it takes requests apart, and hands them to one that computes.

It holds a request until it is answered. So when a replica that computes is lost, its requests go to
another one; Ray Serve's own proxy would answer 500.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from deploy.loopback import keep_replica_on_loopback
from deploy.orders import Order, Reply
from scribbleseg.app.guard import same_origin
from scribbleseg.app.hosts import is_loopback

# A request that kills whoever computes it is given up before it has killed every replica.
NUM_TRIES = 4
FIELDS = ("image", "strokes")
EXAMPLE = "curl -F image=@photo.jpg -F strokes=@strokes.png"

logger = logging.getLogger("ray.serve")


class Refused(Exception):
    """A request that is not answered with a picture."""

    def __init__(self, status: int, line: str, headers: dict[str, str] | None = None):
        super().__init__(line)
        self.response = Response(
            f"error: {line}\n", status, headers, media_type="text/plain; charset=utf-8"
        )


def digest(token: str) -> str:
    """Return what is kept of a token: who reads it in the cluster's state learns nothing."""
    return hashlib.sha256(token.encode()).hexdigest()


class Door:
    """HTTP on one side, replicas that compute on the other."""

    def __init__(self, masks: Any, *, token_digest: str | None, max_bytes: int):
        """Open the door.

        Args:
            masks: Handle of the deployment of `deploy.masks.Masks`.
            token_digest: `digest` of the token that clients show; None: none is asked for.
            max_bytes: Requests that are longer are refused while they come in.
        """
        keep_replica_on_loopback()
        self.masks = masks
        self.token_digest = token_digest
        self.max_bytes = max_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        try:
            match request.method, request.url.path:
                case "GET" | "HEAD", "/healthz":
                    return await self._health()
                case "POST", "/predict":
                    return await self._predict(request)
                case _, "/healthz":
                    raise Refused(405, "expected GET /healthz", {"Allow": "GET, HEAD"})
                case _, "/predict":
                    raise Refused(405, "expected POST /predict", {"Allow": "POST"})
                case _, path:
                    raise Refused(404, f"{path}: expected /predict or /healthz")
        except Refused as refused:
            return refused.response

    async def _predict(self, request: Request) -> Response:
        """Answer an image and its strokes with a PNG."""
        self._require_client(request)
        probabilities = _flag(request, "probabilities")
        async with await self._read_form(request) as form:
            image, strokes = [await _read_file(form, name) for name in FIELDS]
        order = Order(image=image, strokes=strokes, probabilities=probabilities)
        reply = await self._ask(order)
        if reply.status != 200:
            raise Refused(reply.status, reply.body.decode())
        return Response(reply.body, media_type="image/png")

    def _require_client(self, request: Request) -> None:
        """Raise unless the request shows the token; where none is asked for, if a web page asks.

        A page of any site that somebody on this machine has open could do so; where its name was
        made to lead to this machine, it asks for that name.
        """
        if self.token_digest is None:
            host = request.headers.get("host", "")
            if not is_loopback(re.sub(r":\d+$", "", host).strip("[]")):
                raise Refused(
                    421, f"{host[:80]!r} is not served here; expected this machine's own name"
                )
            if not same_origin(request.headers, host):
                raise Refused(403, "requests of web pages are refused")
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        shown = digest(token.strip())
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown, self.token_digest):
            raise Refused(
                401,
                'expected the header "Authorization: Bearer TOKEN", with the value of the '
                "service's SCRIBBLESEG_TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    async def _read_form(self, request: Request) -> Any:
        """Take a multipart body apart while it comes in, and no more of it than is allowed."""
        kind = request.headers.get("content-type", "no content type")
        if not kind.lower().startswith("multipart/form-data"):
            raise Refused(415, f"found {kind[:100]}, expected multipart/form-data: {EXAMPLE}")
        most = f"expected at most {self.max_bytes / 1e6:g} MB"
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            raise Refused(413, f"found {int(length) / 1e6:.1f} MB, {most}")
        received = 0

        async def receive() -> Message:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise Refused(413, f"found more, {most}")
            return message

        counted = Request(request.scope, receive)
        try:
            form = await counted.form(max_files=len(FIELDS), max_fields=len(FIELDS))
        except (MultiPartException, HTTPException) as error:
            why = error.message if isinstance(error, MultiPartException) else error.detail
            raise Refused(400, f"{why} Expected two files: {EXAMPLE}") from None
        except ClientDisconnect:
            raise Refused(400, "the request ended before its length") from None
        return _Closing(form)

    async def _ask(self, order: Order) -> Reply:
        """Let a replica compute, and another one if that is lost."""
        for attempt in range(1, NUM_TRIES + 1):
            try:
                return await self.masks.reply.remote(order)
            except BackPressureError:
                raise Refused(503, "too many requests wait already", {"Retry-After": "5"}) from None
            except (RayActorError, ObjectLostError) as error:
                logger.warning("a replica was lost, attempt %d: %s", attempt, type(error).__name__)
            except Exception:
                logger.exception("a prediction failed")
                raise Refused(500, "the prediction failed; the service's log says why") from None
        raise Refused(503, f"{NUM_TRIES} replicas were lost with this request; is it too large?")

    async def _health(self) -> Response:
        """Say whether there is a replica that computes; asking one would wait behind requests."""
        status: Any = await asyncio.to_thread(serve.status)
        running = sum(
            deployment.replica_states.get("RUNNING", 0)
            for app in status.applications.values()
            for name, deployment in app.deployments.items()
            if name == self.masks.deployment_name
        )
        if not running:
            raise Refused(503, "no replica is ready yet", {"Retry-After": "5"})
        return Response(f"ok: {running} replica(s)\n", media_type="text/plain; charset=utf-8")


class _Closing:
    """A form whose temporary files are removed at the end of the block."""

    def __init__(self, form: FormData):
        self.form = form

    async def __aenter__(self) -> FormData:
        return self.form

    async def __aexit__(self, *_: object) -> None:
        await self.form.close()


async def _read_file(form: FormData, name: str) -> bytes:
    """Return the content of one field."""
    found = form.get(name)
    if found is None:
        there = ", ".join(form) or "none"
        raise Refused(422, f"{name} is missing among the fields ({there[:100]}): {EXAMPLE}")
    if not isinstance(found, UploadFile):
        raise Refused(422, f"{name}: found text, expected a file: {EXAMPLE}")
    return await found.read()


def _flag(request: Request, name: str) -> bool:
    """Return a true or false from the address."""
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise Refused(422, f"{name} is {value[:100]!r}, expected true or false")
    return value == "true"
