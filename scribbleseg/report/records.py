"""What the report knows about a run: its small files, and what its best checkpoint does.

Everything is read from the run's folder and from the data; nothing is written.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scribbleseg.config import FinetuneConfig, ModelConfig, PretrainConfig, flatten, from_dict
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Evaluation, evaluate, evaluate_command, list_scored
from scribbleseg.models import encoder_settings
from scribbleseg.predict import Predictor, load
from scribbleseg.report import gallery
from scribbleseg.report.gallery import Group
from scribbleseg.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder says, read from storage alone."""

    name: str
    """The run's name."""
    uri: str
    """Where it is."""
    info: Mapping[str, Any]
    """run.json."""
    history: list[dict[str, Any]]
    """metrics.jsonl."""
    best: Mapping[str, Any] | None
    """best.json; None until something was saved."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration, by dotted keys."""
        return flatten(self.info.get("config", {}))

    @property
    def is_pretraining(self) -> bool:
        """Whether an encoder was pretrained; else a network was trained to segment."""
        return self.info.get("kind") == "dino"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a network does on some images."""

    evaluation: Evaluation
    """The figures."""
    groups: list[Group]
    """The pictures."""
    num_parameters: int
    """Of the network."""


def read_record(uri: str) -> Record:
    """Read a run's small files.

    Raises:
        InputError: Not a run folder, or one whose settings are not a run's.
    """
    folder = RunFolder.open(uri)
    info = folder.read_record()
    if info is None or "config" not in info:
        raise InputError(f"{uri}: holds no run.json with a 'config'; expected the folder of a run")
    kind = PretrainConfig if info.get("kind") == "dino" else FinetuneConfig
    try:
        from_dict(kind, info["config"])
    except InputError as error:
        raise InputError(f"{uri}/run.json: config: {error}") from None
    return Record(
        name=folder.name,
        uri=uri,
        info=info,
        history=folder.read_metrics(),
        best=folder.best(),
    )


def find(record: Record, data_root: str | Path | None, split: str | None, count: int) -> Findings:
    """Score a run's best checkpoint, and draw some of the images.

    Args:
        record: The run.
        data_root: Where the data is; None: where the run read it.
        split: Split to score; None: the images that the run was validated on.
        count: Images per group of the gallery.

    Raises:
        InputError: Nothing was saved, the run did not validate, or the data is not there.
    """
    if record.best is None:
        raise InputError(f"{record.uri}: no checkpoint has been saved yet")
    if split is None:
        root, split, fold = validation_part(record)
    else:
        root, fold = str(record.settings.get("data.root", "")), None
    predictor = load(record.uri)
    cache_dir = record.settings.get("data.cache_dir")
    evaluation = evaluate(predictor, data_root or root, split, None, fold=fold, cache_dir=cache_dir)
    return examine(predictor, evaluation, count, cache_dir)


def examine(
    predictor: Predictor, evaluation: Evaluation, count: int, cache_dir: str | None = None
) -> Findings:
    """Draw some of the images that were evaluated; remote ones are kept in `cache_dir`."""
    settings = evaluation.settings
    scenes = list_scored(
        settings["root"],
        settings["split"],
        fold=settings["fold"],
        num_folds=predictor.config.data.num_folds,
        cache_dir=cache_dir,
    )
    return Findings(
        evaluation=evaluation,
        groups=gallery.hang(
            predictor,
            scenes,
            evaluation.rows,
            count=count,
            honour_strokes=settings["honour_strokes"],
        ),
        num_parameters=sum(weight.numel() for weight in predictor.model.parameters()),
    )


def validation_part(record: Record) -> tuple[str, str, int | None]:
    """Return root, split and fold of the images that a run is validated on.

    Raises:
        InputError: It is validated on none.
    """
    settings = record.settings
    fold = settings.get("data.fold")
    split = settings.get("data.split") if fold is not None else settings.get("data.val_split")
    if split is None:
        raise InputError("the run was not validated: data.fold and data.val_split are both None")
    return str(settings.get("data.root", "")), str(split), fold


def commands(record: Record) -> list[str]:
    """Return the commands that train the run again, score it and draw this page.

    Training takes the page's own configuration as a file: a recipe may have changed since. What
    is pretrained is not scored but fine-tuned.
    """
    draw = shlex.join(["scribbleseg", "report", record.uri])
    if record.is_pretraining:
        model = from_dict(ModelConfig, record.info["config"].get("model", {}))
        train = shlex.join(["python", "-m", "train.pretrain", f"{record.name}.yaml"])
        return [train, finetune_command(record.uri, model), draw]
    lines = [shlex.join(["python", "-m", "train.finetune", f"{record.name}.yaml"])]
    try:
        root, split, fold = validation_part(record)
    except InputError:
        return [*lines, draw]
    lines.append(evaluate_command(record.uri, root, split, fold))
    return [*lines, draw]


def finetune_command(checkpoint: str, model: ModelConfig) -> str:
    """Return the command that starts from a pretrained encoder; RECIPE and DIR are left open."""
    words = ["python", "-m", "train.finetune", "RECIPE", "--data.root", "DIR"]
    words += ["--model.architecture", model.architecture]
    for name, value in encoder_settings(model).items():
        if name != "encoder":
            words += [f"--model.{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--init-from", checkpoint])
