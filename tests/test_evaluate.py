"""Evaluation: figures against scikit-learn, files, folds and bad input."""

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from scribbleseg.config import DataConfig, FinetuneConfig, PredictConfig
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Evaluation, evaluate, format_table, list_scored, object_share
from scribbleseg.predict import Predictor
from tests.conftest import make_doubtful

STEMS = ["a", "b", "c", "d", "e"]


class RedAsLogits(nn.Module):
    """Stands in for a network: red is object."""

    def forward(self, image: Tensor, strokes: Tensor) -> SimpleNamespace:
        """Return the red channel."""
        return SimpleNamespace(logits=image[:, :1])


@pytest.fixture
def predictor() -> Predictor:
    config = FinetuneConfig(data=DataConfig(long_side=64, num_folds=2))
    return Predictor(
        config=config, model=RedAsLogits(), device=torch.device("cpu"), source="a test"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five scenes of 48 x 64 pixels: random truth, an image that is red on about 7/8 of it."""
    generator = np.random.default_rng(0)
    for stem in STEMS:
        mask = np.kron(generator.integers(0, 2, (6, 8)), np.ones((8, 8), int)).astype(np.uint8)
        mask[:4] = 255
        seen = np.where(generator.random(mask.shape) < 1 / 8, 1 - mask, mask) == 1
        image = np.zeros((48, 64, 3), np.uint8)
        image[seen, 0] = 255
        strokes = np.where(generator.random(mask.shape) < 0.1, mask, 255).astype(np.uint8)
        for name, pixels in (("images", image), ("ground_truth", mask), ("scribbles", strokes)):
            folder = tmp_path / "data" / "val" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{stem}.png")
    return tmp_path / "data"


def oracle(root: Path, stem: str, honour_strokes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the labelled pixels' truth and prediction."""
    image, mask, strokes = (
        np.array(Image.open(root / "val" / name / f"{stem}.png"))
        for name in ("images", "ground_truth", "scribbles")
    )
    prediction = image[..., 0] == 255
    if honour_strokes:
        prediction = np.where(strokes == 255, prediction, strokes == 1)
    return (mask == 1)[mask != 255], prediction[mask != 255]


@pytest.mark.parametrize("honour_strokes", [True, False])
def test_figures_equal_scikit_learns(predictor: Predictor, root: Path, honour_strokes: bool):
    found = evaluate(predictor, root, "val", None, honour_strokes=honour_strokes)
    pairs = [oracle(root, stem, honour_strokes) for stem in STEMS]
    object_ious = [jaccard_score(*pair) for pair in pairs]
    background_ious = [jaccard_score(*pair, pos_label=0) for pair in pairs]
    assert [row.stem for row in found.rows] == STEMS
    np.testing.assert_allclose([row.object_iou for row in found.rows], object_ious)
    np.testing.assert_allclose([row.background_iou for row in found.rows], background_ious)
    assert found.means["object_iou"] == pytest.approx(np.mean(object_ious))
    assert found.means["miou"] == pytest.approx(np.mean([object_ious, background_ious]))
    truth, prediction = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert found.pooled["object_iou"] == pytest.approx(jaccard_score(truth, prediction))
    shares = [pair[0].mean() for pair in pairs]
    np.testing.assert_allclose([row.object_share for row in found.rows], shares)


def test_intervals_hold_the_means_and_repeat(predictor: Predictor, root: Path):
    first, second = (evaluate(predictor, root, "val", None) for _ in range(2))
    assert first == second
    for name, (low, high) in first.intervals.items():
        assert low <= first.means[name] <= high
        assert low < high


def test_files_say_what_was_returned(predictor: Predictor, root: Path, tmp_path: Path):
    out = tmp_path / "new" / "out"
    config = dataclasses.replace(predictor.config, predict=PredictConfig(flip=True))
    predictor = dataclasses.replace(predictor, config=config)
    found = evaluate(predictor, root, "val", out)
    with (out / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["stem"] for line in lines] == STEMS
    for line, row in zip(lines, found.rows, strict=True):
        assert float(line["miou"]) == pytest.approx(row.miou, abs=1e-6)
        assert set(line) == {
            "stem",
            "object_iou",
            "background_iou",
            "miou",
            "boundary_iou",
            "object_share",
        }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_images"] == 5
    assert summary["means"] == found.means
    assert summary["pooled"] == found.pooled
    assert tuple(summary["intervals"]["miou"]) == found.intervals["miou"]
    assert summary["settings"]["checkpoint"] == "a test"
    assert summary["settings"]["flip"] is True
    assert summary["settings"]["edges"] is False
    assert summary["settings"]["threshold"] == 0.5
    assert summary["settings"]["part_threshold"] == 0.0
    assert sorted(path.name for path in out.iterdir()) == ["scores.csv", "summary.json"]


def test_a_fold_is_scored_alone_and_each_image_is_watched(predictor: Predictor, root: Path):
    watched: list[str] = []

    def watch(scenes):
        for scene in scenes:
            watched.append(scene.stem)
            yield scene

    found = evaluate(predictor, root, "val", None, fold=1, watch=watch)
    assert [row.stem for row in found.rows] == watched == ["b", "d"]
    assert found.part == "val, fold 1"


@pytest.mark.parametrize(
    ("data", "fold", "told"),
    [
        ({}, None, "3 of these 5 images were trained on, which flatters; --fold 1 scores"),
        ({}, 0, "3 of these 3 images"),
        ({}, 1, None),
        ({"share": 0.5}, None, "2 of these 5 images"),
        ({"fold": None}, None, "5 of these 5 images were trained on, which flatters; score images"),
        ({"split": "train"}, None, None),
        ({"root": ""}, None, None),
        # Smaller than when it was trained on.
        ({"num_folds": 6}, None, None),
    ],
)
def test_images_that_were_trained_on_are_told_of(
    predictor: Predictor, root: Path, monkeypatch, data, fold: int | None, told: str | None
):
    # Where an unknown root could be taken for this one.
    monkeypatch.chdir(root)
    settings = {"root": f"{root}/", "split": "val", "fold": 1, "num_folds": 2} | data
    config = dataclasses.replace(predictor.config, data=DataConfig(long_side=64, **settings))
    predictor = dataclasses.replace(predictor, config=config)
    warnings = evaluate(predictor, root, "val", None, fold=fold).warnings
    assert [line.startswith(told or "") for line in warnings] == ([True] if told else [])


def test_what_is_doubtful_is_told_and_noted(predictor: Predictor, root: Path, tmp_path: Path):
    make_doubtful(root / "val")
    found = evaluate(predictor, root, "val", tmp_path / "out")
    covered, turned, contradicted = found.warnings
    assert covered.startswith(f"{root}/val/scribbles/a.png: strokes cover more than half")
    assert turned.startswith(f"{root}/val/images/b.png: viewers turn")
    assert "contradicts the mask, as in 1 file(s)" in contradicted
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"] == [
        *found.warnings
    ]


def test_a_split_without_ground_truth_is_refused(predictor: Predictor, root: Path, tmp_path: Path):
    truth = root / "val" / "ground_truth"
    truth.rename(root / "elsewhere")
    with pytest.raises(InputError, match="ground_truth: no such folder.*predict") as refused:
        evaluate(predictor, root, "val", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    predictor: Predictor, root: Path, tmp_path: Path
):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: file exists; expected a folder"):
        evaluate(predictor, root, "val", tmp_path / "file", watch=lambda _: pytest.fail("scored"))
    with pytest.raises(InputError, match="nowhere"):
        list_scored(root, "nowhere", fold=None, num_folds=2)


def test_table_shows_means_intervals_and_pooled_figures(predictor: Predictor, root: Path):
    found: Evaluation = evaluate(predictor, root, "val", None)
    lines = format_table(found).splitlines()
    assert lines[1].split()[0] == "mIoU"
    assert f"{found.means['miou']:.4f}" in lines[1]
    assert f"{found.intervals['miou'][1]:.4f}" in lines[1]
    assert f"{found.pooled['miou']:.4f}" in lines[1]
    assert lines[-1].startswith("5 images of val")
    assert len({len(line) for line in lines[:-1]}) == 1


def test_object_share_leaves_out_ignored_pixels():
    assert object_share(np.array([[0, 1, 1, 255]], np.uint8)) == pytest.approx(2 / 3)
    assert object_share(np.full((2, 2), 255, np.uint8)) == 0


def test_benchmark_fold_has_its_46_images(benchmark: Path):
    assert len(list_scored(benchmark, "train", fold=0, num_folds=5)) == 46
