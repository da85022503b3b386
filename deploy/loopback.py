"""Ray Serve for this machine alone: its replicas listen where nobody else reaches them."""

import importlib
from typing import Any


def keep_replica_on_loopback() -> None:
    """Where Ray keeps to 127.0.0.1, let the replica that is being made in this process do so too.

    Every replica opens a gRPC port for other replicas, on all interfaces, and unpickles what comes
    in. Ray Serve has no setting for it; it is opened after the replica's constructor, which is
    therefore the place to call this. See `train.loopback.stay_on_loopback` for Ray itself.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    if constants.ENABLE_RAY_CLUSTER:
        return
    replica: Any = importlib.import_module("ray.serve._private.replica")
    listen = replica.add_port_to_grpc_server

    def listen_here(server: Any, address: str) -> int:
        return listen(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = listen_here
