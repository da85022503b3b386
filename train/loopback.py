"""Ray for a job on this machine alone: nothing of it listens where others could reach it.

Left to itself, Ray listens on every interface, and whoever reaches one of its ports runs what they
like; so does the rendezvous of `torch.distributed`, which Ray opens for the workers.
"""

import importlib
import os
import socket
import tempfile
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ray.train import get_context
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, get_device


def stay_on_loopback() -> None:
    """Make the Ray that this process starts next, and its workers, listen on 127.0.0.1 alone."""
    # Ray does so by itself on desktop systems; this is its switch for that.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # It was read when Ray was imported, so what was read then is set too. Naming the address to
    # `ray.init` is no way: it turns 127.0.0.1 into the address of the machine.
    constants: Any = importlib.import_module("ray._private.ray_constants")
    wanted = constants.env_bool(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True)
    constants.ENABLE_RAY_CLUSTER = wanted
    # "lo", and "lo0" on macOS.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


@dataclass
class LoopbackConfig(TorchConfig):
    """Ray Train's set-up of `torch.distributed`, with workers that meet in a file."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets the workers up."""
        return _LoopbackBackend


class _LoopbackBackend(Backend):
    """Ray's own, but for the meeting: torch's server for it listens on every interface."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let all workers join one process group."""
        meeting = Path(tempfile.gettempdir(), f"scribbleseg-{uuid.uuid4().hex}")
        worker_group.execute(_join, meeting, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave it again."""
        ray_own: Any = TorchConfig().backend_cls()
        ray_own.on_shutdown(worker_group, backend_config)


def _join(meeting: Path, timeout_s: int) -> None:
    """Join the process group of the workers that meet in a file; torch removes it."""
    context = get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    dist.init_process_group(
        "nccl" if get_device().type == "cuda" else "gloo",
        init_method=meeting.as_uri(),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=timeout_s),
    )
