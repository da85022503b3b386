"""Which network the workers of a cluster talk over: the one that Ray itself does.

Left to itself, gloo takes the interface of the address that the machine's own name resolves to,
which is often the loopback: workers on several nodes then never find one another. NCCL looks for
itself, and finds better ones than Ray's where there are any.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

GLOO = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """Return the name of this machine's interface that has an IPv4 or IPv6 address, if one has."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            # IPv6 addresses of one link carry its name: fe80::1%eth0.
            if each.family in (socket.AF_INET, socket.AF_INET6) and (
                each.address.partition("%")[0] == address
            ):
                return name
    return None


def name_interface() -> None:
    """Tell gloo, in a worker, to use the interface of its node's address; the user's own stays."""
    if GLOO not in os.environ:
        interface = interface_of(ray.util.get_node_ip_address())
        # Behind address translation no interface has it; gloo must then find out for itself.
        if interface is not None:
            os.environ[GLOO] = interface


@dataclass
class InterfaceConfig(TorchConfig):
    """Ray Train's set-up of `torch.distributed`, over the network that Ray uses."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets the workers up."""
        return _InterfaceBackend


class _InterfaceBackend(Backend):
    """Ray's own, which is asked once every worker knows its interface."""

    share_cuda_visible_devices = True

    def __init__(self):
        self.ray_own: Any = TorchConfig().backend_cls()

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let all workers join one process group."""
        worker_group.execute(name_interface)
        self.ray_own.on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Tell each worker its rank in the environment."""
        self.ray_own.on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group again."""
        self.ray_own.on_shutdown(worker_group, backend_config)
