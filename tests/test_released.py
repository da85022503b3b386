"""The checkpoints that ship with the package."""

import re
from pathlib import Path

import pytest

from scribbleseg import load
from scribbleseg.checkpoint import read_model
from scribbleseg.config import FinetuneConfig
from scribbleseg.evaluate import evaluate
from scribbleseg.manifest import RELEASED, verify

FOLDERS = sorted(RELEASED.iterdir())


def test_there_is_one():
    assert RELEASED / "best" in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_whole_light_and_tells_of_no_machine(folder: Path):
    assert verify(folder) == []
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    found = read_model(folder)
    assert isinstance(found.config, FinetuneConfig)
    assert found.config.data.root == ""
    card = (folder / "README.md").read_text()
    assert f"released:{folder.name}" in card
    for part in ("## Data", "## Figures", "## Limits", "## Licence"):
        assert part in card


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_reaches_the_figures_of_its_card(folder: Path, benchmark: Path):
    found = evaluate(load(f"released:{folder.name}"), benchmark, "train", None, fold=0)
    card = (folder / "README.md").read_text()
    stated = re.search(r"\| fold 0 of the benchmark \| ([0-9.]+)", card)
    assert stated is not None
    assert found.means["miou"] == pytest.approx(float(stated[1]), abs=0.003)
