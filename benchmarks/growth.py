"""Growth: an epoch's time and every process's memory as the data set and the images grow.

Generated photographs of 96×72 with strokes and masks, 100 to 100,000 of them; then 100 of them, of
256 to 2,048 pixels. Each size is read, cached and loaded by a process of its own, which leaves the
network out: it does not know how many images there are. Anonymous memory is what a process has for
itself; pages of the mapped cache are the kernel's, and given back when others need them:

    python -m benchmarks.growth --counts 100 1000 10000
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks.measure import in_new_process, machine, status_mb
from scribbleseg.cli import exit_status
from scribbleseg.config import override, parse_arguments
from scribbleseg.loops.batches import open_data
from scribbleseg.manifest import write_bytes
from train.recipes import cpu

SIDE = 96


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What is measured."""

    counts: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    """Numbers of images of 96×72."""
    sides: tuple[int, ...] = (256, 512, 1024, 2048)
    """Longer sides of 100 images, in pixels."""
    folder: Path | None = None
    """Folder for the images, kept for the next time; None: a temporary one."""
    measure: str = ""
    """Measure the data set in this folder alone, and print JSON."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""


def generate(folder: Path, count: int, side: int) -> None:
    """Write a data set: ellipses on noise, with a stroke in each and one beside it."""
    if (folder / "whole").exists():
        return
    for kind in ("images", "scribbles", "ground_truth"):
        (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
    width, height = side, side * 3 // 4
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
    for number in range(count):
        middle = tuple(int(value) for value in generator.uniform(0.35, 0.65, 2) * (width, height))
        axes = tuple(int(value) for value in generator.uniform(0.1, 0.3, 2) * (width, height))
        mask = np.zeros((height, width), np.uint8)
        cv2.ellipse(mask, middle, axes, 0, 0, 360, 1, -1)
        image = np.roll(noise, number, axis=1) + 100 * mask[..., None]
        strokes = np.full_like(mask, 255)
        reach = max(1, axes[0] // 2)
        cv2.line(strokes, (middle[0] - reach, middle[1]), (middle[0] + reach, middle[1]), 1, 3)
        cv2.line(strokes, (3, 3), (width - 4, 3), 0, 3)
        name = f"{number:06d}"
        for kind, suffix, pixels in (
            ("images", "jpg", image),
            ("scribbles", "png", strokes),
            ("ground_truth", "png", mask),
        ):
            cv2.imwrite(str(folder / "train" / kind / f"{name}.{suffix}"), pixels)
    (folder / "whole").touch()


def measure(folder: str) -> dict[str, float]:
    """Open a data set, and load one epoch of it."""
    config = override(cpu(), {"data.root": folder, "data.cache_dir": f"{folder}/cache"})
    config = override(config, {"data.long_side": SIDE, "data.crop_size": SIDE, "train.epochs": 1})
    began = time.perf_counter()
    data = open_data(config)
    opened = time.perf_counter()
    loader_mb = 0.0
    first = opened
    for number, _ in enumerate(data.loader(config, 0, torch.device("cpu"))):
        if number == 0:
            first = time.perf_counter()
        if number % 20 == 0:
            children = [
                status_mb("RssAnon", child.pid) for child in mp.active_children() if child.pid
            ]
            loader_mb = max([loader_mb, *children])
    ended = time.perf_counter()
    worker_mb = status_mb("RssAnon")
    began_again = time.perf_counter()
    open_data(config)
    return {
        "images": len(data.cache),
        "build_s": opened - began,
        "open_s": time.perf_counter() - began_again,
        "first_batch_s": first - opened,
        "ms_per_image": 1000 * (ended - first) / (len(data.samples) - config.train.batch_size),
        "worker_mb": worker_mb,
        "loader_mb": loader_mb,
    }


def main() -> None:
    """Measure and print."""
    bench: Growth = parse_arguments(Growth, sys.argv[1:], prog="python -m benchmarks.growth")
    if bench.measure:
        sys.stdout.write(json.dumps(measure(bench.measure)) + "\n")
        return
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = bench.folder or Path(scratch)
        sizes = [(count, SIDE) for count in bench.counts] + [(100, side) for side in bench.sides]
        for count, side in sizes:
            folder = place / f"{count}x{side}"
            generate(folder, count, side)
            found = in_new_process("benchmarks.growth", "--measure", str(folder))
            rows.append({"side": side, **found})
            sys.stdout.write(table(rows[-1:], head=len(rows) == 1))
            sys.stdout.flush()
    facts = machine()
    sys.stdout.write(f"\n{facts}\n")
    if bench.out is not None:
        tree = {"machine": facts, "lines": rows}
        write_bytes(bench.out.with_suffix(".json"), json.dumps(tree, indent=2).encode())
        write_bytes(bench.out.with_suffix(".md"), table(rows, head=True).encode())


def table(rows: Sequence[Mapping[str, float]], *, head: bool) -> str:
    """Return rows of figures as Markdown, under their names if asked to."""
    lines = [list(rows[0]), ["---"] * len(rows[0])] if head else []
    lines += [[f"{value:.4g}" for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(exit_status(main))
