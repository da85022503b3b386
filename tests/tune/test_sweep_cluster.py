"""Sweeps on a cluster: the road of the README from submission to evaluation, and a lost node."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from scribbleseg.cli import run_line
from scribbleseg.manifest import verify
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import STATES, read_trials
from tests.train.test_finetune import driving, wait_for
from tests.tune.test_sweep import LONGER, command, family, trial_processes

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def free_port() -> int:
    """A port that nobody listens on, nor gets from the system: those begin at 32768.

    Ray gives its workers those up to 19999.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


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
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)
        # A head that is terminated leaves its address behind for drivers that name none.
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def is_up(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Head:
    """A head node."""

    process: subprocess.Popen
    address: str
    """What drivers connect to."""
    jobs: str
    """What jobs are submitted to."""


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    """A head node, which knows the storage's credentials."""
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
        yield Head(process, f"127.0.0.1:{port}", jobs)


def on(head: Head) -> dict[str, str]:
    """The environment of a driver that connects to a head node."""
    return os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": head.address}


LEFT_BEHIND = """
import ray
from ray.util.state import list_actors, list_placement_groups
ray.init(log_to_driver=False)
print([actor.name or actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])])
print([g.state for g in list_placement_groups(limit=1000) if g.state != "REMOVED"])
"""


def test_a_hundred_trials_leave_nothing_behind(head, tiny_data, tmp_path):
    words = command(tiny_data, tmp_path, "--num-trials=100", "--search=random")
    counts: list[list[tuple[int, int]]] = []
    with driving(words, tmp_path / "log", on(head)) as driver:
        while driver.poll() is None:
            with contextlib.suppress(psutil.Error):
                processes = trial_processes(head.process)
                counts.append([(p.num_fds(), p.num_threads()) for p in processes])
            time.sleep(1)
    said = (tmp_path / "log").read_text()
    assert driver.returncode == 0, said
    trials = read_trials(RunFolder.at(str(tmp_path), "s"))
    # At least a third of those that came to the rung, one epoch, have gone on to their end.
    epochs = {state: [t.epochs for t in trials if t.state == state] for state in STATES}
    assert len(epochs["finished"]) >= 33 and set(epochs["finished"]) == {2}
    assert len(epochs["finished"] + epochs["stopped"]) == 100 and set(epochs["stopped"]) == {1}
    ends = re.findall(r"^\[\d+/100\] (\w+) (?:finished|stopped) after", said, re.MULTILINE)
    assert set(ends) == {trial.name for trial in trials} and "[100/100]" in said
    assert not (tmp_path / "s" / "tune").exists()
    # Two processes served all of them, and the last look at them is like an early one.
    assert max(map(len, counts)) <= 2
    served = [max(each) for each in counts if len(each) == 2]
    early, late = served[len(served) // 4], served[-1]
    assert late[0] <= early[0] + 10 and late[1] <= early[1] + 10, (early, late)
    left = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], env=on(head), capture_output=True, text=True
    )
    actors, groups = left.stdout.strip().splitlines()[-2:]
    assert groups == "[]", left.stdout
    assert "ImplicitFunc" not in actors, left.stdout


@pytest.mark.parametrize("head", [1], indirect=True)
def test_a_lost_node_costs_no_trial(head, tiny_data, tmp_path):
    folder, log = RunFolder.at(str(tmp_path), "s"), tmp_path / "log"
    words = command(tiny_data, tmp_path, "--num-trials=6", *LONGER)
    with (
        node(f"--address={head.address}", "--num-cpus=1") as second,
        driving(words, log, on(head)) as driver,
    ):
        wait_for(lambda: sum(trial.epochs >= 2 for trial in read_trials(folder)) >= 2, driver)
        for process in [*family(second), second]:
            process.kill()
        assert driver.wait(timeout=400) == 0, log.read_text()
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 6, log.read_text()
    assert all(trial.epochs == 12 for trial in trials)


def test_submit_status_pull_evaluate(head, storage, tiny_data, tmp_path, capsys):
    submission = [
        BIN / "ray", "job", "submit", "--address", head.jobs, "--working-dir", ".",
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
            "--launch.num-workers=3", "--launch.cpus-per-worker=1", "--launch.wait-minutes=0.05",
        ],
        cwd=ROOT,
        env=on(head),
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
