"""Any folders of images: which files are found, and what their cache holds, skips and tells."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scribbleseg.datasets import pictures
from scribbleseg.datasets.cache import ALIGNMENT
from scribbleseg.datasets.pictures import ImageCache, list_images
from scribbleseg.datasets.scenes import read_image
from scribbleseg.errors import InputError
from tests.conftest import disk_full_after

LARGE = 10_000


def write_image(path: Path, height: int = 12, width: int = 16, *, seed: int = 0) -> Path:
    """Write random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_truncated(path: Path) -> None:
    write_image(path, 64, 64)
    path.write_bytes(path.read_bytes()[:1000])


def write_deep(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)


def write_cmyk(path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(path)


def write_transparent(path: Path) -> None:
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(path)


def write_text(path: Path) -> None:
    path.write_text("no picture")


def write_dead_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone.jpg"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Five images of different sizes and formats."""
    return [
        write_image(tmp_path / "data" / f"{number}.{suffix}", 20 + number, 40 - number, seed=number)
        for number, suffix in enumerate(("png", "jpg", "PNG", "jpeg", "JPG"))
    ]


def assert_holds(cache: ImageCache, images: list[Path]) -> None:
    """Assert that the cache gives exactly what the decoder gives, in order."""
    assert cache.names == [str(path) for path in images]
    assert len(cache) == len(images)
    for index, path in enumerate(images):
        np.testing.assert_array_equal(cache[index], read_image(path))


def test_images_are_found_at_any_depth(tmp_path: Path) -> None:
    found = [write_image(tmp_path / name) for name in ("a.jpg", "b/c/d.JPEG", "b/e.png", "f/g.PNG")]
    for name in (".hidden.png", ".folder/h.png", "b/.cache/i.png"):
        write_image(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert list_images([tmp_path]) == list_images([str(tmp_path)]) == found


def test_labels_of_the_contract_are_passed_over(tiny_data: Path) -> None:
    found = list_images([tiny_data])
    assert len(found) == 18
    assert {path.parent.name for path in found} == {"images"}
    assert found == list_images([tiny_data / "train", tiny_data / "test"])


def test_overlapping_roots_count_once(tmp_path: Path) -> None:
    inner = write_image(tmp_path / "data" / "inner" / "a.png")
    outer = write_image(tmp_path / "data" / "b.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    root = tmp_path / "data"
    for roots in ([root, root / "inner"], [root / "inner", root], [root, tmp_path / "link"]):
        assert list_images(roots) == [outer, inner]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = write_image(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    own = write_image(root / "sub" / "b.png")
    (root / "linked").symlink_to(elsewhere.parent)
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "self").symlink_to("self")
    assert list_images([root]) == [root / "linked" / "a.png", own]


def test_roots_without_images_are_told(tmp_path: Path) -> None:
    write_image(tmp_path / "good" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, found in (("gone", "no such folder"), ("empty", "no image"), ("file", "a file")):
        message = rf"{name}: found {found}; expected .*\.jpg.*; correct --data.roots$"
        with pytest.raises(InputError, match=message) as caught:
            list_images([tmp_path / "good", tmp_path / name])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="data.roots is not set"):
        list_images([])


def test_an_unreadable_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    # A stand-in for permissions, which do not bind root.
    def refuse(path: str) -> object:
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="closed: found permission denied; expected"):
        list_images([tmp_path])


def test_it_holds_what_the_decoder_gives(images: list[Path], tmp_path: Path) -> None:
    cache = ImageCache.open(images, tmp_path / "cache", max_short_side=LARGE)
    assert_holds(cache, images)
    assert cache.skipped == ()
    for index, entry in enumerate(cache.entries):
        assert entry.offset % ALIGNMENT == 0
        assert type(cache[index]) is np.ndarray
        with pytest.raises(ValueError, match="read-only"):
            cache[index][0, 0] = 0


def test_large_images_are_stored_smaller(tmp_path: Path) -> None:
    sizes = {"wide": (40, 80), "tall": (61, 40), "small": (15, 90), "exact": (20, 33)}
    files = [write_image(tmp_path / f"{name}.png", *size) for name, size in sizes.items()]
    cache = ImageCache.open(files, tmp_path / "cache", max_short_side=20)
    shapes = [cache[index].shape[:2] for index in range(4)]
    assert shapes == [(20, 40), (30, 20), (15, 90), (20, 33)]
    blocks = read_image(files[0]).reshape(20, 2, 40, 2, 3).mean((1, 3))
    assert np.abs(cache[0] - blocks).max() <= 0.5
    np.testing.assert_array_equal(cache[3], read_image(files[3]))
    whole = ImageCache.open(files, tmp_path / "cache", max_short_side=LARGE)
    assert whole.path != cache.path
    assert whole.fingerprint == cache.fingerprint


@pytest.mark.parametrize(
    ("write", "suffix", "why"),
    [
        (write_truncated, "png", "truncated"),
        (write_deep, "png", "found 16 bits per channel, expected 8-bit RGB"),
        (write_cmyk, "jpg", "found CMYK pixels, expected 8-bit RGB"),
        (write_transparent, "png", "found transparent pixels, expected opaque RGB"),
        (write_text, "jpg", "not such a picture; expected a whole JPEG or PNG file"),
        (write_dead_link, "jpg", "no such file or directory"),
    ],
)
def test_what_cannot_be_used_is_skipped_and_told(
    write, suffix: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [write_image(tmp_path / "data" / name) for name in ("a.png", "c.png")]
    bad = tmp_path / "data" / f"b.{suffix}"
    write(bad)
    cache = ImageCache.open(list_images([tmp_path / "data"]), tmp_path, max_short_side=LARGE)
    assert_holds(cache, good)
    [skipped] = cache.skipped
    assert skipped.path == bad
    assert why in skipped.reason
    assert "\n" not in skipped.reason and str(tmp_path) not in skipped.reason
    # Who comes later is told the same, and decodes nothing.
    monkeypatch.setattr(pictures, "read_image", None)
    images = list_images([tmp_path / "data"])
    assert ImageCache.open(images, tmp_path, max_short_side=LARGE) == cache
    with pytest.raises(InputError, match="b.*none of the 1 images can be used") as caught:
        monkeypatch.undo()
        ImageCache.open([bad], tmp_path, max_short_side=LARGE)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_decompression_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_image(tmp_path / "a.png", 8, 8), write_image(tmp_path / "bomb.png", 30, 30)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    cache = ImageCache.open(files, tmp_path / "cache", max_short_side=LARGE)
    assert_holds(cache, files[:1])
    assert "megapixels" in cache.skipped[0].reason


def test_a_file_that_was_mended_is_read(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions leave size and time alone; whoever mends them must not meet the old cache."""
    closed = str(images[1])
    real_access, real_read = os.access, pictures.read_image

    def refuse(path: Path) -> np.ndarray:
        if str(path) == closed:
            raise InputError(f"{path}: permission denied; expected a whole file; copy it again")
        return real_read(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: str(path) != closed)
        patch.setattr(pictures, "read_image", refuse)
        cache = ImageCache.open(images, tmp_path, max_short_side=LARGE)
        assert [skipped.path for skipped in cache.skipped] == [images[1]]
    assert os.access is real_access
    assert_holds(ImageCache.open(images, tmp_path, max_short_side=LARGE), images)


def test_it_is_built_once_and_again_when_data_change(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageCache.open(images, tmp_path, max_short_side=LARGE)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_image", None)
        assert ImageCache.open(images, tmp_path, max_short_side=LARGE) == first
    write_image(images[2], seed=99)
    changed = ImageCache.open(images, tmp_path, max_short_side=LARGE)
    assert_holds(changed, images)
    assert changed.path != first.path
    assert changed.fingerprint != first.fingerprint


def test_a_damaged_cache_is_built_again(images: list[Path], tmp_path: Path) -> None:
    cache = ImageCache.open(images, tmp_path, max_short_side=LARGE)
    for path in (cache.path, cache.path.with_suffix(".json")):
        path.write_bytes(path.read_bytes()[:-50])
        assert_holds(ImageCache.open(images, tmp_path, max_short_side=LARGE), images)


def test_names_are_spelled_as_asked_for(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(images[0])
    absolute = ImageCache.open(images, tmp_path / "cache", max_short_side=LARGE)
    monkeypatch.chdir(tmp_path)
    asked = list_images(["data"])
    relative = ImageCache.open(asked, tmp_path / "cache", max_short_side=LARGE)
    assert relative.path == absolute.path
    assert relative.names == [f"data/{path.name}" for path in images[1:]]
    assert relative.skipped[0].path == Path("data/0.png")


def test_the_fingerprint_does_not_know_where_the_data_are(
    images: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    here, there = (
        ImageCache.open(list_images([tmp_path / name]), tmp_path / "cache", max_short_side=LARGE)
        for name in ("data", "elsewhere")
    )
    assert here.path != there.path
    assert here.fingerprint == there.fingerprint


def test_it_travels_without_its_pixels(tmp_path: Path) -> None:
    files = [write_image(tmp_path / "a.png", 200, 300)]
    cache = ImageCache.open(files, tmp_path, max_short_side=LARGE)
    assert cache[0].any()
    packed = pickle.dumps(cache)
    assert len(packed) < 2_000 < cache.path.stat().st_size
    assert_holds(pickle.loads(packed), files)


def test_a_full_disk_is_no_reason_to_skip(images: list[Path], tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="cache: the decoded images cannot be cached here"),
        disk_full_after(4096),
    ):
        ImageCache.open(images, tmp_path / "cache", max_short_side=LARGE)
    assert not list((tmp_path / "cache").glob("*.[!l]*"))


def test_nothing_to_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        ImageCache.open([], tmp_path, max_short_side=LARGE)
