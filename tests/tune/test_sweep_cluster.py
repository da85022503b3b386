"""Sweeps on a cluster: the road of the README from submission to evaluation, and a lost node."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scribbleseg.checkpoint import verify
from scribbleseg.cli import run_line
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import read_trials
from tests.train.test_finetune import wait_for
from tests.tune.test_sweep import LONGER, command

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def node(*arguments: str) -> Iterator[subprocess.Popen]:
    """A node of a Ray cluster, until the end of the block."""
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    process = subprocess.Popen(
        [BIN / "ray", "start", "--block", *arguments],
        env=environment,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield process
    process.terminate()
    process.wait(timeout=60)
    # A head that is terminated leaves its address behind for drivers that name none.
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The addresses of a head node and of its job server; it knows the storage's credentials."""
    if "storage" in request.fixturenames:
        request.getfixturevalue("storage")
    dashboard, port = free_port(), free_port()
    with node(
        "--head", f"--num-cpus={getattr(request, 'param', 2)}", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
    ) as process:  # fmt: skip
        jobs = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: is_up(f"{jobs}/api/jobs/"), process)
        yield f"127.0.0.1:{port}", jobs


@pytest.mark.parametrize("head", [1], indirect=True)
def test_a_lost_node_costs_no_trial(head, tiny_data, tmp_path):
    address, _ = head
    folder = RunFolder.at(str(tmp_path), "s")
    with node(f"--address={address}", "--num-cpus=1") as second:
        driver = subprocess.Popen(
            command(tiny_data, tmp_path, "--num-trials=6", *LONGER),
            cwd=ROOT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: sum(trial.epochs >= 2 for trial in read_trials(folder)) >= 2, driver)
        for process in [*psutil.Process(second.pid).children(recursive=True), second]:
            process.kill()
        _, errors = driver.communicate(timeout=400)
    assert driver.returncode == 0, errors
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 6, errors
    assert all(trial.epochs == 12 for trial in trials)


def test_submit_status_pull_evaluate(head, storage, tiny_data, tmp_path, capsys):
    address, jobs = head
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
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address},
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
