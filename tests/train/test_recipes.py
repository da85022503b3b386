"""Recipes are whole, named and documented."""

import pytest

from scribbleseg.config import FinetuneConfig, from_dict, to_dict
from scribbleseg.errors import InputError
from train.finetune import base_config, main, usage
from train.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_documented_and_survives_the_trip_to_a_worker(name):
    recipe = RECIPES[name]
    assert recipe.__name__ == name
    assert (recipe.__doc__ or "").splitlines()[0] in usage()
    assert from_dict(FinetuneConfig, to_dict(recipe())) == recipe()


def test_a_yaml_file_stands_for_a_recipe(tmp_path, capsys):
    main(["report", "--train.epochs", "3", "--print-config"])
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    name, config = base_config(str(path))
    assert (name, config.train.epochs) == ("mine", 3)
    assert config.model == RECIPES["report"]().model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE is missing"),
        (["cup"], "'cup' is unknown; expected demo, cpu, report, gpu"),
        (["cpu"], "data.root is not set"),
        (["cpu", "--data.root", "/nowhere"], "/nowhere"),
        (["cpu", "--modle.width", "8"], "--modle.width"),
        (["cpu", "--launch.num-workers", "0"], "launch.num_workers is 0"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_command_lines_are_one_line(arguments, words, capsys):
    with pytest.raises(InputError) as caught:
        main(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
