"""Fixtures shared by all tests."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
from PIL import Image

# Tests start a Ray of their own, whatever cluster this shell knows.
os.environ.pop("RAY_ADDRESS", None)
BENCHMARK = Path(__file__).resolve().parents[2] / "shared" / "data" / "scribble-voc"


@pytest.fixture(scope="session")
def benchmark() -> Path:
    """Folder of the real benchmark; tests that need it skip where it is absent."""
    if not BENCHMARK.is_dir():
        pytest.skip("the benchmark (../shared/data/scribble-voc) is not on this machine")
    return BENCHMARK


def write_scenes(root: Path, split: str, count: int, *, seed: int = 0, masks: bool = True) -> None:
    """Write `count` small samples: a bright ellipse on a dark ground, with two strokes."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "scribbles", *(("ground_truth",) if masks else ())):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        height, width = (60, 80) if number % 2 else (80, 60)
        rows, columns = np.mgrid[:height, :width]
        y, x = generator.uniform(0.35, 0.65, 2) * (height, width)
        a, b = generator.uniform(0.15, 0.3, 2) * (height, width)
        mask = (((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1).astype(np.uint8)
        image = generator.integers(0, 90, (height, width, 3)) + 120 * mask[..., None]
        strokes = np.full((height, width), 255, np.uint8)
        strokes[int(y), int(x - b / 2) : int(x + b / 2)] = 1
        strokes[2:4, 5:-5] = 0
        stem = f"scene_{seed}_{number:03d}"
        Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{stem}.png")
        Image.fromarray(strokes).save(root / split / "scribbles" / f"{stem}.png")
        if masks:
            Image.fromarray(mask).save(root / split / "ground_truth" / f"{stem}.png")


def make_doubtful(split: Path) -> None:
    """Spoil the first three scenes: strokes on all of it, a turned photograph, a wrong stroke."""
    first, second, third, *_ = sorted(path.stem for path in (split / "images").iterdir())
    for stem, spoil in ((first, np.s_[:]), (third, np.s_[:2])):
        with Image.open(split / "scribbles" / f"{stem}.png") as picture:
            strokes = np.array(picture)
        strokes[spoil] = 0 if stem == first else 1
        Image.fromarray(strokes).save(split / "scribbles" / f"{stem}.png")
    with Image.open(split / "images" / f"{second}.png") as picture:
        picture.load()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(split / "images" / f"{second}.png", exif=exif)


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """A stand-in for a full disk: the kernel refuses to let any file grow past `size` bytes.

    Wrap the call under test alone: pytest itself may be writing its log to a file that is longer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the data contract: 14 samples in train, 4 in test."""
    root = tmp_path_factory.mktemp("tiny")
    write_scenes(root, "train", 14)
    write_scenes(root, "test", 4, seed=1)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a small network that has learnt nothing."""
    # Here, because checks of types begin only after this file is read.
    import torch

    from scribbleseg.checkpoint import write_model
    from scribbleseg.config import DataConfig, FinetuneConfig, ModelConfig
    from scribbleseg.manifest import write_manifest
    from scribbleseg.models import build_model

    config = FinetuneConfig(data=DataConfig(long_side=64), model=ModelConfig(width=8, depth=3))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    write_model(folder, config=config, weights=build_model(config.model).state_dict(), metrics={})
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images out of the user's cache."""
    before = os.environ.get("SCRIBBLESEG_CACHE")
    os.environ["SCRIBBLESEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("SCRIBBLESEG_CACHE")
    if before is not None:
        os.environ["SCRIBBLESEG_CACHE"] = before


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Keep what a test tells Ray, the processes it starts, torch and OpenCV from the next test."""
    # Here, because checks of types begin only after this file is read.
    import cv2
    import torch

    told = ("RAY_", "TUNE_", "MALLOC_", "GLOO_", "NCCL_")
    before = {name: value for name, value in os.environ.items() if name.startswith(told)}
    threads, opencv_threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    for name in [each for each in os.environ if each.startswith(told)]:
        del os.environ[name]
    os.environ.update(before)
    torch.set_num_threads(threads)
    cv2.setNumThreads(opencv_threads)


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """A bucket of an S3 server in this process; the address is the bucket's URI."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    creator, bucket = pyarrow.fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
    creator.create_dir(bucket)
    yield "s3://bucket"
    patch.undo()
    server.stop()


@pytest.fixture
def bucket_data(object_store: str, tiny_data: Path, tmp_path: Path) -> str:
    """URI of a copy of the tiny data on the object store."""
    uri = f"{object_store}/data-{tmp_path.name}"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    pyarrow.fs.copy_files(str(tiny_data), path, destination_filesystem=filesystem)
    return uri


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage of each kind."""
    if request.param == "local":
        return str(tmp_path / "storage")
    return f"{request.getfixturevalue('object_store')}/{tmp_path.name}"
