"""Training over several nodes of a real Ray cluster: one is lost, one is added, one has notice."""

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from scribbleseg.runs import RunFolder
from tests.train.test_finetune import TINY, driving, wait_for
from tests.tune.test_sweep import family
from tests.tune.test_sweep_cluster import free_port, head, node, on

# The fixture is looked up by name.
__all__ = ["head"]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("head", [0], indirect=True)]

# Growing is considered every few seconds, so that a test need not wait for a minute.
COMMAND = """
import sys, train.launch
from scribbleseg.cli import exit_status
from train.finetune import main
train.launch.SECONDS_BETWEEN_RESIZES = 5.0
sys.exit(exit_status(lambda: main(sys.argv[1:])))
"""

DRAIN = """
import sys, time, ray
from ray.core.generated import autoscaler_pb2
ray.init(log_to_driver=False)
spot, = [n for n in ray.nodes() if n["Resources"].get("spot")]
client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
deadline = int((time.time() + float(sys.argv[1])) * 1000)
accepted, message = client.drain_node(spot["NodeID"], reason, "a test", deadline)
sys.exit(0 if accepted else message)
"""


@contextmanager
def training(head, data, storage, log, *arguments):
    """A run on two nodes or one, that would go on for hours, until the end of the block."""
    command = [
        sys.executable, "-c", COMMAND, "demo", f"--data.root={data}", f"--storage={storage}",
        "--name=a", *TINY, "--data.num-workers=0", "--train.epochs=100000",
        "--launch.num-workers=2", "--launch.min-workers=1", *arguments,
    ]  # fmt: skip
    with driving(command, log, on(head)) as driver:
        yield driver


@contextmanager
def worker_node(head, *arguments):
    """A node with room for one worker, until the end of the block."""
    before = nodes_with_room(head)
    with node(
        f"--address={head.address}", "--num-cpus=1", *arguments,
        f"--dashboard-agent-listen-port={free_port()}",
    ) as process:  # fmt: skip
        # Nodes of one machine that start at the same time take the same socket.
        wait_for(lambda: nodes_with_room(head) - before, process)
        yield process


def nodes_with_room(head):
    with urllib.request.urlopen(f"{head.jobs}/nodes?view=summary", timeout=20) as answer:
        raylets = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
    return {each["nodeId"] for each in raylets if each.get("resourcesTotal", {}).get("CPU")}


def num_workers(run):
    """How many workers the run was last started with; 0 before it was."""
    return (run.read_json("run.json") or {}).get("world_size", 0)


def num_epochs(run):
    return len(run.read_metrics())


def goes_on(run, driver):
    """Wait for more epochs than there are; each of them must be there once."""
    before = num_epochs(run)
    wait_for(lambda: num_epochs(run) >= before + 2, driver)
    epochs = [row["epoch"] for row in run.read_metrics()]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_is_added(head, tiny_data, tmp_path):
    run = RunFolder.at(str(tmp_path), "a")
    with (
        worker_node(head),
        worker_node(head) as second,
        training(head, tiny_data, tmp_path, tmp_path / "log") as driver,
    ):
        wait_for(lambda: num_workers(run) == 2 and num_epochs(run) >= 2, driver)
        assert "all_reduce" in run.read_metrics()[-1]
        first = run.read_metrics()[0]
        for process in [*family(second), second]:
            process.kill()
        wait_for(lambda: num_workers(run) == 1, driver)
        goes_on(run, driver)
        with worker_node(head):
            wait_for(lambda: num_workers(run) == 2, driver)
            goes_on(run, driver)
    # The run was never begun anew.
    assert run.read_metrics()[0] == first


def test_a_node_with_notice_is_left_with_nothing_lost_and_without_a_failure(
    head, tiny_data, tmp_path
):
    run = RunFolder.at(str(tmp_path), "a")
    arguments = ["--train.validate-every=100000", "--launch.max-failures=0"]
    with (
        worker_node(head),
        worker_node(head, '--resources={"spot": 1}') as spot,
        training(head, tiny_data, tmp_path, tmp_path / "log", *arguments) as driver,
    ):
        wait_for(lambda: num_workers(run) == 2 and num_epochs(run) >= 2, driver)
        # Nothing but the notice asks for a checkpoint before the tenth minute.
        assert run.last() is None
        subprocess.run([sys.executable, "-c", DRAIN, "25"], env=on(head), check=True)
        gone = time.monotonic() + 25
        wait_for(lambda: run.last() is not None, driver)
        assert num_workers(run) == 2
        saved = run.last()
        first = run.read_metrics()[0]
        wait_for(lambda: time.monotonic() > gone, driver)
        for process in [*family(spot), spot]:
            process.kill()
        wait_for(lambda: num_workers(run) == 1, driver)
        assert run.last() == saved > 1
        goes_on(run, driver)
    assert run.read_metrics()[0] == first
