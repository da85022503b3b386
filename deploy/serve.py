"""`python -m deploy.serve`: the network behind HTTP, on this machine or a cluster, by Ray Serve.

On a cluster with a Serve configuration of its own, `serve run deploy.serve:app checkpoint=...` and
`serve deploy deploy/serve.yaml` start the same application.
"""

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from scribbleseg.app.hosts import TOKEN, bracketed, is_loopback, read_token
from scribbleseg.cli import exit_status, say
from scribbleseg.config import Looker, parse_arguments, require, to_words
from scribbleseg.datasets.files import MAX_MEGAPIXELS
from scribbleseg.errors import InputError
from train.launch import ClusterConfig, start_ray
from train.places import absolute

PROG = "python -m deploy.serve"
NAME = "scribbleseg"
SECONDS_PER_REQUEST = 120.0


@dataclass(frozen=True, kw_only=True)
class Service(Looker):
    """What is served, and by how much hardware."""

    checkpoint: str
    """Checkpoint, run or sweep folder or URI, or released:NAME; every node must find it there."""
    min_replicas: int = 1
    """Replicas that compute even when nothing is asked (1 or more)."""
    max_replicas: int = 2
    """Replicas under load (min_replicas or more); as many as find room are started."""
    cpus_per_replica: int = 1
    """CPU cores of each replica (1 or more)."""
    gpus_per_replica: int = 0
    """GPUs of each replica (0 or more)."""
    batch_size: int | None = None
    """Requests of one image size that share a forward pass (1 or more); None: 8 on GPUs, and 1 on
    CPUs, where a batch takes as long as its images one by one.
    """
    max_queued: int = 200
    """Requests that wait at most before more are told to come back (1 or more)."""
    max_megapixels: float = 50.0
    """Larger pictures are refused, before they are decoded (at most 178)."""
    max_megabytes: float = 64.0
    """Longer requests are refused, while they come in."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("min_replicas", "cpus_per_replica", "max_queued"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(
            self.max_replicas >= self.min_replicas,
            "max_replicas",
            self.max_replicas,
            f"min_replicas, {self.min_replicas}, or more",
        )
        require(self.gpus_per_replica >= 0, "gpus_per_replica", self.gpus_per_replica, "0 or more")
        size = self.batch_size
        require(size is None or size >= 1, "batch_size", size, "1 or more, or None")
        # Pillow decodes no larger one.
        most = self.max_megapixels
        require(
            0 < most <= MAX_MEGAPIXELS,
            "max_megapixels",
            most,
            f"more than 0 and at most {MAX_MEGAPIXELS}",
        )
        require(self.max_megabytes > 0, "max_megabytes", self.max_megabytes, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve masks over HTTP until interrupted: POST /predict, GET /healthz."""

    service: Annotated[Service, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine, clients must show a token: set SCRIBBLESEG_TOKEN.
    """
    port: int = 8000
    """Port to listen on (1 to 65535)."""
    address: str | None = None
    """Address of a running Ray cluster; None: $RAY_ADDRESS, else Ray is started on this machine."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(0 < self.port < 2**16, "port", self.port, "1 to 65535")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked: Serve = parse_arguments(Serve, arguments, prog=PROG)
    token = read_token()
    if not token and not is_loopback(asked.host):
        raise InputError(
            f"host is {asked.host}, which others reach, and {TOKEN} is not set; set it to a secret "
            f"that clients show (export {TOKEN}=$(openssl rand -hex 32)), or leave --host out"
        )
    # Said before Ray starts, which would say it again and again.
    _try_out(asked.service)
    launch = ClusterConfig(address=asked.address)
    if launch.is_local:
        _require_free(asked.host, asked.port)
    start_ray(launch)
    _serve(asked, token, on_every_node=not launch.is_local)


def _serve(asked: Serve, token: str | None, *, on_every_node: bool) -> None:
    """Run the application until this process is told to stop; Ray is connected.

    Raises:
        InputError: The cluster serves already.
    """
    from ray import serve

    if serve.status().proxies:
        # It would keep its own host, which others may reach, and end with this process.
        raise InputError(
            "Ray Serve runs on this cluster already, at a host and port of its own; put the "
            "service there with `serve deploy deploy/serve.yaml`, or end what runs with "
            "`serve shutdown`"
        )
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
        # Once: what was started is put away in peace.
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    # After Ray's own, which would end this process without a word to Serve.
    for each in signals:
        signal.signal(each, stop)
    # Serve tells of each of its steps; what a person needs is said here.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="EveryNode" if on_every_node else "HeadOnly",
            http_options={
                "host": asked.host,
                "port": asked.port,
                "request_timeout_s": SECONDS_PER_REQUEST,
            },
        )
        serve.run(build(asked.service, token), name=NAME)
        with contextlib.suppress(KeyboardInterrupt):
            say(
                f"{asked.service.checkpoint} on http://{bracketed(asked.host)}:{asked.port}/predict"
            )
            threading.Event().wait()
    finally:
        serve.shutdown()


def app(arguments: Mapping[str, Any]) -> Any:
    """Return the application for `serve run` and a Serve configuration; a token must be set.

    Args:
        arguments: The fields of `Service`.

    Raises:
        InputError: A field is wrong, or SCRIBBLESEG_TOKEN is not set: the proxies of a cluster are
            often open to others.
    """
    settings = dict(arguments)
    if isinstance(settings.get("scales"), str):
        # `serve run` hands over words, a configuration values.
        settings["scales"] = settings["scales"].split()
    line = to_words(Service, settings)
    service: Service = parse_arguments(Service, line, prog="serve run deploy.serve:app")
    token = read_token()
    if not token:
        raise InputError(f"{TOKEN} is not set; expected a secret that clients show")
    return build(service, token)


def build(service: Service, token: str | None) -> Any:
    """Return the application: a door for clients, and behind it replicas that compute."""
    from ray.serve import deployment

    from deploy.door import Door, digest
    from deploy.masks import Masks

    batch_size = service.batch_size or (8 if service.gpus_per_replica else 1)
    make: Any = deployment
    masks = make(Masks).options(
        name="Masks",
        # One batch computes and the next one gathers; the others wait where any replica takes them.
        max_ongoing_requests=2 * batch_size,
        max_queued_requests=service.max_queued,
        autoscaling_config={
            "min_replicas": service.min_replicas,
            "max_replicas": service.max_replicas,
            "target_ongoing_requests": 1.5 * batch_size,
            # A person waits for a mask: sooner up than Serve's 30 seconds, and as slowly down.
            "look_back_period_s": 15,
            "upscale_delay_s": 5,
        },
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": service.cpus_per_replica,
            "num_gpus": service.gpus_per_replica,
        },
    )
    door = make(Door).options(
        name="Door",
        max_ongoing_requests=2 * service.max_queued,
        # It waits more than it works.
        ray_actor_options={"num_cpus": 0},
    )
    # A plain one: the service's own class is that of a script, which replicas cannot import.
    looker = Looker(
        checkpoint=absolute(service.checkpoint),
        flip=service.flip,
        scales=service.scales,
        edges=service.edges,
        threshold=service.threshold,
        part_threshold=service.part_threshold,
    )
    return door.bind(
        masks.bind(
            looker=looker,
            cpus=service.cpus_per_replica,
            gpus=service.gpus_per_replica,
            batch_size=batch_size,
            max_pixels=round(1e6 * service.max_megapixels),
        ),
        token_digest=digest(token) if token else None,
        max_bytes=round(1e6 * service.max_megabytes),
    )


def _try_out(service: Service) -> None:
    """Load the checkpoint once, so that a wrong one is one line and not a service that never is."""
    from scribbleseg.predict import load_as_asked

    load_as_asked(service, device="cpu")


def _require_free(host: str, port: int) -> None:
    """Raise an `InputError` where nobody can listen: Ray's proxy would try for minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{host}:{port}: {(error.strerror or str(error)).lower()}; choose another --port"
            ) from None


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
