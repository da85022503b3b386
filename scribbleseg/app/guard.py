"""Who may talk to the server.

On loopback, any page that the person has open in the same browser can send requests here, so those
of other origins are refused, and those for other host names too (a foreign name may have been made
to resolve to this machine). Beyond loopback, whoever asks must have the token.
"""

import hmac
from collections.abc import Collection
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "scribbleseg"
# The page needs nothing from anywhere else; pictures made in the page are blobs.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """Refuses what does not come from the page itself.

    Args:
        app: What answers all other requests.
        hosts: Values of the Host header that are served; empty: any, which takes a token.
        token: What those beyond loopback must know; None: nothing.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str | None):
        self.app = app
        self.hosts = frozenset(hosts)
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = self.refuse(Request(scope)) if scope["type"] == "http" else Response(None, 404)
        await (answer or self.app)(scope, receive, _with_headers(send))

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that is not handed on; None for all others."""
        headers = request.headers
        host = headers.get("host", "")
        if self.hosts and host not in self.hosts:
            return _no(HTTPStatus.MISDIRECTED_REQUEST, f"{host[:80]!r} is not served here")
        if not same_origin(headers, host) and not _is_visit(request):
            return _no(HTTPStatus.FORBIDDEN, "requests of other web pages are refused")
        if self.token is None:
            return None
        if request.url.path == "/" and _equal(request.query_params.get("token", ""), self.token):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if any(_equal(given, self.token) for given in (request.cookies.get(COOKIE, ""), bearer)):
            return None
        return _no(
            HTTPStatus.UNAUTHORIZED, "open the address that the server printed, token and all"
        )


def same_origin(headers: Headers, host: str) -> bool:
    """Return whether a request comes from the page itself, or from no page at all."""
    origin = headers.get("origin")
    return headers.get("sec-fetch-site", "none") in ("same-origin", "none") and (
        origin is None or origin.partition("://")[2] == host
    )


def _is_visit(request: Request) -> bool:
    """Return whether somebody follows a link to the page, which changes nothing."""
    return request.method == "GET" and request.url.path == "/"


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _no(status: HTTPStatus, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def _with_headers(send: Send) -> Send:
    """Add this page's headers to every answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message.get("headers", ()),
                *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
            ]
        await send(message)

    return sending
