"""Curves: what is drawn, and that a drawing is one safe SVG element."""

import itertools
import math
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest

from scribbleseg.report.curves import (
    PRETRAINING,
    Line,
    compare,
    distribution,
    follow,
    follow_pretraining,
    line_chart,
    series,
    styles,
)

HISTORY = [
    {"epoch": 1, "loss": 2.0},
    {"epoch": 2, "loss": math.nan, "miou": 0.5, "object_iou": 0.2, "background_iou": 0.8},
    {"epoch": 3, "loss": 1.0},
    {"epoch": 4, "loss": None, "miou": 0.6, "object_iou": 0.4, "background_iou": 0.8},
]


def test_series_leaves_out_what_was_not_measured():
    assert series(HISTORY, "loss") == ([1.0, 3.0], [2.0, 1.0])
    assert series(HISTORY, "miou") == ([2.0, 4.0], [0.5, 0.6])
    assert series(HISTORY, "boundary_iou") == ([], [])


def test_drawing_is_one_svg_element_that_scales_and_holds_no_text_of_others():
    settings = dict(mpl.rcParams)
    line = Line(label="<script>$x$</script>", epochs=[1.0, 2.0], values=[0.1, 0.7])
    chart = line_chart("mIoU", [line], best_epoch=2, share=True)
    root = ElementTree.fromstring(chart.svg)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib and "width" not in root.attrib
    assert "script" not in chart.svg
    assert "2" in chart.note
    assert dict(mpl.rcParams) == settings


def test_drawings_repeat_and_do_not_share_ids():
    line = Line(label="a", epochs=[1.0, 2.0], values=[0.1, 0.7])
    first, again, other = (line_chart(title, [line]).svg for title in ("one", "one", "two"))
    assert first == again
    clips = [
        {
            element.get("id")
            for element in ElementTree.fromstring(svg).iter()
            if "clipPath" in element.tag
        }
        for svg in (first, other)
    ]
    assert clips[0] and clips[0].isdisjoint(clips[1])


def test_one_run_shows_loss_and_ious_as_far_as_they_exist():
    titles = [chart.title for chart in follow(HISTORY, 4)]
    assert titles == ["Training loss", "Validation IoU"]
    assert [line.label for line in follow(HISTORY, 4)[1].lines] == [
        "Background IoU",
        "mIoU",
        "Object IoU",
    ]
    assert [chart.title for chart in follow(HISTORY[:1], None)] == ["Training loss"]
    assert follow([], None) == []


def test_runs_are_compared_metric_by_metric():
    charts = compare([("a", HISTORY), ("a", HISTORY[:1])])
    assert [chart.title for chart in charts] == [
        "Training loss",
        "mIoU",
        "Object IoU",
        "Background IoU",
    ]
    assert [[line.label for line in chart.lines] for chart in charts] == [
        ["a", "a"],
        ["a"],
        ["a"],
        ["a"],
    ]
    assert charts[0].lines[0].colour != charts[0].lines[1].colour


def test_pretraining_has_curves_of_its_own_as_far_as_they_exist():
    history = [{"epoch": 1, "loss": 6.0, "entropy": 5.0, "kl": 1.0, "probe_miou": 0.6}]
    charts = follow_pretraining(history, 1024)
    assert [chart.title for chart in charts] == [
        "Pretraining loss",
        "Probe mIoU",
        "Entropy and KL divergence",
    ]
    assert "ln(1024) = 6.93" in charts[0].note
    assert len(charts[2].lines) == 2
    assert "ln(" not in follow_pretraining(history, None)[0].note
    assert follow_pretraining([], 1024) == []
    compared = compare([("a", history), ("b", [])], PRETRAINING)
    assert [chart.title for chart in compared] == list(PRETRAINING.values())[:4]
    assert all([line.label for line in chart.lines] == ["a"] for chart in compared)


def test_dimensions_have_a_curve_of_shares():
    history = [{"epoch": 1, "loss": 6.0, "dimensions": 0.37}, {"epoch": 2, "dimensions": 0.59}]
    charts = {chart.title: chart for chart in follow_pretraining(history, None)}
    assert charts["Share of dimensions"].lines[0].values == [0.37, 0.59]


# The lower one is where the axes of the curve alone would end.
@pytest.mark.parametrize("level", [5.05, 6.93])
def test_level_lies_inside_the_drawing(level: float):
    line = Line(label="a", epochs=[1.0, 2.0], values=[5.0, 4.0])
    root = ElementTree.fromstring(line_chart("loss", [line], level=level).svg)
    (dashed,) = (each for each in root.iter() if "dasharray" in each.get("style", ""))
    (box,) = (each for each in root.iter() if each.tag.endswith("rect"))
    y = float(dashed.get("d").split()[2])
    top, height = float(box.get("y")), float(box.get("height"))
    assert top + height / 50 < y < top + height


def test_first_28_lines_look_different():
    first = list(itertools.islice(styles(), 28))
    assert len(set(first)) == 28


@pytest.mark.parametrize("values", [[0.4], [1.0, 1.0], [0.0, 0.5, 1.0]])
def test_distribution_marks_the_median_image(values: list[float]):
    chart = distribution("Images", values)
    ElementTree.fromstring(chart.svg)
    assert f"{sorted(values)[len(values) // 2]:.3f}" in chart.note
