"""Benchmarks in a row, in a form that takes minutes: each prints its table and writes it.

    python -m benchmarks                       # those of speed
    python -m benchmarks train_step growth     # these

The others want a benchmark's data set, trained networks or hours, and are run by themselves:
asha_replay, app_latency, choices, interaction, peers, probe_rise, robustness, scaling_table,
serving, weak_scaling. `python -m benchmarks.NAME --help` has the settings of each.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from scribbleseg.cli import exit_status
from scribbleseg.config import parse_arguments
from scribbleseg.errors import InputError

# What shortens each; full forms are the modules' own defaults.
SHORT: dict[str, list[str]] = {
    "train_step": ["--rounds", "4"],
    "dino_step": ["--rounds", "4", "--batch-size", "8"],
    "loading": ["--epochs", "2"],
    "ray_share": ["--rounds", "1", "--epochs", "2"],
    "sweep_overhead": ["--trials", "4"],
    "prediction": ["--rounds", "4"],
    "growth": ["--counts", "100", "1000", "--sides", "256", "512"],
}
ON_DATA = {"loading", "ray_share", "sweep_overhead"}
ON_DEVICE = {"train_step", "dino_step", "prediction"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which benchmarks, and where their tables go."""

    names: tyro.conf.Positional[tuple[str, ...]] = tuple(SHORT)
    """train_step, dino_step, loading, ray_share, sweep_overhead, prediction, growth."""
    root: str = "demo/data"
    """Folder of the data of those that load some (`scribbleseg data demo --out demo/data`)."""
    device: str | None = None
    """cuda, mps or cpu, for those that compute in their own process; None: the best there is."""
    out: Path = Path("runs/benchmarks")
    """Folder for the tables, NAME.md and NAME.json."""

    def __post_init__(self) -> None:
        """Check the names."""
        for name in self.names:
            if name not in SHORT:
                raise InputError(f"benchmark {name!r} is unknown; expected {', '.join(SHORT)}")


def main() -> None:
    """Run them, each in a process of its own."""
    request: Request = parse_arguments(Request, sys.argv[1:], prog="python -m benchmarks")
    request.out.mkdir(parents=True, exist_ok=True)
    for name in request.names:
        words = [*SHORT[name], "--out", str(request.out / name)]
        if name in ON_DATA:
            words += ["--root", request.root]
        if name in ON_DEVICE and request.device is not None:
            words += ["--device", request.device]
        sys.stdout.write(f"\n{name}\n\n")
        sys.stdout.flush()
        module = f"benchmarks.{name}"
        status = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    sys.exit(exit_status(main))
