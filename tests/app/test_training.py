"""From accepted masks to a new checkpoint in the page, by the command that the page shows."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scribbleseg import checkpoint as checkpoints
from scribbleseg import manifest
from scribbleseg.app.folder import Folder
from scribbleseg.app.models import load_model
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.sheets import Stroke
from scribbleseg.app.studio import Studio
from scribbleseg.config import FinetuneConfig, from_yaml, override
from scribbleseg.datasets.scenes import list_scenes, read_scene
from scribbleseg.models import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained network."""
    settings = {"model.width": 8, "model.depth": 3, "data.long_side": 64, "data.crop_size": 64}
    config = override(FinetuneConfig(), settings)
    torch.manual_seed(0)
    folder = tmp_path / "a checkpoint"
    weights = build_model(config.model).state_dict()
    checkpoints.write_model(folder, config=config, weights=weights, metrics={})
    manifest.write_manifest(folder)
    return str(folder)


@pytest.fixture
def studio(root, checkpoint):
    opened = Studio(Folder(root=root, split="train"), {"main": load_model(checkpoint)})
    yield opened
    opened.close()


def accept(studio: Studio, stem: str) -> None:
    stroke = Stroke(label=1, width=5.0, points=[(20.0, 40.0), (60.0, 40.0)])
    studio.accept(stem, studio.draw(stem, studio.folder.revision(stem), stroke).revision)


@pytest.mark.slow
def test_the_command_trains_and_the_page_loads_what_came_of_it(studio, root):
    for stem in ("photo_0", "photo_2"):
        accept(studio, stem)
    command, number = studio.finetune_command()
    assert number == 2
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (run,) = studio.folder.list_runs()
    assert run in studio.checkpoints()
    before = studio.models["main"].careful
    studio.load("main", run)
    assert studio.models["main"].name == run and studio.models["main"].careful is not before


def test_every_set_of_masks_is_a_run_of_its_own(studio, root):
    with pytest.raises(Refusal, match="no mask was accepted"):
        studio.finetune_command()
    accept(studio, "photo_0")
    first, _ = studio.finetune_command()
    (scene,) = list_scenes(root, "accepted", need_masks=True)
    assert read_scene(scene).mask is not None
    assert os.path.samefile(scene.image, root / "train" / "images" / "photo_0.png")
    assert studio.finetune_command()[0] == first
    accept(studio, "photo_0")
    assert studio.finetune_command()[0] != first
    for stem in ("photo_1", "photo_2"):
        accept(studio, stem)
    studio.finetune_command()
    # What is hidden is among the photographs of its split, and has neither strokes nor mask.
    hidden = root / "train" / "images" / "photo?.png"
    hidden.write_bytes((root / "train" / "images" / "photo_0.png").read_bytes())
    assert studio.folder.hidden() == ["photo?.png"] and studio.folder.collect()[0] == "accepted"
    assert len(list_scenes(root, "accepted", need_masks=True)) == 3
    # What is not accepted any more is not trained on.
    (root / "train" / "scribbles" / "photo_0.png").unlink()
    studio.finetune_command()
    scenes = list_scenes(root, "accepted", need_masks=True)
    assert [scene.stem for scene in scenes] == ["photo_1", "photo_2"]


def test_settings_name_the_split_that_holds_all(studio, root):
    for stem in ("photo_0", "photo_1", "photo_2"):
        accept(studio, stem)
    studio.finetune_command()
    config = from_yaml(FinetuneConfig(), root / "finetune.yaml")
    assert config.data.split == "train" and config.train.batch_size == 3


def test_rounds_of_drawing_and_training_do_not_slow_down(studio, root):
    accept(studio, "photo_0")
    studio.finetune_command()
    first = from_yaml(FinetuneConfig(), root / "finetune.yaml")
    studio.models["main"] = replace(studio.models["main"], config=first)
    studio.finetune_command()
    second = from_yaml(FinetuneConfig(), root / "finetune.yaml")
    assert second.optim.learning_rate == first.optim.learning_rate


def test_what_the_page_did_not_make_is_not_touched(studio, root):
    accept(studio, "photo_0")
    mine = root / "accepted" / "images" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"a photograph")
    with pytest.raises(Refusal, match="accepted: was not made by the page"):
        studio.finetune_command()
    assert mine.read_bytes() == b"a photograph" and not (root / "finetune.yaml").exists()
    mine.parent.parent.rename(root / "elsewhere")
    (root / "finetune.yaml").write_text("data: {}\n")
    with pytest.raises(Refusal, match="finetune.yaml: was not written by the page"):
        studio.finetune_command()
    assert (root / "finetune.yaml").read_text() == "data: {}\n"


def test_a_mask_whose_strokes_are_gone_is_not_accepted(studio, root):
    accept(studio, "photo_0")
    assert studio.folder.pictures()["photo_0"] == studio.folder.progress("photo_0") == "accepted"
    (root / "train" / "scribbles" / "photo_0.png").unlink()
    assert studio.folder.pictures()["photo_0"] == studio.folder.progress("photo_0") == "changed"


def test_labels_without_their_photograph_are_not_trained_on(studio, root):
    for stem in ("photo_0", "photo_1", "photo_2"):
        accept(studio, stem)
    (root / "train" / "images" / "photo_1.png").unlink()
    assert studio.folder.collect()[0] == "accepted"
    assert [s.stem for s in list_scenes(root, "accepted", need_masks=True)] == [
        "photo_0",
        "photo_2",
    ]


def test_a_mask_whose_strokes_changed_is_not_trained_on(studio, root):
    for stem in ("photo_0", "photo_1"):
        accept(studio, stem)
    strokes = root / "train" / "scribbles" / "photo_1.png"
    other = np.array(Image.open(strokes))
    other[3] = 0
    Image.fromarray(other).save(strokes)
    os.utime(strokes, ns=(0, 0))
    assert studio.folder.pictures()["photo_1"] == studio.folder.progress("photo_1") == "changed"
    assert list(studio.folder.collect()[1]) == ["photo_0"]


def test_a_mask_is_accepted_for_its_strokes_whatever_the_times_say(studio, root):
    accept(studio, "photo_0")
    (root / "train" / "scribbles" / "photo_0.png").touch()
    os.utime(root / "train" / "ground_truth" / "photo_0.png", ns=(0, 0))
    assert studio.folder.pictures()["photo_0"] == studio.folder.progress("photo_0") == "accepted"
    drawn = studio.sheets.open("photo_0").revision
    studio.sheets.restore("photo_0", drawn, "blank")
    assert studio.folder.progress("photo_0") == "changed"
    studio.sheets.restore("photo_0", "blank", drawn)
    assert studio.folder.progress("photo_0") == "accepted"


def test_of_a_mask_of_other_making_the_times_count(studio, root):
    accept(studio, "photo_0")
    mask = root / "train" / "ground_truth" / "photo_0.png"
    Image.open(mask).save(mask)
    assert studio.folder.progress("photo_0") == "accepted"
    os.utime(mask, ns=(0, 0))
    assert studio.folder.pictures()["photo_0"] == studio.folder.progress("photo_0") == "changed"


def test_a_stroke_that_changes_nothing_leaves_a_mask_accepted(studio, root):
    accept(studio, "photo_0")
    written = (root / "train" / "scribbles" / "photo_0.png").stat().st_mtime_ns
    sheet = studio.sheets.open("photo_0")
    nothing = Stroke(label=255, width=1.0, points=((1.0, 1.0),))
    assert studio.sheets.draw("photo_0", sheet.revision, nothing).revision == sheet.revision
    assert (root / "train" / "scribbles" / "photo_0.png").stat().st_mtime_ns == written
    assert studio.folder.pictures()["photo_0"] == "accepted"


def test_what_belongs_to_the_training_before_is_left_out(studio, root):
    before = {"data.cache_dir": "/fast", "data.num_workers": 12, "loss.supervision": "strokes"}
    config = override(studio.models["main"].config, before)
    studio.models["main"] = replace(studio.models["main"], config=config)
    accept(studio, "photo_0")
    studio.finetune_command()
    config = from_yaml(FinetuneConfig(), root / "finetune.yaml")
    assert config.data.cache_dir is None and config.data.num_workers is None
    assert config.loss.supervision == "mask"


def test_a_batch_is_not_cut_into_more_parts_than_it_has(studio, root):
    accept(studio, "photo_0")
    config = override(studio.models["main"].config, {"train.accumulate": 4})
    studio.models["main"] = replace(studio.models["main"], config=config)
    studio.finetune_command()
    found = from_yaml(FinetuneConfig(), root / "finetune.yaml").train
    assert (found.batch_size, found.accumulate) == (1, 1)


def test_a_link_out_of_the_folder_is_not_written_through(studio, root, tmp_path):
    accept(studio, "photo_0")
    (tmp_path / "outside").mkdir()
    (root / "accepted").symlink_to(tmp_path / "outside")
    with pytest.raises(Refusal, match="leads out of"):
        studio.finetune_command()
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_to_photographs_of_the_folder_is_not_emptied(studio, root):
    accept(studio, "photo_0")
    studio.finetune_command()
    photographs = sorted((root / "train" / "images").iterdir())
    made = root / "accepted" / "images"
    for path in made.iterdir():
        path.unlink()
    made.rmdir()
    made.symlink_to(root / "train" / "images")
    with pytest.raises(Refusal, match="accepted/images: is a link"):
        studio.finetune_command()
    assert sorted((root / "train" / "images").iterdir()) == photographs
