"""Weak scaling from 1 to 2 nodes of one core each: Ray Train here, `torchrun` with plain DDP there.

Each node is a Ray node of its own, pinned to one core with all its processes; `torchrun` has the
same core for each of its ranks. Every worker has the same share of a batch whatever their number,
so the ideal is the same time per step. The plain loop is what a reader of PyTorch's DDP tutorial
writes, on the same model, data, precision and threads. Runs are measured in turn:

    python -m benchmarks.weak_scaling --root ../shared/data/scribble-voc
"""

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import settings_of
from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, override, parse_arguments, to_yaml
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.device import num_cores
from scribbleseg.runs import RunFolder

BIN = Path(sys.executable).parent
CARRIERS = ("ray", "torchrun")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    share: int = 4
    """Images of each worker's part of a batch."""
    epochs: int = 3
    """Epochs of each run; the first is not counted."""
    rounds: int = 3
    """Runs of each kind, in turn."""
    changes: tuple[str, ...] = ("data.long_side=160", "data.crop_size=128", "model.width=16")
    """Further settings, KEY=VALUE."""


PLAIN = """
import sys
import time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from scribbleseg.config import FinetuneConfig, from_yaml
from scribbleseg.datasets.transforms import normalise
from scribbleseg.device import autocast_dtype, prepare_cpu
from scribbleseg.loops.batches import open_data
from scribbleseg.losses.segmentation import segmentation_loss
from scribbleseg.models import build_model


def main():
    config = from_yaml(FinetuneConfig(), Path(sys.argv[1]))
    dist.init_process_group("gloo")
    prepare_cpu(1)
    device = torch.device("cpu")
    precision = autocast_dtype(config.train.precision, device)
    torch.manual_seed(0)
    model = build_model(config.model).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = open_data(config)
    plan = data.plan(config)
    began = time.perf_counter()
    for number, batch in enumerate(data.loader(config, 0, device), start=1):
        image = normalise(batch["image"]).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            output = model(image, batch["strokes"].float() / 255)
        loss = segmentation_loss(output.logits, output.side_logits, batch["mask"], config.loss)
        loss.backward()
        optimizer.step()
        if number % plan.steps_per_epoch == 0:
            if dist.get_rank() == 0:
                print(time.perf_counter() - began, flush=True)
            began = time.perf_counter()


if __name__ == "__main__":
    main()
"""


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: int, command: Sequence[str | Path]) -> list[str]:
    """Return the command, which with all its children stays on one core."""
    return ["taskset", "--cpu-list", str(core), *map(str, command)]


@contextmanager
def cluster(num_nodes: int) -> Generator[str]:
    """Start Ray nodes of one core each; yield the address of the first."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for core in range(num_nodes):
            place = head if core == 0 else [f"--address={address}"]
            common = ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--block"]
            command = pinned(core, [BIN / "ray", "start", *place, *common])
            quiet = subprocess.DEVNULL
            nodes.append(subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(timeout=60)


def with_ray(settings: Path, num_workers: int, scratch: Path) -> list[float]:
    """Return the seconds of every epoch of a run on Ray Train."""
    with cluster(num_workers) as address:
        command = [sys.executable, "-m", "train.finetune", settings, "--storage", scratch]
        command += ["--name", settings.stem, "--fresh", "--launch.address", address]
        command += ["--launch.num-workers", str(num_workers), "--launch.cpus-per-worker", "1"]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        quiet = subprocess.DEVNULL
        subprocess.run(list(map(str, command)), check=True, env=environment, stdout=quiet)
    [name] = [folder.name for folder in scratch.iterdir() if folder.is_dir()]
    return [float(row["seconds"]) for row in RunFolder.at(str(scratch), name).read_metrics()]


def with_torchrun(settings: Path, num_workers: int, scratch: Path) -> list[float]:
    """Return the seconds of every epoch of the plain loop."""
    script = scratch / "plain.py"
    script.write_text(PLAIN)
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            pinned(
                core,
                [
                    *(BIN / "torchrun", f"--nnodes={num_workers}", "--nproc-per-node=1"),
                    *(*where, f"--node-rank={core}", script, settings),
                ],
            ),
            env=environment | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for core in range(num_workers)
    ]
    lines = "".join(rank.communicate()[0] for rank in ranks).split()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("the plain loop failed")
    return [float(line) for line in lines]


def main() -> None:
    """Measure and print."""
    bench: Scaling = parse_arguments(
        Scaling, sys.argv[1:], prog="python -m benchmarks.weak_scaling"
    )
    kinds = [(carrier, workers) for workers in (1, 2) for carrier in CARRIERS]
    times: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    carry = {"ray": with_ray, "torchrun": with_torchrun}
    num_images = len(list_scenes(bench.root, "train", need_masks=True))
    for _ in range(bench.rounds):
        for carrier, workers in kinds:
            with tempfile.TemporaryDirectory() as scratch:
                settings = Path(scratch) / "settings.yaml"
                settings.write_text(to_yaml(settle(bench, workers)))
                runs = Path(scratch) / "runs"
                runs.mkdir()
                seconds = carry[carrier](settings, workers, runs)
            times[carrier, workers] += [
                each / (num_images // (bench.share * workers)) for each in seconds[1:]
            ]
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    lines = [
        f"{platform.machine()}, {num_cores()} cores; {bench.share} images per worker and step; "
        f"{', '.join(bench.changes)}",
        "",
        "| carrier | nodes | s per step, median | min | max | images/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {carrier} | {workers} | {medians[carrier, workers]:.3f} | {min(values):.3f} | "
            f"{max(values):.3f} | {bench.share * workers / medians[carrier, workers]:.1f} |"
            for (carrier, workers), values in times.items()
        ),
        "",
        *(
            f"{carrier}: efficiency from 1 to 2 nodes "
            f"{medians[carrier, 1] / medians[carrier, 2]:.3f}"
            for carrier in CARRIERS
        ),
        f"2 nodes, images per second of Ray Train over torchrun: "
        f"{medians['torchrun', 2] / medians['ray', 2]:.3f}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def settle(bench: Scaling, workers: int) -> FinetuneConfig:
    """Return the settings of a run, which trains on all images and saves once, at its end."""
    return override(
        FinetuneConfig(),
        {
            "data.root": str(Path(bench.root).resolve()),
            "data.fold": None,
            "train.batch_size": bench.share * workers,
            "train.epochs": bench.epochs,
            "train.validate_every": bench.epochs,
        }
        | settings_of(bench.changes),
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
