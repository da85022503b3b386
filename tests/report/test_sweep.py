"""The page of a sweep: every trial, the best in front, whatever its size and state."""

import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scribbleseg.config import FinetuneConfig, flatten, override, parse_arguments, to_dict
from scribbleseg.errors import InputError
from scribbleseg.report.sweep import write_sweep_report
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, read_trials, write_best, write_table, write_trial

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script> & $x_1$ \\frac"
SPACE = {
    "model.architecture": {"choice": ["unet", "resunet", "attention_resunet"]},
    "optim.learning_rate": {"log": [3e-4, 1e-2]},
    "augment.strength": {"range": [0.0, 1.5]},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class Outline(HTMLParser):
    """Collects tags, attributes, text, and the rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.highlighted: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Remember a tag, and begin a row or a cell."""
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            if ("class", "highlighted") in attrs:
                self.highlighted.append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        """Remember a tag that closes itself."""
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        """Check that the innermost element is the one closed."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Collect text, but no style sheets."""
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """Return the rows of the table whose header begins like this; none where it is absent."""
        found: list[list[str]] = []
        inside = False
        for row in self.rows:
            if row[0] in ("Trial", "Setting", ""):
                inside = row[: len(header)] == list(header)
            elif inside:
                found.append(row)
        return found


@pytest.fixture
def sweep(tmp_path: Path) -> RunFolder:
    """The folder of a sweep, still empty."""
    return RunFolder.open(str(tmp_path / "sweeps" / "search"))


@pytest.fixture
def add(sweep: RunFolder, config: FinetuneConfig) -> Callable[..., Trial]:
    """Return a function that writes one trial; without scores it was never validated."""

    def make(number: int, params: dict[str, Any], scores: list[float], **facts: Any) -> Trial:
        trial = Trial(number=number, params=params, state=facts.pop("state", "finished"), **facts)
        write_trial(sweep, trial)
        run = sweep.child(trial.name)
        run.write_metrics(
            [
                {"epoch": epoch, "loss": 1 / epoch, "miou": score}
                | {"object_iou": score - 0.1, "background_iou": score + 0.1}
                for epoch, score in enumerate(scores, start=1)
            ]
        )
        changes = {key: value for key, value in params.items() if key in flatten(to_dict(config))}
        run.write_json(
            "run.json",
            {"recipe": "demo", "config": to_dict(override(config, changes)), "wall_time": 90.0},
        )
        if scores:
            run.write_best(scores.index(max(scores)) + 1, "miou", max(scores))
        return trial

    return make


def conclude(sweep: RunFolder, *, best: int | None = None, **facts: Any) -> None:
    """Write the files of the sweep itself."""
    trials = read_trials(sweep)
    write_table(sweep, trials)
    record = {"format": 1, "kind": "sweep", "space": SPACE, "recipe": "demo", "settings": {}}
    record |= {"num_trials": len(trials), "search": "tpe", "stopping": "asha", "seed": 0}
    record |= {"concurrent": 2, "git_commit": "c" * 40, "started": "2026-11-25T01:02:03Z"}
    sweep.write_json("sweep.json", record | {"wall_time": 3725.0, "finished": True} | facts)
    if best is not None:
        run = sweep.child(trials[best].name)
        write_best(sweep, run, {"score": trials[best].score, "trial": best})


def page_of(sweep: RunFolder, tmp_path: Path, **options: Any) -> Outline:
    """Write the page and read it."""
    path = write_sweep_report(sweep.path, tmp_path / "out", **options)
    assert path == tmp_path / "out" / "report.html"
    return Outline(path.read_text(encoding="utf-8"))


def fill(add: Callable[..., Trial], count: int = 14) -> None:
    """Add trials whose learning rate alone decides; trial 2 is the best."""
    names = SPACE["model.architecture"]["choice"]
    for number in range(count):
        rate = RATES[number % 4]
        score = 0.7 - 0.08 * abs(math.log10(rate / 3e-3)) - number / 1e5
        params = {
            "model.architecture": names[number % 3],
            "optim.learning_rate": rate,
            "augment.strength": 1.5 * (number * 0.618 % 1),
        }
        state = "stopped" if number % 4 == 0 else "finished"
        add(number, params, [score - 0.1, score, score, score], state=state)


def test_page_shows_every_trial_and_the_best_in_front(sweep, add, tmp_path: Path):
    fill(add)
    add(14, {"model.architecture": "unet"}, [], state="failed", reason="out of memory: 2 GiB")
    conclude(sweep, best=2)
    page = page_of(sweep, tmp_path)
    rows = page.table("Trial", "State", "Epochs", "Score", "mIoU", "Minutes")
    assert sorted(int(row[0].split(",")[0]) for row in rows) == list(range(15))
    assert rows[0] == page.highlighted[0]
    assert rows[0][:6] == ["2, the best", "finished", "4", "0.700", "0.700", "1.5"]
    assert rows[0][6:] == ["attention_resunet", "0.003", "0.354"]
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)[1:] + ["–"]
    assert page.table("Trial", "Reason") == [["14", "out of memory: 2 GiB"]]
    for text in (
        "0.700best mIoU score, trial 2",
        "15trials: 10 finished, 4 stopped, 1 failed",
        "56epochs trained in 1 h 02 min",
        "Scores in the order of trials",
        "Validation mIoU of all trials",
        "Parameters of all trials",
        "Importance of parameters",
    ):
        assert text in page.text.replace("\n", "")
    assert "not finished" not in page.text
    assert page.table("Setting") == [
        ["model.architecture", "attention_resunet", "unet, resunet, attention_resunet"],
        ["optim.learning_rate", "0.003", "0.0003 to 0.01, logarithmic"],
        ["augment.strength", "0.354", "0 to 1.5"],
    ]


def test_page_is_self_contained_and_its_drawings_keep_apart(sweep, add, tmp_path: Path):
    fill(add)
    conclude(sweep, best=2)
    page = page_of(sweep, tmp_path)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "script" not in page.tags and "link" not in page.tags
    addresses = [value for key, value in page.attributes if key in ("src", "href", "srcset")]
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\((?!#)", text)
    # What a drawing refers to is in that same drawing.
    for drawing in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL):
        for name in re.findall(r'(?:url\(|href=")#([^)"]+)', drawing):
            assert f'id="{name}"' in drawing


def test_importance_knows_what_decides(sweep, add, tmp_path: Path):
    fill(add, 40)
    conclude(sweep, best=2)
    page = page_of(sweep, tmp_path)
    drawing = (tmp_path / "out" / "report.html").read_text().split("Importance of parameters")[1]
    words = re.findall(r"<text[^>]*>([^<]+)</text>", drawing.split("</svg>")[0])
    shares = [int(word[:-1]) for word in words if word.endswith("%")]
    names = [word for word in words if "." in word]
    assert sorted(names) == sorted(SPACE)
    assert names[-1] == "optim.learning_rate" and shares[-1] == max(shares) > 50
    assert sum(shares) == pytest.approx(100, abs=2)
    assert "best 5 of 40 trials" in page.text


def test_text_from_files_is_escaped(sweep, add, tmp_path: Path):
    for number in range(12):
        params = {"optim.learning_rate": RATES[number % 4], HOSTILE: [HOSTILE, "b"][number % 2]}
        add(number, params, [0.5 + number / 100] * 3)
    add(12, {}, [], state="failed", reason=HOSTILE)
    conclude(sweep, best=11, recipe=HOSTILE, space=SPACE | {HOSTILE: {"choice": [HOSTILE, "b"]}})
    page = page_of(sweep, tmp_path)
    assert "script" not in page.tags
    assert page.table("Trial", "Reason") == [["12", HOSTILE]]
    assert page.text.count(HOSTILE) >= 4


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_sweeps_have_a_page(sweep, add, tmp_path: Path, count: int):
    fill(add, count)
    conclude(sweep, finished=False, num_trials=9)
    page = page_of(sweep, tmp_path)
    assert f"This sweep has not finished: {count} of 9 trials have ended." in page.text
    rows = page.table("Trial", "State")
    assert len(rows) == count
    assert ("Scores in the order of trials" in page.text) == (count > 0)
    assert ("fewer than two trials have a score" in page.text) == (count < 2)
    assert "There is no importance of parameters" in page.text
    if count:
        assert rows[0][0].endswith(", the best"), "known before best.json is there"


def test_trials_without_a_score_have_a_page(sweep, add, tmp_path: Path):
    for number in range(3):
        add(
            number,
            {"optim.learning_rate": 1e-3},
            [],
            state=["running", "failed", "stopped"][number],
        )
    conclude(sweep)
    page = page_of(sweep, tmp_path)
    assert len(page.table("Trial", "State")) == 3
    for sentence in ("no history of scores", "no learning curves", "no parallel coordinates"):
        assert sentence in page.text
    assert "1 running, 1 stopped, 1 failed" in page.text


def test_parameters_may_be_missing_constant_or_of_any_kind(sweep, add, tmp_path: Path):
    for number in range(12):
        params: dict[str, Any] = {
            "optim.learning_rate": RATES[number % 4],
            "model.norm": "group",
            "train.compile": number % 2 == 0,
            "data.fold": 1 if number % 3 else None,
            "outside": 5 * number,
        }
        if number % 2:
            where = ["scratch", "s3://bucket/pretrain-a"][number % 4 == 1]
            params["init_from[resunet 16]"] = where
        add(number, params, [0.5 + number / 100] * (1 + number % 3))
    space = {"outside": {"range": [1, 20]}, "odd": {"normal": [0, 1]}, "worse": 3}
    conclude(sweep, best=11, space=space, pretrained=["s3://bucket/pretrain-a"])
    page = page_of(sweep, tmp_path)
    assert "The same in all of these trials, and not shown: odd, worse, model.norm." in page.text
    assert "the trial does not have this parameter" in page.text
    settings = {row[0]: row[1:] for row in page.table("Setting")}
    assert settings["init_from"] == ["scratch", "scratch, s3://bucket/pretrain-a"]
    assert settings["outside"] == ["55", "0 to 55"]
    assert settings["train.compile"][0] == "False"
    assert any("…/pretrain-a" in row for row in page.table("Trial", "State"))


def test_all_alike_is_said(sweep, add, tmp_path: Path):
    for number in range(12):
        add(number, {"optim.learning_rate": 1e-3}, [0.5, 0.5])
    conclude(sweep, best=0)
    page = page_of(sweep, tmp_path)
    assert "all trials have the same parameters" in page.text
    assert "fewer than two of them vary" in page.text


def test_equal_scores_are_drawn(sweep, add, tmp_path: Path):
    for number in range(12):
        params = {"optim.learning_rate": RATES[number % 4], "augment.strength": number / 10}
        add(number, params, [0.5, 0.5])
    conclude(sweep, best=0)
    assert "Parameters of all trials" in page_of(sweep, tmp_path).text


def test_commands_train_the_best_again(sweep, add, tmp_path: Path):
    fill(add, 3)
    run = sweep.child("trial_0002")
    settings = to_dict(override(FinetuneConfig(), flatten(run.read_json("run.json")["config"])))
    settings["train"] |= {"seed": 5}
    settings["strokes"] |= {"width": [2.0, 9.0]}
    conclude(sweep, best=2, settings=settings)
    text = page_of(sweep, tmp_path).text
    listed = text.split("has to be added.")[1].strip().replace("\\\n", "")
    exact, short, score, draw = listed.splitlines()[:4]
    assert exact == "python -m train.finetune trial_0002.yaml"
    config = run.read_json("run.json")["config"]
    words = short.split()
    assert words[:4] == ["python", "-m", "train.finetune", "demo"]
    got = parse_arguments(FinetuneConfig, words[4:], default=FinetuneConfig(), prog="test")
    assert (
        "--strokes.width 3.0 3.0" in short
        and "--train.seed 0" in short
        and "--train.epochs" not in short
    )
    for key in (*SPACE, "data.root"):
        assert flatten(to_dict(got))[key] == flatten(config)[key]
    assert score.startswith(f"scribbleseg evaluate --checkpoint {run.path} --data")
    assert draw == f"scribbleseg report {sweep.path}"
    assert "learning_rate: 0.003" in text, "the whole configuration"


def test_best_network_is_scored_and_shown(sweep, add, make_run, root: Path, tmp_path: Path):
    fill(add, 3)
    shutil.copytree(make_run("single").path, f"{sweep.path}/trial_0002", dirs_exist_ok=True)
    conclude(sweep, best=2)
    page = page_of(sweep, tmp_path)
    assert page.tags.count("img") == 3 * 3 + 2 * 3
    assert "chosen by these very images" in page.text and "The best: trial 2" in page.text
    root.rename(tmp_path / "elsewhere")
    page = page_of(sweep, tmp_path)
    assert "img" not in page.tags
    assert "There are no scored images" in page.text and "Training loss" in page.text
    page = page_of(sweep, tmp_path, data_root=tmp_path / "elsewhere")
    assert page.tags.count("img") == 3 * 3 + 2 * 3
    with pytest.raises(InputError, match="no such folder"):
        page_of(sweep, tmp_path, data_root=root)


def test_removed_folders_leave_their_row(sweep, add, tmp_path: Path):
    fill(add, 5)
    conclude(sweep, best=2)
    for number in (1, 2):
        shutil.rmtree(f"{sweep.path}/trial_000{number}")
    page = page_of(sweep, tmp_path)
    assert len(page.table("Trial", "State")) == 5
    assert "There is no more to say of the best trial" in page.text


def test_best_file_that_leads_elsewhere_is_not_followed(sweep, add, tmp_path: Path):
    fill(add, 3)
    conclude(sweep, best=2)
    sweep.write_json("best.json", sweep.best() | {"run": "../other"})
    page = page_of(sweep, tmp_path)
    assert "best.json names no run of the sweep" in page.text
    assert len(page.table("Trial", "State")) == 3


def test_confirmed_trials_stand_in_a_table(sweep, add, tmp_path: Path):
    fill(add, 4)
    confirmed = [
        {
            "trial": 2, "scores": [0.68, 0.70], "mean": 0.69, "deviation": 0.0141,
            "gain": [0.03, -0.01, 0.0712],
        },
        {"trial": 3, "scores": [0.66], "mean": 0.66, "deviation": None},
    ]  # fmt: skip
    params = read_trials(sweep)[2].params
    again = add(2, params, [0.6, 0.7], seed=1)
    conclude(sweep, best=2, confirmed=confirmed)
    write_best(sweep, sweep.child(again.name), {"score": 0.7, "trial": 2})
    page = page_of(sweep, tmp_path)
    assert page.table("Trial", "Score in the search") == [
        ["2", "0.700", "0.680, 0.700", "0.690", "0.014", "+0.030 (−0.010 to +0.071)"],
        ["3", "0.658", "0.660", "0.660", "–", "–"],
    ]
    assert page.table("Trial", "Score in the search")[0] in page.highlighted
    assert "0.690mIoU of trial 2, mean of 2 new seeds ± 0.014" in page.text.replace("\n", "")
    assert "The best: trial 2, as confirm_0002_s1" in page.text


def test_what_is_no_sweep_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        write_sweep_report(str(tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
