"""Masks in bulk: what `scribbleseg predict` writes, to the last bit; nothing is done twice."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.fs
import pytest
import torch
from PIL import Image

from scribbleseg.errors import InputError
from scribbleseg.predict import load, predict_folder
from tests.conftest import make_doubtful, write_scenes
from tests.train.test_finetune import ROOT, driving, wait_for
from tests.tune import test_sweep_cluster
from tests.tune.test_sweep import family
from tests.tune.test_sweep_cluster import node, on
from train import masks
from train.masks import Folders, MaskMaker, Wishes
from train.predict import main
from train.worklist import list_work

# The fixture, which pytest finds by this name.
head = test_sweep_cluster.head


@pytest.fixture
def split(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of 14 samples, to be spoilt."""
    return Path(shutil.copytree(tiny_data / "train", tmp_path / "split"))


def arguments(checkpoint, split, out, *more):
    return [
        f"--checkpoint={checkpoint}", f"--images={split}/images",
        f"--scribbles={split}/scribbles", f"--out={out}", *more,
    ]  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    """The PNG files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def failed(out: Path) -> dict[str, str]:
    """The reasons of failed.csv, by file."""
    with (out / "failed.csv").open() as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def plain(checkpoint, split, out) -> dict[str, bytes]:
    """What the plain loop writes."""
    predictor = load(checkpoint, device="cpu")
    list(predict_folder(predictor, split / "images", split / "scribbles", out, probabilities=True))
    return written(out)


def test_masks_made_here_are_the_plain_loops_and_are_not_made_twice(
    checkpoint, split, tmp_path, capsys
):
    expected = plain(checkpoint, split, tmp_path / "plain")
    out = tmp_path / "out"
    main(arguments(checkpoint, split, out, "--probabilities"))
    assert written(out) == expected and len(expected) == 28
    with pytest.raises(InputError, match="holds predict.json"):
        plain(checkpoint, split, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    missing = sorted(times)[:3]
    for path in missing:
        path.unlink()
    missing[0].touch()  # What a full disk leaves: it does not count as a mask.
    main(arguments(checkpoint, split, out, "--probabilities"))
    assert "14 photograph(s), 11 with a mask already" in capsys.readouterr().out
    assert written(out) == expected
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in again} == {path.name for path in missing}
    assert "older than" not in capsys.readouterr().err
    strokes = split / "scribbles" / missing[0].name
    later = missing[0].stat().st_mtime_ns + 10**9
    os.utime(strokes, ns=(later, later))
    main(arguments(checkpoint, split, out, "--probabilities"))
    told = capsys.readouterr().err
    assert f"{out}/{strokes.name}: older than its photograph or strokes, as 1 mask" in told
    assert written(out) == expected


def test_ray_makes_the_same_masks_on_an_object_store(checkpoint, split, object_store, tmp_path):
    """Two workers, from and to S3, with a broken file and doubtful ones among the others."""
    make_doubtful(split)
    _, turned, *_ = sorted((split / "images").iterdir())
    expected = plain(checkpoint, split, tmp_path / "plain")
    victim = max((split / "images").iterdir())
    victim.write_bytes(victim.read_bytes()[:200])
    uri = f"{object_store}/{tmp_path.name}"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    pyarrow.fs.copy_files(str(split), f"{path}/split", destination_filesystem=filesystem)
    done = run(checkpoint, f"{uri}/split", f"{uri}/out", "--probabilities")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "1 of 14 photograph(s) got no mask" in done.stderr
    assert f"{uri}/split/images/{turned.name}: viewers turn" in done.stderr
    assert "cover more than half of the photograph, as in 1 file(s)" in done.stderr
    pyarrow.fs.copy_files(f"{path}/out", str(tmp_path / "out"), source_filesystem=filesystem)
    del expected[f"{victim.stem}.png"], expected[f"probabilities/{victim.stem}.png"]
    assert written(tmp_path / "out") == expected
    ((file, why),) = failed(tmp_path / "out").items()
    assert file == f"{uri}/split/images/{victim.name}" and "truncated" in why


def test_a_colon_in_a_name_stays_with_the_name(checkpoint, split, tmp_path):
    for kind in ("images", "scribbles"):
        path = sorted((split / kind).iterdir())[0]
        path.rename(path.with_name(f"a: b{path.suffix}"))
        if kind == "scribbles":
            (split / kind / "a: b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="1 of 14 photograph"):
        main(arguments(checkpoint, split, tmp_path / "out"))
    why = failed(tmp_path / "out")[str(split / "scribbles" / "a: b.png")]
    assert why.startswith("not such a picture")


def run(checkpoint, split, out, *more):
    command = arguments(checkpoint, split, out, "--launch.num-workers=2", *more)
    return subprocess.run(
        [sys.executable, "-m", "train.predict", *command], cwd=ROOT, capture_output=True, text=True
    )


def test_bad_files_are_listed_and_the_rest_is_done(checkpoint, split, tmp_path):
    images, scribbles = (sorted((split / kind).iterdir()) for kind in ("images", "scribbles"))
    images[0].unlink()
    scribbles[1].unlink()
    images[2].write_bytes(b"no picture")
    Image.new("L", (5, 5)).save(scribbles[3])
    Image.new("RGB", (60, 80)).save(images[4].with_suffix(".jpg"))
    Image.new("RGB", (200, 100)).save(images[5])
    out = tmp_path / "out"
    command = arguments(checkpoint, split, out, "--max-megapixels=0.01")
    with pytest.raises(InputError, match="6 of 15 photograph.*failed.csv"):
        main(command)
    rows = {Path(file): why for file, why in failed(out).items()}
    assert rows.keys() == {scribbles[0], images[1], images[2], scribbles[3], images[4], images[5]}
    assert (
        "no .png file of that stem" in rows[images[1]] and "not such a picture" in rows[images[2]]
    )
    assert "5x5" in rows[scribbles[3]] and "megapixels" in rows[images[5]]
    assert len(written(out)) == 9
    for path in (*images[1:6], *scribbles[:1], *scribbles[2:6], images[4].with_suffix(".jpg")):
        path.unlink(missing_ok=True)
    main(command)
    assert not (out / "failed.csv").exists()


def test_what_would_mix_or_replace_is_refused_before_anything_is_written(
    checkpoint, split, tmp_path
):
    for out in (split / "images", f"{split}/images/../scribbles"):
        with pytest.raises(InputError, match="another --out"):
            main(arguments(checkpoint, split, out))
    strokes = tmp_path / "other" / "probabilities"
    with pytest.raises(InputError, match="another --out"):
        main([*arguments(checkpoint, split, strokes.parent), f"--scribbles={strokes}"])
    with pytest.raises(InputError, match="images and scribbles are both"):
        photographs = split / "images"
        main([*arguments(checkpoint, split, tmp_path / "out"), f"--scribbles={photographs}"])
    with pytest.raises(InputError, match="nowhere/images"):
        main(arguments(checkpoint, tmp_path / "nowhere", tmp_path / "out"))
    latin = shutil.copytree(split, tmp_path / "latin")
    (latin / "images" / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(InputError, match=r"file name caf\\xe9.png, which is not UTF-8; rename it"):
        main(arguments(checkpoint, latin, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: not a directory; .*give another --out"):
        main(arguments(checkpoint, split, tmp_path / "file" / "out"))
    main(arguments(checkpoint, split, tmp_path / "out"))
    with pytest.raises(InputError, match=r"made otherwise \(predict differ"):
        main(arguments(checkpoint, split, tmp_path / "out", "--flip=True"))
    other = shutil.copytree(split, tmp_path / "split of the same names")
    with pytest.raises(InputError, match=r"made otherwise \(images, scribbles differ"):
        main(arguments(checkpoint, other, tmp_path / "out"))
    (tmp_path / "out" / "predict.json").unlink()
    for more in ((), ("--probabilities",)):
        with pytest.raises(InputError, match="holds 14 mask"):
            main(arguments(checkpoint, split, tmp_path / "out", *more))


def test_masks_that_are_likely_wrong_are_told_of(checkpoint, split, tmp_path, capsys):
    make_doubtful(split)
    main(arguments(checkpoint, split, tmp_path / "out"))
    first, second = (
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
    )
    assert first.startswith(f"warning: {min((split / 'scribbles').iterdir())}: strokes cover more")
    assert ": viewers turn" in second and "1 file(s)" in second
    assert len(written(tmp_path / "out")) == 14 and not (tmp_path / "out" / "failed.csv").exists()


def test_a_gpu_that_fails_is_not_blamed_on_the_photographs(
    checkpoint, split, tmp_path, monkeypatch
):
    folders = Folders(
        images=f"{split}/images", scribbles=f"{split}/scribbles", out=str(tmp_path / "out")
    )
    wishes = Wishes(probabilities=False, honour_strokes=True, sure=0.5, max_pixels=10**6)
    predictor = load(checkpoint, device="cpu")
    maker = MaskMaker(predictor, folders, wishes, cpus=torch.get_num_threads(), gpus=0)
    maker.predictor = replace(maker.predictor, device=torch.device("cuda"))
    drawn = list_work(folders, False).drawn[:1]

    def fail(error: Exception):
        def answer(*given, **more):
            raise error

        monkeypatch.setattr(masks, "answer", answer)
        return list(maker.make(drawn))

    (failure,) = fail(torch.OutOfMemoryError("no memory"))
    assert failure.reason == "no memory"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fail(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_nothing(checkpoint, tmp_path):
    write_scenes(tmp_path, "many", 400)
    split, out = tmp_path / "many", tmp_path / "out"
    expected = plain(checkpoint, split, tmp_path / "plain")
    command = arguments(checkpoint, split, out, "--launch.num-workers=2", "--probabilities")
    with driving([sys.executable, "-m", "train.predict", *command], tmp_path / "log") as driver:
        wait_for(lambda: len(list(out.glob("*.png"))) > 50, driver)
        rays = family(driver)
    # The block's end killed the driver.
    wait_for(lambda: not any(process.is_running() for process in rays), None)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 50 < len(times) < 400
    done = run(checkpoint, split, out, "--probabilities")
    assert done.returncode == 0, done.stderr
    assert f"{len(times)} with a mask already" in done.stdout
    assert written(out) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_what_it_wrote_is_kept(checkpoint, tmp_path):
    write_scenes(tmp_path, "many", 400)
    split, out = tmp_path / "many", tmp_path / "out"
    expected = plain(checkpoint, split, tmp_path / "plain")
    command = arguments(checkpoint, split, out, "--launch.num-workers=2", "--probabilities")
    log = tmp_path / "log"
    with driving([sys.executable, "-m", "train.predict", *command], log) as driver:
        wait_for(lambda: len(list(out.glob("*.png"))) > 50, driver)
        mask_actors(driver)[0].kill()
        assert driver.wait(timeout=240) == 0, log.read_text()
    assert written(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("head", [1], indirect=True)
def test_a_lost_node_costs_no_mask(head, checkpoint, tmp_path):
    """Two nodes of one core, a worker on each; then one node."""
    write_scenes(tmp_path, "many", 400)
    split, out = tmp_path / "many", tmp_path / "out"
    expected = plain(checkpoint, split, tmp_path / "plain")
    command = arguments(
        checkpoint, split, out, "--launch.num-workers=2", "--launch.min-workers=1",
        "--launch.cpus-per-worker=1", "--probabilities",
    )  # fmt: skip
    log = tmp_path / "log"
    with (
        node(f"--address={head.address}", "--num-cpus=1") as second,
        driving([sys.executable, "-m", "train.predict", *command], log, on(head)) as driver,
    ):
        wait_for(lambda: len(list(out.glob("*.png"))) > 50 and mask_actors(second), driver)
        for process in [*family(second), second]:
            process.kill()
        assert driver.wait(timeout=400) == 0, log.read_text()
    assert written(out) == expected


def mask_actors(process: subprocess.Popen) -> list[psutil.Process]:
    """The workers below a process."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [each for each in below if "MaskActor" in " ".join(each.cmdline())]


KILLER = """
import os
import PIL.Image

unharmed = PIL.Image.open

def killing_open(*arguments, **options):
    picture = unharmed(*arguments, **options)
    if picture.size == (77, 77):
        os.kill(os.getpid(), 9)
    return picture

PIL.Image.open = killing_open
"""


@pytest.mark.slow
def test_a_photograph_that_kills_its_worker_is_found_out(checkpoint, split, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/site:{ROOT}")
    victim = sorted((split / "images").iterdir())[5]
    Image.new("RGB", (77, 77)).save(victim)
    done = run(checkpoint, split, tmp_path / "out", "--launch.max-failures=1")
    assert done.returncode == 2, done.stderr
    assert "1 of 14 photograph(s) got no mask" in done.stderr, done.stderr
    ((file, why),) = failed(tmp_path / "out").items()
    assert file == str(victim) and "lost 2 times" in why
    assert len(written(tmp_path / "out")) == 13
