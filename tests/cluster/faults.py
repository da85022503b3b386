"""What clusters do to training: each fault is done to a run at a given step of it.

Each function's first line says what is done. It returns once nothing more is to be done to the run.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.cluster import Cluster, Job
from tests.cluster.hosts import Host, wait_until
from tests.cluster.traced import Note, read_trace

PAUSE = 0.5
SECONDS_CUT = 20.0
SECONDS_OF_NOTICE = 30.0


@dataclass(kw_only=True)
class Run:
    """A traced run of two workers on the cluster."""

    cluster: Cluster
    name: str
    arguments: tuple[str, ...]
    """Of `train.finetune`, but for the name."""
    steps_per_epoch: int
    job: Job = field(init=False)

    def __post_init__(self) -> None:
        """Submit it."""
        self.trace.mkdir(parents=True)
        self.pause(PAUSE)
        self.submit()

    @property
    def trace(self) -> Path:
        """Folder of its notes."""
        return self.cluster.room.folder / "traces" / self.name

    def submit(self) -> None:
        """Submit it, or the same command again."""
        self.job = self.cluster.submit(
            self.name,
            *("python", "-m", "tests.cluster.traced", *self.arguments, "--name", self.name),
            variables={"TRACE": str(self.trace)},
        )

    def pause(self, seconds: float) -> None:
        """Slow each step down by so much, from now on."""
        partial = self.trace / "partial"
        partial.write_text(str(seconds))
        partial.replace(self.trace / "pause")

    def notes(self, rank: int) -> list[Note]:
        """Return what a rank has written down (-1: the driver), in the order of time."""
        return [note for note in read_trace(self.trace) if note.rank == rank]

    def last(self, rank: int) -> Note:
        """Return the last note of a rank."""
        return self.notes(rank)[-1]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition while the run goes on.

        Raises:
            RuntimeError: the run has ended.
            TimeoutError: it did not come true.
        """

        def holds() -> bool:
            if condition():
                return True
            if not self.job.is_running():
                raise RuntimeError(f"{self.name} ended before {what}\n{self.job.said()[-4000:]}")
            return False

        wait_until(holds, what, seconds=300)

    def wait_for_step(self, step: int) -> None:
        """Wait until rank 0 has taken a step."""
        self.wait_for(lambda: any(n.step >= step for n in self.notes(0)), f"step {step}")

    def wait_for_new_step(self) -> None:
        """Wait until a step is taken after now."""
        now = time.time()
        self.wait_for(lambda: self.last(0).step and self.last(0).time > now, "a further step")

    def host(self, rank: int) -> Host:
        """Return where a rank runs (-1: the driver)."""
        return self.cluster.room.hosts[self.last(rank).host]

    def kill(self, rank: int) -> None:
        """Kill a rank's process, or the driver's (-1), at once."""
        self.host(rank).run("kill", "-9", str(self.last(rank).pid))

    def submit_again(self) -> None:
        """Give the same command again once the job that was is no more."""
        wait_until(lambda: not self.job.is_running(), f"the end of {self.name}'s job", seconds=120)
        self.submit()


def kill_worker(run: Run) -> None:
    """`kill -9` of a worker process."""
    run.kill(1)


def kill_node(run: Run) -> None:
    """A whole node is turned off."""
    run.cluster.room.kill(run.host(1))


def kill_driver(run: Run) -> None:
    """`kill -9` of the driver; the same command again."""
    run.kill(-1)
    run.submit_again()


def cut_link(run: Run) -> None:
    """No packet passes between the two nodes for 20 s."""
    room, hosts = run.cluster.room, (run.host(0), run.host(1))
    room.cut(*hosts)
    time.sleep(SECONDS_CUT)
    room.mend(*hosts)


def unplug_node(run: Run) -> None:
    """A node loses its network until training goes on elsewhere."""
    host = run.host(1)
    run.cluster.room.unplug(host)
    try:
        run.wait_for_new_step()
    finally:
        run.cluster.room.plug(host)


def fill_disk(run: Run) -> None:
    """The storage is full while the next checkpoint is written."""
    filler = run.cluster.room.outside(run.cluster.room.shared) / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        epoch = run.last(0).step // run.steps_per_epoch + 1
        run.wait_for_step(epoch * run.steps_per_epoch + 1)
    finally:
        filler.unlink()


def preempt_node(run: Run) -> None:
    """A spot node is taken back, with 30 s of notice."""
    host, head = run.host(1), run.cluster.head
    node = run.cluster.nodes()[host.address]
    drain = (
        '. "$HOME/scribbleseg/venv/bin/activate"; RAY_AUTH_MODE=token ray drain-node '
        f"--address {head.address}:6379 --node-id {node} --reason DRAIN_NODE_REASON_PREEMPTION "
        f"--reason-message spot --deadline-remaining-seconds {SECONDS_OF_NOTICE:.0f}"
    )
    # Else the run would end before the node does.
    run.pause(SECONDS_OF_NOTICE / 8)
    noticed = time.monotonic()
    head.run("sh", "-c", drain)
    time.sleep(noticed + SECONDS_OF_NOTICE - time.monotonic())
    run.cluster.room.kill(host)
    run.pause(PAUSE)


def lose_head(run: Run) -> None:
    """The head's machine is turned off; `ray up` and the same command again."""
    cluster = run.cluster
    cluster.room.kill(cluster.head)
    cluster.room.boot(cluster.head.name)
    cluster.up()
    run.submit_again()


def add_node(run: Run) -> None:
    """A further node joins while two workers train, and there may be three."""
    # Ray looks for new nodes once a minute, and the run must not end before.
    run.pause(15.0)
    run.cluster.restore()
    run.wait_for(lambda: run.notes(2), "a third worker")
    run.pause(PAUSE)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and what the run that meets it is given besides."""

    inject: Callable[[Run], None]
    arguments: tuple[str, ...] = ()
    same_workers: bool = True
    """Whether as many workers end the run as began it: then its weights must not differ."""

    @property
    def text(self) -> str:
        """What is done, in words."""
        return (self.inject.__doc__ or "").strip().rstrip(".")


GROWING = ("--launch.num-workers", "3", "--launch.min-workers", "2")
FAULTS = {
    # First, because one node is off until then.
    "added": Fault(inject=add_node, arguments=GROWING, same_workers=False),
    "worker": Fault(inject=kill_worker),
    "node": Fault(inject=kill_node),
    "driver": Fault(inject=kill_driver),
    "link": Fault(inject=cut_link),
    "network": Fault(inject=unplug_node),
    "disk": Fault(inject=fill_disk),
    "preempted": Fault(inject=preempt_node),
    "head": Fault(inject=lose_head),
}
