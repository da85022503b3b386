"""Demo scenes, regions, and VOC 2012 and Oxford pets from tiny archives that the test serves."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import OxfordIIITPet, voc

from scribbleseg.datasets import sources
from scribbleseg.datasets.check import check
from scribbleseg.datasets.demo import draw_demo_scene, photographs, random_object
from scribbleseg.datasets.scenes import list_scenes, read_scene
from scribbleseg.datasets.sources import make_demo, make_pets, make_regions, make_voc
from scribbleseg.errors import InputError

# Python 3.12 and later warn where torchvision extracts an archive without a filter.
pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")


def content(root: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def encoded(array: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    """Return a picture file's bytes."""
    file = io.BytesIO()
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(file, kind)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes], mode: str) -> str:
    """Write an archive; return its md5."""
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


def photo(seed: int) -> np.ndarray:
    """Return a smooth colour picture of 60 x 40 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((60, 40), Image.Resampling.BILINEAR))


def labels(inside: int, border: int, outside: int) -> np.ndarray:
    """Return a square of 20 pixels with a border of 2."""
    mask = np.full((40, 60), outside, np.uint8)
    mask[8:32, 8:32] = border
    mask[10:30, 10:30] = inside
    return mask


def test_the_demo_is_a_function_of_its_seed(tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert make_demo(tmp_path / name, seed, num_train=3, num_test=2)
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys() and not set(one.values()) & set(other.values())
    # No sample twice, neither in a split nor over splits.
    assert len(set(one.values())) == len(one) == 5 * 3 + 1
    report = check(tmp_path / "one")
    assert report.errors == () and report.warnings == ()
    assert [(each.name, each.num_images) for each in report.splits] == [("test", 2), ("train", 3)]
    assert all(each.sizes == [("250x188", each.num_images)] for each in report.splits)


def test_a_larger_demo_begins_as_a_smaller_one(tmp_path: Path):
    make_demo(tmp_path / "small", num_train=1, num_test=1)
    make_demo(tmp_path / "large", num_train=2, num_test=1)
    small, large = content(tmp_path / "small"), content(tmp_path / "large")
    assert all(large[name] == value for name, value in small.items() if name != "source.json")


def test_a_finished_demo_is_left_alone_and_another_folder_is_refused(tmp_path: Path):
    out = tmp_path / "demo"
    out.mkdir()
    assert make_demo(out, num_train=1, num_test=1)
    before = content(out)
    assert not make_demo(out, num_train=1, num_test=1)
    with pytest.raises(InputError, match="something else"):
        make_demo(out, 1, num_train=1, num_test=1)
    assert content(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="something else"):
        make_demo(tmp_path / "mine")
    assert content(tmp_path / "mine").keys() == {"notes.txt"}


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path):
    def stop(samples):
        yield samples[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", num_train=2, num_test=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_demo_objects_have_varied_size_and_edges_one_pixel_soft():
    shares = []
    for seed in range(20):
        opacity = random_object(np.random.default_rng(seed))
        inside = opacity >= 0.5
        shares.append(inside.mean())
        soft = (opacity > 0) & (opacity < 1)
        near = np.zeros_like(inside)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near |= np.roll(inside, (dy, dx), (0, 1)) != inside
        assert soft.any() and (soft & near).sum() > 0.85 * soft.sum()
    assert 0.05 < min(shares) < 0.15 and 0.25 < max(shares) <= 0.51


def test_demo_colours_overlap():
    # One threshold per channel, the best of all with the truth at hand, must not find the object.
    photos = photographs()
    scores = []
    for seed in range(8):
        image, mask = draw_demo_scene(photos, np.random.default_rng(seed))
        ious = [
            max((found & (mask == 1)).sum() / (found | (mask == 1)).sum() for found in (low, ~low))
            for channel in range(3)
            for threshold in range(8, 256, 8)
            for low in [image[..., channel] < threshold]
        ]
        scores.append(max(ious))
    assert np.mean(scores) < 0.6


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve tmp_path/served over HTTP on this machine; gives the address."""
    (tmp_path / "served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(Quiet, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def tiny_voc(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Serve an archive of VOC's layout with one image per split, and one that nobody lists."""
    files: dict[str, bytes] = {}
    for number, stem in enumerate(("2007_000001", "2008_000002", "2009_000003")):
        files[f"JPEGImages/{stem}.jpg"] = encoded(photo(number), "JPEG")
        files[f"SegmentationClass/{stem}.png"] = encoded(labels((1, 15, 20)[number], 255, 0), "PNG")
    files["ImageSets/Segmentation/trainval.txt"] = b"2007_000001\n2008_000002\n2009_000003\n"
    md5 = pack(
        tmp_path / "served" / "voc.tar",
        {f"VOCdevkit/VOC2012/{name}": data for name, data in files.items()},
        "w",
    )
    facts = voc.DATASET_YEAR_DICT["2012"] | {"url": f"{server}/voc.tar", "md5": md5}
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", facts)
    stems = {"train": ["2007_000001"], "test1": ["2008_000002"]}
    monkeypatch.setattr(sources, "benchmark_stems", lambda split: stems[split])
    return files


def test_regions_of_photographs_become_samples(tmp_path: Path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for seed, name in enumerate(("b.jpg", "a.png", "more/a.png")):
        large = Image.fromarray(photo(seed)).resize((720, 480), Image.Resampling.NEAREST)
        large.save(photos / name)
    Image.new("RGB", (60, 40), (9, 9, 9)).save(photos / "flat.png")
    (photos / "broken.png").write_bytes(b"\x89PNG and no more")
    out = tmp_path / "one"
    skipped = make_regions([photos], out, per_image=2, seed=5)
    assert skipped is not None
    assert {each.path.name for each in skipped} == {"flat.png", "broken.png"}
    assert "no region" in next(each.reason for each in skipped if each.path.name == "flat.png")
    scenes = [read_scene(paths) for paths in list_scenes(out, "train", need_masks=True)]
    assert [scene.stem for scene in scenes] == [
        f"{number:06d}-{region}" for number in (0, 1, 4) for region in (0, 1)
    ]
    # Scaled down, and no region twice.
    assert {scene.image.shape for scene in scenes} == {(341, 512, 3)}
    assert len({scene.mask.tobytes() for scene in scenes if scene.mask is not None}) == 6
    assert check(out).errors == ()

    assert make_regions([photos], out, per_image=2, seed=5) is None
    with pytest.raises(InputError, match="holds something else"):
        make_regions([photos], out, per_image=3, seed=5)
    make_regions([photos], tmp_path / "two", per_image=2, seed=5)
    make_regions([photos], tmp_path / "other", per_image=2, seed=6)
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and one != other


def test_photographs_without_any_region_make_no_folder(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (60, 40)).save(photos / "black.png")
    with pytest.raises(InputError, match=r"black\.png: found no region .* none of the 1 images"):
        make_regions([photos], tmp_path / "out")
    with pytest.raises(InputError, match="correct --images"):
        make_regions([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(InputError, match="per_image"):
        make_regions([photos], tmp_path / "out", per_image=0)
    assert not (tmp_path / "out").exists()


def test_voc_becomes_the_benchmark(tmp_path: Path, tiny_voc: dict[str, bytes]):
    out, downloads = tmp_path / "out", tmp_path / "downloads"
    assert make_voc(out, downloads)
    for split, stem in (("train", "2007_000001"), ("test1", "2008_000002")):
        (paths,) = list_scenes(out, split, need_masks=True)
        assert paths.stem == stem
        assert paths.image.read_bytes() == tiny_voc[f"JPEGImages/{stem}.jpg"]
        scene = read_scene(paths)
        # The void border counts as background.
        assert np.array_equal(scene.mask, labels(1, 0, 0))
        assert {0, 1, 255} == set(np.unique(scene.scribbles))
    report = check(out)
    assert report.errors == () and report.warnings == ()
    assert not make_voc(out, downloads)


def test_voc_is_extracted_once(
    tmp_path: Path, tiny_voc: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    downloads = tmp_path / "downloads"
    make_voc(tmp_path / "one", downloads)
    monkeypatch.setattr(sources, "VOCSegmentation", None)
    make_voc(tmp_path / "two", downloads)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_voc_cut_off_is_extracted_again(tmp_path: Path, tiny_voc: dict[str, bytes]):
    downloads = tmp_path / "downloads"
    make_voc(tmp_path / "one", downloads)
    masks = downloads / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    (masks / "2008_000002.png").unlink()
    make_voc(tmp_path / "two", downloads)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_voc_without_a_listed_image(
    tmp_path: Path, tiny_voc: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "benchmark_stems", lambda split: ["2011_009999"])
    with pytest.raises(InputError, match="2011_009999.jpg: missing"):
        make_voc(tmp_path / "out", tmp_path / "downloads")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["unreachable", "corrupted"])
def test_a_failed_download_is_one_line(
    tmp_path: Path, tiny_voc: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, fault: str
):
    facts = voc.DATASET_YEAR_DICT["2012"]
    # Nobody listens on the port of the "discard" service.
    unreachable = {"url": "http://127.0.0.1:9/voc.tar"}
    change = unreachable if fault == "unreachable" else {"md5": "0" * 32}
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", facts | change)
    with pytest.raises(OSError, match="PASCAL VOC 2012: the download failed") as caught:
        make_voc(tmp_path / "out", tmp_path / "downloads")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_pets(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images: dict[str, bytes] = {}
    annotations: dict[str, bytes] = {}
    for number, (name, stem) in enumerate((("trainval", "Abyssinian_1"), ("test", "pug_2"))):
        # Some files of the data set are GIF or PNG behind their .jpg.
        kind, mode = (("JPEG", None), ("PNG", "RGBA"))[number]
        images[f"images/{stem}.jpg"] = encoded(photo(number), kind, mode)
        annotations[f"annotations/trimaps/{stem}.png"] = encoded(labels(1, 3, 2), "PNG")
        annotations[f"annotations/trimaps/._{stem}.png"] = b"left behind by macOS"
        annotations[f"annotations/{name}.txt"] = f"{stem} 1 1 1\n".encode()
    archives = [
        (f"{server}/{name}", pack(tmp_path / "served" / name, files, "w:gz"))
        for name, files in (("images.tar.gz", images), ("annotations.tar.gz", annotations))
    ]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", archives)
    out, downloads = tmp_path / "out", tmp_path / "downloads"
    assert make_pets(out, downloads)
    for split, stem, suffix in (("train", "Abyssinian_1", "jpg"), ("test", "pug_2", "png")):
        (paths,) = list_scenes(out, split, need_masks=True)
        assert paths.image.name == f"{stem}.{suffix}"
        scene = read_scene(paths)
        assert np.array_equal(scene.mask, labels(1, 255, 0))
        assert set(np.unique(scene.scribbles)) == {0, 1, 255}
        assert (scene.scribbles[scene.mask == 255] == 255).all()
    stored = (out / "train" / "images" / "Abyssinian_1.jpg").read_bytes()
    assert stored == images["images/Abyssinian_1.jpg"]
    assert not make_pets(out, downloads)
    (downloads / "oxford-iiit-pet" / "images" / "pug_2.jpg").unlink()
    with pytest.raises(InputError, match="pug_2.jpg: missing"):
        make_pets(tmp_path / "again", downloads)
