"""Ray's share of an epoch: the same `fit`, iterated by a Ray Train worker and by a plain loop.

Epochs of the two are measured in turn (A B A B), in one run of this command, so that a machine
whose speed drifts slows both alike:

    python -m benchmarks.ray_share --root ../shared/data/scribble-voc
"""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from scribbleseg.config import FinetuneConfig, override, parse_arguments, to_yaml
from scribbleseg.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Share:
    """What is measured."""

    root: str = "demo/data"
    """Folder of the data."""
    rounds: int = 3
    """Runs of each kind, in turn."""
    epochs: int = 4
    """Epochs of each run; the first is not counted."""
    changes: tuple[str, ...] = field(default_factory=tuple)
    """Further settings, KEY=VALUE."""


PLAIN = """
import os
import sys
from pathlib import Path
from scribbleseg.config import FinetuneConfig, from_yaml
from scribbleseg.device import autocast_dtype, pick_device, prepare_cpu
from scribbleseg.loops.batches import open_data
from scribbleseg.loops.segment import fit
from scribbleseg.loops.state import init_state
from scribbleseg.loops.steps import EpochDone, SaveDue
from scribbleseg.runs import RunFolder
from train.saving import Snapshot, write_checkpoint

config = from_yaml(FinetuneConfig(), Path(sys.argv[1]))
run = RunFolder.open(sys.argv[2])
device = pick_device()
if device.type == "cpu":
    prepare_cpu(os.cpu_count())
precision = autocast_dtype(config.train.precision, device)
data, state = open_data(config), init_state(config, device, precision)
for event in fit(state, data, config, device=device, precision=precision):
    match event:
        case SaveDue():
            write_checkpoint(run, config, Snapshot.take(state, event.epoch))
        case EpochDone():
            run.write_metrics(state.progress.history)
"""


def main() -> None:
    """Measure and print."""
    share: Share = parse_arguments(Share, sys.argv[1:], prog="python -m benchmarks.ray_share")
    config = override(
        FinetuneConfig(),
        {
            "data.root": str(Path(share.root).resolve()),
            "train.epochs": share.epochs,
            "train.validate_every": 1,
        }
        | dict(change.split("=", 1) for change in share.changes),
    )
    times: dict[str, list[float]] = {"ray": [], "plain": []}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "settings.yaml"
        settings.write_text(to_yaml(config))
        for number in range(share.rounds):
            for kind in times:
                name = f"{kind}-{number}"
                if kind == "ray":
                    command = ["-m", "train.finetune", settings, "--storage", scratch]
                    command += ["--name", name]
                else:
                    command = ["-c", PLAIN, settings, Path(scratch) / name]
                subprocess.run(
                    [sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=None
                )
                rows = RunFolder.at(scratch, name).read_metrics()
                times[kind] += [row["seconds"] for row in rows[1:]]
    ray, plain = (statistics.median(times[kind]) for kind in ("ray", "plain"))
    ratios = [a / b for a, b in zip(times["ray"], times["plain"], strict=True)]
    sys.stdout.write(
        "| epoch, seconds | median | min | max |\n| --- | --- | --- | --- |\n"
        f"| Ray Train | {ray:.2f} | {min(times['ray']):.2f} | {max(times['ray']):.2f} |\n"
        f"| plain loop | {plain:.2f} | {min(times['plain']):.2f} | {max(times['plain']):.2f} |\n"
        f"\nratio of medians {ray / plain:.3f}; pair by pair median "
        f"{statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}\n"
    )


if __name__ == "__main__":
    main()
