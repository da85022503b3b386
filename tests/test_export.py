"""ONNX files: the same logits as PyTorch's at any size, and what cannot be written is one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scribbleseg.cli import run_line
from scribbleseg.config import DataConfig, FinetuneConfig, ModelConfig, PredictConfig
from scribbleseg.datasets.transforms import normalise
from scribbleseg.errors import InputError
from scribbleseg.export import export_onnx
from scribbleseg.models import build_model
from scribbleseg.predict import Predictor

onnxruntime = pytest.importorskip("onnxruntime")


def predictor(model: ModelConfig) -> Predictor:
    torch.manual_seed(0)
    network = build_model(model).eval()
    # What starts at zero would be missed if it were lost.
    for name, parameter in network.named_parameters():
        if name.endswith("project.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    data = DataConfig(root="/home/me/photographs", cache_dir="/home/me/cache")
    predict = PredictConfig(threshold=0.6)
    config = replace(FinetuneConfig(), data=data, model=model, predict=predict)
    return Predictor(config=config, model=network, device=torch.device("cpu"), source="test")


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(width=8),
        ModelConfig(width=8, architecture="resunet", matching=True, norm="group"),
        ModelConfig(width=8, architecture="attention_resunet"),
        ModelConfig(width=8, encoder="lite0", matching=True),
    ],
    ids=lambda model: f"{model.architecture}:{model.encoder}",
)
def test_it_gives_the_networks_logits_at_any_size(model: ModelConfig, tmp_path: Path) -> None:
    one = predictor(model)
    export_onnx(one, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in ((1, 64, 128), (3, 96, 32)):
        shape = (batch, 3, height, width)
        image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        strokes = torch.zeros(batch, 2, height, width, dtype=torch.uint8)
        strokes[:, 0, 20:30, 5:25] = 255
        strokes[:-1, 1, 40:44, 5:25] = 128
        with torch.inference_mode():
            logits = one.model(normalise(image), strokes.float() / 255).logits
            expected = logits.numpy() - np.log(0.6 / 0.4)
        (found,) = session.run(None, {"image": image.numpy(), "strokes": strokes.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map["scribbleseg"]
    assert json.loads(told)["model"]["width"] == 8
    assert b"/home/me" not in (tmp_path / "model.onnx").read_bytes()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"photo.jpg: expected a name that ends in .onnx"):
        export_onnx(predictor(ModelConfig(width=8)), tmp_path / "photo.jpg")
    with pytest.raises(InputError, match=r"model.onnx: no such file or directory; expected a file"):
        export_onnx(predictor(ModelConfig(width=8)), tmp_path / "nowhere" / "model.onnx")


def test_a_transformer_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vit_unet") as error:
        export_onnx(predictor(ModelConfig(width=8, architecture="vit_unet")), tmp_path / "m.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_released_network_is_exported_by_its_command(tmp_path: Path, capsys) -> None:
    run_line(["export", "released:best", "--out", str(tmp_path / "best.onnx")])
    assert "checked against PyTorch" in capsys.readouterr().out
