"""Settings: validation, dictionaries, YAML, overrides."""

import ast
import dataclasses
import inspect
import itertools

import pytest

from scribbleseg import config as config_module
from scribbleseg.config import (
    FinetuneConfig,
    PretrainConfig,
    config_hash,
    essence,
    from_dict,
    from_yaml,
    override,
    parse_arguments,
    to_dict,
    to_yaml,
)
from scribbleseg.errors import InputError


def test_dictionary_and_yaml_round_trip(tmp_path):
    config = override(
        FinetuneConfig(),
        {"data.fold": None, "data.val_split": "test", "train.compile": True, "init_from": "--x"},
    )
    assert from_dict(FinetuneConfig, to_dict(config)) == config
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(FinetuneConfig(), path) == config


def test_what_is_left_out_keeps_its_value(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("optim: {learning_rate: 0.5}\n")
    config = from_yaml(override(FinetuneConfig(), {"train.epochs": 7}), path)
    assert (config.optim.learning_rate, config.train.epochs) == (0.5, 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.rot": 1}, ["--data.rot", "--data.root"]),
        ({"train.epochs": "many"}, ["--train.epochs", "many"]),
        ({"train.epochs": 0}, ["train.epochs is 0", "1 or more"]),
        ({"model.architecture": "resnet"}, ["resnet", "attention_resunet"]),
        ({"model.width": 12}, ["model.width is 12", "multiple of 8"]),
        ({"data.crop_size": 100}, ["data.crop_size is 100", "multiple of 32"]),
        (
            {"model.architecture": "vit_unet", "data.crop_size": 200},
            ["data.crop_size is 200", "a multiple of 16, the coarsest stride at model.patch_size"],
        ),
        (
            {"data.crop_size": 32, "train.batch_size": 7, "train.accumulate": 4},
            ["data.crop_size is 32; expected more than 32", "is one image", "model.norm group"],
        ),
        ({"train.seed": 2**63}, ["train.seed is", "0 to 2^63 - 1"]),
        ({"data.fold": 5}, ["data.fold is 5", "0 to 4"]),
        ({"data.val_split": "test"}, ["data.val_split", "--data.fold None"]),
        ({"loss.dice": 0, "loss.bce": 0}, ["loss.bce is 0"]),
        ({"augment.strength": 2.5}, ["augment.strength is 2.5", "0 to 2"]),
        ({"augment.paste_probability": 2}, ["augment.paste_probability is 2", "between 0 and 1"]),
        ({"strokes.width": [5, 3]}, ["strokes.width is (5.0, 3.0)", "least <= most"]),
        ({"strokes.length": [0, 1]}, ["strokes.length is (0.0, 1.0)", "0 < least"]),
        ({"optim.clip_norm": "inf"}, ["optim.clip_norm is inf", "a finite number"]),
        ({"strokes.width": [1, "inf"]}, ["strokes.width is inf", "a finite number"]),
        ({"predict.scales": [1, 9]}, ["predict.scales is (1.0, 9.0)", "each 0.25 to 4"]),
        ({"predict.scales": [4], "data.long_side": 4096}, ["predict.scales", "at most 8192"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_remedy(changes, words):
    with pytest.raises(InputError) as caught:
        override(FinetuneConfig(), changes)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_unreadable_yaml_is_named(tmp_path):
    for content in (
        "a: [",
        "- 1\n- 2\n",
        "train:\n  epochs: 3\ntrain:\n  seed: 4\n",
        "data:\n  split: 2024-02-30\n",
        "data: &x\n  root: *x\n",
    ):
        path = tmp_path / "settings.yaml"
        path.write_text(content)
        with pytest.raises(InputError, match="settings.yaml"):
            from_yaml(FinetuneConfig(), path)


def test_a_bad_setting_of_a_file_is_named_with_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("strokes:\n  width: 3\n")
    with pytest.raises(InputError, match=r"a\.yaml: .*--strokes\.width"):
        from_yaml(FinetuneConfig(), tmp_path / "a.yaml")


def test_a_group_that_is_empty_changes_nothing(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("data:\n#  root: X\ntrain:\n  epochs: 3\n")
    config = from_yaml(FinetuneConfig(), path)
    assert config == override(FinetuneConfig(), {"train.epochs": 3})


def test_a_value_that_looks_like_an_option_is_none(tmp_path):
    with pytest.raises(InputError, match="do not begin with -"):
        override(FinetuneConfig(), {"data.extra": ["-h"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"data.num_workers": 1, "data.cache_dir": "/fast"},
        {"train.recompute": True, "train.keep": 9},
        {"train.save_minutes": 1.0, "train.save_steps": 5},
    ],
)
@pytest.mark.parametrize("kind", [FinetuneConfig, PretrainConfig])
def test_what_may_change_as_a_run_goes_on_is_no_part_of_it(kind, changes):
    changed = override(kind(), changes)
    assert changed != kind() and essence(changed) == kind()
    assert essence(override(changed, {"train.seed": 1})) != kind()


def test_parts_of_a_batch_have_two_images_where_images_are_compared():
    with pytest.raises(InputError, match=r"batch_size is 8; expected at least 16.* 2 images for"):
        override(PretrainConfig(), {"train.batch_size": 8, "train.accumulate": 8})
    tight = override(FinetuneConfig(), {"data.crop_size": 32, "model.depth": 6})
    assert (tight.least_images, FinetuneConfig().least_images) == (2, 1)


@pytest.mark.parametrize("words", [["--data.root=~/d=1"], ["--data.root", "~/d=1"]])
def test_the_home_folder_is_spelt_out(words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert parse_arguments(FinetuneConfig, words, prog="p").data.root == "/home/ann/d=1"


def test_the_hash_follows_every_setting():
    config = FinetuneConfig()
    assert config_hash(config) == config_hash(FinetuneConfig())
    assert config_hash(config) != config_hash(override(config, {"train.seed": 1}))


def one_line(text: str) -> str:
    """A text without the line breaks, and the box, of a help."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    "kind", [each for each in vars(config_module).values() if dataclasses.is_dataclass(each)]
)
def test_every_field_has_a_text_under_it_which_is_its_help(kind, capsys):
    (tree,) = ast.parse(inspect.getsource(kind)).body
    texts = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert list(texts) == list(kind.__annotations__)
    with pytest.raises(SystemExit):
        parse_arguments(kind, ["--help"], prog="settings")
    shown = one_line(capsys.readouterr().out)
    assert [text for text in texts.values() if one_line(text) not in shown] == []


@pytest.mark.parametrize(
    "changes",
    [{"data.crop_size": 64}, {"train.batch_size": 2}, {"model.norm": "group"}, {"model.depth": 5}],
)
def test_a_part_of_one_image_is_enough_where_its_features_are_normalised(changes):
    override(FinetuneConfig(), {"data.crop_size": 32, "train.batch_size": 1} | changes)
