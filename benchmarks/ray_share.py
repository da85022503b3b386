"""Ray's share: the same `fit`, carried by Ray Train, by `torchrun`, and by a plain loop.

Of two things: an epoch's time, and the time from a command's start to the end of its first step,
which is also measured for a Ray trainer that does nothing at all. Runs are measured in turn, so
that a machine whose speed drifts slows all alike; the plain loop exists for one worker only:

    python -m benchmarks.ray_share --root ../shared/data/scribble-voc
    python -m benchmarks.ray_share --root ../shared/data/scribble-voc --workers 2

One worker alone on a machine is not given to Ray's processes. With RAY_ADDRESS=local it is, and
with one core of two they have the other, as on a machine where not every core computes:

    RAY_ADDRESS=local python -m benchmarks.ray_share --root DATA --cores 1
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Measured, settings_of, tell, to_markdown
from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, override, parse_arguments, require, to_yaml
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.device import num_cores
from scribbleseg.runs import RunFolder

RAY, TORCHRUN, PLAIN, EMPTY = "Ray Train", "torchrun", "plain loop", "empty Ray trainer"
STEPPED = "stepped"
# Ray's processes outlive the run before, and would share the cores with the next.
SECONDS_OF_REST = 5.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    workers: int = 1
    """Processes that train together."""
    cores: int | None = None
    """CPU cores of each process; None: as many as there are for it."""
    rounds: int = 3
    """Runs of each kind, in turn."""
    epochs: int = 4
    """Epochs of each run; the first is not counted."""
    changes: tuple[str, ...] = field(default_factory=tuple)
    """Further settings, KEY=VALUE."""
    out: Path | None = None
    """File without suffix for the tables, .md and .json; None: print only."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        require(self.rounds >= 1, "rounds", self.rounds, "1 or more")
        require(
            self.epochs >= 2, "epochs", self.epochs, "2 or more, since the first is not counted"
        )


# Every script gets first the file that it makes when the first step is done.

# The command itself, on every rank of which each step is noted.
COMMAND = """
import sys
from pathlib import Path
import train.finetune
from scribbleseg.cli import exit_status
from train.command import finetune_rank, import_worker


def noted_rank(payload):
    import_worker(payload)
    from scribbleseg.loops import segment

    take_step = segment.train_step

    def step(*args, **kwargs):
        loss = take_step(*args, **kwargs)
        stepped.touch()
        return loss

    segment.train_step = step
    return finetune_rank(payload)


if __name__ == "__main__":
    stepped = Path(sys.argv[1])
    train.finetune.finetune_rank = noted_rank
    sys.exit(exit_status(lambda: train.finetune.main(sys.argv[2:])))
"""

# Started alone or by torchrun, with the settings' file, the run's folder and cores per process.
LOOP = """
import os
import sys
from pathlib import Path
import torch.distributed as dist
from scribbleseg.config import FinetuneConfig, from_yaml
from scribbleseg.device import autocast_dtype, pick_device, prepare_cpu
from scribbleseg.distributed import rank
from scribbleseg.loops.batches import open_data
from scribbleseg.loops.segment import fit
from scribbleseg.loops.state import init_state
from scribbleseg.loops.steps import EpochDone, SaveDue, StepDone
from scribbleseg.runs import RunFolder
from train.saving import Snapshot, write_checkpoint


def main():
    stepped = Path(sys.argv[1])
    config = from_yaml(FinetuneConfig(), Path(sys.argv[2]))
    run = RunFolder.open(sys.argv[3])
    workers = int(os.environ.get("WORLD_SIZE", 1))
    if workers > 1:
        dist.init_process_group()
    device = pick_device()
    if device.type == "cpu":
        prepare_cpu(int(sys.argv[4]))
    precision = autocast_dtype(config.train.precision, device)
    data, state = open_data(config), init_state(config, device, precision)
    for event in fit(state, data, config, device=device, precision=precision):
        match event:
            case StepDone():
                stepped.touch()
            case SaveDue() if rank() == 0:
                write_checkpoint(run, config, Snapshot.take(state, event.epoch))
            case EpochDone() if rank() == 0:
                run.write_metrics(state.progress.history)
            case _:
                pass
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
"""

# With the number of workers.
NOTHING = """
import sys
from pathlib import Path
import ray
import ray.train
import ray.train.torch

if __name__ == "__main__":
    begun = Path(sys.argv[1])

    def work():
        begun.touch()

    ray.init(address="local", log_to_driver=False)
    scaling = ray.train.ScalingConfig(num_workers=int(sys.argv[2]))
    ray.train.torch.TorchTrainer(work, scaling_config=scaling).fit()
"""


def command(kind: str, scratch: Path, share: Share) -> list[str]:
    """Return the command that trains by `scratch`/settings.yaml into `scratch`/runs/run."""
    workers = share.workers
    cores = share.cores or max(1, num_cores() // workers)
    script = scratch / "script.py"
    script.write_text({RAY: COMMAND, EMPTY: NOTHING}.get(kind, LOOP))
    settings, run = scratch / "settings.yaml", scratch / "runs" / "run"
    words: list[object] = [script, scratch / STEPPED]
    if kind == TORCHRUN:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", workers, *words]
    if kind == RAY:
        words += [settings, "--storage", run.parent, "--name", run.name]
        words += ["--launch.num-workers", workers, "--launch.cpus-per-worker", cores]
    elif kind == EMPTY:
        words += [workers]
    else:
        words += [settings, run, cores]
    return [sys.executable, *map(str, words)]


def train(kind: str, config: FinetuneConfig, share: Share) -> tuple[float, list[float]]:
    """Run a command to its end.

    Returns:
        Seconds from its start to the end of its first step, and those of every epoch but the first.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "settings.yaml").write_text(to_yaml(config))
        (scratch / "runs").mkdir()
        words = command(kind, scratch, share)
        time.sleep(SECONDS_OF_REST)
        with (scratch / "errors").open("wb") as errors:
            began = time.perf_counter()
            process = subprocess.Popen(
                words,
                env=os.environ | {"PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            while not (scratch / STEPPED).exists() and process.poll() is None:
                time.sleep(0.02)
            first = time.perf_counter() - began
            process.wait()
        if process.returncode:
            told = (scratch / "errors").read_text(errors="replace")
            sys.stderr.write(told)
            raise RuntimeError(f"{kind} failed, as told above: {' '.join(words)}")
        if kind == EMPTY:
            return first, []
        rows = RunFolder.at(str(scratch / "runs"), "run").read_metrics()
        return first, [float(row["seconds"]) for row in rows[1:]]


def main() -> None:
    """Measure and print."""
    share: Share = parse_arguments(Share, sys.argv[1:], prog="python -m benchmarks.ray_share")
    number = len(list_scenes(share.root, "train", need_masks=True))
    whole = override(
        FinetuneConfig(),
        {
            "data.root": str(Path(share.root).resolve()),
            "train.epochs": share.epochs,
            "train.validate_every": 1,
        }
        | settings_of(share.changes),
    )
    # As many images as a batch has: an epoch of one step, without validation.
    one_step = override(
        whole,
        {
            "data.fold": None,
            "data.share": (whole.train.batch_size + 0.5) / number,
            "train.epochs": 1,
        },
    )
    carriers = [RAY, TORCHRUN, PLAIN] if share.workers == 1 else [RAY, TORCHRUN]
    starts: dict[str, list[float]] = {kind: [] for kind in [*carriers, EMPTY]}
    epochs: dict[str, list[float]] = {kind: [] for kind in carriers}
    for _ in range(share.rounds):
        for kind in starts:
            starts[kind].append(train(kind, one_step, share)[0])
        for kind in epochs:
            epochs[kind] += train(kind, whole, share)[1]
    text = ""
    lines: list[Measured] = []
    for title, unit, times in (
        (f"an epoch, {share.workers} worker(s)", "epochs", epochs),
        (f"start to first step, {share.workers} worker(s)", "starts", starts),
    ):
        found = [
            Measured(
                name=kind,
                seconds=tuple(seconds),
                notes={"seconds": f"{sorted(seconds)[len(seconds) // 2]:.2f}"},
            )
            for kind, seconds in times.items()
        ]
        text += to_markdown(title, found, unit) + "\n"
        lines += found
    tell(text, lines, share.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
