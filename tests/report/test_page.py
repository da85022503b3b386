"""The page: whole, self-contained, escaped, and there for unfinished runs as well."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scribbleseg.config import PredictConfig
from scribbleseg.errors import InputError
from scribbleseg.evaluate import evaluate
from scribbleseg.predict import Predictor
from scribbleseg.report.page import write_evaluation_page, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """Collects tags, addresses and text, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Remember a tag and where it points."""
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attrs):
        """Remember a tag that closes itself."""
        self.tags.append(tag)

    def handle_endtag(self, tag):
        """Check that the innermost element is the one closed."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Collect text, but no style sheets."""
        if "style" not in self.open:
            self.text += data


def page_of(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def test_page_is_whole_self_contained_and_escaped(make_run, tmp_path: Path):
    run = make_run("a <hr> run & $x_1$")
    out = write_report([run.path], tmp_path / "out")
    assert out == tmp_path / "out" / "report.html"
    page = page_of(out)
    assert "script" not in page.tags and "link" not in page.tags and "hr" not in page.tags
    assert page.tags.count("img") == 3 * 3 + 2 * 3
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)", out.read_text())
    assert page.tags.count("h1") == 1
    assert "a <hr> run & $x_1$" in page.text
    assert "photo <0>" in page.text and "recipe demo" in page.text
    for heading in ("Results", "Training loss", "Validation IoU", "Best", "Median", "Worst"):
        assert heading in page.text
    assert "architecture: attention_resunet" in page.text
    assert "has not finished" not in page.text
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_several_runs_share_one_page(make_run, tmp_path: Path):
    runs = [make_run(name).path for name in ("first", "second")]
    out = write_report(runs, tmp_path / "both.html")
    page = page_of(out)
    assert "2 runs side by side" in page.text
    assert "image by image" in page.text
    assert "+0.000 (+0.000 to +0.000)" in page.text
    assert page.tags.count("img") == 2 * (3 * 3 + 2 * 3)


def test_interrupted_run_without_checkpoint_has_a_page(make_run, tmp_path: Path):
    run = make_run("early")
    shutil.rmtree(run.checkpoint_path(4))
    (Path(run.path) / "best.json").unlink()
    run.write_json("run.json", {**run.read_json("run.json"), "finished": False})
    run.write_metrics([])
    page = page_of(write_report([run.path], tmp_path))
    assert "has not finished: 0 of 4 epochs" in page.text
    assert "no checkpoint has been saved yet" in page.text
    assert "img" not in page.tags


def test_run_whose_data_is_elsewhere_has_a_page(make_run, root: Path, tmp_path: Path):
    run = make_run("moved")
    root.rename(tmp_path / "elsewhere")
    page = page_of(write_report([run.path], tmp_path))
    assert "There are no scored images" in page.text
    assert "0.500" in page.text, "the figure recorded in training stands in"
    page = page_of(write_report([run.path], tmp_path, data_root=tmp_path / "elsewhere"))
    assert "There are no scored images" not in page.text
    with pytest.raises(InputError, match="no such folder"):
        write_report([run.path], tmp_path, data_root=root)


def test_run_without_validation_has_a_page(make_run, tmp_path: Path):
    run = make_run("blind")
    info = run.read_json("run.json")
    info["config"]["data"] |= {"fold": None, "val_split": None}
    run.write_json("run.json", info)
    run.write_metrics([{"epoch": 1, "loss": 0.5}])
    page = page_of(write_report([run.path], tmp_path))
    assert "the run was not validated" in page.text
    assert "Training loss" in page.text and "Validation IoU" not in page.text


def test_another_split_can_be_shown(make_run, root: Path, tmp_path: Path):
    run = make_run("run")
    (root / "train").rename(root / "test")
    page = page_of(write_report([run.path], tmp_path, split="test"))
    assert "8 images of test, each at its own size" in page.text
    with pytest.raises(InputError, match="nowhere"):
        write_report([run.path], tmp_path, split="nowhere")


def test_evaluation_has_a_page_of_its_own(predictor: Predictor, root: Path, tmp_path: Path):
    predictor = replace(
        predictor, config=replace(predictor.config, predict=PredictConfig(flip=True))
    )
    found = evaluate(predictor, root, "train", None, honour_strokes=False)
    page = page_of(write_evaluation_page(predictor, found, tmp_path / "scores"))
    assert "a test" in page.text and "evaluated on train" in page.text
    assert page.tags.count("img") == 6 * 3 + 3 * 2
    assert "Training loss" not in page.text
    scored = f"--data {root} --split train --flip True --edges False --scales 1 --threshold 0.5"
    scored += " --part-threshold 0"
    assert f"{scored} --no-honour-strokes" in page.text


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no run.json") as refused:
        write_report([tmp_path / "nowhere"], tmp_path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_no_run_has_are_named(make_run, tmp_path: Path):
    run = make_run("odd")
    info = run.read_json("run.json")
    info["config"]["train"]["epochs"] = "many"
    run.write_json("run.json", info)
    with pytest.raises(InputError, match=r"run\.json: config: .*train\.epochs.*'many'"):
        write_report([run.path], tmp_path)
