"""The built wheel installs and predicts, away from this checkout."""

import os
import subprocess
import sys
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


@pytest.mark.slow
def test_the_wheel_installs_and_predicts(tiny_data, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT], check=True
    )
    (wheel,) = (tmp_path / "wheels").glob("scribbleseg-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)

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


@pytest.mark.slow
def test_the_installed_wheel_carries_its_lists_and_templates(tmp_path):
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "scribbleseg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= carried
