"""The command line: exit statuses, help, and the user's path from data to masks."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scribbleseg import checkpoint as checkpoints
from scribbleseg import manifest
from scribbleseg.cli import exit_status, run_line, say, scoring_command
from scribbleseg.config import DataConfig, FinetuneConfig, override, to_dict
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.models import build_model
from scribbleseg.runs import RunFolder


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (InputError("x"), 2),
        (DivergedError("x"), 1),
        (RuntimeError("x"), 1),
        (OSError("x"), 1),
    ],
)
def test_exit_statuses(error, status, capsys):
    def command():
        if error is not None:
            raise error

    assert exit_status(command) == status
    assert capsys.readouterr().err == ("" if error is None else "error: x\n")


@pytest.mark.parametrize(
    "line",
    ["", "data", "data check", "predict", "app", "evaluate", "status", "pull", "report"],
)
def test_every_command_explains_itself(line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_line([*line.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: scribbleseg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "data"),
        ("predcit", "predcit"),
        ("data check /nowhere", "/nowhere"),
        ("data convert /nowhere --out /tmp/x", "/nowhere"),
        ("data regions --images /nowhere --out /tmp/x/y", "correct --images"),
        ("evaluate --checkpoint /nowhere --data /nowhere", "/nowhere"),
        ("predict --checkpoint released:none --images a --scribbles b --out c", "released:none"),
        ("app --checkpoint released:none --data /tmp/nowhere", "released:none"),
        ("app --data /tmp/nowhere", "neither"),
        ("app --server http://127.0.0.1:9 --data /tmp/nowhere", "cannot be reached"),
        ("app --checkpoint released:best --data /dev/null", "/dev/null"),
        ("status /nowhere", "/nowhere"),
        ("pull /nowhere --out /tmp/x", "/nowhere"),
        ("report /nowhere", "/nowhere"),
        ("report", "no run"),
    ],
)
def test_a_bad_line_is_one_line_and_status_2(line, words, capsys):
    assert exit_status(lambda: run_line(line.split())) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and words in message


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "scribbleseg", "status", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere")


def test_a_line_is_written_in_whatever_the_terminal_can_say(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    say("Übung 日本 \udcff")
    assert written.getvalue() == "Übung \\u65e5\\u672c \\udcff\n".encode("latin-1")


def test_nobody_is_told_to_score_what_was_trained_on():
    assert scoring_command("best", DataConfig(root="data")).endswith("--split train --fold 0")
    held_out = scoring_command("best", DataConfig(root="data", fold=None, val_split="val"))
    assert held_out == "scribbleseg evaluate --checkpoint best --data data --split val"
    told = scoring_command("best", DataConfig(root="data", fold=None))
    assert told.startswith("on other data, since this run held nothing out: scribbleseg evaluate")
    assert told.endswith("--data OTHER --split SPLIT")


@pytest.fixture
def run(tiny_data, tmp_path):
    """A finished run of an untrained network."""
    config = override(
        FinetuneConfig(),
        {"data.root": str(tiny_data), "data.long_side": 64, "model.width": 8, "model.depth": 3},
    )
    torch.manual_seed(0)
    folder = RunFolder.at(str(tmp_path / "runs"), "mine")
    row = {"epoch": 1, "loss": 1.0, "miou": 0.5, "object_iou": 0.4, "background_iou": 0.6}
    with folder.scratch() as scratch:
        weights = build_model(config.model).state_dict()
        checkpoints.write_model(scratch, config=config, weights=weights, metrics=row)
        manifest.write_manifest(scratch)
        folder.save_checkpoint(1, scratch)
    folder.write_best(1, "miou", 0.5)
    folder.write_metrics([row | {"seconds": 1.0}])
    folder.write_json("run.json", {"config": to_dict(config), "recipe": "cpu", "finished": True})
    return folder.path


def test_from_run_to_masks_figures_and_pages(run, tiny_data, tmp_path, capsys):
    run_line(["status", run])
    assert "finished, epoch 1 of 40" in capsys.readouterr().out

    run_line(["pull", run, "--out", str(tmp_path / "best")])
    out = capsys.readouterr().out
    assert "miou: 0.5000" in out and "--split train --fold 0" in out

    split = tiny_data / "test"
    run_line(
        ["predict", "--checkpoint", str(tmp_path / "best"), "--images", str(split / "images")]
        + ["--scribbles", str(split / "scribbles"), "--out", str(tmp_path / "masks")]
    )
    assert "4 mask(s)" in capsys.readouterr().out
    for path in (split / "scribbles").iterdir():
        mask = np.asarray(Image.open(tmp_path / "masks" / path.name))
        strokes = np.asarray(Image.open(path))
        assert (mask == strokes)[strokes != 255].all()

    out = tmp_path / "evaluation"
    run_line(
        ["evaluate", "--checkpoint", run, "--data", str(tiny_data), "--split", "test"]
        + ["--out", str(out)]
    )
    assert "4 images of test" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["num_images"] == 4
    assert (out / "report.html").is_file() and (out / "scores.csv").is_file()

    run_line(["report", run, "--split", "test"])
    assert "report.html" in capsys.readouterr().out


def test_data_commands(tiny_data, tmp_path, capsys):
    run_line(["data", "check", str(tiny_data), "--out", str(tmp_path / "sheet.jpg")])
    assert "no errors" in capsys.readouterr().out and (tmp_path / "sheet.jpg").is_file()
    run_line(["data", "split", str(tiny_data), "--out", str(tmp_path / "lists")])
    assert (tmp_path / "lists" / "fold0.txt").read_text().count("\n") == 3
    regions = ["data", "regions", "--images", str(tiny_data), "--out", str(tmp_path / "regions")]
    run_line([*regions, "--per-image", "1"])
    told = capsys.readouterr().out
    made = len(list((tmp_path / "regions" / "train" / "images").iterdir()))
    assert made > 0 and made + told.count("skipped ") == 18
    run_line([*regions, "--per-image", "1"])
    assert "is there already" in capsys.readouterr().out
    run_line(["data", "convert", str(tiny_data), "--out", str(tmp_path / "converted")])
    assert "0 of 54 file(s) mended" in capsys.readouterr().out
