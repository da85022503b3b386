"""The service: what its replicas answer, and the whole of it as a user starts it."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from deploy.masks import Masks
from deploy.orders import Order
from deploy.serve import Serve, Service, _serve, app, main
from scribbleseg.config import Looker
from scribbleseg.errors import InputError
from scribbleseg.predict import load, predict_folder
from tests.datasets.test_scenes import bomb
from tests.serve.client import BOUNDARY, multipart, post
from tests.train.test_finetune import ROOT, wait_for
from tests.train.test_loopback import is_loopback, listeners
from tests.tune.test_sweep_cluster import free_port


@pytest.fixture(scope="module")
def expected(checkpoint, tiny_data, tmp_path_factory) -> Path:
    """What `scribbleseg predict` writes."""
    out, split = tmp_path_factory.mktemp("expected"), tiny_data / "test"
    predictor = load(checkpoint, device="cpu")
    list(predict_folder(predictor, split / "images", split / "scribbles", out, probabilities=True))
    return out


def parts(data: Path, stem: str) -> dict[str, bytes]:
    """The two files of a request."""
    files = {"image": "images", "strokes": "scribbles"}
    return {
        name: (data / "test" / folder / f"{stem}.png").read_bytes()
        for name, folder in files.items()
    }


def png(array: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def bad_parts(good: dict[str, bytes]) -> dict[str, tuple[dict[str, bytes], int, str]]:
    """Requests whose pictures cannot be used, the status, and a part of the line that says so."""
    twos = png(np.full((60, 80), 2, np.uint8))
    return {
        "no picture": (good | {"image": b"GIF89a"}, 415, "image: not such a picture"),
        "empty": (good | {"strokes": b""}, 415, "strokes: not such a picture"),
        "truncated": (good | {"image": good["image"][:-99]}, 422, "truncated"),
        "sizes": (good | {"strokes": png(np.zeros((9, 9), np.uint8))}, 422, "strokes: found 9x9"),
        "coding": (good | {"strokes": twos}, 422, "values 2"),
        "bomb": (good | {"image": bomb(60_000, 60_000)}, 413, "image: "),
        "large": (good | {"image": bomb(10_000, 10_000)}, 413, "at most 50 megapixels"),
    }


def replica(checkpoint):
    """Return what answers requests, without Ray around it."""
    return Masks(
        looker=Looker(checkpoint=str(checkpoint)),
        cpus=torch.get_num_threads(),
        gpus=0,
        batch_size=1,
        max_pixels=50_000_000,
    )


def test_good_and_bad_requests_of_one_batch_get_their_own_answers(checkpoint, tiny_data, expected):
    masks = replica(checkpoint)
    stem = "scene_1_001"
    good = parts(tiny_data, stem)
    bad = bad_parts(good)
    orders = [Order(**each) for each, _, _ in bad.values()]
    orders = [Order(**good), *orders, Order(**good, probabilities=True)]
    mask, *refused, probabilities = masks.reply_all(orders)
    assert (mask.status, probabilities.status) == (200, 200)
    # Both came out of one forward pass, whose logits differ in their last bits: that may take a
    # pixel to the other side of the threshold, or a probability to the next grey.
    for reply, path, greys in ((mask, expected, 0), (probabilities, expected / "probabilities", 1)):
        wanted = np.asarray(Image.open(path / f"{stem}.png")).astype(int)
        found = np.asarray(Image.open(io.BytesIO(reply.body)))
        assert (np.abs(found - wanted) > greys).mean() < 1e-3
    for reply, (_, status, line) in zip(refused, bad.values(), strict=True):
        assert reply.status == status and line in reply.body.decode(), line
        assert b"\n" not in reply.body
    masks.check_health()


def test_a_replica_whose_device_fails_is_not_well(checkpoint, tiny_data, monkeypatch):
    masks = replica(checkpoint)
    order = Order(**parts(tiny_data, "scene_1_000"))

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(masks.predictor.model, "forward", fail)
        with pytest.raises(RuntimeError, match="CUDA"):
            masks.reply_all([order])
    with pytest.raises(RuntimeError, match="CUDA"):
        masks.check_health()


def test_what_cannot_be_served_is_said_before_ray_starts(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("SCRIBBLESEG_TOKEN", raising=False)
    here = f"--checkpoint={checkpoint}"
    with pytest.raises(InputError, match="SCRIBBLESEG_TOKEN is not set"):
        main([here, "--host=0.0.0.0"])
    with pytest.raises(InputError, match="SCRIBBLESEG_TOKEN is not set"):
        app({"checkpoint": str(checkpoint)})
    with pytest.raises(InputError, match="nowhere"):
        main([f"--checkpoint={tmp_path}/nowhere"])
    with pytest.raises(InputError, match="max_replicas is 1; expected min_replicas, 2, or more"):
        Service(checkpoint="c", min_replicas=2, max_replicas=1)
    for wrong in ("--port=70000", "--port=0", "--max-megapixels=200"):
        with pytest.raises(InputError, match=wrong[2:5]):
            main([here, wrong])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="address already in use; choose another --port"):
            main([here, f"--port={taken.getsockname()[1]}"])


def test_a_cluster_that_serves_already_is_left_as_it_is(checkpoint, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be started or shut down")

    for name in ("start", "run", "shutdown"):
        monkeypatch.setattr(ray_serve, name, never)
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(proxies={"node": "HEALTHY"}))
    with pytest.raises(InputError, match="Serve runs on this cluster already"):
        _serve(Serve(service=Service(checkpoint=str(checkpoint))), None, on_every_node=True)


def test_a_start_that_never_ends_can_be_interrupted(checkpoint, monkeypatch):
    stopped = []

    def run(*given: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)

    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(proxies={}))
    monkeypatch.setattr(ray_serve, "start", lambda **more: None)
    monkeypatch.setattr(ray_serve, "run", run)
    monkeypatch.setattr(ray_serve, "shutdown", lambda: stopped.append(True))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    asked = Serve(service=Service(checkpoint=str(checkpoint)))
    try:
        with pytest.raises(KeyboardInterrupt):
            _serve(asked, None, on_every_node=False)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert stopped == [True]


def test_a_serve_configuration_gives_the_same_settings(checkpoint, monkeypatch):
    monkeypatch.setenv("SCRIBBLESEG_TOKEN", "secret")
    with pytest.raises(InputError, match="batch_size is 0"):
        app({"checkpoint": str(checkpoint), "batch_size": 0})
    for scales in ([0.75, 1.0], "0.75 1.0", 1.0):
        assert app({"checkpoint": str(checkpoint), "edges": True, "scales": scales}) is not None


@contextmanager
def service(checkpoint: Path, log: Path, *arguments: str) -> Iterator[tuple[psutil.Process, int]]:
    """The service, from the command line to SIGTERM; gives its process and its port."""
    port = free_port()
    command = [f"--checkpoint={checkpoint}", f"--port={port}", *arguments]
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "deploy.serve", *command],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        ) as running,
    ):
        try:
            wait_for(lambda: "/predict" in log.read_text(), running)
            yield psutil.Process(running.pid), port
        finally:
            running.send_signal(signal.SIGTERM)
    assert running.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def get(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_service_from_start_to_end(checkpoint, tiny_data, expected, tmp_path):
    """Masks over HTTP are the folder's; nothing that clients do keeps others from theirs."""
    stem = "scene_1_001"
    good = parts(tiny_data, stem)
    mask = (expected / f"{stem}.png").read_bytes()
    threads = f"--cpus-per-replica={torch.get_num_threads()}"
    with service(checkpoint, tmp_path / "log", threads) as (process, port):
        assert {address for _, address in listeners(process) if not is_loopback(address)} == set()
        assert get(port, "/healthz") == (200, b"ok: 1 replica(s)\n")
        assert get(port, "/")[0] == 404
        assert post(port, good) == (200, mask)
        grey = (expected / "probabilities" / f"{stem}.png").read_bytes()
        assert post(port, good, path="/predict?probabilities=true") == (200, grey)
        for bad, status, line in bad_parts(good).values():
            found, answer = post(port, bad)
            assert found == status and line.encode() in answer and answer.count(b"\n") == 1
        lose_clients(port, good)
        assert post(port, good) == (200, mask)


def lose_clients(port: int, good: dict[str, bytes]) -> None:
    """Clients that go: in the middle of their request, and before their answer."""
    body, kind = multipart(good)
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for content in (whole[:-300], whole, head.encode(), b"\0" * 100):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(content)
    assert BOUNDARY.encode() in whole


@pytest.mark.slow
def test_a_killed_replica_costs_no_request(checkpoint, tiny_data, expected, tmp_path):
    """Of 1,000 requests by 4 clients, while one of two replicas is killed, all are answered."""
    stem, total = "scene_1_001", 1000
    good = parts(tiny_data, stem)
    numbers, found = iter(range(total)), Counter[int]()
    lock = threading.Lock()
    with service(checkpoint, tmp_path / "log", "--min-replicas=2") as (process, port):

        def client() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                if number == total // 3:
                    replicas(process)[0].kill()
                status, _ = post(port, good)
                with lock:
                    found[status] += 1

        clients = [threading.Thread(target=client) for _ in range(4)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        assert found == {200: total}
        wait_for(lambda: get(port, "/healthz") == (200, b"ok: 2 replica(s)\n"), None)


def replicas(process: psutil.Process) -> list[psutil.Process]:
    """The replicas that compute, below the command's process."""
    family = process.children(recursive=True)
    return [each for each in family if ":Masks" in " ".join(each.cmdline())]


def test_ray_accepts_the_configuration(monkeypatch):
    monkeypatch.setenv("SCRIBBLESEG_TOKEN", "secret")
    tree = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    (found,) = ServeDeploySchema.model_validate(tree).applications
    assert found.import_path == "deploy.serve:app"
    assert app(found.args) is not None
