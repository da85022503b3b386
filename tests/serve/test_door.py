"""The door, before a stand-in for replicas: what is refused, and what is tried again."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response

from deploy.door import NUM_TRIES, Door, digest
from deploy.orders import Order, Reply
from tests.serve.client import multipart

PARTS = {"image": b"photograph", "strokes": b"strokes"}


class Behind:
    """Stands in for the handle of the replicas: fails as it is told, then echoes."""

    def __init__(self, *faults: Exception):
        self.faults = list(faults)
        self.orders: list[Order] = []
        self.reply = SimpleNamespace(remote=self._reply)

    async def _reply(self, order: Order) -> Reply:
        self.orders.append(order)
        if self.faults:
            raise self.faults.pop(0)
        return Reply(status=200, body=order.image + b", " + order.strokes)


def send(
    door: Door,
    body: bytes = b"",
    *,
    path: str = "/predict",
    method: str = "POST",
    chunk: int = 1 << 16,
    disconnects: bool = False,
    **headers: str,
) -> Response:
    """Answer one request, whose body comes in chunks."""
    target, _, query = path.partition("?")
    chunks = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": disconnects or number < len(chunks)}
        for number, part in enumerate(chunks, start=1)
    ] + [{"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    scope = {
        "type": "http", "method": method, "path": target, "query_string": query.encode(),
        "headers": [
            (key.replace("_", "-").encode(), value.encode())
            for key, value in ({"host": "127.0.0.1:8000"} | headers).items()
        ],
    }  # fmt: skip
    return asyncio.run(door(Request(scope, receive)))


def open_door(*faults: Exception, token: str | None = None, max_bytes: int = 1000) -> Door:
    token_digest = digest(token) if token else None
    return Door(Behind(*faults), token_digest=token_digest, max_bytes=max_bytes)


def refused(response: Response, status: int, *parts: str) -> None:
    """Assert that the answer is one line with all `parts`."""
    line = response.body.decode()
    assert response.status_code == status, line
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n")
    for part in parts:
        assert part in line
    assert response.media_type == "text/plain; charset=utf-8"


def test_a_request_is_taken_apart_and_answered():
    door = open_door()
    body, kind = multipart(PARTS)
    for chunk in (1, 1 << 16):
        answer = send(door, body, content_type=kind, chunk=chunk)
        assert (answer.status_code, answer.body) == (200, b"photograph, strokes")
        assert answer.media_type == "image/png"
    send(door, body, content_type=kind, path="/predict?probabilities=true")
    assert [order.probabilities for order in door.masks.orders] == [False, False, True]


@pytest.mark.parametrize(
    ("parts", "status", "expected"),
    [
        ({"image": b"a"}, 422, "strokes is missing among the fields (image)"),
        ({"strokes": b"a"}, 422, "image is missing"),
        (PARTS | {"mask": b"a"}, 400, "Too many files"),
        (PARTS | {"image": "text"}, 422, "image: found text, expected a file"),
        (PARTS | {"image": b"x" * 1000}, 413, "expected at most 0.001 MB"),
    ],
)
def test_requests_that_cannot_be_used_are_refused_in_one_line(parts, status, expected):
    body, kind = multipart(parts)
    door = open_door()
    refused(send(door, body, content_type=kind), status, expected)
    assert door.masks.orders == []


def test_what_is_no_such_request_is_refused_in_one_line():
    door = open_door()
    body, kind = multipart(PARTS)
    refused(send(door, body), 415, "no content type", "curl -F image=@")
    refused(send(door, body, content_type="application/json"), 415, "application/json")
    refused(send(door, body, content_type="multipart/form-data"), 400, "boundary")
    refused(send(door, b"junk" + body, content_type=kind), 400, "Expected two files")
    refused(send(door, body[:-40], content_type=kind, disconnects=True), 400, "ended before")
    path = "/predict?probabilities=yes"
    refused(send(door, body, content_type=kind, path=path), 422, "probabilities is 'yes'")
    refused(send(door, path="/../etc/passwd"), 404, "expected /predict or /healthz")
    wrong = send(door, method="GET")
    refused(wrong, 405, "expected POST")
    assert wrong.headers["allow"] == "POST"
    assert door.masks.orders == []


def test_too_long_requests_are_refused_by_their_header_before_they_come_in():
    door = open_door()
    answer = send(door, b"", content_type=multipart(PARTS)[1], content_length="1001")
    refused(answer, 413, "expected at most 0.001 MB")


def test_without_the_token_nothing_is_read():
    door = open_door(token="secret")
    body, kind = multipart(PARTS)
    for shown in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        answer = send(door, body, content_type=kind, **shown)
        refused(answer, 401, "Authorization: Bearer")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert "secret" not in repr(vars(door))
    answer = send(door, body, content_type=kind, authorization="Bearer secret")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:9000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200),
        ({"host": "evil.example:8000"}, 421),
        ({"host": "[::1"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
    ],
)
def test_without_a_token_web_pages_compute_nothing(headers, status):
    body, kind = multipart(PARTS)
    door = open_door()
    answer = send(door, body, content_type=kind, **headers)
    assert answer.status_code == status and len(door.masks.orders) == (status == 200)
    answer = send(
        open_door(token="t"), body, content_type=kind, authorization="Bearer t", **headers
    )
    assert answer.status_code == 200


def test_a_request_whose_replica_is_lost_goes_to_another():
    body, kind = multipart(PARTS)
    lost = [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)]
    door = open_door(*lost)
    assert send(door, body, content_type=kind).status_code == 200
    assert len(door.masks.orders) == 3


def test_a_request_that_kills_replicas_is_given_up():
    body, kind = multipart(PARTS)
    door = open_door(*(ActorDiedError() for _ in range(9)))
    refused(send(door, body, content_type=kind), 503, f"{NUM_TRIES} replicas were lost")
    assert len(door.masks.orders) == NUM_TRIES


def test_other_faults_are_answered_once_without_their_details():
    body, kind = multipart(PARTS)
    full = open_door(BackPressureError(num_queued_requests=9, max_queued_requests=9))
    answer = send(full, body, content_type=kind)
    refused(answer, 503, "too many requests")
    assert answer.headers["retry-after"] == "5"
    refused(send(open_door(RuntimeError("/secret")), body, content_type=kind), 500, "log says why")
