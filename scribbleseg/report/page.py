"""One self-contained HTML page about one run or several: figures, curves, pictures, settings.

Everything is inside the file: it can be mailed, printed, and opened in ten years. It has no
scripts, and whatever was read from files is escaped by the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from scribbleseg.config import to_yaml
from scribbleseg.errors import InputError
from scribbleseg.evaluate import METRIC_NAMES, Evaluation, evaluate_command
from scribbleseg.manifest import make_folder, write_bytes
from scribbleseg.predict import Predictor
from scribbleseg.report import curves, tables
from scribbleseg.report.curves import Chart
from scribbleseg.report.pretraining import Pretraining, look_back
from scribbleseg.report.records import (
    Findings,
    Record,
    commands,
    examine,
    find,
    read_record,
)
from scribbleseg.report.tables import Table

EXHIBITS_ALONE, EXHIBITS_TOGETHER = 3, 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of the page that is about one run, or about one network."""

    name: str
    """Its title."""
    kicker: str
    """A few words above the title."""
    history: list[dict[str, Any]]
    """metrics.jsonl; empty where there is no run."""
    best: Mapping[str, Any] | None
    """best.json."""
    findings: Findings | None
    """What the best checkpoint does."""
    note: str
    """What a reader must know first, such as why there are no findings."""
    facts: dict[str, str]
    """What else there is to know, by label."""
    configuration: str
    """All settings, as YAML."""
    hint: str
    """What the commands need."""
    commands: list[str]
    """How all this is made again."""
    pretraining: Pretraining | None = None
    """What there is to say of a pretraining run; None: the network was trained to segment."""

    @property
    def scores(self) -> Table | None:
        """Every image's figures."""
        return self.findings and tables.scores_table(self.findings.evaluation)


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    *,
    data_root: str | Path | None = None,
    split: str | None = None,
) -> Path:
    """Write a page about one run, or about several side by side.

    Args:
        runs: Run folders, local or on object storage.
        out: The file, or a folder that it is written to as report.html.
        data_root: Where the data is, if not where the runs read it.
        split: Split whose images are scored and shown; None: those that each run was validated on.

    Returns:
        The file.

    Raises:
        InputError: A run that is not one, or a `data_root` that is no folder.
    """
    require_folder(data_root)
    count = EXHIBITS_ALONE if len(runs) == 1 else EXHIBITS_TOGETHER
    records = [read_record(str(run)) for run in runs]
    sections = [
        _pretraining_section(record)
        if record.is_pretraining
        else _run_section(record, data_root, split, count)
        for record in records
    ]
    return write_page(out, render(sections))


def require_folder(data_root: str | Path | None) -> None:
    """Raise an `InputError` where the data is said to be in a folder that is none."""
    # What lies elsewhere is fetched, split by split, by whoever reads it.
    if data_root is None or "://" in str(data_root):
        return
    if not Path(data_root).is_dir():
        raise InputError(f"{data_root}: no such folder; expected the one that holds the splits")


def write_evaluation_page(predictor: Predictor, evaluation: Evaluation, out: Path) -> Path:
    """Write a page about an evaluation: figures, pictures, every image's scores.

    Args:
        predictor: The network that was evaluated.
        evaluation: What `evaluate` returned.
        out: The file, or a folder that it is written to as report.html.

    Returns:
        The file.
    """
    findings = examine(predictor, evaluation, EXHIBITS_ALONE)
    settings = evaluation.settings
    section = Section(
        name=settings["checkpoint"],
        kicker=f"scribbleseg · evaluated on {evaluation.part}",
        history=[],
        best=None,
        findings=findings,
        note="",
        facts={
            "Architecture": predictor.config.model.architecture,
            "Parameters": tables.millions(findings.num_parameters),
            "Data": settings["root"],
        },
        configuration=to_yaml(predictor.config),
        hint="",
        commands=[
            evaluate_command(
                settings["checkpoint"], settings["root"], settings["split"], settings["fold"]
            )
            + f" --flip {settings['flip']} --edges {settings['edges']}"
            + f" --scales {' '.join(f'{scale:g}' for scale in settings['scales'])}"
            + f" --threshold {settings['threshold']:g}"
            + f" --part-threshold {settings['part_threshold']:g}"
            + ("" if settings["honour_strokes"] else " --no-honour-strokes")
        ],
    )
    return write_page(out, render([section]))


def write_page(out: Path, text: str) -> Path:
    """Write a page to a file, or to report.html in a folder; return the file."""
    if out.suffix != ".html":
        out = out / "report.html"
    make_folder(out.parent)
    write_bytes(out, text.encode())
    return out


def _run_section(
    record: Record, data_root: str | Path | None, split: str | None, count: int
) -> Section:
    """Score a run's best checkpoint, and gather everything the page says about the run."""
    findings, note = try_to_find(record, data_root, split, count)
    facts = tables.run_facts(
        record.info, record.history, record.best, findings and findings.num_parameters
    )
    note = f"{_unfinished(record, facts)} {note}"
    return Section(
        name=record.name,
        kicker=f"scribbleseg · recipe {record.info.get('recipe', 'unknown')}",
        history=record.history,
        best=record.best,
        findings=findings,
        note=note.strip(),
        facts=facts,
        configuration=yaml.safe_dump(dict(record.info["config"]), sort_keys=False),
        hint=f"With the full configuration below saved as {record.name}.yaml:",
        commands=commands(record),
    )


def try_to_find(
    record: Record, data_root: str | Path | None, split: str | None, count: int
) -> tuple[Findings | None, str]:
    """Return what a run's best checkpoint does, or why that cannot be said."""
    try:
        return find(record, data_root, split, count), ""
    except InputError as error:
        if split is not None:
            # Whoever names a split wants to see it.
            raise
        # A page about a run whose data or checkpoint is elsewhere still has its curves.
        return None, f"There are no scored images: {error}"


def _pretraining_section(record: Record) -> Section:
    """Gather everything the page says about a pretraining run."""
    # Its best checkpoint is its last, which says nothing.
    facts = tables.run_facts(record.info, record.history, None, None)
    pretraining = look_back(record)
    return Section(
        name=record.name,
        kicker=f"scribbleseg · DINO pretraining · recipe {record.info.get('recipe', 'unknown')}",
        history=record.history,
        best=None,
        findings=None,
        note=f"{_unfinished(record, facts)} {pretraining.warning}".strip(),
        facts=facts,
        configuration=yaml.safe_dump(dict(record.info["config"]), sort_keys=False),
        hint=(
            f"With the full configuration below saved as {record.name}.yaml; to fine-tune, put a "
            "recipe and the folder of your labelled data in the places of RECIPE and DIR:"
        ),
        commands=commands(record),
        pretraining=pretraining,
    )


def _unfinished(record: Record, facts: Mapping[str, str]) -> str:
    """Return a sentence about a run that is not finished; nothing about one that is."""
    if record.info.get("finished"):
        return ""
    return f"This run has not finished: {facts['Epochs']} epochs."


def _charts(sections: Sequence[Section]) -> list[Chart]:
    """Return the curves of one run, or those of all runs together.

    A pretraining run shares no chart with one that learned to segment: their losses differ in kind.
    """
    if len(sections) > 1:
        return [
            chart
            for titles, pretrained in ((curves.COMPARED, False), (curves.PRETRAINING, True))
            for chart in curves.compare(
                [
                    # A run keeps its colour in all charts, so the other ones only lose their lines.
                    (
                        section.name,
                        section.history if bool(section.pretraining) == pretrained else [],
                    )
                    for section in sections
                ],
                titles,
            )
        ]
    if not sections:
        return []
    section = sections[0]
    if section.pretraining is not None:
        return curves.follow_pretraining(section.history, section.pretraining.num_prototypes)
    return curves.follow(section.history, section.best["epoch"] if section.best else None)


def _comparisons(sections: Sequence[Section]) -> list[Table]:
    """Return a table of the runs that segment, and one of those that pretrained an encoder."""
    segmented = [section for section in sections if section.pretraining is None]
    pretrained = [section for section in sections if section.pretraining is not None]
    compared: list[Table] = []
    if segmented:
        compared.append(
            tables.comparison_table(
                [section.name for section in segmented],
                [section.findings and section.findings.evaluation for section in segmented],
                [section.facts for section in segmented],
            )
        )
    if pretrained:
        compared.append(
            tables.pretraining_table(
                [section.name for section in pretrained],
                [section.history for section in pretrained],
                [section.facts for section in pretrained],
            )
        )
    return compared


def render(sections: Sequence[Section]) -> str:
    """Return the page's HTML."""
    return template("page.html.jinja").render(variables(sections))


def template(name: str) -> Template:
    """Return a template of this package; it escapes what it is given."""
    environment = Environment(
        loader=PackageLoader("scribbleseg", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def variables(sections: Sequence[Section]) -> dict[str, Any]:
    """Return what page.html.jinja asks for; of no sections, an empty page."""
    alone = sections[0] if len(sections) == 1 else None
    results, spread = list[Table](), None
    if alone is None:
        results = _comparisons(sections)
    elif alone.findings is not None:
        results = [tables.figures_table(alone.findings.evaluation)]
        scores = [row.miou for row in alone.findings.evaluation.rows]
        spread = curves.distribution("Images by mIoU", scores)
    return {
        "title": alone.name if alone else f"{len(sections)} runs",
        "alone": alone,
        "sections": sections,
        "charts": _charts(sections),
        "results": results,
        "spread": spread,
        "has_attention": any(
            exhibit.attention
            for section in sections
            if section.findings
            for group in section.findings.groups
            for exhibit in group.exhibits
        ),
        "metric_names": METRIC_NAMES,
    }
