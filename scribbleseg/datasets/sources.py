"""Data made or fetched into the data contract: demo scenes, VOC 2012, Oxford pets, regions.

Each folder appears when it is complete and holds `source.json`, which says what made it. Asked for
again, it is left alone; a folder that holds anything else is never touched.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torchvision.datasets import (  # pyright: ignore[reportMissingTypeStubs]
    OxfordIIITPet,
    VOCSegmentation,
)

from scribbleseg.config import require
from scribbleseg.datasets.cache import read_ahead
from scribbleseg.datasets.demo import draw_demo_scene, photographs
from scribbleseg.datasets.files import (
    cache_folder,
    new_folder,
    open_picture,
    reason,
    write_picture,
)
from scribbleseg.datasets.pictures import Skipped, list_images, scale_down, why_not
from scribbleseg.datasets.regions import random_region
from scribbleseg.datasets.scenes import (
    BACKGROUND,
    OBJECT,
    UNLABELLED,
    read_image,
    require_same_size,
    write_png,
)
from scribbleseg.errors import InputError
from scribbleseg.scribbles.simulate import simulate

VOC_SPLITS = ("train", "test1")
PETS_SPLITS = {"train": "trainval", "test": "test"}

# The benchmark's strokes are curves three pixels wide; demo and fetched data get the same.
STROKE_WIDTH = 3.0

# Photographs to practise on are scaled down to this longer side, in pixels.
PRACTICE_LONG_SIDE = 512

Sample = tuple[str, str]
"""A split and a stem."""

Progress = Callable[[Sequence[Sample]], Iterable[Sample]]
"""Wraps the samples as they are written, for example in a progress bar."""


def make_demo(
    out: Path,
    seed: int = 0,
    *,
    num_train: int = 64,
    num_test: int = 32,
    progress: Progress = iter,
) -> bool:
    """Make composites of real photographs with masks and simulated strokes; see `demo`.

    Every sample is a function of (seed, split, position), so a larger set begins as a smaller one.

    Args:
        out: Folder to make, with the splits `train` and `test`.
        seed: Seed of all scenes (0 or more).
        num_train: Samples in `train`.
        num_test: Samples in `test`.
        progress: Wraps the samples as they are drawn.

    Returns:
        Whether the folder was made; False: it was there already.

    Raises:
        InputError: `out` exists and holds something else.
    """
    require(seed >= 0, "seed", seed, "0 or more")
    facts = {"source": "demo", "seed": seed, "num_train": num_train, "num_test": num_test}
    if _is_made(out, facts):
        return False
    numbers = {"train": num_train, "test": num_test}
    photos = photographs()
    samples = [
        (split, f"{split}_{position:04d}")
        for split, number in numbers.items()
        for position in range(number)
    ]
    with new_folder(out) as folder:
        for split, stem in progress(samples):
            generator = _generator(seed, stem)
            image, mask = draw_demo_scene(photos, generator)
            write_png(_sample_file(folder, split, "images", f"{stem}.png"), image)
            _write_labels(folder, split, stem, mask, generator)
        _write_facts(folder, facts)
    return True


def make_voc(
    out: Path,
    downloads: Path | None = None,
    *,
    seed: int = 0,
    progress: Progress = iter,
) -> bool:
    """Build the benchmark's images and masks from PASCAL VOC 2012, with simulated strokes.

    The images are those of `benchmark_stems`, byte for byte. A mask is 1 where VOC's class mask is
    any object; VOC's void border counts as background. Unlike the benchmark's, `test1` has masks.

    Args:
        out: Folder to make, with the splits `train` and `test1`.
        downloads: Folder for the archive (2 GB) and its content; None: `downloads_folder()`.
        seed: Seed of the strokes.
        progress: Wraps the samples as they are written.

    Returns:
        Whether the folder was made; False: it was there already.

    Raises:
        InputError: `out` exists and holds something else, or VOC lacks a file.
        OSError: the download failed.
    """
    facts = {"source": "voc", "seed": seed}
    if _is_made(out, facts):
        return False
    samples = [(split, stem) for split in VOC_SPLITS for stem in benchmark_stems(split)]
    voc = _fetch_voc(downloads or downloads_folder(), [stem for _, stem in samples])
    with new_folder(out) as folder:
        for split, stem in progress(samples):
            labels = _read_indices(voc / "SegmentationClass" / f"{stem}.png")
            mask = ((labels > 0) & (labels != 255)).astype(np.uint8)
            _write_photo(folder, split, stem, voc / "JPEGImages" / f"{stem}.jpg", mask)
            _write_labels(folder, split, stem, mask, _generator(seed, stem))
        _write_facts(folder, facts)
    return True


def make_pets(
    out: Path,
    downloads: Path | None = None,
    *,
    seed: int = 0,
    progress: Progress = iter,
) -> bool:
    """Build the Oxford-IIIT Pet data set, with simulated strokes: one cat or dog per image.

    Of the trimap, 1 (pet) is object, 2 background, and 3, the border, is ignored (255).

    Args:
        out: Folder to make, with the splits `train` (the data set's trainval) and `test`.
        downloads: Folder for the archives (0.8 GB) and their content; None: `downloads_folder()`.
        seed: Seed of the strokes.
        progress: Wraps the samples as they are written.

    Returns:
        Whether the folder was made; False: it was there already.

    Raises:
        InputError: `out` exists and holds something else, or the data set lacks a file.
        OSError: the download failed.
    """
    facts = {"source": "pets", "seed": seed}
    if _is_made(out, facts):
        return False
    pets, samples = _fetch_pets(downloads or downloads_folder())
    meaning = np.full(256, UNLABELLED, np.uint8)
    meaning[[1, 2]] = OBJECT, BACKGROUND
    with new_folder(out) as folder:
        for split, stem in progress(samples):
            mask = meaning[_read_indices(pets / "annotations" / "trimaps" / f"{stem}.png")]
            _write_photo(folder, split, stem, pets / "images" / f"{stem}.jpg", mask)
            _write_labels(folder, split, stem, mask, _generator(seed, stem))
        _write_facts(folder, facts)
    return True


def make_regions(
    images: Sequence[str | Path],
    out: Path,
    *,
    per_image: int = 4,
    seed: int = 0,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> list[Skipped] | None:
    """Make data to practise on from photographs without labels; see `regions.random_region`.

    Every region is a sample of its own in the split `train`, with its photograph, scaled down where
    the longer side is above 512 pixels, and simulated strokes. Stems are the photograph's number
    in the sorted list and the region's. A photograph that cannot be read, or has no region, is
    skipped.

    Args:
        images: Folders or URIs of photographs; all their subfolders are searched.
        out: Folder to make.
        per_image: Regions of each photograph (1 or more).
        seed: Seed of all regions and strokes (0 or more).
        progress: Wraps the photographs.

    Returns:
        The photographs that were skipped; None: the folder was there already.

    Raises:
        InputError: no photograph, none that can be used, or `out` exists and holds something else.
    """
    require(seed >= 0, "seed", seed, "0 or more")
    require(per_image >= 1, "per_image", per_image, "1 or more")
    roots = " ".join(str(root) for root in images)
    facts = {"source": "regions", "images": roots, "per_image": per_image, "seed": seed}
    if _is_made(out, facts):
        return None
    paths = list_images(images, option="--images")
    skipped: list[Skipped] = []
    with new_folder(out) as folder:
        work = partial(_write_regions, folder, paths, per_image, seed)
        outcomes = read_ahead(work, range(len(paths)))
        for path in progress(paths):
            why = next(outcomes)
            if why is not None:
                skipped.append(Skipped(path, why))
        if len(skipped) == len(paths):
            raise InputError(
                f"{paths[0]}: {skipped[0].reason}; none of the {len(paths)} images can be used; "
                "name other folders with --images"
            )
        _write_facts(folder, facts)
    return skipped


def _write_regions(
    folder: Path, paths: Sequence[Path], per_image: int, seed: int, position: int
) -> str | None:
    """Write the samples of one photograph; return why there are none."""
    try:
        image = read_image(paths[position])
    except (InputError, OSError) as error:
        return why_not(paths[position], error)
    image = scale_down(image, PRACTICE_LONG_SIDE / max(image.shape[:2]))
    found = False
    for number in range(per_image):
        generator = np.random.default_rng([seed, position, number])
        mask = random_region(image, generator)
        if mask is None:
            continue
        stem = f"{position:06d}-{number}"
        photo = _sample_file(folder, "train", "images", f"{stem}.jpg")
        write_picture(photo, Image.fromarray(image), "JPEG", quality=95)
        _write_labels(folder, "train", stem, mask, generator)
        found = True
    return None if found else "found no region of 2 to 60 % of its pixels"


def benchmark_stems(split: str) -> list[str]:
    """Return the stems of the benchmark's split `train` or `test1`, sorted."""
    lists = resources.files("scribbleseg.datasets") / "lists" / "scribble-voc"
    return (lists / f"{split}.txt").read_text().split()


def downloads_folder() -> Path:
    """Return where archives are kept: downloads/ in $SCRIBBLESEG_CACHE or ~/.cache/scribbleseg."""
    return cache_folder() / "downloads"


def _fetch_voc(downloads: Path, stems: Sequence[str]) -> Path:
    """Return the folder of VOC 2012 in `downloads`; download and extract what is not there."""
    voc = downloads / "VOCdevkit" / "VOC2012"
    needed = [
        path
        for stem in stems
        for path in (voc / "JPEGImages" / f"{stem}.jpg", voc / "SegmentationClass" / f"{stem}.png")
    ]
    # torchvision extracts all 2 GB again at each call, so it is asked only for what is missing.
    if not all(path.is_file() for path in needed):
        _download(
            lambda: VOCSegmentation(downloads, year="2012", image_set="trainval", download=True),
            "PASCAL VOC 2012",
            downloads,
        )
    _require_files(needed, downloads)
    return voc


def _fetch_pets(downloads: Path) -> tuple[Path, list[Sample]]:
    """Return the folder of the pets in `downloads`, fetched if need be, and its samples."""
    pets = downloads / "oxford-iiit-pet"
    _download(lambda: OxfordIIITPet(downloads, download=True), "Oxford-IIIT Pet", downloads)
    samples = [
        (split, line.split()[0])
        for split, name in PETS_SPLITS.items()
        for line in sorted((pets / "annotations" / f"{name}.txt").read_text().splitlines())
    ]
    needed = [
        path
        for _, stem in samples
        for path in (
            pets / "images" / f"{stem}.jpg",
            pets / "annotations" / "trimaps" / f"{stem}.png",
        )
    ]
    _require_files(needed, pets)
    return pets, samples


def _download(fetch: Callable[[], object], name: str, downloads: Path) -> None:
    """Let torchvision download, verify (md5) and extract; a failure becomes one line."""
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        fetch()
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{name}: the download failed ({reason(error)}); run the command again, or put the "
            f"archive into {downloads} by hand"
        ) from error


def _require_files(paths: Sequence[Path], folder: Path) -> None:
    """Raise an `InputError` that names the first file that is missing."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: missing, with {len(missing) - 1} others; expected what the archive "
            f"holds; remove {folder} and run the command again"
        )


def _read_indices(path: Path) -> UInt8[np.ndarray, "h w"]:
    """Return the stored values of a palette or grey PNG."""
    with open_picture(path, ("PNG",)) as picture:
        return np.array(picture)


def _write_photo(
    folder: Path, split: str, stem: str, source: Path, mask: UInt8[np.ndarray, "h w"]
) -> None:
    """Copy a JPEG byte for byte; a file of another kind (pets has some) becomes an RGB PNG."""
    with open_picture(source, ("JPEG", "PNG", "GIF")) as picture:
        pixels = np.array(picture.convert("RGB"))
        is_plain = picture.format == "JPEG" and picture.mode in ("L", "RGB")
    require_same_size(source, mask, source, pixels)
    if is_plain:
        shutil.copyfile(source, _sample_file(folder, split, "images", f"{stem}.jpg"))
    else:
        write_png(_sample_file(folder, split, "images", f"{stem}.png"), pixels)


def _write_labels(
    folder: Path,
    split: str,
    stem: str,
    mask: UInt8[np.ndarray, "h w"],
    generator: np.random.Generator,
) -> None:
    """Write a mask, and strokes simulated from it."""
    strokes = simulate(mask, generator, style="curve", width=STROKE_WIDTH)
    write_png(_sample_file(folder, split, "scribbles", f"{stem}.png"), strokes, palette=True)
    write_png(_sample_file(folder, split, "ground_truth", f"{stem}.png"), mask, palette=True)


def _sample_file(folder: Path, split: str, kind: str, name: str) -> Path:
    """Return the path of a file of the data contract; its folder is made."""
    path = folder / split / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _generator(seed: int, stem: str) -> np.random.Generator:
    """Return the generator of one sample: a function of the seed and the stem alone."""
    return np.random.default_rng([seed, zlib.crc32(stem.encode())])


def _is_made(out: Path, facts: dict[str, str | int]) -> bool:
    """Return whether `out` was made from the same facts; False if it is absent or empty.

    Raises:
        InputError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    wanted = ", ".join(f"{key} {value}" for key, value in facts.items())
    try:
        found = json.loads((out / "source.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != facts:
        raise InputError(
            f"{out}: holds something else, expected a new folder or one with {wanted}; name "
            "another --out"
        )
    return True


def _write_facts(folder: Path, facts: dict[str, str | int]) -> None:
    """Say what made the folder."""
    (folder / "source.json").write_text(json.dumps(facts, indent=1) + "\n")
