"""One self-contained HTML page about one run or several: figures, curves, pictures, settings.

Everything is inside the file: it can be mailed, printed, and opened in ten years. It has no
scripts, and whatever was read from files is escaped by the template.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from scribbleseg.checkpoint import write_bytes
from scribbleseg.config import flatten
from scribbleseg.errors import InputError
from scribbleseg.evaluate import METRIC_NAMES, Evaluation, evaluate, list_scored
from scribbleseg.predict import load
from scribbleseg.report import curves, gallery, tables
from scribbleseg.report.curves import Chart
from scribbleseg.report.gallery import Group
from scribbleseg.report.tables import Table
from scribbleseg.runs import RunFolder

EXHIBITS_ALONE, EXHIBITS_TOGETHER = 3, 1


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


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What its best checkpoint does on the images it was validated on."""

    evaluation: Evaluation
    """The figures."""
    groups: list[Group]
    """The pictures."""
    num_parameters: int
    """Of the network."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of the page that is about one run."""

    record: Record
    facts: dict[str, str]
    findings: Findings | None
    note: str
    """Why there are no findings, or what a reader must know about the run."""
    scores: Table | None
    configuration: str
    commands: list[str]


def write_report(
    runs: Sequence[str | Path], out: Path, *, data_root: str | Path | None = None
) -> Path:
    """Write a page about one run, or about several side by side.

    Args:
        runs: Run folders, local or on object storage.
        out: The file, or a folder that it is written to as report.html.
        data_root: Where the data is, if not where the runs read it.

    Returns:
        The file.

    Raises:
        InputError: A run that is not one, or a `data_root` that is no folder.
    """
    if data_root is not None and not Path(data_root).is_dir():
        raise InputError(f"{data_root}: no such folder; expected the one that holds the splits")
    count = EXHIBITS_ALONE if len(runs) == 1 else EXHIBITS_TOGETHER
    sections = [_section(read_record(str(run)), data_root, count) for run in runs]
    if out.suffix != ".html":
        out = out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, render(sections).encode())
    return out


def read_record(uri: str) -> Record:
    """Read a run's small files.

    Raises:
        InputError: Not a run folder.
    """
    folder = RunFolder.open(uri)
    info = folder.read_json("run.json")
    if info is None or not isinstance(info.get("config"), Mapping):
        raise InputError(f"{uri}: holds no run.json with a 'config'; expected the folder of a run")
    return Record(
        name=folder.name,
        uri=uri,
        info=info,
        history=folder.read_metrics(),
        best=folder.best(),
    )


def _section(record: Record, data_root: str | Path | None, count: int) -> Section:
    """Score a run's best checkpoint, and gather everything the page says about the run."""
    findings, note = None, ""
    try:
        findings = find(record, data_root, count)
    except InputError as error:
        # A page about a run whose data or checkpoint is elsewhere still has its curves.
        note = f"There are no scored images: {error}"
    facts = tables.run_facts(
        record.info, record.history, record.best, findings and findings.num_parameters
    )
    if not record.info.get("finished"):
        note = f"This run has not finished: {facts['Epochs']} epochs. {note}"
    return Section(
        record=record,
        facts=facts,
        findings=findings,
        note=note.strip(),
        scores=tables.scores_table(findings.evaluation) if findings else None,
        configuration=yaml.safe_dump(dict(record.info["config"]), sort_keys=False),
        commands=commands(record),
    )


def find(record: Record, data_root: str | Path | None, count: int) -> Findings:
    """Score a run's best checkpoint on its validation images, and draw some of them.

    Args:
        record: The run.
        data_root: Where the data is; None: where the run read it.
        count: Images per group of the gallery.

    Raises:
        InputError: Nothing was saved, the run did not validate, or the data is not there.
    """
    if record.best is None:
        raise InputError(f"{record.uri}: no checkpoint has been saved yet")
    root, split, fold = validation_part(record, data_root)
    scenes = list_scored(root, split, fold=fold, num_folds=record.settings.get("data.num_folds", 0))
    predictor = load(record.uri)
    evaluation = evaluate(predictor, root, split, None, fold=fold)
    return Findings(
        evaluation=evaluation,
        groups=gallery.hang(predictor, scenes, evaluation.rows, count=count),
        num_parameters=sum(weight.numel() for weight in predictor.model.parameters()),
    )


def validation_part(
    record: Record, data_root: str | Path | None = None
) -> tuple[str, str, int | None]:
    """Return root, split and fold of the images that a run is validated on.

    Raises:
        InputError: It is validated on none.
    """
    settings = record.settings
    root = str(data_root or settings.get("data.root") or "")
    fold = settings.get("data.fold")
    split = settings.get("data.split") if fold is not None else settings.get("data.val_split")
    if not root or split is None:
        raise InputError("the run was not validated: data.fold and data.val_split are both None")
    return root, str(split), fold


def commands(record: Record) -> list[str]:
    """Return the commands that train the run again, score it and draw this page.

    Training takes the page's own configuration as a file: a recipe may have changed since.
    """
    lines = [shlex.join(["python", "-m", "train.finetune", f"{record.name}.yaml"])]
    try:
        root, split, fold = validation_part(record)
    except InputError:
        return lines
    score = ["scribbleseg", "evaluate", "--checkpoint", record.uri, "--data", root]
    score += ["--split", split] + ([] if fold is None else ["--fold", str(fold)])
    return [*lines, shlex.join(score), shlex.join(["scribbleseg", "report", record.uri])]


def _charts(sections: Sequence[Section]) -> list[Chart]:
    """Return the curves of one run, or those of all runs together."""
    if len(sections) > 1:
        return curves.compare({each.record.name: each.record.history for each in sections})
    record = sections[0].record
    return curves.follow(record.history, record.best["epoch"] if record.best else None)


def render(sections: Sequence[Section]) -> str:
    """Return the page's HTML."""
    alone = sections[0] if len(sections) == 1 else None
    table = spread = None
    if alone is None:
        table = tables.comparison_table(
            [section.record.name for section in sections],
            [section.findings and section.findings.evaluation for section in sections],
            [section.facts for section in sections],
        )
    elif alone.findings is not None:
        table = tables.figures_table(alone.findings.evaluation)
        scores = [row.miou for row in alone.findings.evaluation.rows]
        spread = curves.distribution("Images by mIoU", scores)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("scribbleseg.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=alone.record.name if alone else f"{len(sections)} runs",
        alone=alone,
        sections=sections,
        charts=_charts(sections),
        table=table,
        spread=spread,
        has_attention=any(
            exhibit.attention
            for section in sections
            if section.findings
            for group in section.findings.groups
            for exhibit in group.exhibits
        ),
        metric_names=METRIC_NAMES,
    )
