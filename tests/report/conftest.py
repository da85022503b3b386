"""A small finished run, its data, and a predictor, for the report's tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scribbleseg.checkpoint import write_model
from scribbleseg.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    PretrainDataConfig,
    ProbeConfig,
    TrainConfig,
    to_dict,
)
from scribbleseg.datasets.scenes import list_scenes, read_scene
from scribbleseg.manifest import write_manifest
from scribbleseg.models import build_model
from scribbleseg.predict import Predictor
from scribbleseg.report.pretraining import draw_picture, picture_name
from scribbleseg.runs import RunFolder

STEMS = [f"photo <{number}>" for number in range(8)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight scenes of 40 x 56 pixels with one bright rectangle each."""
    generator = np.random.default_rng(0)
    for stem in STEMS:
        mask = np.zeros((40, 56), np.uint8)
        top, left = generator.integers(2, 20, 2)
        mask[top : top + 15, left : left + 20] = 1
        image = (generator.integers(0, 90, (40, 56, 3)) + 150 * mask[..., None]).astype(np.uint8)
        strokes = np.full(mask.shape, 255, np.uint8)
        strokes[top + 7, left + 4 : left + 16] = 1
        strokes[38, 4:50] = 0
        for name, pixels in (("images", image), ("ground_truth", mask), ("scribbles", strokes)):
            folder = tmp_path / "data" / "train" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{stem}.png")
    return tmp_path / "data"


@pytest.fixture
def config(root: Path) -> FinetuneConfig:
    """A small attention network, validated on half of the scenes."""
    return FinetuneConfig(
        data=DataConfig(root=str(root), long_side=64, num_folds=2),
        model=ModelConfig(architecture="attention_resunet", width=8, depth=3),
        train=TrainConfig(epochs=4),
    )


@pytest.fixture
def predictor(config: FinetuneConfig) -> Predictor:
    """That network, untrained."""
    torch.manual_seed(0)
    return Predictor(
        config=config,
        model=build_model(config.model).eval(),
        device=torch.device("cpu"),
        source="a test",
    )


@pytest.fixture
def make_run(
    tmp_path: Path, config: FinetuneConfig, predictor: Predictor
) -> Callable[[str], RunFolder]:
    """Return a function that writes a finished run of a given name."""

    def make(name: str) -> RunFolder:
        run = RunFolder.open(str(tmp_path / "runs" / name))
        scores = {"miou": 0.5, "object_iou": 0.25, "background_iou": 0.75}
        run.write_metrics([{"epoch": epoch, "loss": 1 / epoch, **scores} for epoch in range(1, 5)])
        with run.scratch() as folder:
            write_model(folder, config=config, weights=predictor.model.state_dict(), metrics={})
            write_manifest(folder)
            run.save_checkpoint(4, folder)
        run.write_best(4, "miou", 0.5)
        run.write_json(
            "run.json",
            {
                "format": 1,
                "kind": "segmentation",
                "recipe": "demo",
                "config": to_dict(config),
                "seed": 0,
                "wall_time": 75.0,
                "versions": {"torch": "2.11"},
                "finished": True,
            },
        )
        return run

    return make


@pytest.fixture
def make_pretraining(tmp_path: Path, root: Path) -> Callable[..., RunFolder]:
    """Return a function that writes a finished pretraining run with pictures of its epochs."""

    def make(name: str, *, num_epochs: int = 3) -> RunFolder:
        config = PretrainConfig(
            data=PretrainDataConfig(roots=(str(root),)),
            model=ModelConfig(width=8, depth=3),
            train=TrainConfig(epochs=num_epochs),
            probe=ProbeConfig(root=str(root), long_side=32),
        )
        run = RunFolder.open(str(tmp_path / "runs" / name))
        scene = read_scene(list_scenes(root, "train", need_masks=True)[0])
        picture = draw_picture(build_model(config.model).encoder, [scene], config.probe, "cpu")
        figures = {"entropy": 2.0, "deviation": 0.4, "grad_norm": 0.7}
        rows = [
            {"epoch": epoch, "loss": 2 + 1 / epoch, "kl": 1 / epoch, **figures}
            | {"probe_miou": 0.5 + epoch / 100}
            for epoch in range(1, num_epochs + 1)
        ]
        run.write_metrics(rows)
        for row in rows:
            run.write_file(picture_name(row["epoch"]), picture)
        run.write_best(num_epochs, "epoch", float(num_epochs))
        info = {"kind": "dino", "recipe": "demo", "config": to_dict(config), "finished": True}
        run.write_json("run.json", {**info, "resolved": {"dino": {"out_dim": 1024}}})
        return run

    return make
