"""The page's network on another machine: a deployed predictor, asked over HTTP (`deploy/serve.py`).

POST URL/predict takes the files `image` and `strokes`; with `?probabilities=true` it answers with
an 8-bit grey PNG of 255 x the probability of "object".
"""

import http.client
import io
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from scribbleseg.app.models import Model
from scribbleseg.app.refusal import Refusal
from scribbleseg.errors import InputError

_SECONDS = 120
_MAX_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class RemoteLook:
    """Asks a deployed predictor."""

    url: str
    """Where it is: http://HOST:PORT, without /predict."""
    token: str | None = field(default=None, repr=False)
    """What it asks its clients for."""

    def probabilities(
        self, image: UInt8[np.ndarray, "h w 3"], strokes: UInt8[np.ndarray, "h w"]
    ) -> Float32[np.ndarray, "h w"]:
        """Return the probability of "object", in [0, 1], in steps of 1/255.

        Raises:
            Refusal: it cannot be reached, or answers with something else.
        """
        # As PNG: what is masked must be what is seen, to the last bit.
        body, kind = _multipart({"image": _png(image[..., ::-1]), "strokes": _png(strokes)})
        answer = self._ask("/predict?probabilities=true", body, {"Content-Type": kind})
        try:
            with Image.open(io.BytesIO(answer), formats=("PNG",)) as picture:
                # Its size is known before anything is decoded.
                if picture.size == image.shape[1::-1] and picture.mode == "L":
                    return np.array(picture, np.float32) / 255
        except (OSError, SyntaxError, ValueError):
            pass
        raise _gone_wrong(self.url, "answered with something else than a mask of the right size")

    def require_health(self) -> None:
        """Raise a `Refusal` unless it is there."""
        self._ask("/healthz", None, {})

    def _ask(self, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        """Return the answer to a request."""
        known = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.url + path, body, {**headers, **known})
        try:
            with _opener().open(request, timeout=_SECONDS) as answer:
                return answer.read(_MAX_BYTES)
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace").removeprefix("error: ").strip()
            said = " ".join(said.split()) or error.reason
            raise _gone_wrong(self.url, f"answered {error.code}: {said}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise _gone_wrong(self.url, f"cannot be reached ({why})") from None


def load_remote(url: str, token: str | None) -> Model:
    """Return the network behind a URL.

    Raises:
        InputError: no such URL, or nobody answers there.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.netloc
    except ValueError:
        known = False
    if not known:
        raise InputError(f"--server is {url!r}; expected http://HOST:PORT")
    looks = RemoteLook(url=url.rstrip("/").removesuffix("/predict"), token=token)
    try:
        looks.require_health()
    except Refusal as refusal:
        raise InputError(f"--{refusal}; start it: python -m deploy.serve --checkpoint C") from None
    return Model(name=looks.url, quick=looks, careful=looks, config=None)


def _opener() -> urllib.request.OpenerDirector:
    """Return what follows no redirection: photographs and the token go where the person said."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _gone_wrong(url: str, what: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_GATEWAY, f"server {url} {what}")


def _png(pixels: UInt8[np.ndarray, "h w *c"]) -> bytes:
    done, content = cv2.imencode(".png", pixels, (cv2.IMWRITE_PNG_COMPRESSION, 1))
    assert done
    return content.tobytes()


def _multipart(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """Return a body that carries files, and its content type."""
    boundary = uuid.uuid4().hex
    body = bytearray()
    for name, content in files.items():
        head = f'form-data; name="{name}"; filename="{name}.png"'
        body += f"--{boundary}\r\nContent-Disposition: {head}\r\n".encode()
        body += b"Content-Type: image/png\r\n\r\n" + content + b"\r\n"
    return bytes(body) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
