"""The service under load, and masks in bulk beside the plain loop.

    python -m benchmarks.serving --root ../shared/data/scribble-voc

Four clients send the split's photographs, each as soon as it has its answer: to one replica, to
two, and 1,000 times to two of which one is killed on the way. Then the same photographs become
masks in bulk, by `scribbleseg predict`'s loop, by `train.predict` in one process, and by two
workers on Ray. Replicas and workers have one core each; the loops all cores.
"""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from scribbleseg.checkpoint import read_model, write_model
from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, PredictConfig, parse_arguments, require
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.device import num_cores
from scribbleseg.errors import InputError
from scribbleseg.manifest import write_manifest
from scribbleseg.runs import find_checkpoint

BOUNDARY = "-----boundary-of-the-parts"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    split: str = "test1"
    """Split whose photographs are sent."""
    checkpoint: str = "released:best"
    """Checkpoint that answers."""
    own_looks: bool = False
    """As many looks at each photograph as the checkpoint's settings say, in place of one."""
    clients: int = 4
    """Clients at once."""
    requests: int = 200
    """Requests for each number of replicas."""
    killed: int = 1000
    """Requests while a replica is killed."""
    bulk: int = 64
    """Photographs that become masks in bulk."""
    out: Path = Path("serving.json")
    """File for the figures."""

    def __post_init__(self) -> None:
        """Check what is not found out before the service runs."""
        require(self.requests >= 2, "requests", self.requests, "2 or more")
        list_scenes(self.root, self.split, need_masks=False)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients saw."""

    replicas: int
    killed: int
    """Replicas that were killed on the way."""
    requests: int
    errors: int
    """Answers other than 200, and connections that broke."""
    per_second: float
    p50: float
    """Seconds from a request to the end of its answer."""
    p95: float
    slowest: float


def main() -> None:
    """Measure, print and write."""
    asked: Serving = parse_arguments(Serving, sys.argv[1:], prog="python -m benchmarks.serving")
    with tempfile.TemporaryDirectory() as scratch:
        if not asked.own_looks:
            asked = replace(asked, checkpoint=one_look(asked.checkpoint, Path(scratch)))
        split = Path(asked.root, asked.split).resolve()
        before = os.getloadavg()
        loads = under_load(asked, split)
        between = os.getloadavg()
        bulk = in_bulk(asked, split)
    load = f"load averages {before}, {between}, {os.getloadavg()} on {num_cores()} cores"
    served = [asdict(each) for each in loads]
    figures = {"load": load, "own_looks": asked.own_looks, "served": served, "bulk": bulk}
    asked.out.write_text(json.dumps(figures, indent=2))
    sys.stdout.write(table(loads, bulk, load))


def one_look(checkpoint: str, scratch: Path) -> str:
    """Return a copy of a checkpoint whose settings ask for one look at each photograph."""
    found = read_model(find_checkpoint(checkpoint, scratch / "found"))
    assert isinstance(found.config, FinetuneConfig)
    folder = scratch / "one_look"
    config = replace(found.config, predict=PredictConfig())
    write_model(folder, config=config, weights=found.weights, metrics={})
    write_manifest(folder)
    return str(folder)


def under_load(asked: Serving, split: Path) -> list[Load]:
    """Measure one replica, two, and two of which one is killed."""
    bodies = [multipart(image, split) for image in sorted((split / "images").iterdir())[:100]]
    loads: list[Load] = []
    for replicas in (1, 2):
        with service(asked, replicas) as (process, port):
            send(port, bodies, asked.clients, 2 * asked.clients)
            loads.append(measure(port, bodies, asked, replicas, asked.requests, None))
            if replicas == 2:
                loads.append(measure(port, bodies, asked, replicas, asked.killed, process))
    return loads


def multipart(image: Path, split: Path) -> bytes:
    """Return the body of a request for one photograph."""
    parts = {"image": image, "strokes": split / "scribbles" / f"{image.stem}.png"}
    lines = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{path.name}"'
        "\r\n\r\n".encode()
        + path.read_bytes()
        + b"\r\n"
        for name, path in parts.items()
    ]
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()])


@contextmanager
def service(asked: Serving, replicas: int) -> Generator[tuple[psutil.Process, int]]:
    """The service as a user starts it, with so many replicas."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "deploy.serve", f"--checkpoint={asked.checkpoint}",
        f"--port={port}", f"--min-replicas={replicas}", f"--max-replicas={replicas}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        try:
            if not running.stdout.readline():
                raise InputError(f"deploy.serve has ended; `{' '.join(command)}` says why")
            yield psutil.Process(running.pid), port
        finally:
            running.send_signal(signal.SIGTERM)


def send(
    port: int,
    bodies: Sequence[bytes],
    clients: int,
    total: int,
    victim: psutil.Process | None = None,
) -> tuple[list[float], Counter[str]]:
    """Send requests; return the seconds of each, and how often each status was met."""
    numbers, lock = iter(range(total)), threading.Lock()
    seconds: list[float] = []
    found = Counter[str]()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if victim is not None and number == total // 3:
                victim.kill()
            began = time.perf_counter()
            status = post(port, bodies[number % len(bodies)])
            with lock:
                seconds.append(time.perf_counter() - began)
                found[status] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, found


def post(port: int, body: bytes) -> str:
    """Send one request; return its status, or what went wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        connection.request("POST", "/predict", body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def measure(
    port: int,
    bodies: Sequence[bytes],
    asked: Serving,
    replicas: int,
    total: int,
    process: psutil.Process | None,
) -> Load:
    """Return what clients saw; with the service's process, while one of its replicas is killed."""
    victim = None
    if process is not None:
        family = process.children(recursive=True)
        victim = next(each for each in family if ":Masks" in " ".join(each.cmdline()))
    began = time.perf_counter()
    seconds, found = send(port, bodies, asked.clients, total, victim)
    took = time.perf_counter() - began
    cuts = statistics.quantiles(seconds, n=20)
    return Load(
        replicas=replicas,
        killed=int(victim is not None),
        requests=total,
        errors=total - found["200"],
        per_second=total / took,
        p50=cuts[9],
        p95=cuts[18],
        slowest=max(seconds),
    )


PLAIN = """
import sys, time
from pathlib import Path
from scribbleseg.predict import load, predict_folder
checkpoint, images, scribbles, out = sys.argv[1:]
for done in predict_folder(load(checkpoint), Path(images), Path(scribbles), Path(out)):
    pass
"""


def in_bulk(asked: Serving, split: Path) -> dict[str, dict[str, float]]:
    """Return images per second of each way to make masks, and how many masks differ."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for image in sorted((split / "images").iterdir())[: asked.bulk]:
            for path in (image, split / "scribbles" / f"{image.stem}.png"):
                link = Path(scratch, path.parent.name, path.name)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(path)
        images, scribbles = f"{scratch}/images", f"{scratch}/scribbles"
        folders = [f"--images={images}", f"--scribbles={scribbles}"]
        ours = ["-m", "train.predict", f"--checkpoint={asked.checkpoint}"]
        ways = {
            "plain": ["-c", PLAIN, asked.checkpoint, images, scribbles],
            "here": [*ours, *folders],
            "ray": [*ours, *folders, "--launch.num-workers=2"],
        }
        for name, command in ways.items():
            out = Path(scratch, name)
            target = str(out) if name == "plain" else f"--out={out}"
            with subprocess.Popen(
                [sys.executable, *command, target], stdout=subprocess.DEVNULL, stderr=None
            ) as running:
                seconds = watch(running, out)
            masks = {path.name: path.read_bytes() for path in out.glob("*.png")}
            plain = {path.name: path.read_bytes() for path in Path(scratch, "plain").glob("*.png")}
            found[name] = {
                "per_second": (asked.bulk - 1) / (seconds[-1] - seconds[0]),
                "whole_seconds": seconds[-1],
                "masks_that_differ": sum(masks[name] != plain[name] for name in plain),
            }
    return found


def watch(running: subprocess.Popen[bytes], out: Path) -> tuple[float, float]:
    """Return when the first mask was there, and the last, in seconds from the start."""
    began = time.time()
    if running.wait() != 0:
        raise RuntimeError("prediction failed")
    times = [path.stat().st_mtime for path in out.glob("*.png")]
    return min(times) - began, max(times) - began


def table(loads: Sequence[Load], bulk: dict[str, dict[str, float]], load: str) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| replicas | killed | requests | errors | requests/s | p50, s | p95, s | slowest, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.replicas} | {each.killed} | {each.requests} | {each.errors} | "
        f"{each.per_second:.2f} | {each.p50:.2f} | {each.p95:.2f} | {each.slowest:.2f} |"
        for each in loads
    ]
    lines += [
        "",
        "| masks in bulk | images/s | first start to last mask, s | masks that differ |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {row['per_second']:.2f} | {row['whole_seconds']:.0f} | "
        f"{row['masks_that_differ']:.0f} |"
        for name, row in bulk.items()
    ]
    return "\n".join([*lines, "", load, ""])


if __name__ == "__main__":
    sys.exit(exit_status(main))
