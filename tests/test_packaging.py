"""The built wheel installs and predicts, away from this checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scribbleseg import checkpoint as checkpoints
from scribbleseg import manifest
from scribbleseg.config import FinetuneConfig, ModelConfig
from scribbleseg.models import build_model

ROOT = Path(__file__).resolve().parents[1]


PIP = [sys.executable, "-m", "pip", "--quiet"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: the build folder of a checkout still holds what is no longer packed."""
    folder = tmp_path_factory.mktemp("wheel")
    project = folder / "project"
    project.mkdir()
    for path in ROOT.iterdir():
        if (path / "__init__.py").exists():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, project / path.name, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, project)
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, project], check=True)
    (wheel,) = folder.glob("scribbleseg-*.whl")
    return wheel


def test_the_wheel_installs_and_predicts(wheel, tiny_data, tmp_path):
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)

    torch.manual_seed(0)
    config = FinetuneConfig(model=ModelConfig(width=8, depth=3))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = build_model(config.model).state_dict()
    checkpoints.write_model(folder, config=config, weights=weights, metrics={})
    manifest.write_manifest(folder)

    code = (
        "import scribbleseg, train.finetune, sys;"
        f"assert scribbleseg.__file__.startswith({str(site)!r}), scribbleseg.__file__;"
        "from scribbleseg.cli import main; main()"
    )
    split = tiny_data / "test"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "--checkpoint", folder, "--images"]
        + [split / "images", "--scribbles", split / "scribbles", "--out", tmp_path / "masks"],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in (split / "images").iterdir():
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{path.stem}.png"))
        assert mask.shape == np.asarray(Image.open(path)).shape[:2]
        assert set(np.unique(mask)) <= {0, 1}


def test_the_installed_wheel_carries_its_lists_and_templates(wheel):
    carried = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "scribbleseg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= carried
