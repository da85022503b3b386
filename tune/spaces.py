"""Search spaces as data: a setting's dotted key -> the distribution its values are drawn from.

A space can be given as a YAML file:

```yaml
model.architecture: {choice: [unet, resunet]}    # one of these
augment.strength: {range: [0.0, 1.5]}            # uniform; whole numbers where the setting is one
optim.learning_rate: {log: [3.0e-4, 1.0e-2]}     # uniform in the logarithm
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from scribbleseg.config import (
    FinetuneConfig,
    ModelConfig,
    flatten,
    from_dict,
    override,
    read_yaml,
    to_dict,
)
from scribbleseg.errors import InputError
from scribbleseg.models import encoder_settings
from scribbleseg.runs import RunFolder
from train.places import absolute

INIT = "init_from"
SCRATCH = "scratch"
PATHS = ("data.extra", "data.cache_dir")
SCORED_ON = ("data.root", "data.split", "data.fold", "data.num_folds", "data.val_split")

Kind = Literal["choice", "range", "log"]
KINDS: tuple[Kind, ...] = ("choice", "range", "log")


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What the values of one setting are drawn from."""

    kind: Kind
    """choice: one of `values`; range: uniform between two of them; log: uniform in the logarithm.
    """
    values: tuple[Any, ...]
    """The choices, or the lowest and the highest value."""

    @property
    def is_whole(self) -> bool:
        """Whether numbers between the ends are whole ones; see `fit_space`."""
        return all(isinstance(value, int) for value in self.values)

    def holds(self, value: Any) -> bool:
        """Say whether a value can be drawn."""
        if self.kind == "choice":
            return value in self.values
        kinds = int if self.is_whole else int | float
        return isinstance(value, kinds) and self.values[0] <= value <= self.values[1]


Space = Mapping[str, Distribution]


class Draws(Protocol):
    """The part of an Optuna trial that values are drawn with."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draw one of the choices."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw a whole number."""
        ...


def choice(*values: Any) -> Distribution:
    """Return a distribution over these values."""
    return Distribution(kind="choice", values=values)


def uniform(low: float, high: float) -> Distribution:
    """Return a uniform distribution."""
    return Distribution(kind="range", values=(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Return a distribution that is uniform in the logarithm."""
    return Distribution(kind="log", values=(low, high))


CORE: Space = {
    "model.architecture": choice("unet", "resunet", "attention_resunet"),
    "optim.learning_rate": log_uniform(3e-4, 1e-2),
    "augment.strength": uniform(0.0, 1.5),
}
FULL: Space = CORE | {
    "model.width": choice(8, 16, 24, 32),
    "model.depth": uniform(4, 6),
    "optim.weight_decay": log_uniform(1e-4, 1e-1),
    "loss.dice": uniform(0.2, 2.0),
    "strokes.encoding": choice("raw", "disc", "distance"),
    "strokes.simulate_probability": uniform(0.0, 1.0),
}
SMOKE: Space = {
    "optim.learning_rate": log_uniform(1e-3, 1e-2),
    "augment.strength": uniform(0.0, 1.0),
}

SPACES: dict[str, Space] = {"core": CORE, "full": FULL, "smoke": SMOKE}

# What a built-in space changes in the recipe. The demo's network at a small scale, two
# epochs of a few steps: a trial of `smoke` is over in seconds and shows that everything works.
SETTINGS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.long_side": 64,
        "data.crop_size": 32,
        "model.width": 8,
        "model.depth": 3,
        "train.epochs": 2,
        "train.validate_every": 1,
    }
}


def read_space(name: str) -> Space:
    """Return a built-in space, or that of a YAML file.

    Raises:
        InputError: there is none of that name, or the file is not a space.
    """
    if name in SPACES:
        return SPACES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"space {name!r} is unknown; expected {', '.join(SPACES)} or a .yaml file of "
            "distributions"
        )
    tree = read_yaml(path)
    if not isinstance(tree, Mapping) or not tree:
        raise InputError(f"{path}: found no settings; expected lines of KEY: {{KIND: VALUES}}")
    return {str(key): _parse(f"{path}: {key}", value) for key, value in tree.items()}


def to_tree(space: Space) -> dict[str, dict[str, list[Any]]]:
    """Return a space as it stands in YAML."""
    return {key: {each.kind: list(each.values)} for key, each in space.items()}


def _parse(where: str, tree: Any) -> Distribution:
    """Read one distribution."""
    expected = "expected {choice: [...]}, {range: [LOW, HIGH]} or {log: [LOW, HIGH]}"
    if not isinstance(tree, Mapping) or len(tree) != 1:
        raise InputError(f"{where} is {tree!r}; {expected}")
    kind, values = next(iter(tree.items()))
    if kind not in KINDS or not isinstance(values, list) or not values:
        raise InputError(f"{where} is {dict(tree)!r}; {expected}")
    if kind != "choice":
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not numbers or len(values) != 2 or not values[0] < values[1]:
            raise InputError(
                f"{where}.{kind} is {values!r}; expected two numbers, the lower first (to YAML, "
                "3e-4 is a word: write 3.0e-4)"
            )
        if kind == "log" and values[0] <= 0:
            raise InputError(f"{where}.log is {values!r}; expected numbers above 0")
    return Distribution(kind=kind, values=tuple(values))


def fit_space(space: Space, base: FinetuneConfig) -> Space:
    """Try every setting of a space at its ends, or at each of its choices.

    Returns:
        The space with the ends of a range as numbers of the setting's own kind: from 0 to 1 there
        is more than 0 and 1, if it is no whole number.

    Raises:
        InputError: a key that is no setting, or a value that the setting refuses.
    """
    known = flatten(to_dict(base))
    fitted: dict[str, Distribution] = {}
    for key, distribution in space.items():
        if key == INIT:
            raise InputError(f"{INIT}: is not searched by a space; expected --pretrained RUN")
        if key not in known:
            raise InputError(f"space: {key} is no setting; expected one of those of --help")
        if key in SCORED_ON:
            raise InputError(
                f"space: {key}: decides which images trials are scored on, and trials of different "
                f"ones cannot be compared; expected it for all of them: --{key.replace('_', '-')}"
            )
        if distribution.kind != "choice" and isinstance(known[key], float):
            ends = tuple(float(value) for value in distribution.values)
            distribution = replace(distribution, values=ends)
        if key in PATHS:
            # Trials run in other folders.
            chosen = tuple(_absolute(value) for value in distribution.values)
            distribution = replace(distribution, values=chosen)
        fitted[key] = distribution
        values = list(distribution.values)
        if distribution.kind != "choice" and distribution.is_whole:
            # What steps a setting has, its neighbours tell.
            values.append(values[0] + 1)
        for value in values:
            try:
                override(base, {key: value})
            except InputError as error:
                raise InputError(f"space: {key}: {error}") from None
    return fitted


def _absolute(value: Any) -> Any:
    """Return a folder, or each of several, as every machine finds it; None as it is."""
    if isinstance(value, list | tuple):
        return [absolute(str(each)) for each in cast(Sequence[object], value)]
    return absolute(value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretraining run that trials may start from."""

    uri: str
    """The run."""
    encoder: dict[str, Any]
    """What a network must have for it to fit, see `encoder_settings`."""


def read_pretrained(uri: str) -> Pretrained:
    """Read what a pretraining run's encoder fits.

    Raises:
        InputError: it is not a finished pretraining run.
    """
    record = RunFolder.open(uri).read_record()
    if record is None or record.get("kind") != "dino":
        raise InputError(
            f"pretrained: {uri}: is no pretraining run; expected one of train.pretrain"
        )
    if record.get("finished") is not True:
        raise InputError(f"pretrained: {uri}: has not finished; run its command again first")
    model = from_dict(ModelConfig, record.get("config", {}).get("model", {}))
    return Pretrained(uri=uri, encoder=encoder_settings(model))


def draw(
    draws: Draws, space: Space, base: FinetuneConfig, pretrained: Sequence[Pretrained]
) -> dict[str, Any]:
    """Draw a trial's parameters.

    Where pretraining runs are listed and some fit the network that was drawn, the start is drawn
    too, from these and from scratch.

    Returns:
        Values by dotted key; the start's key also names the encoder, because for each of them it
        is drawn from other runs.
    """
    params = {key: _draw(draws, key, each) for key, each in space.items()}
    key, fitting = _starts(params, base, pretrained)
    if fitting:
        params[key] = draws.suggest_categorical(key, [SCRATCH, *fitting])
    return params


def _starts(
    params: Mapping[str, Any], base: FinetuneConfig, pretrained: Sequence[Pretrained]
) -> tuple[str, list[str]]:
    """Return the key of a trial's start, and the pretraining runs that fit its network."""
    model = {key: value for key, value in params.items() if key.startswith("model.")}
    try:
        settings = encoder_settings(override(base, model).model) if pretrained else {}
    except InputError:
        # The trial itself fails by it, and says why; the sweep goes on.
        settings = {}
    fitting = [each.uri for each in pretrained if each.encoder == settings]
    return f"{INIT}[{' '.join(str(value) for value in settings.values())}]", fitting


def _draw(draws: Draws, key: str, distribution: Distribution) -> Any:
    """Draw one value."""
    values, log = distribution.values, distribution.kind == "log"
    if distribution.kind == "choice":
        return draws.suggest_categorical(key, list(values))
    if distribution.is_whole:
        return draws.suggest_int(key, *values, log=log)
    return draws.suggest_float(key, *values, log=log)


def apply(base: FinetuneConfig, params: Mapping[str, Any]) -> FinetuneConfig:
    """Return the settings of a trial.

    Raises:
        InputError: settings that do not go together.
    """
    starts = {key: value for key, value in params.items() if key.startswith(f"{INIT}[")}
    changes = {key: value for key, value in params.items() if key not in starts}
    start = next(iter(starts.values()), SCRATCH)
    return override(base, changes if start == SCRATCH else changes | {INIT: start})


def defaults(
    space: Space, base: FinetuneConfig, pretrained: Sequence[Pretrained]
) -> dict[str, Any] | None:
    """Return the base's own settings as a trial's parameters; None where the space lacks them.

    They start from scratch.
    """
    known = flatten(to_dict(base))
    values = {key: known[key] for key in space}
    if not all(each.holds(values[key]) for key, each in space.items()):
        return None
    key, fitting = _starts(values, base, pretrained)
    return values | ({key: SCRATCH} if fitting else {})
