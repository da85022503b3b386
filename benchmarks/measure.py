"""What the benchmarks share: rounds in turn, peak memory, and tables as Markdown and JSON."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scribbleseg.config import require
from scribbleseg.datasets.scenes import ScenePaths
from scribbleseg.device import find_device, num_cores, pick_device, prepare_cpu
from scribbleseg.evaluate import list_scored
from scribbleseg.manifest import write_bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of a table."""

    name: str
    """What was measured."""
    seconds: tuple[float, ...]
    """Of every round that counts, in order."""
    items: int = 1
    """Images, or whatever is counted, in a round."""
    peak_mb: float | None = None
    """Most memory of tensors beyond what stood before the first round, in 10^6 bytes."""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further figures, by column."""

    @property
    def rates(self) -> list[float]:
        """Items per second, round by round."""
        return [self.items / seconds for seconds in self.seconds]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Which images with masks a benchmark scores: fields that several have."""

    root: str = "demo/data"
    """Folder of the data."""
    split: str = "train"
    """Split, with masks."""
    fold: int | None = None
    """Only this fold of the split; None: all of it."""
    num_folds: int = 5
    """Folds the split is divided into."""

    @property
    def part(self) -> str:
        """Name of the images."""
        return self.split if self.fold is None else f"{self.split}, fold {self.fold}"

    def paths(self) -> list[ScenePaths]:
        """Return the images' files."""
        return list_scored(self.root, self.split, fold=self.fold, num_folds=self.num_folds)


def settings_of(changes: Sequence[str]) -> dict[str, str]:
    """Return settings that were given as KEY=VALUE.

    Raises:
        InputError: one is given otherwise.
    """
    for change in changes:
        require("=" in change, "changes", change, "KEY=VALUE, such as model.width=8")
    pairs = (change.partition("=") for change in changes)
    return {key: value for key, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Where a benchmark computes: a field that several have."""

    device: str | None = None
    """cuda, mps or cpu; None: the first of these that the machine has."""

    def prepare(self) -> torch.device:
        """Return the device, ready to compute on as it is in our runs, which serves all alike."""
        device = find_device(self.device) if self.device else pick_device()
        if device.type == "cpu":
            prepare_cpu(num_cores())
        return device


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 2
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of every kind of work, measured in turn (A B A B).

    A machine whose speed drifts slows all alike; the first rounds do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + warm_up):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - began)
    return {name: tuple(values) for name, values in times.items()}


def peak_mb(work: Callable[[], object], device: torch.device) -> float:
    """Return the most memory that tensors took at once in two rounds of work, in 10^6 bytes.

    What was there before is not counted, nor what an allocator keeps besides. On a CPU, memory
    that was there before and is given back meanwhile leaves no room for what comes after.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # What PyTorch declares of these events leaves out their size.
    events: list[Any] = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes)) / 1e6


def process_mb(work: Callable[[], object], rounds: int = 3) -> float:
    """Return by how much this process grew for some rounds of work, in 10^6 bytes.

    It must do only this: what it once took counts. Libraries that are loaded, code that is
    generated and gaps between tensors are in it, and differ from one process to the next.
    """
    before = status_mb("VmRSS")
    for _ in range(rounds):
        work()
    return status_mb("VmHWM") - before


def status_mb(field: str, process: int | str = "self") -> float:
    """Return what Linux says of a process's memory, in 10^6 bytes.

    Args:
        field: VmRSS, what it has now; VmHWM, the most it ever had (`getrusage` would count what the
            process had that started it); RssAnon, what it has for itself alone.
        process: Its number.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None, field
    return int(found[1]) * 1024 / 1e6


def in_new_process(module: str, *words: str) -> Any:
    """Run `python -m MODULE WORDS` and return the JSON that it prints last.

    What it says of what went wrong is seen.
    """
    command = [sys.executable, "-m", module, *words]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def ratio(ours: Measured, theirs: Measured) -> str:
    """Return how much faster ours is, round by round: the median, and the extremes."""
    pairs = [a / b for a, b in zip(ours.rates, theirs.rates, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def to_markdown(title: str, lines: Sequence[Measured], unit: str) -> str:
    """Return the lines as a table; all of them are compared with the last one.

    Args:
        title: Head of the first column.
        lines: What was measured; the last one is what a user would run instead.
        unit: Of the items, in the plural.
    """
    columns = list(dict.fromkeys(key for line in lines for key in line.notes))
    heads = [title, f"{unit} per second", "least", "most", f"× {lines[-1].name}"]
    if any(line.peak_mb is not None for line in lines):
        heads.append("peak MB")
    rows = [heads + columns, ["---"] * (len(heads) + len(columns))]
    for line in lines:
        median, low, high = statistics.median(line.rates), min(line.rates), max(line.rates)
        cells = [line.name, f"{median:.2f}", f"{low:.2f}", f"{high:.2f}"]
        cells.append(ratio(line, lines[-1]) if line is not lines[-1] else "1")
        if "peak MB" in heads:
            cells.append("" if line.peak_mb is None else f"{line.peak_mb:.0f}")
        rows.append(cells + [str(line.notes.get(key, "")) for key in columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    return {
        "cores": num_cores(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def tell(text: str, lines: Sequence[Measured], out: Path | None) -> None:
    """Print a table with the machine below it; write both as OUT.md and OUT.json if asked to."""
    found = machine()
    text += "\n" + ", ".join(f"{key} {value}" for key, value in found.items() if value) + "\n"
    sys.stdout.write(text)
    if out is not None:
        tree = {"machine": found, "lines": [asdict(line) for line in lines]}
        write_bytes(out.with_suffix(".json"), json.dumps(tree, indent=2).encode())
        write_bytes(out.with_suffix(".md"), text.encode())
