"""The data contract: what is read, and every way in which it is refused."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from scribbleseg.datasets.files import (
    FileBytes,
    NotAPictureError,
    TooManyPixelsError,
    require_pixels,
)
from scribbleseg.datasets.scenes import (
    encode_png,
    fold_stems,
    label_values,
    list_scenes,
    list_splits,
    read_drawn,
    read_image,
    read_mask,
    read_scene,
    read_scribbles,
    write_png,
)
from scribbleseg.errors import InputError
from scribbleseg.manifest import write_bytes


def one_line(caught: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    """Assert that the message is one line and names all `parts`."""
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Write an array with Pillow, converted to `mode`."""
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    """Return random bytes."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_lists_sorted_samples(tiny_root: Path):
    scenes = list_scenes(tiny_root, "train", need_masks=True)
    assert [paths.stem for paths in scenes] == ["a", "b", "c"]
    assert all(
        {path.stem for path in (paths.image, paths.scribbles, paths.ground_truth)} == {paths.stem}
        for paths in scenes
    )
    assert list_splits(tiny_root) == ["train"]


def test_reads_what_was_stored(tiny_root: Path):
    scene = read_scene(list_scenes(tiny_root, "train", need_masks=True)[1])
    folder = tiny_root / "train"
    # OpenCV as an independent reader.
    assert np.array_equal(scene.image, cv2.imread(str(folder / "images" / "b.png"))[..., ::-1])
    for name, labels in (("scribbles", scene.scribbles), ("ground_truth", scene.mask)):
        stored = cv2.imread(str(folder / name / "b.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(labels, stored)


def test_masks_may_be_absent(tiny_root: Path):
    truth = tiny_root / "train" / "ground_truth"
    (truth / "b.png").unlink()
    scenes = list_scenes(tiny_root, "train", need_masks=False)
    assert [paths.ground_truth is None for paths in scenes] == [False, True, False]
    assert read_scene(scenes[1]).mask is None
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=True)
    one_line(caught, "ground_truth", "b")
    for path in truth.iterdir():
        path.unlink()
    truth.rmdir()
    assert list_scenes(tiny_root, "train", need_masks=False)[0].ground_truth is None
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=True)
    one_line(caught, "ground_truth", "no such folder", "--data.fold None")


def test_names_that_no_table_of_text_can_hold(tiny_root: Path):
    images = tiny_root / "train" / "images"
    (images / "b.png").rename(images / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=True)
    one_line(caught, "images: found the file name caf\\xe9.png, which is not UTF-8", "rename")
    str(caught.value).encode()


def test_missing_folders_and_images(tiny_root: Path):
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root / "nowhere", "train", need_masks=False)
    one_line(caught, "nowhere", "not a folder")
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "test", need_masks=False)
    one_line(caught, "test", "train")
    for path in (tiny_root / "train" / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=False)
    one_line(caught, "images", "no .jpg or .png")


@pytest.mark.parametrize(("folder", "other"), [("images", "scribbles"), ("scribbles", "images")])
def test_stems_that_do_not_match(tiny_root: Path, folder: str, other: str):
    (tiny_root / "train" / folder / "c.png").unlink()
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=False)
    one_line(caught, f"{tiny_root / 'train' / folder}: found no file for c", other)


def test_stems_in_another_unicode_spelling(tiny_root: Path):
    (tiny_root / "train" / "images" / "b.png").rename(tiny_root / "train/images/caf\u00e9.png")
    (tiny_root / "train" / "scribbles" / "b.png").rename(
        tiny_root / "train/scribbles/cafe\u0301.png"
    )
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=False)
    one_line(caught, "scribbles: found no file for", "Unicode", f"--nfc {tiny_root / 'train'}`")


def test_a_split_in_place_of_its_root(tiny_root: Path):
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root / "train", "train", need_masks=False)
    one_line(caught, "this is one split", f"give {tiny_root}")


def test_two_images_of_one_stem(tiny_root: Path):
    save(tiny_root / "train" / "images" / "a.jpg", noise(8, 12, 3))
    with pytest.raises(InputError) as caught:
        list_scenes(tiny_root, "train", need_masks=False)
    one_line(caught, "a.jpg and a.png")


def test_hidden_and_foreign_files_are_passed_over(tiny_root: Path):
    for name in (".DS_Store", "._a.png", "notes.txt"):
        (tiny_root / "train" / "images" / name).write_text("x")
    assert len(list_scenes(tiny_root, "train", need_masks=True)) == 3


def test_sizes_that_differ(tiny_root: Path):
    save(tiny_root / "train" / "scribbles" / "a.png", np.full((9, 12), 255, np.uint8))
    with pytest.raises(InputError) as caught:
        read_scene(list_scenes(tiny_root, "train", need_masks=True)[0])
    one_line(caught, "scribbles", "12x9", "12x8", "same size")
    save(tiny_root / "train" / "scribbles" / "a.png", np.full((12, 8), 255, np.uint8))
    with pytest.raises(InputError) as caught:
        read_scene(list_scenes(tiny_root, "train", need_masks=True)[0])
    one_line(caught, "8x12", "12x8", "upright")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_grey_palette_and_opaque_images_become_rgb(tmp_path: Path, mode: str):
    picture = Image.fromarray(noise(8, 12, 3)).convert(mode)
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.array(picture.convert("RGB")))


def test_exif_orientation_is_not_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6
    path = save(tmp_path / "a.jpg", noise(8, 12, 3), exif=exif)
    assert read_image(path).shape == (8, 12, 3)


def test_transparent_images_are_refused(tmp_path: Path):
    pixels = noise(8, 12, 4)
    with pytest.raises(InputError) as caught:
        read_image(save(tmp_path / "a.png", pixels))
    one_line(caught, "a.png", "transparent", "data convert")
    palette = Image.fromarray(noise(8, 12, 3)).convert("P")
    palette.save(tmp_path / "p.png", transparency=int(np.array(palette)[0, 0]))
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "p.png")
    one_line(caught, "transparent")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_masks_are_exported_anew(tmp_path: Path, mode: str):
    mask = np.zeros((8, 12, 4), np.uint8)
    mask[2:4] = 255
    path = save(tmp_path / "a.png", mask, mode)
    with pytest.raises(InputError) as caught:
        read_mask(path)
    one_line(caught, "a.png: found transparent pixels", "without alpha")
    # Of strokes, and where nothing is transparent, it is known what is meant.
    for read, each in ((read_scribbles, path), (read_mask, save(path, mask | 255, mode))):
        with pytest.raises(InputError, match="data convert"):
            read(each)


def test_cmyk_and_16_bits_are_refused(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        read_image(save(tmp_path / "a.jpg", noise(8, 12, 3), "CMYK"))
    one_line(caught, "a.jpg", "CMYK", "data convert")
    for name, shape in (("grey", (8, 12)), ("colour", (8, 12, 3))):
        path = tmp_path / f"{name}.png"
        assert cv2.imwrite(str(path), noise(*shape).astype(np.uint16) * 257)
        for read in (read_image, read_scribbles, read_mask):
            with pytest.raises(InputError) as caught:
                read(path)
            one_line(caught, path.name, "16 bits", "data convert")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, name: str, share: float):
    path = save(tmp_path / name, noise(64, 64, 3))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught:
        read_image(path)
    one_line(caught, name, "expected a whole JPEG or PNG")


def test_damaged_and_foreign_files(tmp_path: Path):
    path = save(tmp_path / "a.png", noise(64, 64, 3))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_image(path)
    # A BMP by another name: Pillow would open it, the contract does not know it.
    with pytest.raises(InputError) as caught:
        read_image(save(tmp_path / "b.png", noise(8, 12, 3), format="BMP"))
    one_line(caught, "b.png", "not such a picture")
    with pytest.raises(InputError) as caught:
        read_mask(save(tmp_path / "c.png", noise(8, 12), format="JPEG"))
    one_line(caught, "c.png", "PNG")
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "missing.png")
    one_line(caught, "missing.png", "no such file")


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_scribbles_have_one_channel_or_three_equal_ones(tmp_path: Path, mode: str):
    scribbles = np.random.default_rng(0).choice([0, 1, 255], (8, 12)).astype(np.uint8)
    path = tmp_path / "a.png"
    if mode == "P":
        write_png(path, scribbles, palette=True)
    else:
        save(path, scribbles, mode)
    assert np.array_equal(read_scribbles(path), scribbles)
    assert np.array_equal(read_mask(path), scribbles)


def test_colours_are_no_labels(tmp_path: Path):
    path = save(tmp_path / "a.png", noise(8, 12, 3) % 2)
    for read in (read_scribbles, read_mask):
        with pytest.raises(InputError) as caught:
            read(path)
        one_line(caught, "a.png", "colours", "data convert")


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 1, 254), (0, 128, 255)])
def test_other_values_are_refused(tmp_path: Path, values: tuple[int, ...]):
    path = save(tmp_path / "a.png", np.array([values] * 4, np.uint8))
    for read in (read_scribbles, read_mask):
        with pytest.raises(InputError) as caught:
            read(path)
        one_line(caught, "a.png", ", ".join(map(str, values)), "data convert")


def test_a_mask_of_0_and_255_is_refused_but_such_strokes_are_not(tmp_path: Path):
    path = save(tmp_path / "a.png", np.array([[0, 255]] * 4, np.uint8))
    with pytest.raises(InputError) as caught:
        read_mask(path)
    one_line(caught, "a.png", "0, 255", "data convert")
    assert label_values(read_scribbles(path)) == [0, 255]


def test_a_predicted_mask_may_be_sure_of_no_object(tmp_path: Path):
    mask = np.array([[0, 255]] * 4, np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(mask, palette=True, predicted=True))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)


def test_a_picture_that_pillow_will_not_open_is_told_by_its_size(tmp_path: Path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((64, 64), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError) as caught:
        read_image(path)
    one_line(caught, "a.png", "megapixels", "scale it down")


def test_a_bilevel_mask_is_0_and_1(tmp_path: Path):
    mask = np.eye(8, dtype=np.uint8)
    path = save(tmp_path / "a.png", mask * 255, "1")
    assert np.array_equal(read_mask(path), mask)


def test_folds_against_a_slow_loop():
    stems = [f"{number:02d}" for number in np.random.default_rng(0).permutation(23)]
    for fold in range(5):
        train, validation = fold_stems(stems, fold, 5)
        expected: tuple[list[str], list[str]] = ([], [])
        for position, stem in enumerate(sorted(stems)):
            expected[position % 5 == fold].append(stem)
        assert (train, validation) == expected


@pytest.mark.parametrize(("fold", "num_folds"), [(5, 5), (-1, 5), (0, 1), (0, 4)])
def test_folds_out_of_range(fold: int, num_folds: int):
    with pytest.raises(InputError):
        fold_stems(["a", "b", "c"] if num_folds == 4 else list("abcdef"), fold, num_folds)


def test_fewer_samples_than_folds():
    with pytest.raises(InputError) as caught:
        fold_stems(["a"], 0, 5)
    one_line(caught, "5 fold(s) of 1 sample(s)", "--data.fold None", "without --fold")


def test_palette_keeps_values_and_shows_them(tmp_path: Path):
    labels = np.array([[0, 1, 255]], np.uint8)
    write_png(tmp_path / "a.png", labels, palette=True)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), labels)
        colours = np.array(picture.convert("RGB")).astype(int)[0]
    assert min(np.abs(colours[i] - colours[j]).sum() for i in range(3) for j in range(i)) > 150


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    write_png(path, noise(4, 4))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError):
        write_png(path, noise(8, 8))
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as picture:
        assert picture.size == (4, 4)


def test_the_benchmark_keeps_the_contract(benchmark: Path):
    train = list_scenes(benchmark, "train", need_masks=True)
    test = list_scenes(benchmark, "test1", need_masks=False)
    assert (len(train), len(test)) == (228, 226)
    assert all(paths.ground_truth is None for paths in test)
    scene = read_scene(train[0])
    assert scene.image.shape == (375, 500, 3) and scene.mask is not None
    assert not (scene.mask[scene.scribbles == 1] == 0).any()


def test_files_in_memory_are_read_as_those_on_disk(tiny_root):
    (paths, *_) = list_scenes(tiny_root, "train", need_masks=False)
    image, strokes = (
        FileBytes(name=name, content=path.read_bytes())
        for name, path in (("image", paths.image), ("strokes", paths.scribbles))
    )
    scene, on_disk = read_drawn("a", image, strokes), read_scene(paths)
    np.testing.assert_array_equal(scene.image, on_disk.image)
    np.testing.assert_array_equal(scene.scribbles, on_disk.scribbles)
    with pytest.raises(NotAPictureError, match="^image: not such a picture"):
        read_drawn("a", FileBytes(name="image", content=b"GIF89a"), strokes)
    with pytest.raises(InputError, match="^image: .*truncated"):
        read_drawn("a", FileBytes(name="image", content=image.content[:-30]), strokes)


@pytest.mark.parametrize("palette", [False, True])
def test_a_png_in_memory_is_the_file_to_the_last_bit(tmp_path, palette):
    labels = np.random.default_rng(0).integers(0, 2, (40, 60), np.uint8)
    write_png(tmp_path / "a.png", labels, palette=palette)
    assert encode_png(labels, palette=palette) == (tmp_path / "a.png").read_bytes()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces a picture of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("size", [(101, 100), (10_000, 10_000), (60_000, 60_000)])
def test_pictures_of_too_many_pixels_are_refused_undecoded(size):
    file = FileBytes(name="image", content=bomb(*size))
    with pytest.raises(TooManyPixelsError, match=r"^image: .*expected at most 0\.01 megapixels"):
        require_pixels(file, 10_000)


def test_what_is_no_picture_is_left_to_its_decoder():
    require_pixels(FileBytes(name="image", content=bomb(100, 100)), 10_000)
    require_pixels(FileBytes(name="image", content=b"no picture"), 10_000)


def test_names_may_be_as_long_as_file_systems_allow(tmp_path: Path):
    path = tmp_path / f"{'é' * 125}a.png"
    assert len(path.name.encode()) == 255
    write_png(path, np.zeros((3, 4), np.uint8))
    content = path.read_bytes()
    write_bytes(path, content)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [content]
