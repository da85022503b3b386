"""What benchmarks share, and that those of speed still run: no test asserts a time."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest


def test_kinds_of_work_take_turns_and_the_first_rounds_do_not_count():
    from benchmarks.measure import in_turn

    done: list[str] = []
    works = {name: lambda name=name: done.append(name) for name in "ab"}
    times = in_turn(works, 3, warm_up=1)
    assert done == ["a", "b"] * 4
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_a_table_compares_with_its_last_line_round_by_round():
    from benchmarks.measure import Measured, to_markdown

    ours = Measured(name="ours", seconds=(1.0, 2.0, 1.0), items=4)
    theirs = Measured(name="theirs", seconds=(2.0, 2.0, 4.0), items=4)
    assert to_markdown("step", [ours, theirs], "images").splitlines() == [
        "| step | images per second | least | most | × theirs |",
        "| --- | --- | --- | --- | --- |",
        "| ours | 4.00 | 2.00 | 4.00 | 2.00 (1.00 to 4.00) |",
        "| theirs | 2.00 | 1.00 | 2.00 | 1 |",
    ]


@pytest.mark.parametrize(
    "words", [["nope"], ["train_step", "--device", "nowhere"]], ids=["name", "device"]
)
def test_bad_input_is_one_line(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from benchmarks import train_step
    from benchmarks.__main__ import main
    from scribbleseg.cli import exit_status

    command = main if len(words) == 1 else train_step.main
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words[-2:]])
    assert exit_status(command) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert words[-1] in said


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_what_learned_nothing_differs_by_its_normalisation_alone(norm: str, tiny_data: Path):
    from benchmarks.probe_rise import nothing_learned
    from scribbleseg.config import PretrainConfig, override
    from scribbleseg.loops.pretrain import resolve

    changes = {
        "data.roots": [str(tiny_data)],
        "data.num_workers": 0,
        "probe.root": str(tiny_data),
        "crops.global_size": 64,
        "crops.local_size": 32,
        "model.width": 8,
        "model.depth": 3,
        "model.norm": norm,
        "train.batch_size": 4,
    }
    untouched, looked = nothing_learned(resolve(override(PretrainConfig(), changes), 100))
    assert (untouched == looked) == (norm == "group")


def test_only_a_probed_pretraining_has_a_rise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from benchmarks.probe_rise import main
    from scribbleseg.cli import exit_status

    monkeypatch.setattr(sys, "argv", ["benchmarks.probe_rise", "--run", str(tmp_path)])
    assert exit_status(main) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(tmp_path) in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_step", ["--width", "8", "--batch-size", "2", "--side", "64"]),
        ("dino_step", ["--width", "8", "--batch-size", "2", "--out-dim", "64"]),
    ],
)
def test_those_of_speed_run(name: str, words: list[str], tmp_path: Path):
    # In a process of its own, as users do: types that tests check cannot be compiled.
    out = tmp_path / name
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", "1", *words]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    lines = json.loads(out.with_suffix(".json").read_text())["lines"]
    assert len(lines) >= 3
    assert all(seconds > 0 for line in lines for seconds in line["seconds"])
    assert out.with_suffix(".md").read_text().startswith("| ")


def test_more_draws_leave_the_first_as_it_is(tiny_data: Path):
    from benchmarks.robustness import Robustness, strokes_of
    from scribbleseg.datasets.scenes import read_scene

    bench = Robustness(root=str(tiny_data), groups=("length",))
    scene = read_scene(bench.paths()[0])
    one = strokes_of(scene, 5, bench)
    three = strokes_of(scene, 5, Robustness(root=str(tiny_data), draws=3))
    assert {kind for kind, _ in one} == {"length"} and set(one) < set(three)
    for name, (strokes,) in one.items():
        first, second, third = three[name]
        np.testing.assert_array_equal(first, strokes)
        assert (second != first).any() and (third != second).any()


def test_what_short_strokes_keep_is_a_ratio_of_means():
    from benchmarks.robustness import kept

    whole = np.linspace(0.5, 1, 40)
    share, low, high = kept(whole * np.where(np.arange(40) % 2, 0.8, 1.0), whole)
    assert low < share < high and share == pytest.approx(1 - 0.2 * whole[1::2].sum() / whole.sum())
    assert kept(0.9 * whole, whole) == pytest.approx((0.9, 0.9, 0.9))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scaling_table", ["--recipe", "foo"]),
        ("scaling_table", ["--gpus", "0"]),
        ("interaction", ["--strokes", "4"]),
        ("robustness", ["--draws", "0"]),
        ("ray_share", ["--root", "DATA", "--changes", "foo"]),
    ],
)
def test_settings_out_of_range_are_named_before_anything_is_measured(
    name: str,
    words: list[str],
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from scribbleseg.cli import exit_status

    words = [str(tiny_data) if word == "DATA" else word for word in words]
    monkeypatch.setattr(sys, "argv", [name, *words])
    assert exit_status(import_module(f"benchmarks.{name}").main) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{words[-2].strip('-')} is" in said
