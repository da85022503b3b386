"""Tables: numbers as text."""

import pytest

from scribbleseg.evaluate import METRIC_NAMES, Evaluation, Row
from scribbleseg.report.tables import (
    NOTHING,
    comparison_table,
    difference,
    duration,
    figures_table,
    how_scored,
    run_facts,
    scores_table,
)


def evaluation(*mious: float, fold: int | None = 0) -> Evaluation:
    rows = [
        Row(
            stem=f"photo {index}",
            object_iou=miou,
            background_iou=miou,
            miou=miou,
            boundary_iou=miou,
            object_share=0.25,
        )
        for index, miou in enumerate(mious)
    ]
    mean = sum(mious) / len(mious)
    settings = {
        "split": "train",
        "fold": fold,
        "flip": False,
        "edges": False,
        "threshold": 0.5,
        "part_threshold": 0.0,
        "scales": [1.0],
        "honour_strokes": True,
    }
    return Evaluation(
        rows=rows,
        means=dict.fromkeys(METRIC_NAMES, mean),
        intervals=dict.fromkeys(METRIC_NAMES, (min(mious), max(mious))),
        pooled={"miou": 0.9, "object_iou": 0.9, "background_iou": 0.9},
        settings=settings,
    )


def test_figures_of_one_run():
    table = figures_table(evaluation(0.25, 0.75))
    assert table.rows[0] == ["mIoU", "0.500", "0.250 to 0.750", "0.900"]
    assert table.rows[-1] == ["Boundary IoU", "0.500", "0.250 to 0.750", NOTHING]
    assert table.note.startswith("2 images of train, fold 0, each at its own size")
    assert all(len(row) == len(table.header) for row in table.rows)
    assert "object from" not in table.note


def test_several_looks_are_told():
    found = evaluation(0.25, 0.75)
    found.settings["scales"] = [2 / 3, 1.0]
    assert "size, averaged over looks at 0.667, 1 of the network's size; pi" in how_scored(found)


def test_another_threshold_is_told():
    found = evaluation(0.25, 0.75)
    found.settings["threshold"] = 0.62
    assert "its own size, object from a probability of 0.62 on; pixels" in how_scored(found)
    found.settings["part_threshold"] = 0.99
    assert how_scored(found) != how_scored(evaluation(0.25, 0.75))
    assert "0.62 on, parts without a stroke from 0.99 on; pixels" in how_scored(found)


def test_runs_side_by_side_with_paired_differences():
    first, second = evaluation(0.2, 0.8), evaluation(0.3, 0.9)
    facts = [{"Architecture": "unet"}, {"Architecture": "resunet"}, {}]
    table = comparison_table(["a", "b", "c"], [first, second, None], facts)
    assert all(len(row) == len(table.header) for row in table.rows)
    assert [row[0] for row in table.rows] == ["a", "b", "c"]
    # The images differ by 0.6, the runs by 0.1 on each: paired, the interval has no width.
    assert table.rows[1][4] == "+0.100 (+0.100 to +0.100)"
    assert table.rows[0][4] == NOTHING
    assert table.rows[2][1:] == [NOTHING] * (len(table.header) - 1)
    assert "image by image" in table.note
    mixed = comparison_table(["a", "b"], [first, evaluation(0.3, 0.9, fold=1)], facts[:2])
    assert mixed.note.startswith("The runs were scored on different images")


def test_difference_needs_the_same_images():
    assert difference(evaluation(0.5), evaluation(0.5, 0.5)) == NOTHING
    assert difference(evaluation(0.5), None) == NOTHING
    assert difference(evaluation(0.4), evaluation(0.5)) == "−0.100 (−0.100 to −0.100)"


def test_scores_stand_best_first():
    table = scores_table(evaluation(0.2, 0.9, 0.5))
    assert [row[0] for row in table.rows] == ["photo 1", "photo 2", "photo 0"]
    assert table.rows[0][1:] == ["0.900"] * 4 + ["0.250"]


def test_facts_leave_out_what_is_unknown():
    info = {
        "config": {"train": {"epochs": 40}, "model": {"architecture": "unet"}},
        "wall_time": 3725.0,
        "git_commit": "0123456789abcdef",
        "world_size": 2,
        "versions": {"torch": "2.11", "numpy": "2.4"},
        "started": None,
    }
    facts = run_facts(info, [{"epoch": 1}], {"epoch": 1}, 1_230_000)
    assert facts == {
        "Architecture": "unet",
        "Parameters": "1.23 million",
        "Epochs": "1 of 40",
        "Best epoch": "1",
        "Wall time": "1 h 02 min",
        "Workers": "2",
        "Git commit": "0123456789ab",
        "Versions": "numpy 2.4, torch 2.11",
    }
    assert run_facts({"config": {}}, [], None, None) == {"Epochs": "0"}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(5, "5 s"), (59.7, "1 min 00 s"), (75, "1 min 15 s"), (7260, "2 h 01 min"), ("x", None)],
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected
