"""One self-contained HTML page about a sweep: its trials, its parameters, and its best network.

Read from storage alone, finished or not. The page is built like that of a run (see `page`), with
an overview of the search before it.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from scribbleseg.config import flatten
from scribbleseg.errors import InputError
from scribbleseg.report import tables
from scribbleseg.report.curves import Chart
from scribbleseg.report.dimensions import (
    MIN_TRIALS,
    importances,
    is_number,
    to_text,
    varying,
)
from scribbleseg.report.page import (
    EXHIBITS_ALONE,
    Section,
    require_folder,
    template,
    try_to_find,
    variables,
    write_page,
)
from scribbleseg.report.records import Record, commands, read_record
from scribbleseg.report.sweep_record import INIT, Sweep, read_sweep
from scribbleseg.report.tables import NOTHING, Table
from scribbleseg.report.trials import (
    importance_chart,
    judged,
    learning_curves,
    parallel_coordinates,
    score_history,
)
from scribbleseg.sweeps import (
    SMOOTHED,
    STATES,
    Trial,
    rank,
)

CHOSEN_HERE = (
    "The trial was chosen by these very images, which flatters it; other images tell more."
)


def write_sweep_report(uri: str, out: Path, *, data_root: str | Path | None = None) -> Path:
    """Write a page about a sweep.

    Args:
        uri: Its folder, local or on object storage.
        out: The file, or a folder that it is written to as report.html.
        data_root: Where the data is, if not where the trials read it.

    Returns:
        The file.

    Raises:
        InputError: Not a sweep, damaged files of one, or a `data_root` that is no folder.
    """
    require_folder(data_root)
    sweep = read_sweep(uri)
    section, missing = _best_section(sweep, data_root)
    page = variables([section] if section else [])
    results = [replace(table, note=f"{table.note} {CHOSEN_HERE}") for table in page["results"]]
    charts, wide_chart, importance, left_out = _draw(sweep)
    names = [each.name for each in sweep.dimensions]
    text = template("sweep.html.jinja").render(
        page | {"title": sweep.name, "results": results},
        kicker=_kicker(sweep.info),
        headline=_headline(sweep),
        notes=[note for note in (_unfinished(sweep), missing) if note],
        search_charts=charts,
        wide_chart=wide_chart,
        importance=importance,
        left_out=left_out,
        space=_space_table(sweep),
        trials=trials_table(sweep.trials, names, sweep.best_trial),
        failures=_failures_table(sweep.trials),
        confirmed=_confirmed_table(sweep),
        best_title=_best_title(sweep, section),
        sweep_facts=_facts(sweep),
    )
    return write_page(out, text)


def _best_section(sweep: Sweep, data_root: str | Path | None) -> tuple[Section | None, str]:
    """Return the part of the page about the best network, or None and why there is none."""
    if sweep.best_run is None:
        return None, "" if sweep.best_trial is None else "best.json names no run of the sweep."
    try:
        record = read_record(sweep.best_run)
    except InputError as error:
        return None, f"There is no more to say of the best trial: {error}"
    findings, note = try_to_find(record, data_root, None, EXHIBITS_ALONE)
    num_parameters = findings and findings.num_parameters
    return Section(
        name=record.name,
        kicker="",
        history=record.history,
        best=record.best,
        findings=findings,
        note="",
        facts=tables.run_facts(record.info, record.history, record.best, num_parameters),
        configuration=yaml.safe_dump(dict(record.info["config"]), sort_keys=False),
        hint=(
            f"With the full configuration below saved as {record.name}.yaml, the first command "
            "trains exactly the best trial again. The second says what the search found, on top "
            "of its recipe; what the sweep itself or its command line changed has to be added."
        ),
        commands=_commands(sweep, record),
    ), note


def _best_title(sweep: Sweep, section: Section | None) -> str:
    """Return a title for what is said of the best network; "" where there is none."""
    trial = sweep.best_trial
    if trial is None:
        return ""
    title = f"The best: trial {trial.number}"
    return title if section is None or section.name == trial.name else f"{title}, as {section.name}"


def _commands(sweep: Sweep, record: Record) -> list[str]:
    """Return the commands that train the best trial again, score it and draw this page."""
    exact, *others = commands(record)
    draw = shlex.join(["scribbleseg", "report", sweep.uri])
    # The last of them draws a page about the run alone.
    score = others[:-1]
    return [exact, _short_command(sweep, record), *score, draw]


def _short_command(sweep: Sweep, record: Record) -> str:
    """Return the command that trains a run by its sweep's recipe and what was drawn for it."""
    drawn = sweep.best_trial.params if sweep.best_trial else {}
    settings, base = record.settings, flatten(sweep.info.get("settings") or {})
    # A trial that was trained again has a seed that nobody drew.
    others = [key for key in base if key in settings and settings[key] != base[key]]
    train = ["python", "-m", "train.finetune", str(sweep.info.get("recipe", "RECIPE"))]
    lines = [train, ["--data.root", str(settings.get("data.root", "DIR"))]]
    for name in dict.fromkeys([*drawn, *others]):
        if name == "data.root":
            continue
        # The run's own configuration knows what a drawn word stood for, such as "scratch".
        value = settings.get(name, drawn.get(name))
        key = name.replace("_", "-")
        if value is True or value is False:
            section, _, last = key.rpartition(".")
            lines.append([f"--{key}" if value else f"--{section}.no-{last}"])
        elif not (name == INIT and value is None):
            values = value if isinstance(value, list | tuple) else [value]
            lines.append([f"--{key}", *map(str, values)])
    return " \\\n  ".join(map(shlex.join, lines))


def _draw(sweep: Sweep) -> tuple[list[Chart], Chart | None, Chart | None, list[str]]:
    """Draw the search.

    Returns:
        The charts of half the page's width, that of its whole width, that of importance, and a
        sentence for each that cannot be drawn.
    """
    trials, best = sweep.trials, sweep.best_trial
    counted = judged(trials)
    varied = varying(sweep.dimensions, counted)
    enough = len(counted) >= MIN_TRIALS and len(varied) > 1
    shares = importances(varied, counted) if enough else {}
    # The most important ones stand beside the score.
    ordered = sorted(sweep.dimensions, key=lambda each: shares.get(each.name, 0.0))
    drawn = [
        score_history(trials, best),
        learning_curves(trials, sweep.histories, best),
        parallel_coordinates(ordered, trials, best),
        importance_chart(shares, len(counted)),
    ]
    charts = [chart if isinstance(chart, Chart) else None for chart in drawn]
    left_out = [sentence for sentence in drawn if isinstance(sentence, str)]
    return [chart for chart in charts[:2] if chart], charts[2], charts[3], left_out


def _kicker(info: Mapping[str, Any]) -> str:
    """Return a few words to stand above the title."""
    return f"scribbleseg · hyper-parameter sweep · recipe {info.get('recipe', 'unknown')}"


def _headline(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the figures to read first, and what they are."""
    figures: list[tuple[str, str]] = []
    best = sweep.best_trial
    if best is not None:
        score = (tables.share(best.score), f"best mIoU score, trial {best.number}")
        again = [each for each in sweep.confirmed if each.get("trial") == best.number]
        if again and is_number(again[0].get("mean")):
            seeds = f"mean of {len(_scores(again[0]))} new seeds{_spread(again[0])}"
            figures.append(
                (tables.share(again[0]["mean"]), f"mIoU of trial {best.number}, {seeds}")
            )
            figures.append((score[0], "its score in the search"))
        else:
            figures += [score, (tables.share(best.miou), f"mIoU at its epoch {best.best_epoch}")]
    counts = Counter(trial.state for trial in sweep.trials)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    num_trials = len(sweep.trials)
    figures.append((str(num_trials), f"trial{'s' * (num_trials != 1)}: {states or 'none begun'}"))
    # 0 until it has come to its end once.
    spent = tables.duration(sweep.info.get("wall_time") or None)
    epochs = sum(trial.epochs for trial in sweep.trials)
    figures.append((f"{epochs:,}", "epochs trained" + (f" in {spent}" if spent else "")))
    return figures


def _scores(entry: Mapping[str, Any]) -> list[float]:
    """Return the scores of a trial that was trained again."""
    scores = entry.get("scores")
    return [score for score in scores if is_number(score)] if isinstance(scores, list) else []


def _spread(entry: Mapping[str, Any]) -> str:
    """Return the deviation of a trial that was trained again, where it is known."""
    deviation = entry.get("deviation")
    return f" ± {deviation:.3f}" if is_number(deviation) else ""


def _unfinished(sweep: Sweep) -> str:
    """Return a sentence about a sweep that is not finished; nothing about one that is."""
    if sweep.info.get("finished") is True:
        return ""
    ended = sum(trial.ended for trial in sweep.trials)
    planned = sweep.info.get("num_trials", len(sweep.trials))
    return f"This sweep has not finished: {ended} of {planned} trials have ended."


def trials_table(trials: Sequence[Trial], names: Sequence[str], best: Trial | None) -> Table:
    """Return one row per trial, the highest score first.

    Args:
        trials: All trials.
        names: Their parameters.
        best: The trial that stands out.
    """
    ranked = rank(trials)
    ordered = [*ranked, *(trial for trial in trials if trial not in ranked)]
    rows = [
        [
            f"{trial.number}{', the best' if trial == best else ''}",
            trial.state,
            str(trial.epochs),
            tables.share(trial.score),
            tables.share(trial.miou),
            f"{trial.seconds / 60:.1f}",
            *(_cell(trial.params, name) for name in names),
        ]
        for trial in ordered
    ]
    last = [name.rpartition(".")[2] for name in names]
    short = [
        word if last.count(word) == 1 else name for word, name in zip(last, names, strict=True)
    ]
    return Table(
        header=["Trial", "State", "Epochs", "Score", "mIoU", "Minutes"]
        + [name.replace("_", " ") for name in short],
        rows=rows,
        note=(
            f"The highest score first: the best mean mIoU of {SMOOTHED} validations in a row, "
            "which a single lucky one does not decide. mIoU is that of the best epoch alone."
        ),
        highlighted=ordered.index(best) if best in ordered else None,
    )


def _failures_table(trials: Sequence[Trial]) -> Table | None:
    """Return why trials failed, a row for each; None where none did."""
    rows = [
        [str(trial.number), trial.reason or NOTHING]
        for trial in trials
        if trial.state == "failed" or trial.reason
    ]
    return Table(header=["Trial", "Reason"], rows=rows) if rows else None


def _cell(params: Mapping[str, Any], name: str) -> str:
    """Return a parameter with three digits; of a path, its end, for the whole is elsewhere."""
    value = params.get(name, NOTHING)
    if isinstance(value, str) and "/" in value:
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return f"{value:.3g}" if isinstance(value, float) else to_text(value)


def _space_table(sweep: Sweep) -> Table | None:
    """Return what was drawn from what, and what the best trial has of it."""
    if not sweep.dimensions:
        return None
    params = sweep.best_trial.params if sweep.best_trial else {}
    remarks = {
        each.name: remark
        for each in sweep.dimensions
        if each.name in params and (remark := each.remark(params[each.name]))
    }
    rows = [
        [
            each.name,
            _cell(params, each.name),
            each.extent + (f" ({remarks[each.name]})" if each.name in remarks else ""),
        ]
        for each in sweep.dimensions
    ]
    return Table(
        header=["Setting", "Best trial", "Drawn from"],
        rows=rows,
        note="Where the best is near an end, better ones may lie beyond it." if remarks else "",
    )


def _gain(entry: Mapping[str, Any]) -> str:
    """Return how much better a trial is than the recipe's own settings, where it is known."""
    gain = entry.get("gain")
    if not isinstance(gain, list) or len(gain) != 3 or not all(map(is_number, gain)):
        return NOTHING
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain).replace("-", "−")


def _confirmed_table(sweep: Sweep) -> Table | None:
    """Return the trials that were trained again, the highest mean first."""
    trials = {trial.number: trial for trial in sweep.trials}

    def mean(entry: Mapping[str, Any]) -> float:
        return entry["mean"] if is_number(entry.get("mean")) else -math.inf

    entries = sorted(sweep.confirmed, key=mean, reverse=True)
    rows: list[list[str]] = []
    for entry in entries:
        number = entry.get("trial")
        trial = trials.get(number) if isinstance(number, int) else None
        rows.append(
            [
                str(entry.get("trial")),
                tables.share(trial and trial.score),
                ", ".join(map(tables.share, _scores(entry))) or NOTHING,
                *(
                    tables.share(entry[key]) if is_number(entry.get(key)) else NOTHING
                    for key in ("mean", "deviation")
                ),
                _gain(entry),
            ]
        )
    if not rows:
        return None
    numbers = [entry.get("trial") for entry in entries]
    best = sweep.best_trial and sweep.best_trial.number
    return Table(
        header=[
            "Trial",
            "Score in the search",
            "Scores over new seeds",
            "Mean",
            "Deviation",
            "Against the recipe's own settings",
        ],
        rows=rows,
        note=(
            "The last column compares the last checkpoints, image by image, each image averaged "
            "over the seeds first, with a 95 % bootstrap interval over images."
        ),
        highlighted=numbers.index(best) if best in numbers else None,
    )


def _facts(sweep: Sweep) -> dict[str, str]:
    """Return what else there is to know about a sweep, by label; what is unknown is left out."""
    info = sweep.info
    commit = info.get("git_commit")
    facts = {
        "Recipe": info.get("recipe"),
        "Search": info.get("search"),
        "Stopping": info.get("stopping"),
        "Trials planned": info.get("num_trials"),
        "Trials at once": info.get("concurrent"),
        "Seed": info.get("seed"),
        "Started": info.get("started"),
        "Git commit": commit and str(commit)[:12],
    }
    return {label: str(value) for label, value in facts.items() if value not in (None, "")}
