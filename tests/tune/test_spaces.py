"""Spaces are data: read, checked by name, drawn from, and put over a recipe."""

import json

import pytest

from scribbleseg.config import FinetuneConfig, PretrainConfig, flatten, override, to_dict
from scribbleseg.errors import InputError
from train.recipes import RECIPES
from tune.spaces import (
    SETTINGS,
    SPACES,
    Pretrained,
    apply,
    choice,
    defaults,
    draw,
    fit_space,
    read_pretrained,
    read_space,
    to_tree,
    uniform,
)

BASE = RECIPES["cpu"]()


class Fixed:
    """Draws the last choice and the upper end of a range, and notes what it was asked for."""

    def __init__(self):
        self.asked = {}

    def suggest_categorical(self, name, choices):
        """See Optuna."""
        self.asked[name] = list(choices)
        return choices[-1]

    def suggest_float(self, name, low, high, *, log=False):
        """See Optuna."""
        self.asked[name] = (low, high, log)
        return high

    def suggest_int(self, name, low, high, *, log=False):
        """See Optuna."""
        self.asked[name] = (low, high, log)
        return high


@pytest.mark.parametrize("name", SPACES)
def test_built_in_spaces_fit_every_recipe_and_hold_the_default_of_cpu(name):
    # They search architectures, which an encoder that others trained and stroke matching confine.
    found = [recipe() for recipe in RECIPES.values()]
    free = [r for r in found if r.model.encoder == "own" and not r.model.matching]
    assert len(free) == len(RECIPES) - 2
    for recipe in free:
        fit_space(SPACES[name], override(recipe, SETTINGS.get(name, {})))
    values = defaults(SPACES[name], BASE, [])
    assert values is not None and apply(BASE, values) == BASE


def test_a_space_from_a_file_is_the_one_that_was_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(to_tree(SPACES["full"])))
    assert read_space(str(path)) == SPACES["full"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found no settings"),
        ("[1]", "found no settings"),
        ("a: {log: [0, 1]}", "a.log is [0, 1]; expected numbers above 0"),
        ("a: {range: [2, 1]}", "the lower first"),
        ("a: {range: [1, 2, 3]}", "two numbers"),
        ("a: {range: [false, true]}", "two numbers"),
        ("a: {choice: []}", "expected {choice"),
        ("a: {normal: [0, 1]}", "expected {choice"),
        ("a: 3", "a is 3; expected {choice"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_is_no_space_says_why(tmp_path, text, words):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_space(str(path))
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_space_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="'cor' is unknown; expected core, full, smoke"):
        read_space("cor")
    with pytest.raises(InputError, match="cannot be read"):
        read_space(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("key", "distribution", "words"),
    [
        ("optim.lr", uniform(0.1, 0.2), "optim.lr is no setting"),
        ("model", choice("unet"), "model is no setting"),
        ("augment.strength", uniform(0.0, 2.5), "augment.strength is 2.5"),
        ("model.width", choice(8, 12), "model.width is 12"),
        ("model.architecture", choice("unet", "vgg"), "vgg"),
        ("train.epochs", uniform(1.5, 2.5), "train.epochs"),
        ("init_from", choice("a"), "--pretrained RUN"),
        ("model.width", uniform(8, 32), "model.width is 9"),
        ("data.fold", choice(0, 1), "scored on"),
    ],
)
def test_a_wrong_key_or_range_is_refused_by_name(key, distribution, words):
    with pytest.raises(InputError) as error:
        fit_space({key: distribution}, BASE)
    assert words in str(error.value)


def test_what_is_drawn_is_what_the_space_says_and_lands_in_the_settings():
    drawn = Fixed()
    params = draw(drawn, SPACES["full"], BASE, [])
    assert drawn.asked["optim.learning_rate"] == (3e-4, 1e-2, True)
    assert drawn.asked["model.depth"] == (4, 6, False)
    settings = flatten(to_dict(apply(BASE, params)))
    assert {key: settings[key] for key in params} == params
    untouched = flatten(to_dict(BASE))
    assert all(settings[key] == untouched[key] for key in settings if key not in params)


def test_a_range_is_of_the_numbers_of_its_setting():
    space = {"strokes.simulate_probability": uniform(0, 1), "model.depth": uniform(4, 6)}
    fitted, drawn = fit_space(space, BASE), Fixed()
    draw(drawn, fitted, BASE, [])
    assert drawn.asked["strokes.simulate_probability"] == (0.0, 1.0, False)
    assert not fitted["strokes.simulate_probability"].is_whole and fitted["model.depth"].is_whole
    assert defaults(fitted, BASE, []) is not None
    assert not space["strokes.simulate_probability"].holds(0.5)


def test_a_default_outside_the_space_is_not_drawn():
    assert defaults({"augment.strength": uniform(1.0, 2.0)}, BASE, []) is None


def test_what_is_no_number_lies_in_no_range():
    assert not uniform(0, 1).holds(None) and not uniform(0.5, 2.0).holds((1.0,))
    assert defaults({"predict.scales": uniform(1.0, 2.0)}, BASE, []) is None


def test_the_recipes_own_settings_start_from_scratch():
    runs = [pretrained("/p/resunet", architecture="resunet")]
    space = {"model.architecture": choice("unet", "resunet")}
    base = override(BASE, {"model.architecture": "resunet"})
    own = defaults(space, base, runs)
    assert own == {
        "model.architecture": "resunet",
        "init_from[resunet 16 6 batch]": "scratch",
    }
    assert defaults(space, BASE, runs) == {"model.architecture": "unet"}


def test_folders_of_a_space_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = fit_space({"data.extra": choice([], ["more"]), "data.cache_dir": choice("c")}, BASE)
    assert fitted["data.extra"].values == ([], [f"{tmp_path}/more"])
    assert fitted["data.cache_dir"].values == (f"{tmp_path}/c",)


def pretrained(uri, **model):
    config = override(PretrainConfig(), {f"model.{key}": value for key, value in model.items()})
    from scribbleseg.models import encoder_settings

    return Pretrained(uri=uri, encoder=encoder_settings(config.model))


def test_only_pretraining_runs_that_fit_the_drawn_network_are_starts():
    space = {"model.architecture": choice("unet", "attention_resunet")}
    runs = [
        pretrained("/p/unet", architecture="unet"),
        pretrained("/p/resunet", architecture="resunet"),
        pretrained("/p/wide", architecture="resunet", width=32),
        pretrained("/p/shallow", architecture="resunet", depth=5),
    ]
    drawn = Fixed()
    params = draw(drawn, space, BASE, runs)
    key = "init_from[resunet 16 6 batch]"
    assert drawn.asked[key] == ["scratch", "/p/resunet"]
    assert apply(BASE, params).init_from == "/p/resunet"
    assert apply(BASE, params | {key: "scratch"}).init_from is None
    assert draw(Fixed(), space, BASE, runs[:1]).keys() == {"model.architecture"}


def test_settings_that_do_not_go_together_fail_their_trial_and_not_the_drawing():
    # Stroke matching looks at levels that a shallow network does not have.
    space = {"model.depth": choice(4), "model.matching": choice(True)}
    params = draw(Fixed(), space, BASE, [pretrained("/p/unet", architecture="unet")])
    assert params == {"model.depth": 4, "model.matching": True}
    with pytest.raises(InputError, match="matching"):
        apply(BASE, params)


def test_only_finished_pretraining_runs_are_accepted(tmp_path):
    record = {"kind": "dino", "finished": True, "config": to_dict(PretrainConfig())}
    for name, changes in {"ok": {}, "half": {"finished": False}, "other": {"kind": "x"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record | changes))
    found = read_pretrained(str(tmp_path / "ok"))
    assert found.encoder == {"encoder": "unet", "width": 16, "depth": 6, "norm": "batch"}
    with pytest.raises(InputError, match="has not finished"):
        read_pretrained(str(tmp_path / "half"))
    for name in ("other", "none"):
        with pytest.raises(InputError, match="is no pretraining run"):
            read_pretrained(str(tmp_path / name))


def test_settings_of_smoke_are_settings():
    assert isinstance(override(RECIPES["demo"](), SETTINGS["smoke"]), FinetuneConfig)
