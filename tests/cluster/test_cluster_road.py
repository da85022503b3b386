"""The road on a cluster in short: up, training over two nodes, faults, pull, evaluation, down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scribbleseg.manifest import verify
from tests.cluster.cluster import open_cluster
from tests.cluster.hosts import BIN, ROOT, missing, open_room, wait_until
from tests.cluster.proof import disturb, prepare, start

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def hosts_can_be_made():
    reason = missing()
    if reason is not None:
        pytest.skip(f"hosts cannot be made here: {reason}")


def test_two_nodes_two_faults_and_the_best_checkpoint_at_home():
    with open_cluster(["one"], head_cpus=1) as cluster:
        cluster.up()
        arguments = prepare(cluster)
        start(cluster, "undisturbed", arguments).job.expect()
        for fault in ("worker", "driver"):
            outcome = disturb(cluster, fault, arguments)
            assert outcome.survived, outcome
        best, data = cluster.room.folder / "best", cluster.room.folder / "data"
        run = cluster.room.shared / "runs" / "driver"
        cluster.desk.run(BIN / "scribbleseg", "pull", run, "--out", best)
        assert verify(best) == []
        said = cluster.desk.run(
            *(BIN / "scribbleseg", "evaluate", "--checkpoint", best, "--data", data),
            *("--split", "test", "--out", cluster.room.folder / "evaluation"),
        )
        assert "mIoU" in said
        cluster.down()
        assert "raylet" not in cluster.head.run("ps", "ax")


def test_hosts_reach_each_other_until_cut_and_are_gone_with_the_room():
    def reached(host, other):
        probe = f"exec 3<>/dev/tcp/{other.address}/22"
        return "no" not in host.run("sh", "-c", f"timeout 2 bash -c '{probe}' || echo no")

    with open_room(["desk", "one", "two"]) as room:
        desk, one, two = (room.boot(name) for name in ("desk", "one", "two"))
        wait_until(lambda: reached(one, two) and reached(two, one), "sshd of both", seconds=30)
        room.cut(one, two)
        assert not reached(one, two) and reached(desk, one) and reached(desk, two)
        room.mend(one, two)
        assert reached(one, two)
        room.unplug(one)
        assert not reached(desk, one)
        room.plug(one)
        assert reached(desk, one)
        room.kill(two)
        assert not reached(desk, two)
        again = room.boot("two")
        wait_until(lambda: reached(desk, again), "two's sshd", seconds=30)
    assert not room.folder.exists() and not Path(f"/proc/{room.pid}").exists()


def test_a_killed_python_leaves_nothing_of_a_room():
    code = (
        "import os; from tests.cluster.hosts import open_room\n"
        "with open_room(['desk']) as room:\n"
        "    room.boot('desk'); print(room.folder, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    folder = Path(done.stdout.strip())
    wait_until(lambda: not folder.exists(), "the end of the room", seconds=30)
    assert str(folder) not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
