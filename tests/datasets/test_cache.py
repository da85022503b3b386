"""The cache: what it holds, when it is built, and what happens when that goes wrong."""

import errno
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from scribbleseg.datasets import cache as cache_module
from scribbleseg.datasets.cache import ALIGNMENT, DAYS_KEPT, NUM_THREADS, SceneCache, read_ahead
from scribbleseg.datasets.scenes import Scene, ScenePaths, list_scenes, read_scene
from scribbleseg.errors import InputError
from tests.conftest import make_doubtful


def assert_holds(cache: SceneCache, scenes: list[ScenePaths]) -> None:
    """Assert that the cache gives exactly what the decoder gives, in order."""
    assert list(cache.stems) == [paths.stem for paths in scenes]
    assert len(cache) == len(scenes)
    for index, paths in enumerate(scenes):
        expected = read_scene(paths)
        found = cache[index]
        assert found.stem == expected.stem
        for name in ("image", "scribbles", "mask"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail if a scene is decoded."""

    def refuse(paths: ScenePaths) -> Scene:
        raise AssertionError(f"{paths.stem} is decoded again")

    monkeypatch.setattr(cache_module, "read_scene", refuse)


@pytest.fixture
def scenes(tiny_data: Path) -> list[ScenePaths]:
    """Samples of two sizes."""
    return list_scenes(tiny_data, "train", need_masks=True)


def test_it_holds_what_the_decoder_gives(scenes: list[ScenePaths], tmp_path: Path) -> None:
    cache = SceneCache.open(scenes, tmp_path)
    assert_holds(cache, scenes)
    assert len({cache[index].image.shape for index in range(len(cache))}) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_views_are_plain_aligned_and_read_only(scenes: list[ScenePaths], tmp_path: Path) -> None:
    cache = SceneCache.open(scenes, tmp_path)
    assert not (cache.places[:, 2:] % ALIGNMENT).any()
    scene = cache[1]
    assert scene.mask is not None
    for pixels in (scene.image, scene.scribbles, scene.mask):
        assert type(pixels) is np.ndarray
        assert pixels.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            pixels[0, 0] = 0


def test_masks_may_be_absent(tiny_root: Path, tmp_path: Path) -> None:
    (tiny_root / "train" / "ground_truth" / "b.png").unlink()
    cache = SceneCache.open(list_scenes(tiny_root, "train", need_masks=False), tmp_path)
    assert [cache[index].mask is None for index in range(3)] == [False, True, False]


def test_it_is_built_once(
    scenes: list[ScenePaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SceneCache.open(scenes, tmp_path)
    forbid_decoding(monkeypatch)
    assert SceneCache.open(scenes, tmp_path) == first


def test_all_orders_share_one_file(scenes: list[ScenePaths], tmp_path: Path) -> None:
    forward = SceneCache.open(scenes, tmp_path)
    backward = SceneCache.open(scenes[::-1], tmp_path)
    assert_holds(backward, scenes[::-1])
    assert backward.path == forward.path
    assert backward.fingerprint == forward.fingerprint
    part = SceneCache.open(scenes[:3], tmp_path)
    assert_holds(part, scenes[:3])
    assert part.path != forward.path
    assert part.fingerprint != forward.fingerprint


def test_links_by_other_names_are_other_samples(tiny_root: Path, tmp_path: Path) -> None:
    before = SceneCache.open(list_scenes(tiny_root, "train", need_masks=True), tmp_path)
    for path in list((tiny_root / "train").rglob("*.png")):
        link = tiny_root / "linked" / path.parent.name / f"other_{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    linked = list_scenes(tiny_root, "linked", need_masks=True)
    after = SceneCache.open(linked, tmp_path)
    assert_holds(after, linked)
    assert after.fingerprint != before.fingerprint


def test_it_remembers_what_is_doubtful(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SceneCache.open(list_scenes(tiny_root, "train", need_masks=True), tmp_path).doubts == ()
    make_doubtful(tiny_root / "train")
    scenes = list_scenes(tiny_root, "train", need_masks=True)
    built = SceneCache.open(scenes, tmp_path)
    covered, turned, contradicted = built.doubts
    assert covered.startswith(f"{scenes[0].scribbles}: strokes cover") and "1 file(s)" in covered
    assert turned.startswith(f"{scenes[1].image}: viewers turn") and "1 file(s)" in turned
    assert contradicted.startswith(f"{scenes[0].scribbles}: more than a tenth of the strokes")
    assert "2 file(s)" in contradicted
    forbid_decoding(monkeypatch)
    assert SceneCache.open(scenes[::-1], tmp_path).doubts == built.doubts
    monkeypatch.undo()
    assert SceneCache.open([*scenes, *scenes], tmp_path).doubts == built.doubts


def test_changed_data_get_another_cache(tiny_root: Path, tmp_path: Path) -> None:
    scenes = list_scenes(tiny_root, "train", need_masks=True)
    before = SceneCache.open(scenes, tmp_path)
    shutil.copy(scenes[0].image, scenes[1].image)
    after = SceneCache.open(scenes, tmp_path)
    assert_holds(after, scenes)
    assert after.path != before.path
    assert after.fingerprint != before.fingerprint


def test_what_nobody_has_opened_for_long_goes_when_another_is_built(
    scenes: list[ScenePaths], tmp_path: Path
) -> None:
    forgotten = SceneCache.open(scenes, tmp_path)
    used = SceneCache.open(scenes[1:], tmp_path)
    killed, foreign = tmp_path / f"{0:016x}.partial", tmp_path / "notes.json"
    killed.touch()
    foreign.touch()
    long_ago = time.time() - (DAYS_KEPT + 1) * 86400
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    SceneCache.open(scenes[1:], tmp_path)
    assert killed.exists() and forgotten.path.exists()

    built = SceneCache.open(scenes[2:], tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    paths = [each.path.with_suffix(suffix) for each in (used, built) for suffix in (".json", ".u8")]
    assert names == {path.name for path in (*paths, foreign)}


def test_touched_data_are_read_again_but_keep_their_fingerprint(
    tiny_root: Path, tmp_path: Path
) -> None:
    scenes = list_scenes(tiny_root, "train", need_masks=True)
    before = SceneCache.open(scenes, tmp_path)
    os.utime(scenes[0].image, ns=(1, 1))
    after = SceneCache.open(scenes, tmp_path)
    assert after.path != before.path
    assert after.fingerprint == before.fingerprint


def test_the_fingerprint_does_not_know_where_the_data_are(tiny_root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_root, elsewhere)
    here, there = (
        SceneCache.open(list_scenes(root, "train", need_masks=True), tmp_path / "cache")
        for root in (tiny_root, elsewhere)
    )
    assert here.path != there.path
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize("damage", ["truncated pixels", "no pixels", "truncated index", "no index"])
def test_a_damaged_cache_is_built_again(
    damage: str, scenes: list[ScenePaths], tmp_path: Path
) -> None:
    first = SceneCache.open(scenes, tmp_path)
    kind, what = damage.split()
    path = first.path if what == "pixels" else first.path.with_suffix(".json")
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    assert_holds(SceneCache.open(scenes, tmp_path), scenes)


def test_it_travels_without_its_pixels(scenes: list[ScenePaths], tmp_path: Path) -> None:
    cache = SceneCache.open(scenes, tmp_path)
    assert cache[0].image.any()
    packed = pickle.dumps(cache)
    assert len(packed) < 5_000 < cache.path.stat().st_size
    assert_holds(pickle.loads(packed), scenes)


def test_many_at_once_build_one(
    scenes: list[ScenePaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def slowly(paths: ScenePaths) -> Scene:
        decoded.append(paths.stem)
        time.sleep(0.01)
        return read_scene(paths)

    monkeypatch.setattr(cache_module, "read_scene", slowly)
    with ThreadPoolExecutor(4) as pool:
        caches = list(pool.map(lambda _: SceneCache.open(scenes, tmp_path), range(4)))
    assert sorted(decoded) == sorted(paths.stem for paths in scenes)
    assert all(cache == caches[0] for cache in caches)


def test_it_waits_for_the_one_who_builds(scenes: list[ScenePaths], tmp_path: Path) -> None:
    path = SceneCache.open(scenes, tmp_path).path
    path.unlink()
    with FileLock(path.with_suffix(".lock")):
        thread = threading.Thread(target=SceneCache.open, args=(scenes, tmp_path))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not path.exists()
    thread.join(10)
    assert path.exists()


def test_what_a_killed_process_left_is_overwritten(
    scenes: list[ScenePaths], tmp_path: Path
) -> None:
    path = SceneCache.open(scenes, tmp_path).path
    path.unlink()
    path.with_suffix(".partial").write_bytes(bytes(10_000_000))
    assert_holds(SceneCache.open(scenes, tmp_path), scenes)
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_names_the_folder_and_leaves_nothing(
    scenes: list[ScenePaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = cache_module._write_aligned, []

    def fill_up(*arguments: object) -> int:
        written.append(arguments)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(cache_module, "_write_aligned", fill_up)
    with pytest.raises(InputError, match="no space left.*--data.cache-dir") as caught:
        SceneCache.open(scenes, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_a_folder_that_cannot_be_made_is_named(scenes: list[ScenePaths], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/cache: .*--data.cache-dir"):
        SceneCache.open(scenes, tmp_path / "file" / "cache")


def test_bad_input_passes_through(tiny_root: Path, tmp_path: Path) -> None:
    scenes = list_scenes(tiny_root, "train", need_masks=True)
    scenes[1].image.write_bytes(scenes[1].image.read_bytes()[:60])
    with pytest.raises(InputError, match="b.png"):
        SceneCache.open(scenes, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_nothing_to_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no scenes"):
        SceneCache.open([], tmp_path)


def test_the_environment_names_the_folder(
    scenes: list[ScenePaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIBBLESEG_CACHE", str(tmp_path / "named"))
    assert SceneCache.open(scenes, None).path.parent == tmp_path / "named"
    monkeypatch.delenv("SCRIBBLESEG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert SceneCache.open(scenes, None).path.is_relative_to(tmp_path / "home" / ".cache")


def test_few_items_are_read_ahead_of_what_is_taken() -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return item

    for taken, item in enumerate(read_ahead(read, range(40)), start=1):
        assert item == taken - 1
        time.sleep(0.002)
        assert len(begun) <= taken + 2 * NUM_THREADS
    assert sorted(begun) == list(range(40))
