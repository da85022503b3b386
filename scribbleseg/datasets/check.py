"""The doctor: reads a data folder once and says all that is wrong, odd and typical about it."""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool
from PIL import Image

from scribbleseg.datasets.doubts import is_covered, num_contradicting
from scribbleseg.datasets.files import IMAGE_SUFFIXES, is_turned_file, write_picture
from scribbleseg.datasets.remote import local_copy
from scribbleseg.datasets.scenes import (
    BACKGROUND,
    FOLDERS,
    LABEL_SUFFIXES,
    OBJECT,
    RESPELL,
    UNLABELLED,
    Scene,
    are_respelled,
    list_files,
    read_image,
    read_mask,
    read_scribbles,
    require_above_splits,
    require_same_size,
    require_utf8,
)
from scribbleseg.datasets.sheet import draw_sheet, draw_tile
from scribbleseg.errors import InputError

MAX_TILES = 24


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """Something odd that can be used all the same."""

    sample: str
    """SPLIT/STEM, or the file."""
    kind: str
    """What is odd, in the same words for every sample."""
    detail: str = ""
    """How much of it."""

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.sample}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class SceneFacts:
    """What is measured on one sample."""

    width: int
    """Columns, in pixels."""
    height: int
    """Rows, in pixels."""
    object_share: float | None
    """Share of object among the mask's pixels that are not ignored; None without a mask."""
    stroke_shares: tuple[float, float]
    """Share of the image under object strokes and under background strokes."""
    num_strokes: tuple[int, int]
    """Number of object strokes and of background strokes (8-connected)."""


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What a split holds."""

    name: str
    """Name of its folder."""
    num_images: int
    """Number of photographs."""
    num_scribbles: int
    """Number of scribble files."""
    num_masks: int
    """Number of masks."""
    facts: tuple[SceneFacts, ...]
    """One entry per sample that could be read whole."""

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """WIDTHxHEIGHT of the images and how many have it, the most frequent first."""
        return Counter(f"{each.width}x{each.height}" for each in self.facts).most_common()

    @property
    def object_share(self) -> float | None:
        """Mean share of object pixels over the samples with a mask; None if there is none."""
        shares = [each.object_share for each in self.facts if each.object_share is not None]
        return float(np.mean(shares)) if shares else None

    @property
    def stroke_shares(self) -> tuple[float, float]:
        """Mean share of pixels under object strokes and under background strokes."""
        return _mean_pair([each.stroke_shares for each in self.facts])

    @property
    def num_strokes(self) -> tuple[float, float]:
        """Mean number of object strokes and of background strokes per sample."""
        return _mean_pair([each.num_strokes for each in self.facts])


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All that was found in a data folder."""

    root: Path
    """The folder."""
    splits: tuple[SplitSummary, ...]
    """One entry per split, sorted by name."""
    errors: tuple[str, ...]
    """One line each: file, what was found, what was expected, how to mend it."""
    warnings: tuple[Oddity, ...]
    """Odd but usable samples."""

    def text(self, limit: int = 20) -> str:
        """Return the report as lines to read; of each list only the first `limit` entries."""
        lines = [f"{self.root}", "", *_table(self.splits), ""]
        if self.errors:
            lines.append(f"{_count(len(self.errors), 'error')}: the data cannot be used like this")
            lines += [f"  {line}" for line in self.errors[:limit]]
            if len(self.errors) > limit:
                lines.append(f"  and {len(self.errors) - limit} more")
        else:
            lines.append("no errors")
        lines.append(_count(len(self.warnings), "warning") + (":" if self.warnings else ""))
        for kind, number in Counter(each.kind for each in self.warnings).most_common():
            samples = [
                each.sample + (f" ({each.detail})" if each.detail else "")
                for each in self.warnings
                if each.kind == kind
            ]
            more = f" and {number - limit} more" if number > limit else ""
            lines.append(f"  {number} x {kind}: {', '.join(samples[:limit])}{more}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The files of one stem; None where one is missing."""

    split: str
    stem: str
    image: Path | None
    scribbles: Path | None
    mask: Path | None


def check(
    root: str | Path,
    out: Path | None = None,
    *,
    progress: Callable[[Sequence[_Sample]], Iterable[_Sample]] = iter,
) -> CheckReport:
    """Read every sample of every split below `root` once and report on all of them.

    One sample at a time is in memory, and the thumbnails of the contact sheet.

    Args:
        root: Folder or URI of the data contract; a remote one is fetched first.
        out: JPEG file to draw the contact sheet to (up to 24 samples, evenly spread over all
            splits); None: no sheet.
        progress: Wraps the samples as they are read, for example in a progress bar.

    Raises:
        InputError: `root` holds no split at all, or cannot be fetched. Everything else is collected
            in the report.
    """
    root = local_copy(root)
    if out is not None:
        _require_place(out, root)
    errors: list[str] = []
    warnings: list[Oddity] = []
    splits = {folder.name: _list_split(folder, errors, warnings) for folder in _split_folders(root)}
    samples = [sample for split in splits.values() for sample in split]
    facts: dict[str, list[SceneFacts]] = {name: [] for name in splits}
    shown = set(np.linspace(0, len(samples) - 1, MAX_TILES).round().astype(int).tolist())
    tiles: list[Image.Image] = []
    for position, sample in enumerate(progress(samples)):
        scene = _read(sample, errors)
        if scene is None:
            continue
        facts[sample.split].append(measure(scene))
        name = f"{sample.split}/{sample.stem}"
        odd = [Oddity(sample=name, kind=kind, detail=detail) for kind, detail in oddities(scene)]
        if sample.image is not None and is_turned_file(sample.image):
            odd.append(Oddity(sample=name, kind="photograph that viewers turn (EXIF)", detail=""))
        warnings += odd
        if out is not None and position in shown:
            tiles.append(draw_tile(scene, name, odd[0].kind if odd else ""))
    if out is not None:
        # Full chroma resolution: thin coloured lines are what the sheet is about.
        write_picture(out, draw_sheet(tiles), "JPEG", quality=90, subsampling=0)
    return CheckReport(
        root=root,
        splits=tuple(_summary(name, splits[name], facts[name]) for name in splits),
        errors=tuple(errors),
        warnings=tuple(warnings),
    )


def measure(scene: Scene) -> SceneFacts:
    """Measure one sample."""
    height, width = scene.scribbles.shape
    object_share = None
    if scene.mask is not None:
        num_known = np.count_nonzero(scene.mask != UNLABELLED)
        object_share = float(np.count_nonzero(scene.mask == OBJECT) / max(num_known, 1))
    strokes = [scene.scribbles == value for value in (OBJECT, BACKGROUND)]
    shares = [float(each.mean()) for each in strokes]
    return SceneFacts(
        width=width,
        height=height,
        object_share=object_share,
        stroke_shares=(shares[0], shares[1]),
        num_strokes=(_num_parts(strokes[0]), _num_parts(strokes[1])),
    )


def oddities(scene: Scene) -> list[tuple[str, str]]:
    """Return what is odd about a sample, as (kind, detail)."""
    found: list[tuple[str, str]] = []
    object_stroke, background_stroke = scene.scribbles == OBJECT, scene.scribbles == BACKGROUND
    num_pixels = np.count_nonzero(object_stroke | background_stroke)
    match bool(object_stroke.any()), bool(background_stroke.any()):
        case False, False:
            found.append(("no strokes", ""))
        case False, True:
            found.append(("no object stroke", ""))
        case True, False:
            found.append(("no background stroke", ""))
        case _:
            pass
    if is_covered(scene.scribbles):
        share = num_pixels / scene.scribbles.size
        found.append(("strokes cover more than half of the image", f"{share:.0%}"))
    if scene.mask is not None and not (scene.mask == OBJECT).any():
        found.append(("no object in the mask", ""))
    num_wrong = num_contradicting(scene)
    if num_wrong > 0:
        detail = f"{num_wrong} of {num_pixels} stroke pixels"
        found.append(("strokes contradict the mask", detail))
    return found


def _require_place(out: Path, root: Path) -> None:
    """Raise an `InputError` where the sheet would be among the data, or cannot be written."""
    folder = out.resolve().parent
    if out.is_dir():
        raise _unwritable(out, "is a folder")
    if folder.name in FOLDERS and folder.is_relative_to(root.resolve()):
        raise InputError(f"{out}: is among the data; give the contact sheet another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error.strerror) from None
    if not os.access(folder, os.W_OK):
        raise _unwritable(out, "permission denied")


def _unwritable(out: Path, reason: str | None) -> InputError:
    return InputError(
        f"{out}: {(reason or 'unknown error').lower()}; expected a place that can be written: "
        "give the contact sheet another --out"
    )


def _split_folders(root: Path) -> list[Path]:
    """Return the folders in `root` that hold any of the contract's folders, sorted."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; expected ROOT that holds SPLIT/images")
    require_above_splits(root)
    splits = sorted({path.parent for name in FOLDERS for path in root.glob(f"*/{name}")})
    if not splits:
        raise InputError(f"{root}: found no SPLIT/images; expected a folder of splits, as train/")
    return splits


def _list_split(folder: Path, errors: list[str], warnings: list[Oddity]) -> list[_Sample]:
    """Return the samples of a split, sorted by stem; note files that do not match."""
    files: dict[str, dict[str, Path]] = {}
    for name in FOLDERS:
        if name == "ground_truth" and not (folder / name).exists():
            continue
        suffixes = IMAGE_SUFFIXES if name == "images" else LABEL_SUFFIXES
        try:
            files[name] = list_files(folder / name, suffixes)
        except InputError as error:
            errors.append(str(error))
            continue
        for path in files[name].values():
            try:
                require_utf8(path)
            except InputError as error:
                errors.append(str(error))
        warnings += _passed_over(folder / name, files[name].values())
    images = files.get("images")
    if images == {}:
        errors.append(f"{folder / 'images'}: found no .jpg or .png file, expected the photographs")
    stems = sorted({stem for there in files.values() for stem in there})
    for name, there in files.items():
        if are_respelled(images or (), there):
            errors.append(f"{folder / name} and images: {RESPELL.format(shlex.quote(str(folder)))}")
        # Every stem is held against the images, and the images against every other folder.
        for stem in sorted(set(images or ()) - set(there)):
            errors.append(
                f"{folder / name / stem}.png: missing; expected a file for every image; add it, or "
                f"remove {folder / 'images' / stem}.*"
            )
        for stem in sorted(set(there) - set(images)) if images else ():
            errors.append(
                f"{there[stem]}: found no image of this stem, expected {folder / 'images' / stem}"
                ".jpg or .png; add it, or remove this file"
            )
    return [
        _Sample(
            split=folder.name,
            stem=stem,
            image=files.get("images", {}).get(stem),
            scribbles=files.get("scribbles", {}).get(stem),
            mask=files.get("ground_truth", {}).get(stem),
        )
        for stem in stems
    ]


def _passed_over(folder: Path, used: Collection[Path]) -> list[Oddity]:
    """Return a warning for each visible file that has a suffix nobody reads."""
    others = {path for path in folder.iterdir() if not path.name.startswith(".")} - set(used)
    return [Oddity(sample=str(path), kind="file is passed over") for path in sorted(others)]


def _read(sample: _Sample, errors: list[str]) -> Scene | None:
    """Decode a sample, noting every error; None unless image and scribbles are whole and fit."""
    problems: list[str] = []
    image = _attempt(read_image, sample.image, problems)
    scribbles = _attempt(read_scribbles, sample.scribbles, problems)
    mask = _attempt(read_mask, sample.mask, problems)
    for path, labels in ((sample.scribbles, scribbles), (sample.mask, mask)):
        if image is not None and sample.image and labels is not None and path:
            try:
                require_same_size(path, labels, sample.image, image)
            except InputError as error:
                problems.append(str(error))
    errors += problems
    if problems or image is None or scribbles is None:
        return None
    return Scene(stem=sample.stem, image=image, scribbles=scribbles, mask=mask)


def _attempt(
    read: Callable[[Path], np.ndarray], path: Path | None, problems: list[str]
) -> np.ndarray | None:
    """Read a file that exists; an error is noted instead of raised."""
    try:
        return None if path is None else read(path)
    except InputError as error:
        problems.append(str(error))
        return None


def _table(splits: Sequence[SplitSummary]) -> list[str]:
    """Return the summaries as aligned lines."""
    rows = [
        ["split", "images", "scribbles", "masks", "size", "object"]
        + ["object strokes", "background strokes"]
    ]
    for split in splits:
        sizes = split.sizes
        size = sizes[0][0] if sizes else "-"
        share = split.object_share
        strokes = [
            f"{area:.2%} in {number:.1f}"
            for area, number in zip(split.stroke_shares, split.num_strokes, strict=True)
        ]
        rows.append(
            [
                split.name,
                str(split.num_images),
                str(split.num_scribbles),
                str(split.num_masks),
                size if len(sizes) < 2 else f"{size} and {len(sizes) - 1} other",
                "-" if share is None else f"{share:.1%}",
                *strokes,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _summary(name: str, samples: Sequence[_Sample], facts: Sequence[SceneFacts]) -> SplitSummary:
    """Return the summary of one split."""
    return SplitSummary(
        name=name,
        num_images=sum(each.image is not None for each in samples),
        num_scribbles=sum(each.scribbles is not None for each in samples),
        num_masks=sum(each.mask is not None for each in samples),
        facts=tuple(facts),
    )


def _num_parts(region: Bool[np.ndarray, "h w"]) -> int:
    """Return the number of 8-connected parts."""
    num_components, _ = cv2.connectedComponents(region.view(np.uint8))
    # OpenCV counts what is outside as a component of its own.
    return num_components - 1


def _mean_pair(
    pairs: Sequence[tuple[float, float]] | Sequence[tuple[int, int]],
) -> tuple[float, float]:
    """Return the mean of each place; zeros where there is nothing."""
    first, second = np.mean(pairs, axis=0).tolist() if pairs else (0.0, 0.0)
    return first, second


def _count(number: int, noun: str) -> str:
    """Return "1 error" or "2 errors"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
