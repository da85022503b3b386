"""The page of a pretraining run: curves, pictures in order, commands that lead to fine-tuning."""

import io
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scribbleseg.config import ModelConfig, ProbeConfig
from scribbleseg.datasets.scenes import Scene, list_scenes, read_scene
from scribbleseg.loops.steps import EpochDone
from scribbleseg.models import build_model
from scribbleseg.probe import choose_evenly
from scribbleseg.report.page import write_report
from scribbleseg.report.pretraining import (
    ATTENTION,
    CELL,
    FEATURES,
    GAP,
    draw_picture,
    look_back,
    picture_name,
)
from scribbleseg.report.records import commands, read_record
from scribbleseg.runs import RunFolder
from tests.report.test_page import page_of
from train.worker import RunRecord


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([], []),
        ([5], [5]),
        ([30, 10, 20], [10, 20, 30]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        (range(10, 310, 10), [10, 70, 130, 180, 240, 300]),
    ],
)
def test_epochs_are_chosen_evenly_with_both_ends(epochs, expected):
    assert choose_evenly(sorted(epochs), 6) == expected


@pytest.mark.parametrize("architecture", ["unet", "vit_unet"])
def test_picture_has_a_row_per_scene_and_is_a_small_jpeg(architecture, root: Path):
    scenes = [read_scene(paths) for paths in list_scenes(root, "train", need_masks=True)[:3]]
    upright = Scene(
        stem="upright",
        image=scenes[0].image.transpose(1, 0, 2),
        scribbles=scenes[0].scribbles.T,
        mask=None,
    )
    encoder = build_model(ModelConfig(architecture=architecture, width=8, depth=3)).encoder
    jpeg = draw_picture(encoder, [*scenes, upright], ProbeConfig(long_side=64), "cpu")
    assert len(jpeg) < 100_000
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        assert image.size == (2 * CELL[1] + GAP, 4 * CELL[0] + 3 * GAP)
        pixels = np.array(image).astype(int)
    assert encoder.training
    cell = np.array(Image.fromarray(scenes[0].image).resize(CELL[::-1])).astype(int)
    middle = slice(20, -20)
    shown = pixels[: CELL[0], : CELL[1]]
    assert np.corrcoef(shown[middle, middle].flat, cell[middle, middle].flat)[0, 1] > 0.9
    assert (pixels[-CELL[0] :, :20] > 235).all(), "an upright image stands in the middle"


def test_epochs_with_a_probe_leave_a_picture_and_a_full_disk_ends_no_run(tmp_path: Path):
    run = RunFolder.open(str(tmp_path))
    record = RunRecord(
        run=run,
        facts={},
        draw=lambda: b"a picture",
        began=0.0,
        num_shown=0,
        folder=tmp_path / "tensorboard",
    )
    with record:
        for row in ({"epoch": 1, "probe_miou": 0.5}, {"epoch": 2}):
            record.epoch(EpochDone(epoch=row["epoch"], metrics=row), [row])
        assert run.list_files("pictures") == ["features_0001.jpg"]
        assert run.read_file(picture_name(1)) == b"a picture"
        assert run.read_file(picture_name(2)) is None and run.list_files("elsewhere") == []
        (tmp_path / "pictures").rename(tmp_path / "moved")
        (tmp_path / "pictures").write_bytes(b"a file in the folder's place fails like a full disk")
        record.epoch(EpochDone(epoch=3, metrics={"epoch": 3, "probe_miou": 0.6}), [])
        record.draw = None
        record.epoch(EpochDone(epoch=4, metrics={"epoch": 4, "probe_miou": 0.6}), [])


def test_page_has_curves_pictures_and_commands(make_pretraining, tmp_path: Path):
    run = make_pretraining("eyes <1>", num_epochs=9)
    out = write_report([run.path], tmp_path / "out")
    page = page_of(out)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert "DINO pretraining · recipe demo" in page.text
    for title in ("Pretraining loss", "Probe mIoU", "Entropy and KL", "Spread", "Gradient norm"):
        assert title in page.text
    assert "ln(1024) = 6.93" in page.text
    assert page.tags.count("img") == 1 + 6
    captions = [f"epoch {epoch} · {0.5 + epoch / 100:.3f}" for epoch in (1, 3, 4, 6, 7, 9)]
    positions = [page.text.index(caption) for caption in captions]
    assert positions == sorted(positions)
    assert "0.590" in page.text and "0.510 after epoch 1" in page.text
    assert FEATURES in page.text and ATTENTION not in page.text
    assert "python -m train.pretrain" in page.text and "--init-from" in page.text
    assert "architecture: unet" in page.text
    for foreign in ("no scored images", "has not finished", "Best epoch", "Validation IoU"):
        assert foreign not in page.text


def test_commands_pretrain_again_and_fine_tune(make_pretraining):
    run = make_pretraining("it's mine")
    assert [shlex.split(line) for line in commands(read_record(run.path))] == [
        ["python", "-m", "train.pretrain", "it's mine.yaml"],
        ["python", "-m", "train.finetune", "RECIPE", "--data.root", "DIR"]
        + ["--model.architecture", "unet", "--model.width", "8", "--model.depth", "3"]
        + ["--model.norm", "batch", "--init-from", run.path],
        ["scribbleseg", "report", run.path],
    ]


def test_run_without_probe_or_epochs_has_a_page(make_pretraining, tmp_path: Path):
    run = make_pretraining("blind")
    for epoch in (1, 2, 3):
        (Path(run.path) / picture_name(epoch)).unlink()
    run.write_metrics([{"epoch": 1, "loss": 6.9}])
    run.write_json("run.json", {**run.read_json("run.json"), "finished": False, "resolved": {}})
    page = page_of(write_report([run.path], tmp_path))
    assert "has not finished: 1 of 3 epochs" in page.text
    assert "Pretraining loss" in page.text and "Probe mIoU" not in page.text
    assert "img" not in page.tags and "What the encoder sees" not in page.text
    run.write_metrics([])
    assert "Pretraining loss" not in page_of(write_report([run.path], tmp_path)).text


def test_collapse_is_told(make_pretraining, tmp_path: Path):
    run = make_pretraining("run")
    assert ", collapse:" not in page_of(write_report([run.path], tmp_path)).text
    run.write_metrics([*run.read_metrics()[:-1], {**run.read_metrics()[-1], "loss": 6.93}])
    assert "After epoch 3, collapse: the loss" in page_of(write_report([run.path], tmp_path)).text


def test_picture_that_cannot_be_read_is_left_out(make_pretraining):
    run = make_pretraining("run")
    run.write_file(picture_name(2), b"\xff\xd8 not a whole picture")
    run.write_file("pictures/notes.txt", b"mine")
    titles = [panel.title for panel in look_back(read_record(run.path)).panels]
    assert titles == ["image", "epoch 1 · 0.510", "epoch 3 · 0.530"]


def test_transformer_is_shown_by_its_attention(make_pretraining):
    record = read_record(make_pretraining("run").path)
    record.info["config"]["model"]["architecture"] = "vit_unet"
    assert look_back(record).explanation == ATTENTION
    assert "--model.vit tiny --model.patch-size 16 --init-from" in commands(record)[1]


def test_several_pretraining_runs_share_charts_and_a_table(make_pretraining, tmp_path: Path):
    runs = [make_pretraining(name).path for name in ("first", "second")]
    page = page_of(write_report(runs, tmp_path))
    assert "2 runs side by side" in page.text and "Pretraining run" in page.text
    assert "What the encoder sees: second" in page.text
    assert page.text.count("Pretraining loss") == 1 and "Boundary IoU" not in page.text
    assert page.tags.count("img") == 2 * (1 + 3)


def test_page_of_a_network_that_segments_knows_nothing_of_pretraining(make_run, tmp_path: Path):
    page = page_of(write_report([make_run("net").path], tmp_path))
    headings = ["Results", "Images by mIoU", "Training", "Training loss", "Validation IoU"]
    headings += ["Pictures", "Best", "Median", "Worst", "Details", "To reproduce it"]
    positions = [page.text.index(f"\n{heading}\n") for heading in headings]
    assert positions == sorted(positions)
    for foreign in ("etrain", "probe", "encoder sees", "Prototypes", "nothing is learned"):
        assert foreign not in page.text


def test_both_kinds_on_one_page_share_no_chart(make_run, make_pretraining, tmp_path: Path):
    page = page_of(write_report([make_run("net").path, make_pretraining("eyes").path], tmp_path))
    for title in ("Training loss", "Pretraining loss", "Pooled mIoU", "Pretraining run"):
        assert page.text.count(title) == 1
    assert page.tags.count("img") == (3 * 3 + 2 * 3) + (1 + 3)
