"""Recipes are whole, named and documented."""

import pytest

from scribbleseg.config import FinetuneConfig, from_dict, to_dict
from scribbleseg.errors import InputError
from scribbleseg.models import encoder_settings
from train import finetune, pretrain
from train.command import base_config
from train.finetune import main
from train.recipes import PRETRAIN_RECIPES, RECIPES

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE is missing"),
        (["cup"], "'cup' is unknown; expected demo, cpu, best, scratch, report, gpu"),
        (["cpu"], "data.root is not set"),
        (["cpu", "--data.root", "/nowhere"], "/nowhere"),
        (["cpu", "--modle.width", "8"], "--modle.width"),
        (["cpu", "--launch.num-workers", "0"], "launch.num_workers is 0"),
        (["missing.yaml"], "missing.yaml"),
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
