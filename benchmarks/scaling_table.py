"""How well each network should scale to many GPUs: `docs/scaling.md` has the formula and its terms.

Counted here: parameters, bytes of an all-reduce and floating-point operations per image. Measured
here: the seconds of a training step on this machine. The rest of the table follows from the speed
of a GPU and of the network between nodes, which are yours to give:

    python -m benchmarks.scaling_table --tflops 20 --gbit 10 100
    python -m benchmarks.scaling_table --seconds-per-step 0.21     # as measured on one GPU
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from scribbleseg.cli import exit_status
from scribbleseg.config import Architecture, FinetuneConfig, parse_arguments, require
from scribbleseg.device import autocast_dtype, pick_device, prepare_cpu
from scribbleseg.loops.segment import train_step
from scribbleseg.loops.state import init_state
from scribbleseg.models import build_model
from train.launch import this_machine
from train.recipes import RECIPES

ARCHITECTURES: tuple[Architecture, ...] = ("unet", "resunet", "attention_resunet")
# A gradient is float32, whatever the products are computed in.
GRADIENT_BYTES = 4
# DDP's own; the last bucket is full only when backward has ended.
BUCKET_BYTES = 25 * 2**20
# Forward, and twice as much backward, during which gradients are already sent.
BACKWARD = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is computed."""

    recipe: str = "gpu"
    """Recipe whose network and crops are meant."""
    batch_size: int = 16
    """Images of each GPU per step."""
    tflops: float = 20.0
    """What a GPU sustains on such networks, in 10^12 operations per second."""
    seconds_per_step: float | None = None
    """Time of a step on one GPU, as measured; None: follows from --tflops."""
    gbit: tuple[float, ...] = (10.0, 100.0)
    """Speeds of a node's network, in 10^9 bits per second."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs, all on nodes of their own."""
    latency: float = 50e-6
    """Seconds that a message takes from node to node."""
    steps: int = 3
    """Steps that are timed on this machine, at 4 images of 128 pixels; 0: none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.recipe in RECIPES, "recipe", self.recipe, " or ".join(RECIPES))
        require(self.steps >= 0, "steps", self.steps, "0 or more")
        require(min(self.gpus) >= 1, "gpus", self.gpus, "1 or more each")
        require(min(self.gbit) > 0, "gbit", self.gbit, "more than 0 each")
        for key in ("batch_size", "tflops"):
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")


def all_reduce_seconds(num_bytes: float, num_nodes: int, gbit: float, latency: float) -> float:
    """Return the time of a ring all-reduce: each node sends 2 (n - 1) / n of the bytes."""
    rounds = 2 * (num_nodes - 1)
    return rounds / num_nodes * num_bytes * 8 / (gbit * 1e9) + rounds * latency


def efficiency(step: float, num_bytes: float, num_nodes: int, gbit: float, latency: float) -> float:
    """Return a step's time on one node over its time on `num_nodes`.

    Args:
        step: Seconds of a step without an all-reduce.
        num_bytes: Size of all gradients.
        num_nodes: Nodes of one GPU each.
        gbit: Speed of the network.
        latency: Seconds from node to node.
    """
    last = min(num_bytes, BUCKET_BYTES)
    hidden = all_reduce_seconds(num_bytes - last, num_nodes, gbit, latency)
    exposed = max(0.0, hidden - BACKWARD * step)
    return step / (step + exposed + all_reduce_seconds(last, num_nodes, gbit, latency))


def count(config: FinetuneConfig) -> tuple[int, float]:
    """Return a network's parameters, and the operations of a training step per image."""
    side = config.data.crop_size
    with torch.device("meta"):
        model = build_model(config.model)
        image, strokes = torch.empty(1, 3, side, side), torch.empty(1, 2, side, side)
    with FlopCounterMode(display=False) as counter:
        model(image, strokes)
    forward = counter.get_total_flops()
    return sum(parameter.numel() for parameter in model.parameters()), 3 * forward


def time_step(config: FinetuneConfig, num_steps: int) -> float:
    """Return the median time of a training step on this machine, 4 images of 128 pixels."""
    device = pick_device()
    if device.type == "cpu":
        prepare_cpu(this_machine()[0])
    precision = autocast_dtype(config.train.precision, device)
    state = init_state(config, device, precision)
    generator = torch.Generator().manual_seed(0)
    shape = (4, 128, 128)
    batch = {
        "image": torch.randint(256, (4, 3, 128, 128), dtype=torch.uint8, generator=generator),
        "strokes": torch.zeros(4, 2, 128, 128, dtype=torch.uint8),
        "mask": torch.randint(2, shape, dtype=torch.uint8, generator=generator),
        "stem": [""] * 4,
    }
    seconds: list[float] = []
    for _ in range(num_steps + 1):
        began = time.perf_counter()
        train_step(
            state, state.model, batch, config, device=device, precision=precision, num_steps=100
        ).item()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    """Compute and print."""
    table: Table = parse_arguments(Table, sys.argv[1:], prog="python -m benchmarks.scaling_table")
    base = RECIPES[table.recipe]()
    sized = [f"{number} GPUs, {speed:g} Gbit/s" for speed in table.gbit for number in table.gpus]
    header = ["network", "parameters", "all-reduce", "GFLOP per image", "s per step", *sized]
    if table.steps:
        header.insert(4, "s per step here")
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for architecture in ARCHITECTURES:
        config = replace(base, model=replace(base.model, architecture=architecture))
        parameters, flops = count(config)
        size = GRADIENT_BYTES * parameters
        step = table.seconds_per_step or table.batch_size * flops / (table.tflops * 1e12)
        cells = [architecture, f"{parameters / 1e6:.1f} M", f"{size / 1e6:.0f} MB"]
        cells += [f"{flops / 1e9:.0f}"]
        if table.steps:
            cells += [f"{time_step(config, table.steps):.2f}"]
        cells += [f"{step:.3f}"]
        cells += [
            f"{efficiency(step, size, number, speed, table.latency):.2f}"
            for speed in table.gbit
            for number in table.gpus
        ]
        lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
