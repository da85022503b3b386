"""From a training function to a finished Ray Train job: cluster, resources, exit status.

The facts of a cluster live here and nowhere in `scribbleseg`. Ray is imported where it is used:
`--help` answers at once, and loader processes, which import the main module, start light.
"""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Annotated, Any, Self, TypeVar

import torch
import tyro
from pyarrow.fs import FileType

from scribbleseg.config import require
from scribbleseg.device import num_cores
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.runs import RunFolder
from train.places import absolute, marked
from train.progress import Board, RemoteBoard, Watcher

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """On how much hardware a job runs; it never changes what the job computes."""

    num_workers: int = 1
    """Worker processes (1 or more); in training, each is one rank of DDP. A single one without a
    cluster is this process.
    """
    min_workers: int | None = None
    """With how few of them a job starts, and goes on when nodes are lost, until there is room for
    more again (1 or more); None: with all or not at all. Batch and learning rate stay as they are.
    """
    gpus_per_worker: int | None = None
    """GPUs of each worker; None: one where the cluster has any, else none. To be set for a cluster
    that has no workers yet.
    """
    cpus_per_worker: int | None = None
    """CPU cores of each worker, loader processes included; None: as many as fit. To be set for a
    cluster that has to grow first.
    """
    address: str | None = None
    """Address of a running Ray cluster; None: $RAY_ADDRESS, else Ray is started on this machine."""
    wait_minutes: float = 15.0
    """Minutes to wait for a cluster to grow until it has room (0 or more)."""
    max_failures: int = 3
    """How often work that was lost with its worker is tried again before it counts as failed."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_workers >= 1, "launch.num_workers", self.num_workers, "1 or more")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            "launch.min_workers",
            self.min_workers,
            f"1 to launch.num_workers, {self.num_workers}",
        )
        require(
            self.gpus_per_worker is None or self.gpus_per_worker >= 0,
            "launch.gpus_per_worker",
            self.gpus_per_worker,
            "0 or more",
        )
        require(
            self.cpus_per_worker is None or self.cpus_per_worker >= 1,
            "launch.cpus_per_worker",
            self.cpus_per_worker,
            "1 or more",
        )
        for key in ("wait_minutes", "max_failures"):
            require(getattr(self, key) >= 0, f"launch.{key}", getattr(self, key), "0 or more")

    @property
    def least_workers(self) -> int:
        """Workers without which the job does not run."""
        return self.min_workers or self.num_workers

    @property
    def where(self) -> str | None:
        """Address of the cluster; None, and an empty $RAY_ADDRESS, stand for this machine."""
        return self.address or os.environ.get("RAY_ADDRESS") or None

    @property
    def is_local(self) -> bool:
        """Whether Ray will be started on this machine, for this job alone."""
        return self.where is None

    @property
    def is_here(self) -> bool:
        """Whether all of Ray will be on this machine; "local" asks for that as of a cluster."""
        return self.where in (None, "local")

    def named(self) -> Self:
        """Return the same wishes with the cluster's address written down.

        Processes of the cluster, to which they travel, do not have the command's environment.
        """
        return replace(self, address=self.where)

    @property
    def is_alone(self) -> bool:
        """Whether the work is done in this process: there is nothing for Ray's own ones to do.

        On 2 cores those take a tenth of the time of training, and half a minute to start.
        """
        return self.is_local and self.num_workers == 1


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(ClusterConfig):
    """Where and on how much hardware a training job runs."""

    storage: Annotated[str, tyro.conf.arg(aliases=["--storage"])] = "runs"
    """Folder or URI (s3://, gs://) under which the run's folder is written."""


# Environment variables that Ray reads when it starts; the user's own are never overwritten.
CLUSTER = {
    # Ray polls its workers this often; at its default of 2 s every report costs 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces a change of this default at every start; this is the new one.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Where the number of workers may change, Ray need not wait for as long as by default for room that
# a lost node has taken with it: it then tries with fewer.
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
# Growing restarts the workers from the last checkpoint, so it is not done for every node at once.
SECONDS_BETWEEN_RESIZES = 60.0
# On the only machine, Ray's own processes take time from training: what serves a cluster is off.
ALONE = {
    # Workers compute in a thread of their own. By the time that `prepare_cpu` speaks to glibc, it
    # has memory apart from the rest, which goes back to the kernel at every step. (A runtime
    # environment would reach the workers of any cluster, and start them six seconds later.)
    "MALLOC_ARENA_MAX": "1",
    # Ray's default of 15 starves training whose threads wait for one another on a busy machine.
    "RAY_worker_niceness": "0",
    # Nobody takes this machine back with notice.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # No Prometheus reads the metrics that every process would gather.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "10000",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker gets."""

    cpus: int
    gpus: int


def start_ray(launch: ClusterConfig) -> None:
    """Connect to the cluster, or start Ray on this machine; the settings are those of ray.md."""
    import ray
    from ray.exceptions import AuthenticationError

    settings = CLUSTER | (ALONE if launch.is_local else {})
    if launch.min_workers is not None:
        settings |= ELASTIC
    # Also where Ray runs already: a trial's process on a cluster has nothing of the command's.
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    # Left to itself, Ray would join whatever cluster was last started on this machine, and wait for
    # minutes for one that is long gone.
    address = launch.where or "local"
    if launch.is_here:
        from train.loopback import stay_on_loopback

        stay_on_loopback()
    try:
        ray.init(
            address=address,
            num_cpus=num_cores() if launch.is_here else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Nobody looks at a cluster that lasts as long as one command.
            include_dashboard=False if launch.is_local else None,
        )
    # What Ray says can have several lines; the first has the reason.
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"launch.address is {launch.address!r} (RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}): "
            f"no Ray cluster answers there ({_first_line(error)}); start one, or leave the address "
            "out"
        ) from None
    except AuthenticationError as error:
        raise InputError(
            f"RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE')}, and Ray finds no token that this "
            f"cluster takes ({_first_line(error)}); `ray get-auth-token --generate` makes one, on "
            "every machine the same"
        ) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def call_remotely(
    function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], *, cpus: float = 1
) -> list[T]:
    """Return what a function makes of each tuple of arguments, on workers of the cluster.

    Raises:
        InputError: the function raised it, in its own words.
    """
    import ray
    from ray.exceptions import RayTaskError

    task: Any = ray.remote(function).options(num_cpus=cpus)
    try:
        return ray.get([task.remote(*each) for each in arguments])
    except RayTaskError as error:
        # Ray's own text is a traceback.
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def living_nodes() -> list[tuple[int, int]]:
    """Return the (CPUs, GPUs) of each living node of the cluster that is connected."""
    import ray

    return [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]


def plan_resources(
    launch: ClusterConfig, nodes: Sequence[tuple[int, int]], *, can_grow: bool
) -> Resources:
    """Return what each worker gets, as much CPU as fits.

    Args:
        launch: Wishes.
        nodes: (CPUs, GPUs) of each living node.
        can_grow: Whether an autoscaler may add nodes, so that too little now is no error.

    Raises:
        InputError: the workers can never be placed; the message has the numbers. Or none fits now,
            and the wishes leave open what is to come.
    """
    gpus = launch.gpus_per_worker
    if gpus is None:
        gpus = int(any(node_gpus > 0 for _, node_gpus in nodes))

    most = launch.cpus_per_worker or max((cpus for cpus, _ in nodes), default=1)
    least = launch.cpus_per_worker or 1
    for num_workers in (launch.num_workers, launch.least_workers):
        for cpus in range(most, least - 1, -1):
            if num_places(nodes, Resources(cpus=cpus, gpus=gpus)) >= num_workers:
                return Resources(cpus=cpus, gpus=gpus)
    if can_grow:
        require_named(launch, nodes)
        return Resources(cpus=least, gpus=gpus)
    key = "num_workers" if launch.min_workers is None else "min_workers"
    raise InputError(
        f"launch.{key} is {launch.least_workers}, with {least} CPU and {gpus} GPU each; this "
        f"cluster has {sum(c for c, _ in nodes)} CPUs and {sum(g for _, g in nodes)} GPUs on "
        f"{len(nodes)} node(s), room for {num_places(nodes, Resources(cpus=least, gpus=gpus))}; "
        "ask for fewer"
    )


def require_named(launch: ClusterConfig, nodes: Sequence[tuple[int, int]]) -> None:
    """See that what a worker gets is said, where the nodes that it will run on are not there yet.

    What fits best cannot be told then, and a guess would be one core of a machine with a GPU.

    Raises:
        InputError: the settings to add.
    """
    unsaid = [] if launch.cpus_per_worker else ["--launch.cpus-per-worker"]
    if launch.gpus_per_worker is None and not any(cpus for cpus, _ in nodes):
        unsaid.append("--launch.gpus-per-worker")
    if unsaid:
        raise InputError(
            f"the cluster as it is ({sum(c for c, _ in nodes)} CPUs and "
            f"{sum(g for _, g in nodes)} GPUs on {len(nodes)} node(s)) has no room for "
            f"{launch.least_workers} worker(s), and what the nodes to come will have cannot be "
            f"known; say what each worker gets: {' and '.join(unsaid)}"
        )


def num_places(nodes: Sequence[tuple[int, int]], worker: Resources) -> int:
    """Return how many such workers nodes of these (CPUs, GPUs) have room for."""
    return sum(
        min(cpus // worker.cpus, gpus // worker.gpus if worker.gpus else cpus)
        for cpus, gpus in nodes
    )


def wait_for_room(launch: ClusterConfig, resources: Resources) -> None:
    """Ask the cluster to grow until the workers fit, and wait for it.

    Nobody can ask a cluster whether it will ever grow, so the waiting has an end.

    Raises:
        InputError: there was no room in time; the message has the numbers.
    """
    import ray.autoscaler.sdk

    def room() -> int:
        return num_places(living_nodes(), resources)

    def ask(bundles: list[dict[str, int]]) -> None:
        ray.autoscaler.sdk.request_resources(bundles=bundles)

    if room() >= launch.least_workers:
        if not launch.is_local:
            # A job that was killed while it waited could not take back its wish.
            ask([])
        return
    wish = (
        f"{launch.least_workers} worker(s) with {resources.cpus} CPU and {resources.gpus} GPU each"
    )
    sys.stderr.write(f"no room yet for {wish}: waiting for the cluster to grow\n")
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    deadline = time.monotonic() + 60 * launch.wait_minutes
    try:
        while room() < launch.least_workers:
            # Again with every look: a cluster knows one wish alone, the last that any job had.
            ask([bundle] * launch.least_workers)
            if time.monotonic() > deadline:
                nodes = living_nodes()
                raise InputError(
                    f"{wish} found no room within {launch.wait_minutes:g} minutes: the cluster has "
                    f"{sum(c for c, _ in nodes)} CPUs and {sum(g for _, g in nodes)} GPUs on "
                    f"{len(nodes)} node(s); ask for less, or raise --launch.wait-minutes"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        # The wish outlives the job, and so would the nodes that come for it. With room, the job's
        # own demand keeps them from here on.
        ask([])


@contextmanager
def uncollected() -> Generator[None]:
    """Collect nothing within the block, and never what came of it: for imports, which stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def launch_job(
    worker: Callable[[dict[str, Any]], dict[str, str]],
    payload: dict[str, Any],
    launch: LaunchConfig,
    run: RunFolder,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `worker` on every rank with `payload` and show its progress until it has ended.

    Args:
        worker: Returns {} when done, or its last words under "input_error" or "diverged": a fault
            that a restart cannot mend is returned and not raised, so that Ray does not retry it.
        payload: Plain values; "board", "cpus", "gpus" and "mark" are added to it.
        launch: Hardware and storage.
        run: The folder of the run, under the launch's storage.
        callbacks: Ray Train's, which hear of every report.

    Raises:
        InputError: what the workers found wrong with the input, or a storage that cannot be written
            or is not theirs.
        DivergedError: the loss is no longer a number.
        RuntimeError: the job failed more often than `launch.max_failures`.
    """
    if not launch.is_alone:
        # Ray waits for its own processes to start: time to import what comes next.
        with uncollected(), ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(import_module, "ray.train.torch")
            start_ray(launch)
    import ray
    import ray.train
    import ray.train.torch

    from train.interface import InterfaceConfig
    from train.loopback import LoopbackConfig

    # Ray tells of every report; what a person needs is on the board.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if launch.is_alone:
        resources = plan_resources(launch, [this_machine()], can_grow=False)
        board = Board()
        # Ray Train's local mode: the same function and reports, in this process.
        scaling = ray.train.ScalingConfig(num_workers=0, use_gpu=resources.gpus > 0)
    else:
        resources = plan_resources(launch, living_nodes(), can_grow=not launch.is_local)
        wait_for_room(launch, resources)
        board = RemoteBoard()
        is_elastic = launch.least_workers < launch.num_workers
        scaling = ray.train.ScalingConfig(
            num_workers=(launch.least_workers, launch.num_workers)
            if is_elastic
            else launch.num_workers,
            elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus}
            | ({"GPU": resources.gpus} if resources.gpus else {}),
            # A node that is lost then takes as few workers with it as can be.
            placement_strategy="PACK" if launch.is_local else "SPREAD",
        )
        forget_ray_state(run)
    with marked(run) as mark, Watcher(board):
        trainer = ray.train.torch.TorchTrainer(
            worker,
            train_loop_config=payload
            | {"board": board, "cpus": resources.cpus, "gpus": resources.gpus, "mark": mark},
            torch_config=LoopbackConfig() if launch.is_here else InterfaceConfig(),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=run.name,
                storage_path=absolute(launch.storage),
                failure_config=ray.train.FailureConfig(max_failures=launch.max_failures),
                callbacks=list(callbacks),
            ),
        )
        try:
            outcome: dict[str, str] = trainer.fit().return_value or {}
        except ray.train.TrainingFailedError as error:
            raise RuntimeError(_last_words(error)) from error
        except SystemExit:
            # So Ray answers Ctrl-C, once its workers have stopped.
            raise KeyboardInterrupt from None
    if "input_error" in outcome:
        raise InputError(outcome["input_error"])
    if "diverged" in outcome:
        raise DivergedError(outcome["diverged"])


def this_machine() -> tuple[int, int]:
    """Return the CPU cores that this process may use, and the GPUs."""
    return num_cores(), torch.cuda.device_count()


def forget_ray_state(run: RunFolder) -> None:
    """Remove Ray's own list of the run's checkpoints, which a restarted driver would read.

    It names checkpoints that have since been pruned, and Ray refuses to start without them. The
    run resumes from what its folder holds, not from that list.
    """
    snapshot = f"{run.path}/checkpoint_manager_snapshot.json"
    if run.filesystem.get_file_info(snapshot).type != FileType.NotFound:
        run.filesystem.delete_file(snapshot)


def _last_words(error: Exception) -> str:
    """Return the first worker's own error in one line."""
    failures = getattr(error, "worker_failures", {})
    first: object = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(first).__name__}"
