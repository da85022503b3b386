"""Wrong codings are mended to the contract, doubtful ones are asked about."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from scribbleseg.datasets.check import check
from scribbleseg.datasets.convert import convert
from scribbleseg.datasets.scenes import encode_png, list_scenes, read_mask, read_scene
from scribbleseg.errors import InputError


def recode(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite every label file of a folder."""
    for path in folder.iterdir():
        with Image.open(path) as picture:
            labels = np.array(picture)
        assert cv2.imwrite(str(path), change(labels))


def lookup(inside: int, outside: int, unlabelled: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that replaces 1, 0 and 255 by other values."""
    table = np.zeros(256, np.uint8)
    table[[1, 0, 255]] = inside, outside, unlabelled
    return lambda labels: table[labels]


def scenes(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Return all decoded samples of `train`."""
    decoded = map(read_scene, list_scenes(root, "train", need_masks=True))
    return {each.stem: (each.image, each.scribbles, each.mask) for each in decoded}


def same(left: Path, right: Path) -> None:
    """Assert that two folders decode alike, and that the second has no errors."""
    assert check(right).errors == ()
    for stem, arrays in scenes(left).items():
        for first, second in zip(arrays, scenes(right)[stem], strict=True):
            assert np.array_equal(first, second)


@pytest.fixture
def original(tiny_root: Path, tmp_path: Path) -> Path:
    """An untouched copy of the tiny folder."""
    copy = tmp_path / "original"
    actions = convert(tiny_root, copy)
    assert {each.action for each in actions} == {"copied"} and len(actions) == 9
    for path in tiny_root.rglob("*.png"):
        assert path.read_bytes() == (copy / path.relative_to(tiny_root)).read_bytes()
    return copy


def test_indices_with_colours_of_their_own_are_asked_about(tiny_root: Path, tmp_path: Path) -> None:
    """White, lime and red: an index says nothing where its colour does. VOC's colours do not."""

    def paint(*palette: int) -> None:
        for path in (tiny_root / "train" / "scribbles").iterdir():
            picture = Image.fromarray(np.array(Image.open(path)))
            picture.putpalette(palette)
            picture.save(path)

    recode(tiny_root / "train" / "scribbles", lookup(2, 1, 0))
    paint(255, 255, 255, 0, 255, 0, 255, 0, 0)
    with pytest.raises(InputError, match=r"a.png: found labels 0, 1, 2 in .*ff0000.* --stroke-col"):
        convert(tiny_root, tmp_path / "none")
    red, lime = 2, 1
    told = convert(tiny_root, tmp_path / "values", strokes=(red, lime, 0))
    assert "values 0 -> 255, 1 -> 0, 2 -> 1" in {each.action for each in told}
    convert(tiny_root, tmp_path / "colours", stroke_colours=("red", "lime"))
    same(tmp_path / "values", tmp_path / "colours")
    paint(0, 0, 0, 128, 0, 0, 0, 128, 0)
    assert convert(tiny_root, tmp_path / "voc")


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        ("scribbles", lookup(1, 2, 0)),
        ("scribbles", lookup(1, 0, 2)),
        ("scribbles", lambda labels: np.repeat(labels[..., None], 3, axis=2)),
        ("scribbles", lambda labels: labels.astype(np.uint16)),
        ("ground_truth", lambda labels: labels * 255),
        ("ground_truth", lambda labels: np.repeat(labels[..., None] * 255, 3, axis=2)),
        ("ground_truth", lambda labels: labels.astype(np.uint16) * 65535),
    ],
)
def test_codings_that_are_told(
    tiny_root: Path, original: Path, tmp_path: Path, folder: str, change: Callable
):
    recode(tiny_root / "train" / folder, change)
    mended = {
        each.path.parent.name
        for each in convert(tiny_root, tmp_path / "out")
        if each.action != "copied"
    }
    assert mended == {folder}
    same(original, tmp_path / "out")


def test_voc_like_masks(tiny_root: Path, original: Path, tmp_path: Path):
    truth = tiny_root / "train" / "ground_truth"
    for number, path in enumerate(sorted(truth.iterdir())):
        with Image.open(path) as picture:
            labels = np.array(picture)
        # The first file alone looks like a mask of 0 and 1.
        labels[labels == 1] = (1, 15, 20)[number]
        if number == 2:
            labels[0, 0] = 255
        assert cv2.imwrite(str(path), labels)
    convert(tiny_root, tmp_path / "out")
    same(original, tmp_path / "out")
    convert(tiny_root, tmp_path / "ignoring", keep_ignore=True)
    assert scenes(tmp_path / "ignoring")["c"][2][0, 0] == 255


@pytest.mark.parametrize(
    ("folder", "values", "words"),
    [
        ("scribbles", (1, 0, 128), "--strokes"),
        ("scribbles", (255, 128, 0), "--strokes"),
        # Mostly 0 in the contract's coding: 0 is probably not background here.
        ("scribbles", (1, 255, 0), "--strokes"),
        ("ground_truth", (2, 0, 0), "--masks"),
        ("ground_truth", (1, 2, 2), "--masks"),
        ("ground_truth", (254, 1, 1), "--masks"),
    ],
)
def test_doubt_names_the_option_that_settles_it(
    tiny_root: Path,
    original: Path,
    tmp_path: Path,
    folder: str,
    values: tuple[int, int, int],
    words: str,
):
    recode(tiny_root / "train" / folder, lookup(*values))
    with pytest.raises(InputError, match=words) as caught:
        convert(tiny_root, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    if folder == "scribbles":
        convert(tiny_root, tmp_path / "out", strokes=values)
    else:
        convert(tiny_root, tmp_path / "out", masks=(values[0], values[0]))
    same(original, tmp_path / "out")


def test_masks_of_two_codings_in_one_folder_are_not_mended_by_half(tiny_root: Path, tmp_path: Path):
    path = tiny_root / "train" / "ground_truth" / "a.png"
    Image.fromarray(np.array(Image.open(path)) * 255).save(path)
    with pytest.raises(InputError, match="a.png: found 255 and no 1.*--masks 1 255"):
        convert(tiny_root, tmp_path / "out")
    convert(tiny_root, tmp_path / "out", masks=(1, 255))
    mended = np.array(Image.open(tmp_path / "out" / "train" / "ground_truth" / "a.png"))
    assert set(np.unique(mended)) == {0, 1}


def test_masks_reduced_to_two_colours_are_asked_about(tiny_root: Path, tmp_path: Path):
    """Pillow numbers the frequent colour first, whichever it is: here white is background."""
    masks = sorted((tiny_root / "train" / "ground_truth").iterdir())
    for path in masks:
        object_white = Image.fromarray((np.array(Image.open(path)) == 1).astype(np.uint8) * 255)
        object_white.quantize(2).save(path)
    with pytest.raises(InputError, match=r"1, the object, in black.*--masks 1 1"):
        read_mask(masks[0])
    with pytest.raises(InputError, match=r"save masks as grey 0 and 255; .*--masks 1 1"):
        convert(tiny_root, tmp_path / "out")
    indices = np.array(Image.open(masks[0]))
    assert set(np.unique(indices)) == {0, 1}
    done = convert(tiny_root, tmp_path / "out", masks=(1, 1))
    assert [d.action for d in done if d.path == masks[0]] == [
        "black and white -> a palette of labels"
    ]
    found = read_mask(tmp_path / "out" / "train" / "ground_truth" / masks[0].name)
    np.testing.assert_array_equal(found, indices)


def test_a_predicted_mask_that_is_sure_of_no_object_stays_as_it_is(tiny_root: Path, tmp_path: Path):
    path = tiny_root / "train" / "ground_truth" / "a.png"
    mask = np.array(Image.open(path)) * 255
    path.write_bytes(encode_png(mask, predicted=True))
    convert(tiny_root, tmp_path / "out")
    copied = np.array(Image.open(tmp_path / "out" / "train" / "ground_truth" / "a.png"))
    np.testing.assert_array_equal(copied, mask)


def test_options_that_do_not_fit(tiny_root: Path, tmp_path: Path):
    for options, words in (
        ({"strokes": (1, 1, 0)}, "three different values"),
        ({"strokes": (1, 0, 256)}, "three different values"),
        ({"strokes": (1, 2, 0)}, "a.png: found values 255"),
        ({"masks": (9, 3)}, "LOWEST HIGHEST"),
    ):
        with pytest.raises(InputError, match=words):
            convert(tiny_root, tmp_path / "out", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_images_of_other_kinds(tiny_root: Path, tmp_path: Path):
    images = tiny_root / "train" / "images"
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (8, 12, 4), np.uint8)
    Image.fromarray(rgba).save(images / "a.png")
    (images / "b.png").unlink()
    cmyk = Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).convert("CMYK")
    cmyk.save(images / "b.jpg", quality=100)
    deep = rng.integers(0, 65536, (8, 12, 3), np.uint16)
    assert cv2.imwrite(str(images / "c.png"), deep[..., ::-1])
    done = convert(tiny_root, tmp_path / "out")
    actions = {each.path.name: each.action for each in done if each.path.parent.name == "images"}
    assert "white" in actions["a.png"] and "CMYK" in actions["b.jpg"]
    assert "8 bits" in actions["c.png"]
    mended = scenes(tmp_path / "out")
    alpha = rgba[..., 3:] / 255
    on_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(mended["a"][0] - on_white).max() <= 1
    with Image.open(images / "b.jpg") as stored:
        inks = np.array(stored).astype(float) / 255
    shown = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
    assert np.abs(mended["b"][0] - shown).max() <= 2
    assert np.array_equal(mended["c"][0], deep >> 8)


def test_16_bit_grey_images(tiny_root: Path, tmp_path: Path):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 12), np.uint16)
    assert cv2.imwrite(str(tiny_root / "train" / "images" / "a.png"), deep)
    convert(tiny_root, tmp_path / "out")
    assert np.array_equal(scenes(tmp_path / "out")["a"][0], np.repeat(deep[..., None] >> 8, 3, 2))


@pytest.mark.parametrize("folder", ["scribbles", "ground_truth"])
def test_what_cannot_be_mended(tiny_root: Path, tmp_path: Path, folder: str):
    path = tiny_root / "train" / folder / "b.png"
    whole = path.read_bytes()
    for labels, words in (
        (np.full((5, 12), 255 if folder == "scribbles" else 0, np.uint8), "12x5"),
        (np.random.default_rng(0).integers(0, 2, (8, 12, 3), np.uint8), "colours"),
        (np.full((8, 12), 300, np.uint16), "300"),
        (np.zeros((8, 12, 4), np.uint8), "transparent"),
        # Decoded to their upper 8 bits, 1 and 255 alike would be 0.
        (np.random.default_rng(0).integers(0, 2, (8, 12, 3), np.uint16), "16 bits in several"),
    ):
        assert cv2.imwrite(str(path), labels)
        with pytest.raises(InputError, match=words):
            convert(tiny_root, tmp_path / "out")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="whole PNG"):
        convert(tiny_root, tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match="no file for b"):
        convert(tiny_root, tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]


def test_never_in_place(tiny_root: Path, tmp_path: Path):
    with pytest.raises(InputError, match="already there"):
        convert(tiny_root, tiny_root)
    with pytest.raises(InputError, match="no SPLIT/images"):
        convert(tiny_root / "train", tmp_path / "out")


def test_a_place_that_cannot_be_written(tiny_root: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: not a directory; expected a folder that can"):
        convert(tiny_root, tmp_path / "file" / "out")


def drawn(labels: np.ndarray) -> np.ndarray:
    """Return strokes in red and lime, nearly, on nothing (BGR and alpha, as OpenCV writes them)."""
    drawing = np.zeros((*labels.shape, 4), np.uint8)
    drawing[labels == 1] = (8, 0, 250, 255)
    drawing[labels == 0] = (0, 240, 12, 255)
    return drawing


@pytest.mark.parametrize("colours", [("red", "lime"), ("#ff0000", "00FF00")])
@pytest.mark.parametrize("canvas", ["transparent", "white"])
def test_strokes_in_colours(
    tiny_root: Path, original: Path, tmp_path: Path, canvas: str, colours: tuple[str, str]
):
    def change(labels: np.ndarray) -> np.ndarray:
        drawing = drawn(labels)
        if canvas == "transparent":
            return drawing
        drawing[labels == 255] = 255
        return drawing[..., :3]

    recode(tiny_root / "train" / "scribbles", change)
    with pytest.raises(InputError, match="--stroke-colours OBJECT BACKGROUND"):
        convert(tiny_root, tmp_path / "out")
    mended = convert(tiny_root, tmp_path / "out", stroke_colours=colours)
    assert {each.path.parent.name for each in mended if each.action == "colours -> labels"} == {
        "scribbles"
    }
    same(original, tmp_path / "out")


def test_colours_that_nobody_explained_are_named_with_what_they_cover(
    tiny_root: Path, tmp_path: Path
):
    recode(tiny_root / "train" / "scribbles", lambda labels: drawn(labels)[..., :3])
    with pytest.raises(InputError, match=r"found colours 000000 \([0-9.]+%\).*fa0008"):
        convert(tiny_root, tmp_path / "out")
    for colours, words in (
        (("red", "blue"), "no pixel of the second"),
        (("yellow", "lime"), "no pixel of the first"),
        (("red", "reddish"), "holds 'reddish'; expected two colours"),
        (("ff0000", "ff4040"), "differ by more than 96"),
    ):
        with pytest.raises(InputError, match=words):
            convert(tiny_root, tmp_path / "out", stroke_colours=colours)
    with pytest.raises(InputError, match="both given"):
        convert(tiny_root, tmp_path / "out", strokes=(1, 2, 0), stroke_colours=("red", "lime"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny"]
