"""The road of the README: submit a sweep to a cluster, watch it, pull its best, evaluate it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from scribbleseg.checkpoint import verify
from scribbleseg.cli import run_line

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(storage, tmp_path) -> Iterator[tuple[str, str]]:
    """The addresses of a head node and of its job server; it knows the storage's credentials."""
    dashboard, port = free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    node = subprocess.Popen(
        [
            BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                break
        except OSError:
            assert node.poll() is None and time.monotonic() < deadline, "the head did not start"
            time.sleep(1)
    yield f"127.0.0.1:{port}", address
    node.terminate()
    node.wait(timeout=60)
    # A head that is terminated leaves its address behind for drivers that name none.
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def test_submit_status_pull_evaluate(head, storage, tiny_data, tmp_path, capsys):
    node, jobs = head
    submission = [
        BIN / "ray", "job", "submit", "--address", jobs, "--working-dir", ".",
        "--runtime-env-json", '{"excludes": [".git"]}', "--",
        "python", "-m", "tune.sweep", "smoke", f"--data.root={tiny_data}",
        "--train.batch-size=4", "--num-trials=4", f"--storage={storage}", "--name=s",
    ]  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        submitted = subprocess.run(
            submission,
            cwd=ROOT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        # The head answers a while before its agent, which starts jobs.
        if "No available agent" not in submitted.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "succeeded" in said and "[4/4] trial_000" in said

    # The same cluster will never hold this trial, and nobody can know that but by waiting.
    large = subprocess.run(
        [
            sys.executable, "-m", "tune.sweep", "smoke", f"--data.root={tiny_data}",
            "--train.batch-size=4", f"--storage={storage}", "--name=large",
            "--launch.num-workers=3", "--launch.wait-minutes=0.05",
        ],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": node},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert large.returncode == 2, large.stderr
    assert "3 worker(s) with 1 CPU and 0 GPU each found no room" in large.stderr
    assert "the cluster has 2 CPUs and 0 GPUs on 1 node(s)" in large.stderr

    place = f"{storage}/s"
    run_line(["status", place])
    shown = capsys.readouterr().out
    assert "s: finished, 4 trials" in shown and "best: trial_000" in shown
    run_line(["pull", place, "--out", str(tmp_path / "best")])
    pulled = capsys.readouterr().out
    assert "95 % interval over images" in pulled and verify(tmp_path / "best") == []
    command = pulled.strip().splitlines()[-1].removeprefix("evaluate it: scribbleseg ")
    run_line(command.split())
    assert "mIoU" in capsys.readouterr().out
    run_line(["report", place, "--out", str(tmp_path / "page.html")])
    assert "<svg" in (tmp_path / "page.html").read_text()
