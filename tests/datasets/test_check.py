"""The doctor finds every bad file, says what is odd, and measures the rest."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from scribbleseg.datasets.check import check, measure, oddities
from scribbleseg.datasets.scenes import Scene, list_scenes, read_scene
from scribbleseg.datasets.sheet import OBJECT_COLOUR, draw_tile
from scribbleseg.errors import InputError


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    """Write an array with Pillow, converted to `mode`."""
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path)


def scene(scribbles: np.ndarray, mask: np.ndarray | None) -> Scene:
    """Return a black scene."""
    image = np.zeros((*scribbles.shape, 3), np.uint8)
    return Scene(stem="a", image=image, scribbles=scribbles, mask=mask)


def test_a_good_folder(tiny_root: Path, tmp_path: Path):
    report = check(tiny_root, tmp_path / "sheet.jpg")
    assert report.errors == () and report.warnings == ()
    (split,) = report.splits
    assert (split.name, split.num_images, split.num_scribbles, split.num_masks) == (
        "train",
        3,
        3,
        3,
    )
    assert split.sizes == [("12x8", 3)]
    assert split.object_share == pytest.approx(24 / 96)
    assert split.stroke_shares == pytest.approx((4 / 96, 10 / 96))
    assert split.num_strokes == (1, 1)
    assert "no errors" in report.text() and "12x8" in report.text()
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
        pixels = np.array(sheet.convert("RGB")).astype(int)
    # The object stroke of the first tile is drawn in its colour.
    assert (np.abs(pixels - OBJECT_COLOUR).sum(-1) < 30).sum() > 100


def test_the_sheet_is_not_drawn_over_the_data(tiny_root: Path):
    photograph = tiny_root / "train" / "images" / "a.png"
    before = photograph.read_bytes()
    with pytest.raises(InputError, match="a.png: is among the data"):
        check(tiny_root, photograph)
    assert photograph.read_bytes() == before
    with pytest.raises(InputError, match="expected a place that can be written"):
        check(tiny_root, photograph / "sheet.jpg")
    check(tiny_root, tiny_root / "sheet.jpg")


def test_photographs_that_viewers_turn_are_told_of(tiny_root: Path):
    path = tiny_root / "train" / "images" / "a.png"
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[274] = 3
        picture.save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()
    report = check(tiny_root)
    (odd,) = [each for each in report.warnings if "EXIF" in each.kind]
    assert odd.sample == "train/a" and report.errors == ()


def test_a_damaged_note_of_how_to_turn_is_no_error(tiny_root: Path):
    path = tiny_root / "train" / "images" / "a.png"
    with Image.open(path) as picture:
        picture.save(path, exif=b"Exif\0\0GARBAGEGARBAGE")
    assert check(tiny_root).errors == ()


def test_every_error_is_collected(tiny_root: Path):
    folder = tiny_root / "train"
    rng = np.random.default_rng(0)
    content = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "a.png").write_bytes(content[: len(content) // 2])
    save(folder / "scribbles" / "a.png", np.array([[0, 1, 2]], np.uint8))
    save(folder / "ground_truth" / "b.png", np.array([[0, 255]], np.uint8))
    save(folder / "scribbles" / "c.png", np.full((5, 12), 255, np.uint8))
    (folder / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(content)
    save(folder / "images" / "d.png", rng.integers(0, 256, (8, 12, 4), np.uint8))
    save(folder / "scribbles" / "e.png", np.full((8, 12), 255, np.uint8))
    save(folder / "images" / "f.jpg", rng.integers(0, 256, (8, 12, 3), np.uint8), "CMYK")
    assert cv2.imwrite(str(folder / "images" / "g.png"), np.full((8, 12, 3), 999, np.uint16))
    (tiny_root / "test" / "images").mkdir(parents=True)
    report = check(tiny_root)
    wanted = [
        ("images/a.png", "truncated"),
        ("scribbles/a.png", "0, 1, 2"),
        ("ground_truth/b.png", "0, 255"),
        ("scribbles/c.png", "12x5"),
        ("images/d.png", "transparent"),
        ("scribbles/d.png", "missing"),
        ("ground_truth/d.png", "missing"),
        ("scribbles/e.png", "no image"),
        ("images/f.jpg", "CMYK"),
        ("scribbles/f.png", "missing"),
        ("caf\\xe9.png", "not UTF-8; rename"),
        ("images/g.png", "16 bits"),
        ("test/images", "no .jpg"),
        ("test/scribbles", "no such file"),
    ]
    for path, problem in wanted:
        assert any(path in line and problem in line for line in report.errors), (path, problem)
    assert all("\n" not in line for line in report.errors)
    text = report.text(limit=3)
    assert f"{len(report.errors)} errors" in text and "more" in text


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"mask": 0}, "no object in the mask"),
        ({"strokes": 255}, "no strokes"),
        ({"object": 255}, "no object stroke"),
        ({"background": 255}, "no background stroke"),
        ({"object": 0, "background": 1}, "strokes contradict the mask"),
        ({"unlabelled": 0}, "strokes cover more than half of the image"),
    ],
)
def test_oddities(change: dict[str, int], kind: str):
    mask = np.zeros((8, 12), np.uint8)
    mask[2:6, 3:9] = change.get("mask", 1)
    scribbles = np.full((8, 12), change.get("unlabelled", 255), np.uint8)
    scribbles[4, 4:8] = change.get("strokes", change.get("object", 1))
    scribbles[0] = change.get("strokes", change.get("background", 0))
    assert kind in [found for found, _ in oddities(scene(scribbles, mask))]


def test_odd_samples_are_counted_and_listed(tiny_root: Path):
    for stem in ("a", "c"):
        save(tiny_root / "train" / "scribbles" / f"{stem}.png", np.full((8, 12), 255, np.uint8))
    (tiny_root / "train" / "images" / "a.webp").write_bytes(b"")
    report = check(tiny_root)
    assert report.errors == ()
    assert "2 x no strokes: train/a, train/c" in report.text()
    assert "a.webp: file is passed over" in "\n".join(map(str, report.warnings))


def test_measures_against_a_flood_fill():
    rng = np.random.default_rng(0)
    scribbles = rng.choice([0, 1, 255, 255, 255], (20, 30)).astype(np.uint8)
    mask = rng.choice([0, 1, 255], (20, 30)).astype(np.uint8)
    facts = measure(scene(scribbles, mask))
    assert facts.object_share == pytest.approx((mask == 1).sum() / (mask != 255).sum())
    for place, value in enumerate((1, 0)):
        left = {(int(y), int(x)) for y, x in zip(*np.nonzero(scribbles == value), strict=True)}
        assert facts.stroke_shares[place] == pytest.approx(len(left) / scribbles.size)
        number = 0
        while left:
            number += 1
            front = [left.pop()]
            while front:
                y, x = front.pop()
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                front += near
        assert facts.num_strokes[place] == number


def test_folders_that_hold_no_split(tiny_root: Path, tmp_path: Path):
    for root, words in (
        (tmp_path / "nowhere", "not a folder"),
        (tiny_root / "train", f"give {tiny_root}"),
        (tiny_root / "train" / "images", "no SPLIT/images"),
    ):
        with pytest.raises(InputError, match=words):
            check(root)


def test_names_in_another_unicode_spelling_are_told_of(tiny_root: Path):
    (tiny_root / "train" / "images" / "b.png").rename(tiny_root / "train/images/caf\u00e9.png")
    for folder in ("scribbles", "ground_truth"):
        path = tiny_root / "train" / folder / "b.png"
        path.rename(path.with_name("cafe\u0301.png"))
    respelled = [line for line in check(tiny_root).errors if "convmv" in line]
    assert [line.partition(" and images: ")[0] for line in respelled] == [
        str(tiny_root / "train" / folder) for folder in ("scribbles", "ground_truth")
    ]


def test_progress_sees_every_sample(tiny_root: Path):
    seen: list[str] = []

    def watch(samples):
        for sample in samples:
            seen.append(sample.stem)
            yield sample

    check(tiny_root, progress=watch)
    assert seen == ["a", "b", "c"]


def test_the_benchmarks_shares(benchmark: Path):
    scenes = list_scenes(benchmark, "train", need_masks=True)[::8]
    facts = [measure(read_scene(paths)) for paths in scenes]
    # 0.6 % of all pixels are object stroke and 0.9 % background stroke; this is an eighth of them.
    assert np.mean([each.stroke_shares for each in facts], axis=0) == pytest.approx(
        (0.006, 0.009), rel=0.2
    )
    assert all(oddities(read_scene(paths)) == [] for paths in scenes)


def test_a_name_of_two_lines_gets_a_tile() -> None:
    blank = np.zeros((20, 30), np.uint8)
    scene = Scene(stem="a", image=np.zeros((20, 30, 3), np.uint8), scribbles=blank, mask=blank)
    tiles = [draw_tile(scene, name, "wrong") for name in ("new\nline", "new?line")]
    assert np.array_equal(*map(np.asarray, tiles))
