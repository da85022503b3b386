"""Lists of stems, and the benchmark's, which the package holds."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.datasets.sources import benchmark_stems
from scribbleseg.datasets.split import hold_out, split
from scribbleseg.errors import InputError

LISTS = resources.files("scribbleseg.datasets") / "lists" / "scribble-voc"


def test_writes_folds_and_holdout(tiny_root: Path, tmp_path: Path):
    out = tmp_path / "lists"
    lists = split(tiny_root, "train", 3, out, holdout=0.3)
    assert {path.name for path in out.iterdir()} == set(lists)
    for name, stems in lists.items():
        assert (out / name).read_text().splitlines() == stems
    assert [lists[f"fold{fold}.txt"] for fold in range(3)] == [["a"], ["b"], ["c"]]
    assert sorted(lists["train.txt"] + lists["val.txt"]) == ["a", "b", "c"]
    with pytest.raises(InputError, match="already there"):
        split(tiny_root, "train", 3, out)


def test_writes_where_a_link_leads_and_never_over_a_mounted_disk(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "lists").symlink_to(tmp_path / "disk")
    lists = split(tiny_root, "train", 3, tmp_path / "lists")
    assert {path.name for path in (tmp_path / "disk").iterdir()} == set(lists)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mounted")
    with pytest.raises(InputError, match="mounted there; expected .*: name one inside it"):
        split(tiny_root, "train", 3, tmp_path / "mounted")


def test_the_holdout_is_a_function_of_the_seed():
    stems = [f"{number:03d}" for number in range(100)]
    first, second, other = (
        hold_out(stems, 0.25, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first == second != other
    assert len(first[1]) == 25 and sorted(first[0] + first[1]) == stems


@pytest.mark.parametrize("share", [-0.5, 1.0, 0.99, float("nan")])
def test_a_holdout_that_cannot_be(share: float):
    with pytest.raises(InputError, match="holdout"):
        hold_out(["a", "b", "c"], share, np.random.default_rng(0))


def test_the_benchmarks_folds_follow_the_rule():
    stems = benchmark_stems("train")
    for fold in range(5):
        listed = (LISTS / "folds" / f"fold{fold}.txt").read_text().splitlines()
        assert listed == [stem for at, stem in enumerate(sorted(stems)) if at % 5 == fold]
    assert len((LISTS / "folds" / "fold0.txt").read_text().splitlines()) == 46


def test_the_lists_are_the_benchmarks(benchmark: Path):
    for name in ("train", "test1"):
        stems = [paths.stem for paths in list_scenes(benchmark, name, need_masks=False)]
        assert benchmark_stems(name) == stems


def test_a_seed_below_0_is_refused(tiny_root: Path, tmp_path: Path):
    with pytest.raises(InputError, match="seed is -1; expected 0 or more"):
        split(tiny_root, "train", 3, tmp_path / "lists", holdout=0.3, seed=-1)


def test_a_name_that_a_list_cannot_hold_is_refused(tiny_root: Path, tmp_path: Path):
    for path in (tiny_root / "train").glob("*/a.*"):
        path.rename(path.with_name(f"a\nb{path.suffix}"))
    with pytest.raises(InputError, match=r"file name 'a\\nb' of split train holds a line break"):
        split(tiny_root, "train", 2, tmp_path / "lists")
    assert not (tmp_path / "lists").exists()


def test_fewer_than_two_folds_are_refused(tiny_root: Path, tmp_path: Path):
    with pytest.raises(InputError, match="folds is 0; expected 2 or more"):
        split(tiny_root, "train", 0, tmp_path / "lists")
    assert not (tmp_path / "lists").exists()
