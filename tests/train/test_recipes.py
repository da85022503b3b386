"""Recipes are whole, named and documented."""

import pytest
import torch

from scribbleseg.checkpoint import write_model
from scribbleseg.config import DataConfig, FinetuneConfig, TrainConfig, from_dict, override, to_dict
from scribbleseg.errors import InputError
from scribbleseg.loops.state import init_state
from scribbleseg.manifest import write_manifest
from scribbleseg.models import build_model, encoder_settings
from scribbleseg.predict import load
from train import finetune, pretrain
from train.command import base_config
from train.finetune import main
from train.recipes import PRETRAIN_RECIPES, RECIPES

RELEASED = ("best", "scratch")

JOBS = [
    pytest.param(command, recipes, name, id=f"{command.PROG.split('.')[-1]}-{name}")
    for command, recipes in ((finetune, RECIPES), (pretrain, PRETRAIN_RECIPES))
    for name in recipes
]


@pytest.mark.parametrize(("command", "recipes", "name"), JOBS)
def test_a_recipe_is_documented_and_survives_the_trip_to_a_worker(command, recipes, name, capsys):
    recipe = recipes[name]
    assert recipe.__name__.removeprefix("pretrain_") == name
    command.main(["--help"])
    assert (recipe.__doc__ or "").splitlines()[0] in capsys.readouterr().out
    config = recipe()
    assert from_dict(type(config), to_dict(config)) == config


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_what_a_recipe_pretrains_fits_the_finetuning_recipe_of_that_name(name):
    pretrained, wanted = PRETRAIN_RECIPES[name]().model, RECIPES[name]().model
    assert encoder_settings(pretrained) == encoder_settings(wanted)


def test_a_yaml_file_stands_for_a_recipe(tmp_path, capsys):
    main(["report", "--train.epochs", "3", "--print-config"])
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    name, config = base_config(str(path), RECIPES, FinetuneConfig())
    assert (name, config.train.epochs) == ("mine", 3)
    assert config.model == RECIPES["report"]().model


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_network_stands_for_a_recipe(name, capsys):
    """Its weights fit its settings, and nothing is left of the data that it came from."""
    main([f"released:{name}", "--train.epochs", "3", "--print-config"])
    assert f"init_from: released:{name}" in capsys.readouterr().out
    title, config = base_config(f"released:{name}", RECIPES, FinetuneConfig())
    assert title == "further" and config.init_from == f"released:{name}"
    begun = init_state(config, torch.device("cpu"), None)
    weights = load(f"released:{name}", device="cpu").model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in begun.model.state_dict().items())


def test_a_run_stands_for_a_recipe_and_leaves_its_data_behind(tmp_path):
    trained = override(
        FinetuneConfig(),
        {
            "model.width": 8,
            "model.depth": 3,
            "data.crop_size": 64,
            "data.root": "/data",
            "data.fold": None,
            "data.extra": ["/more/train"],
            "data.cache_dir": "/fast",
            "data.num_workers": 12,
            "loss.supervision": "strokes",
            "train.precision": "fp16",
            "train.compile": True,
            "train.save_steps": 100,
            "init_from": "/before",
        },
    )
    folder = tmp_path / "run" / "checkpoint_0001"
    write_model(folder, config=trained, weights=build_model(trained.model).state_dict(), metrics={})
    write_manifest(folder)
    _, config = base_config(str(folder), RECIPES, FinetuneConfig())
    assert config.model == trained.model and config.init_from == str(folder)
    assert config.data == DataConfig(long_side=trained.data.long_side, crop_size=64)
    assert config.loss.supervision == "mask"
    plain = TrainConfig()
    for own in ("precision", "compile", "save_steps"):
        assert getattr(config.train, own) == getattr(plain, own)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE is missing"),
        (["cup"], "'cup' is unknown; expected demo, practice, cpu, best, scratch, report, gpu"),
        (["cpu"], "data.root is not set"),
        (["cpu", "--data.root", "/nowhere"], "/nowhere"),
        (["cpu", "--modle.width", "8"], "--modle.width"),
        (["cpu", "--launch.num-workers", "0"], "launch.num_workers is 0"),
        (["missing.yaml"], "missing.yaml"),
        (["released:nothing"], "released:nothing"),
        (["tests"], "tests"),
    ],
)
def test_bad_command_lines_are_one_line(arguments, words):
    with pytest.raises(InputError) as caught:
        main(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE is missing"),
        (["cup"], "'cup' is unknown; expected demo, cpu, report, gpu"),
        (["cpu"], "data.roots is not set"),
        (["cpu", "--data.roots", "/nowhere"], "/nowhere"),
        (["cpu", "--crops.global-scale", "0.9", "0.2"], "crops.global_scale is (0.9, 0.2)"),
        (["cpu", "--dino.out-dim", "1"], "dino.out_dim is 1"),
    ],
)
def test_bad_pretraining_command_lines_are_one_line(arguments, words):
    with pytest.raises(InputError) as caught:
        pretrain.main(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(InputError, match="found no image"):
        pretrain.main(["demo", "--data.roots", str(tmp_path)])
