"""Masks -> figures: how well a network does on a split that has ground truth.

Two numbers go by the name of mIoU. Ours is per image: the mean of object IoU and background IoU of
one image, then the mean over images. Pooled figures sum intersections and unions over the whole
split first; they favour large objects. Both are written, and each is called by its name.
"""

import csv
import dataclasses
import io
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from scribbleseg.config import DataConfig, FinetuneConfig
from scribbleseg.datasets.doubts import Doubt, describe_doubts, find_doubts
from scribbleseg.datasets.remote import local_copy
from scribbleseg.datasets.scenes import (
    OBJECT,
    UNLABELLED,
    Scene,
    ScenePaths,
    choose_stems,
    fold_stems,
    list_scenes,
    read_scene,
)
from scribbleseg.errors import InputError
from scribbleseg.manifest import make_folder, to_json, write_bytes
from scribbleseg.metrics import ImageScores, SegmentationMetrics, bootstrap_interval
from scribbleseg.predict import Predictor, predict_logits, to_mask

# The intervals are a property of the scores: the same scores give the same interval.
BOOTSTRAP_SEED = 0

METRIC_NAMES = {
    "miou": "mIoU",
    "object_iou": "Object IoU",
    "background_iou": "Background IoU",
    "boundary_iou": "Boundary IoU",
}
"""What people call the fields of `ImageScores`; the first one is the headline."""

Watch = Callable[[Sequence[ScenePaths]], Iterable[ScenePaths]]


@dataclass(frozen=True, kw_only=True)
class SceneResult:
    """One predicted and scored image."""

    stem: str
    """File name without its suffix."""
    prediction: UInt8[np.ndarray, "h w"]
    """0 background, 1 object."""
    scores: ImageScores
    """Its figures."""
    object_share: float
    """Share of the labelled pixels that the truth calls object [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of scores.csv."""

    stem: str
    object_iou: float
    background_iou: float
    miou: float
    boundary_iou: float
    object_share: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one network on one split."""

    rows: list[Row]
    """One per image, in the order of the stems."""
    means: dict[str, float]
    """Means over images: object_iou, background_iou, miou, boundary_iou."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval of each mean, over images."""
    pooled: dict[str, float]
    """Sums over the split first: object_iou, background_iou, miou."""
    settings: dict[str, Any]
    """What was evaluated, and how: checkpoint, root, split, fold, flip, honour_strokes, ..."""
    warnings: tuple[str, ...] = ()
    """Why the figures may not be what they seem, one line each."""

    @property
    def part(self) -> str:
        """Name of the images that were scored: a split, or a fold of it."""
        split, fold = self.settings["split"], self.settings["fold"]
        return split if fold is None else f"{split}, fold {fold}"


def score_scenes(
    model: nn.Module,
    scenes: Iterable[Scene],
    config: FinetuneConfig,
    device: torch.device | str,
    *,
    metrics: SegmentationMetrics,
    honour_strokes: bool = True,
    precision: torch.dtype | None = None,
) -> Iterator[SceneResult]:
    """Predict and score scenes one by one, each at its own size.

    Args:
        model: The network, on `device`.
        scenes: Samples with masks.
        config: Gives the scale, the strokes' encoding, and how logits become masks.
        device: Where the model is.
        metrics: Every scene is added to it.
        honour_strokes: Pixels under a stroke take the stroke's label before they are scored.
        precision: Autocast dtype; None computes in float32.
    """
    for scene in scenes:
        assert scene.mask is not None, f"{scene.stem} has no mask to be scored against"
        logits = predict_logits(
            model,
            scene.image,
            scene.scribbles,
            config=config,
            device=device,
            precision=precision,
        )
        prediction = to_mask(logits, scene.scribbles, honour_strokes=honour_strokes)
        yield SceneResult(
            stem=scene.stem,
            prediction=prediction,
            scores=metrics.update(prediction, scene.mask),
            object_share=object_share(scene.mask),
        )


def object_share(mask: UInt8[np.ndarray, "h w"]) -> float:
    """Return the share of labelled pixels that are object; 0 where nothing is labelled."""
    return float((mask == OBJECT).sum() / max(1, (mask != UNLABELLED).sum()))


def list_scored(
    root: str | Path,
    split: str,
    *,
    fold: int | None,
    num_folds: int,
    cache_dir: str | None = None,
) -> list[ScenePaths]:
    """Return the samples of a split, or of one fold of it, that figures can be computed on.

    Remote ones are kept in `cache_dir`, see `remote.local_copy`.

    Raises:
        InputError: The split is missing, has no ground truth, or is smaller than its folds.
    """
    root = local_copy(root, cache_dir, below=split)
    truth = root / split / "ground_truth"
    if truth.parent.is_dir() and not truth.is_dir():
        raise InputError(
            f"{truth}: no such folder; evaluating needs a mask per image; name a split that has "
            "them, or use `scribbleseg predict`, which needs none"
        )
    return _keep_fold(list_scenes(root, split, need_masks=True), fold, num_folds)


def _keep_fold(scenes: list[ScenePaths], fold: int | None, num_folds: int) -> list[ScenePaths]:
    """Return the samples of one fold of a split; None: all."""
    if fold is None:
        return scenes
    kept = set(fold_stems([scene.stem for scene in scenes], fold, num_folds)[1])
    return [scene for scene in scenes if scene.stem in kept]


def evaluate_command(checkpoint: str, root: str, split: str, fold: int | None) -> str:
    """Return the command that scores a checkpoint."""
    words = ["scribbleseg", "evaluate", "--checkpoint", checkpoint, "--data", root]
    words += ["--split", split] + ([] if fold is None else ["--fold", str(fold)])
    return shlex.join(words)


def evaluate(
    predictor: Predictor,
    root: str | Path,
    split: str,
    out: Path | None,
    *,
    fold: int | None = None,
    cache_dir: str | None = None,
    honour_strokes: bool = True,
    watch: Watch = iter,
) -> Evaluation:
    """Score a network on a split, and write what was found.

    Args:
        predictor: The network.
        root: Folder or URI that holds the splits.
        split: Name of the split; it must have ground truth.
        out: Folder for scores.csv and summary.json; None writes nothing.
        fold: Only this fold of the split, by the rule of `fold_stems`; None: all of it.
        cache_dir: Where remote data are kept, see `remote.local_copy`.
        honour_strokes: Pixels under a stroke take the stroke's label before they are scored.
        watch: Wraps the list of samples that is iterated over: the place for a progress bar.

    Raises:
        InputError: The split is missing, has no ground truth, or breaks the data contract; or `out`
            cannot be made.
    """
    config = predictor.config
    num_folds = config.data.num_folds
    whole = list_scored(root, split, fold=None, num_folds=num_folds, cache_dir=cache_dir)
    paths = _keep_fold(whole, fold, num_folds)
    if out is not None:
        make_folder(out)
    doubts: list[Doubt] = []

    def read(paths: ScenePaths) -> Scene:
        scene = read_scene(paths)
        doubts.extend(find_doubts(scene, paths.image, paths.scribbles))
        return scene

    metrics = SegmentationMetrics()
    results = score_scenes(
        predictor.model,
        map(read, watch(paths)),
        config,
        predictor.device,
        metrics=metrics,
        honour_strokes=honour_strokes,
    )
    rows: list[Row] = []
    for result in results:
        rows.append(
            Row(
                stem=result.stem,
                object_share=result.object_share,
                **dataclasses.asdict(result.scores),
            )
        )
    settings = {
        "checkpoint": predictor.source,
        "root": str(root),
        "split": split,
        "fold": fold,
        "flip": config.predict.flip,
        "edges": config.predict.edges,
        "threshold": config.predict.threshold,
        "part_threshold": config.predict.part_threshold,
        "scales": list(config.predict.scales),
        "honour_strokes": honour_strokes,
        "long_side": config.data.long_side,
        "device": predictor.device.type,
    }
    warnings = describe_doubts(doubts)
    trained_on = config.data
    # Addresses of object stores pass through: equal ones stay equal.
    same_root = trained_on.root and os.path.realpath(root) == os.path.realpath(trained_on.root)
    if same_root and split == trained_on.split:
        warnings += _warn_of_known(paths, whole, trained_on)
    evaluation = dataclasses.replace(summarise(rows, metrics, settings), warnings=tuple(warnings))
    if out is not None:
        write_evaluation(evaluation, out)
    return evaluation


def _warn_of_known(
    scored: Sequence[ScenePaths], whole: Sequence[ScenePaths], data: DataConfig
) -> list[str]:
    """Return a line if images are scored that the network was trained on.

    Args:
        scored: Samples of the split that it was trained on.
        whole: All samples of that split.
        data: How it was trained.
    """
    if data.fold is not None and len(whole) < data.num_folds:
        # Not the samples of then: those had a fold each.
        return []
    known = set(choose_stems([scene.stem for scene in whole], data)[0])
    number = sum(scene.stem in known for scene in scored)
    if not number:
        return []
    remedy = "score images that it has not seen"
    if data.fold is not None:
        remedy = f"--fold {data.fold} scores those held out"
    return [f"{number} of these {len(scored)} images were trained on, which flatters; {remedy}"]


def summarise(
    rows: list[Row], metrics: SegmentationMetrics, settings: dict[str, Any]
) -> Evaluation:
    """Return means, their intervals and the pooled figures of scored images."""
    figures = metrics.compute()
    return Evaluation(
        rows=rows,
        means={name: figures[name] for name in METRIC_NAMES},
        intervals={
            name: bootstrap_interval(
                [getattr(row, name) for row in rows], np.random.default_rng(BOOTSTRAP_SEED)
            )
            for name in METRIC_NAMES
        },
        pooled={
            name.removeprefix("pooled_"): value
            for name, value in figures.items()
            if name.startswith("pooled_")
        },
        settings=settings,
    )


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write `out`/scores.csv (one line per image) and `out`/summary.json, each atomically."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Row))
    for row in evaluation.rows:
        stem, *values = dataclasses.astuple(row)
        writer.writerow([stem, *(f"{value:.6f}" for value in values)])
    summary = {
        "num_images": len(evaluation.rows),
        "means": evaluation.means,
        "intervals": {"level": 0.95, **evaluation.intervals},
        "pooled": evaluation.pooled,
        "warnings": evaluation.warnings,
        "settings": evaluation.settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "scores.csv", table.getvalue().encode())
    write_bytes(out / "summary.json", to_json(summary))


def format_table(evaluation: Evaluation) -> str:
    """Return the figures as a table for the terminal."""
    lines = [f"{'':<16}{'mean':>7}   {'95 % interval':<17}{'pooled':>6}"]
    for name, label in METRIC_NAMES.items():
        low, high = evaluation.intervals[name]
        interval = f"{low:.4f} to {high:.4f}"
        pooled = f"{evaluation.pooled[name]:.4f}" if name in evaluation.pooled else "-"
        lines.append(f"{label:<16}{evaluation.means[name]:>7.4f}   {interval:<17}{pooled:>6}")
    lines.append(f"{len(evaluation.rows)} images of {evaluation.part}; means over images")
    return "\n".join(lines)
