"""Data on an object store: fetched once, whole, shared, and anew only where they have changed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import boto3
import pytest

from scribbleseg.cli import run_line
from scribbleseg.config import DataConfig, FinetuneConfig, PretrainConfig, PretrainDataConfig
from scribbleseg.datasets import remote
from scribbleseg.datasets.pictures import ImageCache, list_images
from scribbleseg.datasets.remote import inside, local_copy, outside
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from scribbleseg.evaluate import list_scored
from scribbleseg.loops import batches, pretrain
from scribbleseg.progress import narrated
from tests.conftest import disk_full_after

NUM_FILES = 3 * 14 + 3 * 4


@pytest.fixture
def s3(object_store):
    """A client that can write any key, where pyarrow cannot."""
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def fetched(monkeypatch):
    """Names of the files that are fetched, in order."""
    names = []
    fetch = remote._fetch

    def note(filesystem, item):
        names.append(item[0].name)
        return fetch(filesystem, item)

    monkeypatch.setattr(remote, "_fetch", note)
    return names


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_line(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_local_folders_are_used_where_they_are(tmp_path):
    assert local_copy(str(tmp_path)) == local_copy(f"file://{tmp_path}") == tmp_path


def test_the_copy_holds_what_the_store_holds_and_is_used_again(
    bucket_data, tiny_data, cache, fetched
):
    copy = local_copy(bucket_data, cache)
    assert files(copy) == files(tiny_data)
    assert len(fetched) == NUM_FILES
    assert local_copy(f"{bucket_data}/", cache) == copy and len(fetched) == NUM_FILES
    assert local_copy(f"{bucket_data}/test", cache) == copy / "test" and len(fetched) == NUM_FILES


def test_only_the_split_that_is_asked_for_is_fetched(bucket_data, cache, fetched):
    scenes = list_scenes(bucket_data, "test", need_masks=True, cache_dir=cache)
    assert len(scenes) == 4 and len(fetched) == 3 * 4
    assert "no .jpg" in one_line(
        lambda: list_scenes(bucket_data, "tset", need_masks=True, cache_dir=cache)
    )


def test_only_what_has_changed_is_fetched_anew(bucket_data, s3, tiny_data, cache, fetched):
    copy = local_copy(bucket_data, cache)
    fetched.clear()
    names = sorted(path.name for path in (tiny_data / "train/images").iterdir())
    prefix = bucket_data.removeprefix("s3://bucket/") + "/train/images"
    # The store's clock has whole seconds.
    time.sleep(1.1)
    same_size = bytes(len((tiny_data / "train/images" / names[0]).read_bytes()))
    s3.put_object(Bucket="bucket", Key=f"{prefix}/{names[0]}", Body=same_size)
    s3.put_object(Bucket="bucket", Key=f"{prefix}/new.jpg", Body=b"new")
    s3.delete_object(Bucket="bucket", Key=f"{prefix}/{names[1]}")
    (copy / "train/images" / names[2]).write_bytes(b"damaged here")
    local_copy(bucket_data, cache)
    assert sorted(fetched) == sorted([names[0], names[2], "new.jpg"])
    assert (copy / "train/images" / names[0]).read_bytes() == same_size
    assert not (copy / "train/images" / names[1]).exists()
    damaged = copy / "train/images" / names[2]
    assert damaged.read_bytes() == (tiny_data / "train/images" / names[2]).read_bytes()


def test_hidden_files_other_files_and_keys_that_lead_elsewhere_are_passed_over(
    bucket_data, s3, cache, tmp_path
):
    before = set(tmp_path.rglob("*"))
    prefix = bucket_data.removeprefix("s3://bucket/")
    for key in ("../../../../evil.png", "a/../../b.png", ".git/c.png", "..\\d.png", "e//f.png"):
        s3.put_object(Bucket="bucket", Key=f"{prefix}/{key}", Body=b"x")
    s3.put_object(Bucket="bucket", Key=f"{prefix}/archive.zip", Body=b"x")
    copy = local_copy(bucket_data, cache)
    assert len(files(copy)) == NUM_FILES
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} == before | {cache}
    assert "found .." in one_line(lambda: local_copy(f"{bucket_data}/../../x", cache))


# Several processes, and killed ones.

PROCESS = """
import sys, time
from scribbleseg.datasets import remote
fetch = remote._fetch
def slowly(filesystem, item):
    time.sleep({pause})
    sys.stdout.write(item[0].name + "\\n")
    sys.stdout.flush()
    return fetch(filesystem, item)
remote._fetch = slowly
remote.NUM_THREADS = 2
remote.local_copy(sys.argv[1], sys.argv[2])
"""


def start(uri, cache, pause):
    code = PROCESS.format(pause=pause)
    command = [sys.executable, "-c", code, uri, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_fetch_once(bucket_data, tiny_data, cache):
    processes = [start(bucket_data, cache, 0.1) for _ in range(2)]
    said = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(said[0]) + len(said[1]) == NUM_FILES
    assert files(local_copy(bucket_data, cache)) == files(tiny_data)


def test_a_killed_fetch_is_continued(bucket_data, tiny_data, cache, fetched):
    process = start(bucket_data, cache, 0.1)
    for _ in range(10):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = next(cache.rglob("images"))
    (left / ".scene.png.partial").write_bytes(b"half")
    copy = local_copy(bucket_data, cache)
    assert files(copy) == files(tiny_data)
    assert 0 < len(fetched) < NUM_FILES - 4


# What can be wrong.


@pytest.mark.parametrize(
    ("place", "root", "name"),
    [
        ("more/train", "more", "train"),
        ("/data/more/train/", "/data/more", "train"),
        ("train", ".", "train"),
        ("s3://bucket/more/train", "s3://bucket/more", "train"),
        (
            "s3://b/more/train?endpoint=h:1/x&scheme=http",
            "s3://b/more?endpoint=h:1/x&scheme=http",
            "train",
        ),
    ],
)
def test_a_split_is_taken_off_its_place_and_put_back(place, root, name):
    assert outside(place) == (root, name)
    if root != ".":
        assert inside(root, name) == place.removesuffix("/")


def test_what_is_not_there_is_named(object_store, cache):
    for uri in ("s3://bucket/nothing-here", "s3://no-such-bucket/data"):
        message = one_line(lambda uri=uri: local_copy(uri, cache))
        assert message.startswith(f"{uri}: ")
    assert not cache.exists()


def test_refused_credentials_are_named(bucket_data, cache, monkeypatch):
    def refuse(*_, **__):
        raise OSError("AWS Error ACCESS_DENIED during ListObjectsV2 operation:\nAccess Denied")

    monkeypatch.setattr(remote, "FileSelector", refuse)
    message = one_line(lambda: local_copy(bucket_data, cache))
    assert "ACCESS_DENIED" in message and "credentials" in message


def test_a_file_that_vanishes_or_changes_on_the_way_is_named(bucket_data, cache, monkeypatch):
    read = remote._read
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_read", lambda filesystem, path: read(filesystem, f"{path}.gone"))
        assert "cannot be read" in one_line(lambda: local_copy(bucket_data, cache))
        patch.setattr(remote, "_read", lambda filesystem, path: [b"short"])
        assert "the listing says" in one_line(lambda: local_copy(bucket_data, cache))
    assert not [path for path in cache.rglob("*.png") if not path.name.startswith(".")]


def test_a_full_disk_is_one_line_and_the_next_fetch_mends_it(
    bucket_data, tiny_data, cache, monkeypatch
):
    with disk_full_after(100):
        message = one_line(lambda: local_copy(bucket_data, cache))
    assert str(cache) in message and "make room" in message
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(cache)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "are needed" in one_line(lambda: local_copy(bucket_data, cache))
    assert files(local_copy(bucket_data, cache)) == files(tiny_data)


def test_a_cache_folder_that_cannot_be_made_is_named(bucket_data, tmp_path):
    (tmp_path / "file").write_text("x")
    message = one_line(lambda: local_copy(bucket_data, tmp_path / "file"))
    assert "--data.cache-dir" in message


# Whoever reads data reads them from a store too.


def test_progress_is_told_in_lines(bucket_data, cache, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS_BETWEEN_LINES", 0)
    lines = []
    with narrated(lines.append):
        local_copy(bucket_data, cache)
        assert lines[0].startswith(f"{bucket_data}: fetching {NUM_FILES} files")
        assert lines[-1].startswith(f"{bucket_data}: {NUM_FILES} of {NUM_FILES} files")
        told = len(lines)
        local_copy(bucket_data, cache)
        assert len(lines) == told


def test_the_fingerprint_of_the_data_is_that_of_local_ones(bucket_data, tiny_data, tmp_path):
    found = set()
    for number, root in enumerate((str(tiny_data), bucket_data, bucket_data)):
        data = DataConfig(root=root, cache_dir=str(tmp_path / f"cache{number}"))
        found.add(batches.open_data(FinetuneConfig(data=data)).cache.fingerprint)
    assert len(found) == 1


def test_pretraining_and_its_probe_read_from_a_store(bucket_data, tiny_data, cache):
    config = PretrainConfig(data=PretrainDataConfig(roots=(bucket_data,), cache_dir=str(cache)))
    fingerprint = pretrain.open_data(config).cache.fingerprint
    local = ImageCache.open(list_images([tiny_data]), cache, max_short_side=256)
    assert fingerprint == local.fingerprint


def test_the_doctor_the_lists_and_the_evaluation_read_from_a_store(
    bucket_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("SCRIBBLESEG_CACHE", str(tmp_path / "cache"))
    run_line(["data", "check", bucket_data, "--out", str(tmp_path / "check.jpg")])
    assert "no errors" in capsys.readouterr().out
    run_line(["data", "split", bucket_data, "--out", str(tmp_path / "lists")])
    assert len((tmp_path / "lists/fold0.txt").read_text().split()) == 3
    assert len(list_scored(bucket_data, "test", fold=None, num_folds=5)) == 4
    elsewhere = tmp_path / "elsewhere"
    scored = list_scored(bucket_data, "test", fold=None, num_folds=5, cache_dir=str(elsewhere))
    assert all(scene.image.is_relative_to(elsewhere) for scene in scored)
