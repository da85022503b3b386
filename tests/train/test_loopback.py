"""Nothing of a job on this machine can be reached from another one.

Covered is every TCP port that is listened on, and every bound UDP port, by the command and all
processes below it, from start to end: the command, its loaders, and with two workers the control
store, raylet, dashboard, agents, controller and workers of Ray, and the sockets of gloo.
"""

import ipaddress
import socket
import subprocess
import time

import psutil
import pytest

from tests.train.test_finetune import ROOT, command


def listeners(process):
    """Return (name of the process, IP address) of whatever a process tree listens on."""
    found = set()
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:
        return found
    for each in tree:
        try:
            name, connections = each.name(), each.net_connections("inet")
        except psutil.Error:
            continue
        for connection in connections:
            is_open = connection.status == psutil.CONN_LISTEN
            if is_open or (connection.type == socket.SOCK_DGRAM and not connection.raddr):
                found.add((name, connection.laddr.ip))
    return found


def is_loopback(text):
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_listens_beyond_loopback(tiny_data, tmp_path, workers):
    arguments = ["--train.epochs=1", f"--launch.num-workers={workers}"]
    found = set()
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command(tiny_data, tmp_path, "a", *arguments), cwd=ROOT, stdout=log, stderr=log
        ) as run,
    ):
        process = psutil.Process(run.pid)
        while run.poll() is None:
            found |= listeners(process)
            time.sleep(0.3)
    assert run.returncode == 0, (tmp_path / "log").read_text()
    assert {(name, address) for name, address in found if not is_loopback(address)} == set()
    if workers == 1:
        assert found == set()
    else:
        names = {name for name, _ in found}
        assert {"gcs_server", "raylet"} <= names
        assert any("RayTrainWorker" in name for name in names), names
