"""Checkpoint folders: what is written comes back, and what is hostile ends in one line."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import scribbleseg.manifest
from scribbleseg.checkpoint import (
    read_model,
    read_trainer,
    slim,
    transfer,
    write_model,
    write_trainer,
)
from scribbleseg.config import DataConfig, FinetuneConfig, ModelConfig, TrainConfig
from scribbleseg.errors import InputError
from scribbleseg.manifest import (
    find_best,
    is_plain_name,
    parse_manifest,
    resolve,
    verify,
    write_bytes,
    write_manifest,
)
from tests.conftest import disk_full_after

CONFIG = FinetuneConfig(
    data=DataConfig(root="some where/--help", fold=None, val_split="val", long_side=384),
    model=ModelConfig(architecture="attention_resunet", width=24, norm="group"),
    train=TrainConfig(compile=True, save_minutes=0.5),
    init_from="released:best",
)
METRICS = {"miou": 0.81, "num_images": 46.0}


def network() -> nn.Sequential:
    """A small network with every kind of state: kernels, running statistics, an integer counter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1))


def trainer_state() -> dict[str, Any]:
    """What a training loop keeps: an optimiser's state, counters, random state, history."""
    model = network()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimiser.step()
    return {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "samples": 1280,
        "history": [{"epoch": 1, "loss": 0.5}],
        "random": torch.get_rng_state(),
    }


def write_whole(folder: Path) -> Path:
    """A checkpoint as training writes it."""
    write_model(folder, config=CONFIG, weights=network().state_dict(), metrics=METRICS)
    write_trainer(folder, trainer_state())
    write_manifest(folder)
    return folder


def one_line(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises, which must be one short line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, to be copied."""
    return write_whole(tmp_path_factory.mktemp("template") / "checkpoint")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A whole checkpoint."""
    return shutil.copytree(template, tmp_path / "checkpoint_0001")


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make the manifest agree, as a hostile author would."""
    (folder / name).write_bytes(content)
    write_manifest(folder)


# What is written comes back.


def test_a_model_comes_back_bit_for_bit(folder: Path) -> None:
    found = read_model(folder)
    expected = network().state_dict()
    assert found.config == CONFIG
    assert found.metrics == METRICS
    assert set(found.weights) == set(expected)
    for name, tensor in expected.items():
        assert found.weights[name].dtype == tensor.dtype
        assert torch.equal(found.weights[name], tensor)


def test_a_training_state_comes_back_bit_for_bit(folder: Path) -> None:
    found, expected = read_trainer(folder), trainer_state()
    assert found["samples"] == 1280
    assert found["history"] == expected["history"]
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        found["optimiser"]["state"], expected["optimiser"]["state"], rtol=0, atol=0
    )
    assert torch.equal(found["random"], expected["random"])


def test_the_folder_holds_these_files_and_no_pickle(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "manifest.json", "model.safetensors", "trainer.pt"]
    description = json.loads((folder / "config.json").read_text())
    assert (description["format"], description["kind"]) == (1, "segmentation")
    assert description["config"]["model"]["width"] == 24
    torch.load(folder / "trainer.pt", weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_shared_and_low_precision_weights_are_written(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    kernel = torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    base = torch.arange(10.0)
    weights = {"kernel": kernel, "tied": kernel, "odd": base[1::2], "grad": nn.Parameter(base)}
    write_model(tmp_path, config=CONFIG, weights=weights, metrics={})
    write_manifest(tmp_path)
    found = read_model(tmp_path).weights
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor)
        assert found[name].is_contiguous()


def test_weights_outlive_their_file(folder: Path) -> None:
    weights = read_model(folder).weights
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert torch.equal(weights["0.weight"], network().state_dict()["0.weight"])


def test_a_state_that_needs_pickle_is_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not plain"):
        write_trainer(tmp_path, {"config": CONFIG})
    assert not (tmp_path / "trainer.pt").exists()


def test_metrics_that_json_cannot_hold_are_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_model(tmp_path, config=CONFIG, weights={}, metrics={"miou": float("nan")})


# A checkpoint exists when its manifest matches.


def test_the_manifest_is_sha256_and_size_of_every_other_file(folder: Path) -> None:
    stamps = parse_manifest((folder / "manifest.json").read_bytes(), "here")
    assert sorted(stamps) == ["config.json", "model.safetensors", "trainer.pt"]
    for name, stamp in stamps.items():
        content = (folder / name).read_bytes()
        assert stamp.size == len(content)
        assert stamp.sha256 == hashlib.sha256(content).hexdigest()
    assert verify(folder) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trainer.pt"])
def test_verify_finds_a_missing_a_shortened_and_a_changed_file(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert len(verify(folder)) == 1
    assert f"{len(content) - 1} bytes" in verify(folder, hashed=())[0]
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "sha256" in verify(folder)[0]
    assert verify(folder, hashed=()) == []
    path.unlink()
    assert "missing" in verify(folder, hashed=())[0]


def test_a_damaged_checkpoint_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "sha256" in one_line(lambda: read_model(folder))
    path.unlink()
    assert "missing" in one_line(lambda: read_model(folder))
    assert "missing" in one_line(lambda: read_trainer(folder))


def test_a_checkpoint_without_training_state_predicts_but_does_not_resume(tmp_path: Path) -> None:
    write_model(tmp_path, config=CONFIG, weights={}, metrics={})
    write_manifest(tmp_path)
    assert read_model(tmp_path).config == CONFIG
    (tmp_path / "trainer.pt").write_bytes(b"put there by somebody")
    assert "lists no trainer.pt" in one_line(lambda: read_trainer(tmp_path))


def test_what_is_no_checkpoint_folder_is_named(tmp_path: Path) -> None:
    assert "no such folder" in one_line(lambda: read_model(tmp_path / "none"))
    assert "no manifest.json" in one_line(lambda: read_model(tmp_path))
    (tmp_path / "file").write_text("x")
    assert "no such folder" in one_line(lambda: read_model(tmp_path / "file"))
    write_model(tmp_path, config=CONFIG, weights={}, metrics={})
    assert "unfinished" in one_line(lambda: read_model(tmp_path))


# A full disk.


def test_a_full_disk_is_an_oserror_and_leaves_no_half_file(tmp_path: Path) -> None:
    with pytest.raises(OSError), disk_full_after(4096):
        write_model(tmp_path, config=CONFIG, weights={"w": torch.zeros(5000)}, metrics={})
    with pytest.raises(OSError), disk_full_after(4096):
        write_trainer(tmp_path, {"w": torch.zeros(5000)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"old")
    with pytest.raises(OSError), disk_full_after(4096):
        write_bytes(tmp_path / "a.json", b"x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_a_write_that_fails_names_the_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.json'$") as failed, disk_full_after(4096):
        write_bytes(tmp_path / "a.json", b"x" * 5000)
    assert failed.value.errno == errno.EFBIG
    (tmp_path / "b.json").mkdir()
    assert "found a folder" in one_line(lambda: write_bytes(tmp_path / "b.json", b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


# Hostile files: the manifest agrees with all of them.


def description(**changes: object) -> dict[str, Any]:
    """Content of a good config.json, with changes."""
    tree = {"format": 1, "version": "0.1.0", "kind": "segmentation", "config": {}, "metrics": {}}
    return {**tree, **changes}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[1]", "holds list"),
        (b'"text"', "holds str"),
        (b" " * 2_000_000, "over 1000000 bytes"),
        (description(format=2), "format is 2, expected 1; read it with the scribbleseg version"),
        (description(format=True), "format is True"),
        (description(format="1"), "format is '1'"),
        (description(format=None), "format is None"),
        (description(format="x" * 5000), "format is 'x"),
        ({}, "format is None"),
        (description(kind="ocr"), "kind is 'ocr', expected segmentation or dino"),
        (description(kind=["a\nb"]), "kind is"),
        (description(config=None), "'config' is None"),
        (description(config=[1]), "'config' is [1]"),
        (description(config={"help": ""}), "unknown settings in 'config': help"),
        (description(config={"model": {"layers": 3}}), "model.layers"),
        (description(config={str(i): 0 for i in range(5000)}), "and 4995 more"),
        (description(config={"x" * 5000: 1}), "unknown settings"),
        (description(config={"model": 5}), "unknown settings in 'config': model"),
        (description(config={"model": {"width": "wide"}}), "model.width"),
        (description(config={"model": {"width": [16]}}), "model.width"),
        (description(config={"model": {"width": 17}}), "multiple of 8"),
        (description(config={"model": {"width": 8 * 10**9}}), "at most 1024"),
        (description(config={"model": {"width": 10**4000}}), "model.width"),
        (description(config={"model": {"depth": 10**6}}), "model.depth"),
        (description(config={"data": {"long_side": 10**9}}), "data.long_side"),
        (description(config={"optim": {"learning_rate": float("inf")}}), "optim.learning_rate"),
        (description(config={"optim": {"learning_rate": float("nan")}}), "optim.learning_rate"),
        (
            description(kind="dino", config={"data": {"roots": ["--help"]}}),
            "values that do not begin with -",
        ),
        (
            description(kind="dino", config={"data": {"roots": ["a", "--train.epochs=9"]}}),
            "values that do not begin with -",
        ),
        (description(config={"model": {"architecture": "vit"}}), "model.architecture"),
        (description(config={"train": {"epochs": -1}}), "train.epochs"),
        (description(config={"train": {"compile": "x\ny"}}), "train.compile"),
        (description(metrics=None), "'metrics' is None"),
        (description(metrics=[0.5]), "'metrics' is [0.5]"),
        (description(metrics={"miou": "0.5"}), "metric 'miou' is '0.5'"),
        (description(metrics={"miou": True}), "metric 'miou' is True"),
        (description(metrics={"miou": {"a": 1}}), "metric 'miou' is"),
        (description(metrics={"miou": 10**400}), "expected a finite number"),
        (description(metrics={"miou": float("inf")}), "metric 'miou' is inf"),
        (description(metrics={"miou": float("nan")}), "metric 'miou' is nan"),
    ],
)
def test_a_hostile_config_gives_one_line(
    folder: Path, content: bytes | dict[str, Any], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    rewrite(folder, "config.json", data)
    message = one_line(lambda: read_model(folder))
    assert "config.json" in message
    assert expected in message
    assert capfd.readouterr() == ("", "")


def test_a_deeply_nested_config_gives_one_line(folder: Path) -> None:
    for depth in (500, 950, 5000):
        nested = '{"a":' * depth + "1" + "}" * depth
        text = json.dumps(description(config="HERE")).replace('"HERE"', nested)
        rewrite(folder, "config.json", text.encode())
        assert "config.json" in one_line(lambda: read_model(folder))


def safetensors_file(header: bytes, data: bytes = b"", *, size: int | None = None) -> bytes:
    """Header length (little-endian, 8 bytes), header, data; the length may be a lie."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def tensor_header(**changes: object) -> bytes:
    """A header of one tensor of two float32, with changes."""
    return json.dumps(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        safetensors_file(b"", size=2**64 - 1),
        safetensors_file(b"{}", size=2**40),
        safetensors_file(b"{}", size=3),
        safetensors_file(b"[]"),
        safetensors_file(b"\xff" * 8),
        safetensors_file(b"{" * 100_000),
        safetensors_file(tensor_header()),
        safetensors_file(tensor_header(), b"\0" * 7),
        safetensors_file(tensor_header(), b"\0" * 9),
        safetensors_file(tensor_header(shape=[2**62, 2**62]), b"\0" * 8),
        safetensors_file(tensor_header(shape=[2**40]), b"\0" * 8),
        safetensors_file(tensor_header(shape=[-2]), b"\0" * 8),
        safetensors_file(tensor_header(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
        safetensors_file(
            tensor_header(v={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}), b"\0" * 12
        ),
        safetensors_file(tensor_header(shape="x"), b"\0" * 8),
        safetensors_file(tensor_header(data_offsets=[8, 0]), b"\0" * 8),
        safetensors_file(tensor_header(data_offsets=[0, 2**63]), b"\0" * 8),
        safetensors_file(tensor_header(data_offsets=[4, 12]), b"\0" * 12),
        safetensors_file(tensor_header(dtype="PICKLE"), b"\0" * 8),
        safetensors_file(tensor_header(dtype="F8_E8M0", shape=[8]), b"\0" * 8)[:-1],
        pickle.dumps({"w": 1}),
    ],
)
def test_a_hostile_weights_file_gives_one_line(folder: Path, content: bytes) -> None:
    rewrite(folder, "model.safetensors", content)
    assert "model.safetensors" in one_line(lambda: read_model(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json"])
def test_random_damage_is_an_input_error_or_harmless(folder: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    content = (folder / name).read_bytes()
    for _ in range(30):
        damaged = bytearray(content[: generator.integers(len(content) + 1)])
        for position in generator.integers(len(damaged) + 1, size=3):
            if position < len(damaged):
                damaged[position] = generator.integers(256)
        rewrite(folder, name, bytes(damaged))
        try:
            read_trainer(folder) if name == "trainer.pt" else read_model(folder)
        except InputError as error:
            assert "\n" not in str(error)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_training_state_never_runs_code(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"state": Malicious(trap)}, folder / "trainer.pt")
    write_manifest(folder)
    assert "trainer.pt" in one_line(lambda: read_trainer(folder))
    rewrite(folder, "trainer.pt", pickle.dumps(Malicious(trap)))
    one_line(lambda: read_trainer(folder))
    assert not trap.exists()


def test_a_training_state_of_another_shape_gives_one_line(folder: Path) -> None:
    torch.save([1, 2], folder / "trainer.pt")
    write_manifest(folder)
    assert "holds list" in one_line(lambda: read_trainer(folder))
    with zipfile.ZipFile(folder / "trainer.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04.")
    write_manifest(folder)
    one_line(lambda: read_trainer(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer.pt"])
def test_a_link_to_a_file_elsewhere_is_no_way_to_read_it(
    folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    # Of the size that the manifest says, which may be guessed; its content cannot be.
    secret.write_bytes(b"s" * (folder / name).stat().st_size)
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    assert "sha256" in one_line(lambda: (read_model(folder), read_trainer(folder)))
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "missing" in one_line(lambda: (read_model(folder), read_trainer(folder)))


def test_weights_of_another_kind_of_number_do_not_fit() -> None:
    model = network()
    weights = dict(model.state_dict())
    weights["0.weight"] = torch.zeros(weights["0.weight"].shape, dtype=torch.int64)
    weights["1.num_batches_tracked"] = torch.tensor(0.5)
    message = one_line(lambda: transfer(model, weights))
    assert "mis-shaped: 0.weight, 1.num_batches_tracked" in message


# Hostile files that ask for memory: they are read in a process that may not have much.

WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from scribbleseg.checkpoint import read_trainer
from scribbleseg.config import ModelConfig
from scribbleseg.models import build_model
from scribbleseg.predict import load

torch.set_num_threads(1)
build_model(ModelConfig(architecture="vit_unet"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
for folder in sys.argv[1:]:
    try:
        read_trainer(Path(folder)) if Path(folder).name.startswith("trainer") else load(folder)
        sys.stdout.write("accepted\\n")
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
"""


def legacy_state(path: Path) -> None:
    """The format before archives: sizes are promised and allocated, then the file is read."""
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    # In the pickle, a count of 4 is K\x04; of 2**40 it is a long integer of 6 bytes.
    promised = content.replace(b"cpu\x94K\x04", b"cpu\x94\x8a\x06" + (2**40).to_bytes(6, "little"))
    path.write_bytes(promised)


def bomb(path: Path, method: int) -> None:
    """A training state whose archive unpacks to more than there is."""
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(
                name, content if "data.pkl" not in name else content + bytes(400_000_000)
            )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc and RLIMIT_AS")
def test_what_asks_for_memory_is_refused_before_it_gets_it(tmp_path: Path) -> None:
    folders = []

    def hostile(name: str) -> Path:
        folders.append(tmp_path / name)
        return write_whole(tmp_path / name)

    for width, depth in ((8 * 10**9, 6), (1024, 6), (16, 10**6)):
        wide = description(config={"model": {"width": width, "depth": depth}})
        rewrite(hostile(f"width{width}x{depth}"), "config.json", json.dumps(wide).encode())
    for architecture in ("resunet", "attention_resunet", "vit_unet"):
        model = {"width": 1024, "architecture": architecture}
        text = json.dumps(description(config={"model": model})).encode()
        rewrite(hostile(architecture), "config.json", text)
    for dino in ("out_dim", "hidden_dim"):
        text = json.dumps(description(kind="dino", config={"dino": {dino: 10**12}})).encode()
        rewrite(hostile(dino), "config.json", text)
    header = safetensors_file(b"{}", size=2**33)
    rewrite(hostile("header"), "model.safetensors", header)
    huge = safetensors_file(tensor_header(shape=[2**33], data_offsets=[0, 2**35]), b"\0" * 8)
    rewrite(hostile("shape"), "model.safetensors", huge)
    for name, write in (
        ("trainer-legacy", legacy_state),
        ("trainer-bomb", lambda path: bomb(path, zipfile.ZIP_DEFLATED)),
    ):
        folder = hostile(name)
        write(folder / "trainer.pt")
        write_manifest(folder)
    done = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(folders)
    names = [folder.name for folder in folders]
    bad = {n: line for n, line in zip(names, said, strict=True) if "InputError: " not in line}
    assert bad == {}


def manifest(**files: object) -> dict[str, Any]:
    """A manifest of these entries."""
    return {"format": 1, "files": files}


ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "tree",
    [
        {"format": 2, "files": {}},
        {"files": {}},
        {"format": 1},
        {"format": 1, "files": [1]},
        {"format": 1, "files": {}},
        manifest(a=1),
        manifest(a={"size": "1", "sha256": ""}),
        manifest(a={"size": 1}),
        {"format": 1, "files": {"../a": ENTRY}},
        {"format": 1, "files": {"/etc/passwd": ENTRY}},
        {"format": 1, "files": {"a/b": ENTRY}},
        {"format": 1, "files": {"a\\b": ENTRY}},
        {"format": 1, "files": {"..": ENTRY}},
        {"format": 1, "files": {"C:a": ENTRY}},
        {"format": 1, "files": {"C:\\a": ENTRY}},
        {"format": 1, "files": {"": ENTRY}},
        {"format": 1, "files": {"a\nb": ENTRY}},
        {"format": 1, "files": {"a\0b": ENTRY}},
        {"format": 1, "files": {"x" * 5000: ENTRY}},
    ],
)
def test_a_hostile_manifest_gives_one_line(folder: Path, tree: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert "manifest.json" in one_line(lambda: read_model(folder))
    assert len(verify(folder)) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", True),
        ("cpu-1a2b", True),
        ("", False),
        (".", False),
        ("..", False),
        (".hidden", False),
        ("a/b", False),
        ("c:d", False),
        ("a\\b", False),
        ("a\x00", False),
        ("x" * 300, False),
        (None, False),
        (3, False),
    ],
)
def test_plain_names(name: object, expected: bool) -> None:
    assert is_plain_name(name) is expected


# Weights are carried over exactly, except what is exempted.


def test_transfer_is_exact() -> None:
    source = network()
    for tensor in source.state_dict().values():
        tensor.add_(1)
    model = network()
    report = transfer(model, source.state_dict())
    assert report.loaded == list(model.state_dict())
    assert report.missing == report.unexpected == report.mis_shaped == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_transfer_names_what_does_not_fit_and_changes_nothing() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    del weights["0.bias"]
    weights["head.weight"] = torch.zeros(1)
    weights["2.weight"] = torch.zeros(1, 4, 1, 1)
    message = one_line(lambda: transfer(model, weights))
    assert "missing: 0.bias" in message
    assert "unexpected: head.weight" in message
    assert "mis-shaped: 2.weight" in message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_transfer_exempts_by_name_and_reports_what_became_of_each() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    del weights["0.bias"]
    weights["head.weight"] = torch.zeros(1)
    weights["2.weight"] = torch.zeros(1, 4, 1, 1)
    report = transfer(model, weights, exempt=["0.*", "head.*", "2.weight"])
    assert report.missing == ["0.bias"]
    assert report.unexpected == ["head.weight"]
    assert report.mis_shaped == ["2.weight"]
    kept = {"0.bias", "2.weight"}
    assert report.loaded == [name for name in before if name not in kept]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in kept else weights[name])


def test_transfer_counts_what_it_does_not_list() -> None:
    weights = {f"layer.{index}": torch.zeros(1) for index in range(300)}
    message = one_line(lambda: transfer(nn.Identity(), weights))
    assert "layer.0, layer.1, layer.2, layer.3, layer.4 and 295 more" in message


# What a user may mean by a checkpoint.


def test_resolve_takes_a_checkpoint_a_run_and_a_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    run = sweep / "trial_0003"
    folder = write_whole(run / "checkpoint_0007")
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoint_0007", "epoch": 7}))
    (sweep / "best.json").write_text(
        json.dumps({"run": "trial_0003", "checkpoint": "checkpoint_0007"})
    )
    assert resolve(str(folder)) == resolve(str(run)) == resolve(str(sweep)) == folder


def test_resolve_names_what_it_cannot_find(tmp_path: Path) -> None:
    assert "no such folder" in one_line(lambda: resolve(str(tmp_path / "none")))
    assert "neither best.json nor manifest.json" in one_line(lambda: resolve(str(tmp_path)))
    assert "scribbleseg pull" in one_line(lambda: resolve("s3://bucket/run"))


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {},
        {"run": "a"},
        {"checkpoint": 3},
        {"checkpoint": "../../etc"},
        {"checkpoint": "/etc"},
        {"run": "..", "checkpoint": "checkpoint_0001"},
        {"run": None, "checkpoint": "checkpoint_0001"},
    ],
)
def test_a_best_json_that_points_elsewhere_is_refused(tmp_path: Path, tree: object) -> None:
    (tmp_path / "best.json").write_text(json.dumps(tree))
    assert "best.json" in one_line(lambda: resolve(str(tmp_path)))
    read = {"best.json": json.dumps(tree)}.get
    assert "here" in one_line(lambda: find_best(read, "here"))


def test_nor_may_the_best_json_of_the_run_that_a_sweep_names() -> None:
    read = {"best.json": '{"run": "a", "checkpoint": "b"}', "a/best.json": '{"checkpoint": ".."}'}
    assert "here/a/best.json" in one_line(lambda: find_best(read.get, "here"))


def test_released_checkpoints_are_found_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scribbleseg.manifest, "RELEASED", tmp_path)
    assert "none ships with this version" in one_line(lambda: resolve("released:best"))
    write_whole(tmp_path / "small")
    write_whole(tmp_path / "best")
    (tmp_path / "not-one").mkdir()
    assert resolve("released:best") == tmp_path / "best"
    assert "available: best, small" in one_line(lambda: resolve("released:bset"))
    assert "available: best, small" in one_line(lambda: resolve("released:../best"))


def test_safetensors_files_are_what_other_tools_read(folder: Path) -> None:
    found = safetensors.torch.load_file(folder / "model.safetensors")
    torch.testing.assert_close(found, dict(network().state_dict()), rtol=0, atol=0)


def test_a_slim_checkpoint_keeps_a_variance_that_half_precision_has_no_number_for(tmp_path: Path):
    weights = network().state_dict()
    name = next(name for name in weights if name.endswith("running_var"))
    weights[name][0] = 70_000.0
    write_model(tmp_path, config=CONFIG, weights=weights, metrics={})
    write_manifest(tmp_path)
    slim(tmp_path)
    assert torch.equal(read_model(tmp_path).weights[name], weights[name])


def test_a_slim_checkpoint_tells_nothing_of_where_it_came_from(folder: Path) -> None:
    before = read_model(folder)
    size = (folder / "model.safetensors").stat().st_size
    slim(folder)
    assert verify(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").stat().st_size < 0.75 * size
    after = read_model(folder)
    assert isinstance(after.config, FinetuneConfig)
    assert after.config.model == CONFIG.model
    assert (after.config.data.root, after.config.init_from) == ("", None)
    assert after.config.data.long_side == 384
    assert after.metrics == before.metrics
    model = network()
    transfer(model, after.weights)
    for name, tensor in model.state_dict().items():
        wanted = before.weights[name]
        assert tensor.dtype == wanted.dtype
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-6)
