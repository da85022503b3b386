"""How the probe's mIoU rises while an encoder is pretrained, beside encoders that learned nothing.

Most of what the probe gains, it gains as soon as normalisation knows how large features are; so the
run's curve stands beside its own random weights, as they are and with the normalisation of as many
views as one epoch has. What lies above the second line was learned:

    python -m train.pretrain cpu --data.roots DIR --probe.root ROOT --train.validate-every 1 ...
    python -m benchmarks.probe_rise --run RUN --figure probe.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure

from scribbleseg.cli import exit_status
from scribbleseg.config import PretrainConfig, from_dict, parse_arguments
from scribbleseg.device import num_cores, prepare_cpu
from scribbleseg.errors import InputError
from scribbleseg.loops.pretrain import PretrainData, init_state, open_data, to_views
from scribbleseg.probe import probe
from scribbleseg.runs import RunFolder

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Rise:
    """Whose rise is drawn."""

    run: str = "runs/eyes"
    """Pretraining run that was probed."""
    figure: Path | None = None
    """File for the curve; None: print only."""


def probe_of(encoder: torch.nn.Module, data: PretrainData, config: PretrainConfig) -> float:
    """Return the probe's mIoU."""
    assert data.probed is not None
    scenes = (data.probed[index] for index in range(len(data.probed)))
    return probe(encoder, scenes, config.probe, CPU)


def nothing_learned(config: PretrainConfig) -> tuple[float, float]:
    """Return the probe's mIoU of the run's random weights, and after an epoch of looking alone.

    The second encoder has seen the global views of the first epoch in training mode: its
    normalisation has their means and variances, and no weight has moved.
    """
    data = open_data(config)
    encoder = init_state(config, CPU, None).encoder
    untouched = probe_of(encoder, data, config)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Plain means over all views; by default the last ones count most, the start a little.
            module.reset_running_stats()
            module.momentum = None
    batches = islice(data.loader(config, 0, CPU), data.plan(config).steps_per_epoch)
    with torch.no_grad():
        for batch in batches:
            encoder(to_views(batch["global"], CPU).flatten(0, 1))
    return untouched, probe_of(encoder, data, config)


def draw(probed: Sequence[tuple[int, float]], untouched: float, looked: float, path: Path) -> None:
    """Write the curve, from the random weights on, and the line of what nothing learned."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip((0, untouched), *probed, strict=True), marker="o", label="pretrained with DINO")
    axes.axhline(looked, linestyle="--", color="grey", label="random weights, normalisation fitted")
    axes.set_xlabel("epoch")
    axes.set_ylabel("probe mIoU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the run, probe what it began from, and print."""
    bench: Rise = parse_arguments(Rise, sys.argv[1:], prog="python -m benchmarks.probe_rise")
    run = RunFolder.open(bench.run)
    info = run.read_json("run.json") or {}
    found = [(row["epoch"], row.get("probe_miou")) for row in run.read_metrics()]
    probed = [(epoch, value) for epoch, value in found if value is not None]
    if info.get("kind") != "dino" or not probed:
        raise InputError(f"{bench.run}: expected a pretraining run with --probe.root, found none")
    prepare_cpu(num_cores())
    untouched, looked = nothing_learned(from_dict(PretrainConfig, info["resolved"]))
    say = sys.stdout.write
    say(f"{bench.run}; probe mIoU\n\n| weights | mIoU |\n| --- | --- |\n")
    say(f"| random | {untouched:.3f} |\n| random, normalisation fitted | {looked:.3f} |\n")
    for epoch, value in probed:
        say(f"| after epoch {epoch} | {value:.3f} |\n")
    if bench.figure is not None:
        draw(probed, untouched, looked, bench.figure)


if __name__ == "__main__":
    sys.exit(exit_status(main))
