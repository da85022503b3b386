"""Gallery: which images are shown, and what their colours say."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scribbleseg.config import ModelConfig
from scribbleseg.datasets.scenes import Scene, list_scenes, read_scene
from scribbleseg.evaluate import Row
from scribbleseg.models import build_model
from scribbleseg.predict import Predictor
from scribbleseg.report import gallery
from scribbleseg.report.gallery import (
    BACKGROUND_COLOUR,
    OBJECT_COLOUR,
    choose,
    draw_attention,
    draw_panels,
    draw_prediction,
    draw_strokes,
    draw_truth,
    hang,
    to_data_uri,
)


def row(stem: str, miou: float) -> Row:
    return Row(
        stem=stem,
        object_iou=miou,
        background_iou=miou,
        miou=miou,
        boundary_iou=miou,
        object_share=0.5,
    )


@pytest.mark.parametrize(
    ("num_rows", "count", "expected"),
    [
        (9, 2, {"Best": [9, 8], "Median": [6, 5], "Worst": [2, 1]}),
        (10, 3, {"Best": [10, 9, 8], "Median": [7, 6, 5], "Worst": [3, 2, 1]}),
        (3, 3, {"Best": [3], "Median": [2], "Worst": [1]}),
        (2, 3, {"Best": [2], "Worst": [1]}),
        (1, 3, {"Best": [1]}),
        (0, 3, {}),
    ],
)
def test_choice_of_best_median_and_worst(num_rows: int, count: int, expected: dict):
    rows = [row(str(number), number / 10) for number in range(1, num_rows + 1)]
    chosen = choose(rows, count)
    assert {
        title: [int(each.stem) for each in group] for title, group in chosen.items()
    } == expected


def test_strokes_are_coloured_by_kind_and_the_image_shows_elsewhere():
    image = np.full((60, 60, 3), 90, np.uint8)
    strokes = np.full((60, 60), 255, np.uint8)
    strokes[10, 10:50], strokes[40, 10:50] = 1, 0
    picture = draw_strokes(image, strokes)
    assert tuple(picture[10, 30]) == OBJECT_COLOUR
    assert tuple(picture[40, 30]) == BACKGROUND_COLOUR
    assert tuple(picture[25, 30]) == (90, 90, 90)
    assert (image == 90).all()


def test_truth_keeps_the_object_and_fades_the_rest():
    image = np.full((60, 60, 3), 90, np.uint8)
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40], mask[50:] = 1, 255
    picture = draw_truth(image, mask)
    assert tuple(picture[30, 30]) == (90, 90, 90)
    assert (picture[5, 5] > 180).all()
    assert tuple(picture[55, 5]) == (120, 120, 120)
    assert tuple(picture[19, 30]) == OBJECT_COLOUR


def test_prediction_colours_hits_false_alarms_and_misses():
    image = np.full((80, 80, 3), 128, np.uint8)
    mask, prediction = np.zeros((2, 80, 80), np.uint8)
    mask[:, 20:60], mask[:, 75:] = 1, 255
    prediction[:, 40:] = 1
    picture = draw_prediction(image, mask, prediction).astype(int)
    red, green, blue = (picture[40, column] for column in (68, 28, 50))
    assert red[0] == red.max() and red[2] == red.min(), "false alarms are red"
    assert min(green[:2]) > green[2] + 50, "misses are yellow"
    assert blue[2] == blue.max(), "hits are blue"
    for column in (5, 78):
        assert len(set(picture[40, column])) == 1, "background and ignored pixels stay grey"


def test_large_scenes_are_drawn_small_and_thin_objects_stay(monkeypatch):
    drawn: list[tuple[int, ...]] = []

    def watch(image, mask):
        drawn.append(image.shape)
        return draw_truth(image, mask)

    monkeypatch.setattr(gallery, "draw_truth", watch)
    image = np.full((1500, 3000, 3), 90, np.uint8)
    scribbles, mask = np.full((1500, 3000), 255, np.uint8), np.zeros((1500, 3000), np.uint8)
    scribbles[700, 100:2900] = mask[700, 100:2900] = 1
    scene = Scene(stem="a", image=image, scribbles=scribbles, mask=mask)
    panels = draw_panels(scene, mask)
    assert drawn == [(480, 960, 3)]
    for panel, line in zip(panels, (OBJECT_COLOUR, OBJECT_COLOUR, (255, 255, 255)), strict=True):
        content = base64.b64decode(panel.uri.partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        assert picture.shape == (240, 480, 3)
        assert (np.abs(picture[:, 240] - line).sum(1) < 120).any(), panel.title


def test_pictures_become_small_jpegs():
    uri = to_data_uri(np.zeros((300, 900, 3), np.uint8), 480)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (480, 160)
    assert to_data_uri(np.zeros((3, 9, 3), np.uint8), 480).startswith(head)


def test_hanging_shows_the_first_of_each_group_with_attention(predictor: Predictor, root: Path):
    scenes = list_scenes(root, "train", need_masks=True)
    rows = [row(scene.stem, number / 10) for number, scene in enumerate(scenes)]
    groups = hang(predictor, scenes, rows, count=2)
    assert [group.title for group in groups] == ["Best", "Median", "Worst"]
    for group in groups:
        assert [len(exhibit.panels) for exhibit in group.exhibits] == [3, 3]
        assert [len(exhibit.attention) for exhibit in group.exhibits] == [2, 0]
        titles = [panel.title.split(":")[0] for panel in group.exhibits[0].attention]
        assert titles == ["scale 1/1", "scale 1/2"]


def test_networks_without_gates_have_no_attention(predictor: Predictor, root: Path):
    unet = replace(predictor, model=build_model(ModelConfig(width=8, depth=3)))
    scene = read_scene(list_scenes(root, "train", need_masks=True)[0])
    assert draw_attention(unet, scene) == []
