"""The page's network on another machine."""

import io
import socket
import threading

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from scribbleseg.app.folder import Folder
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.remote import RemoteLook, load_remote
from scribbleseg.app.serve import listen
from scribbleseg.app.sheets import Stroke
from scribbleseg.app.studio import Studio
from scribbleseg.errors import InputError
from tests.app.conftest import Growing, photograph

seen: list[np.ndarray] = []


async def predict(request: Request) -> Response:
    """Answer as `deploy/serve.py` does."""
    if request.headers.get("authorization") != "Bearer secret":
        return Response("error: expected the header\n", 401)
    assert request.query_params["probabilities"] == "true"
    async with request.form() as form:
        files = [np.asarray(Image.open(form[name].file)) for name in ("image", "strokes")]
    seen[:] = files
    grey = np.round(Growing(20).probabilities(*files) * 255).astype(np.uint8)
    answer = io.BytesIO()
    Image.fromarray(grey[:-1] if files[0].shape[0] == 13 else grey).save(answer, "PNG")
    return Response(answer.getvalue(), media_type="image/png")


@pytest.fixture(scope="module")
def url():
    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/healthz", lambda request: Response("ok")),
        Route("/away/healthz", lambda request: RedirectResponse("/healthz")),
    ]
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def test_masks_come_from_another_machine(url, root):
    studio = Studio(Folder(root=root, split="train"), {"main": load_remote(f"{url}/", "secret")})
    stroke = Stroke(label=1, width=5.0, points=[(20.0, 40.0), (60.0, 40.0)])
    sheet = studio.draw("photo_0", "blank", stroke)
    grey = studio.look("photo_0", sheet.revision, "main").grey
    assert np.array_equal(seen[0], sheet.image) and np.array_equal(seen[1], sheet.strokes)
    assert grey[40, 30] == 255 and grey[50, 30] == 230 and grey[80, 100] == 76
    studio.accept("photo_0", sheet.revision)
    assert (root / "train" / "ground_truth" / "photo_0.png").is_file()
    studio.close()


@pytest.mark.parametrize(
    ("shape", "token", "words"),
    [((12, 20), "wrong", "answered 401: expected the header"), ((13, 20), "secret", "right size")],
)
def test_what_goes_wrong_there_is_told(url, shape, token, words):
    strokes = np.full(shape, 255, np.uint8)
    with pytest.raises(Refusal, match=words) as told:
        RemoteLook(url=url, token=token).probabilities(photograph(*shape), strokes)
    assert told.value.status == 502


@pytest.mark.parametrize(
    ("path", "words"), [("/nothing", "404"), ("/away", "307"), (None, "cannot be reached")]
)
def test_a_server_that_is_not_there_is_one_line(url, path, words):
    with pytest.raises(InputError, match=words):
        load_remote("http://127.0.0.1:9" if path is None else url + path, None)


def test_what_is_no_web_server_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as client:
                client.recv(1 << 16)
                client.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InputError, match="--server .* cannot be reached"):
            load_remote(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        thread.join()


@pytest.mark.parametrize(
    "address", ["file:///etc", "localhost:8000", "", "http://[::1", "http://127.0.0.1:80a"]
)
def test_urls_that_are_none_are_refused(address):
    with pytest.raises(InputError, match="--server"):
        load_remote(address, None)
