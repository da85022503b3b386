"""Which choices earn accuracy: one change at a time from a default, over folds, paired by image.

The protocol is fixed: recipe `cpu` at 160 pixels (crops of 128), 30 epochs, the last epoch's
weights, each image of the folds scored at its own size by a network that never saw it. Choices at
prediction time are scored on the default's networks. Runs that are finished are not repeated:

    python -m benchmarks.choices --root DATA --storage runs/choices
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, override, parse_arguments
from scribbleseg.evaluate import BOOTSTRAP_SEED, Row, evaluate
from scribbleseg.metrics import bootstrap_interval
from scribbleseg.predict import Predictor, load
from scribbleseg.runs import RunFolder
from tune.comparison import paired_difference

PROTOCOL = {
    "data.long_side": "160",
    "data.crop_size": "128",
    "train.epochs": "30",
    "train.validate_every": "30",
}
DEFAULT = "default"
TRAINED: dict[str, dict[str, dict[str, str]]] = {
    "stroke encoding (default: discs of radius 3)": {
        "the strokes' own pixels": {"strokes.encoding": "raw"},
        "discs of radius 6": {"strokes.radius": "6"},
        "distance up to 10 pixels": {"strokes.encoding": "distance", "strokes.radius": "10"},
        "distance up to 40 pixels": {"strokes.encoding": "distance", "strokes.radius": "40"},
        "geodesic distance up to 255": {"strokes.encoding": "geodesic", "strokes.radius": "255"},
    },
    "strokes in training (default: half simulated, like the benchmark's)": {
        "the data's own alone": {"strokes.simulate_probability": "0"},
        "simulated alone": {"strokes.simulate_probability": "1"},
        "of all widths and lengths, up to 2 per part": {
            "strokes.width": "1 8",
            "strokes.length": "0.1 1",
            "strokes.count": "2",
        },
        "corrections in half of the steps": {"strokes.correct_probability": "0.5"},
    },
    "scenes (default: strength 0.5)": {
        "no augmentation": {"augment.strength": "0"},
        "strength 1": {"augment.strength": "1"},
        "objects pasted into half": {"augment.paste_probability": "0.5"},
    },
    "loss (default: Dice + BCE)": {
        "Dice alone": {"loss.bce": "0"},
        "BCE alone": {"loss.dice": "0"},
        "and focal": {"loss.focal": "1"},
        "and boundary": {"loss.boundary": "0.5"},
        "and Lovász": {"loss.lovasz": "1"},
    },
    "network (default: UNet of width 16)": {
        "stroke matching": {"model.matching": ""},
        "ResUNet": {"model.architecture": "resunet"},
        "Attention-ResUNet, a loss per level": {"model.architecture": "attention_resunet"},
        "Attention-ResUNet, one loss": {
            "model.architecture": "attention_resunet",
            "loss.side": "0",
        },
        "EfficientNet-Lite0 with ImageNet weights": {"model.encoder": "lite0"},
    },
    "averaging of weights (default: EMA of 0.995)": {
        "none": {"optim.ema_decay": "0"},
        "EMA of 0.98": {"optim.ema_decay": "0.98"},
    },
    "arithmetic (default: bfloat16 where the hardware multiplies it)": {
        "float32": {"train.precision": "fp32"},
    },
    "training resolution (default: 160, crops of 128)": {
        "192, crops of 160": {"data.long_side": "192", "data.crop_size": "160"},
        "256, crops of 224": {"data.long_side": "256", "data.crop_size": "224"},
    },
}
PREDICTED: dict[str, dict[str, object]] = {
    "mirrored too": {"predict.flip": True},
    "three scales": {"predict.scales": (2 / 3, 1.0, 4 / 3)},
    "mirrored, three scales": {"predict.flip": True, "predict.scales": (2 / 3, 1.0, 4 / 3)},
    "along the image's edges": {"predict.edges": True},
    "object from a probability of 0.62 on": {"predict.threshold": 0.62},
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Where the data and the runs are."""

    root: str = "demo/data"
    """Folder of the data."""
    storage: Path = Path("runs/choices")
    """Folder for the runs and their scores."""
    folds: tuple[int, ...] = (0, 1, 2)
    """Folds that are held out in turn."""
    only: str = ""
    """Only the groups whose name contains this."""


def train(name: str, changes: Mapping[str, str], fold: int, bench: Choices) -> str:
    """Train a network unless it is there, and return its run."""
    settings = {**PROTOCOL, **changes, "data.root": bench.root, "data.fold": str(fold)}
    words = [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", *value.split())
    ]
    place = ["--storage", str(bench.storage), "--name", name]
    command = [sys.executable, "-m", "train.finetune", "cpu", *words, *place]
    training = subprocess.run(command, stdout=subprocess.DEVNULL)
    if training.returncode:
        # It has said why.
        sys.exit(training.returncode)
    return str(bench.storage / name)


def rows_of(predictor: Predictor, file: Path, fold: int, bench: Choices) -> list[Row]:
    """Return the scores of a fold's images, from the file they were once written to."""
    if not file.exists():
        rows = evaluate(predictor, bench.root, "train", None, fold=fold).rows
        file.write_text(json.dumps([asdict(row) for row in rows]))
    return [Row(**row) for row in json.loads(file.read_text())]


def score(name: str, changes: Mapping[str, str], bench: Choices) -> list[Row]:
    """Return the scores of all folds' images, each by the network that never saw it."""
    rows: list[Row] = []
    for fold in bench.folds:
        run = train(f"{name}-fold{fold}", changes, fold, bench)
        epoch = RunFolder.open(run).last()
        predictor = load(f"{run}/checkpoint_{epoch:04d}")
        rows += rows_of(predictor, Path(run) / "scores.json", fold, bench)
    return rows


def rescore(name: str, changes: Mapping[str, object], bench: Choices) -> list[Row]:
    """Return the scores of the default's networks with other settings of prediction."""
    rows: list[Row] = []
    for fold in bench.folds:
        run = bench.storage / f"{DEFAULT}-fold{fold}"
        epoch = RunFolder.open(str(run)).last()
        found = load(f"{run}/checkpoint_{epoch:04d}")
        config = override(found.config, dict(changes))
        assert isinstance(config, FinetuneConfig)
        predictor = Predictor(
            config=config, model=found.model, device=found.device, source=found.source
        )
        rows += rows_of(predictor, run / f"scores-{slug(name)}.json", fold, bench)
    return rows


def slug(text: str) -> str:
    """Return a name for files."""
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def line(name: str, rows: Sequence[Row], default: Sequence[Row]) -> str:
    """Return a choice's line of the table."""
    mean = np.mean([row.miou for row in rows])
    gain, low, high = paired_difference([rows], [default], "miou")
    text = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    return f"| {name} | {mean:.3f} | {text} |\n"


def main() -> None:
    """Train what is missing, and print the tables."""
    bench: Choices = parse_arguments(Choices, sys.argv[1:], prog="python -m benchmarks.choices")
    default = score(DEFAULT, {}, bench)
    mious = [row.miou for row in default]
    low, high = bootstrap_interval(mious, np.random.default_rng(BOOTSTRAP_SEED))
    say = sys.stdout.write
    say(f"folds {', '.join(map(str, bench.folds))}: {len(default)} images\n")
    say(f"default: {np.mean(mious):.3f} ({low:.3f} to {high:.3f})\n")
    for group, choices in TRAINED.items():
        if bench.only in group:
            say(f"\n| {group} | mIoU | difference |\n| --- | --- | --- |\n")
            for name, changes in choices.items():
                say(line(name, score(f"{slug(group[:8])}-{slug(name)}", changes, bench), default))
                sys.stdout.flush()
    if bench.only in "prediction":
        say("\n| prediction (default: one look) | mIoU | difference |\n| --- | --- | --- |\n")
        for name, changes in PREDICTED.items():
            say(line(name, rescore(name, changes, bench), default))
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(exit_status(main))
