"""`python -m tune.ablation RECIPE`: {UNet, ResUNet, Attention-ResUNet} x {scratch, DINO} x seeds.

Networks that have practised on regions are a third way to start (`--practised`).

The two tables of the 2025 report, made fair and repeatable:

- Encoders are pretrained once (seed 0) and shared by all fine-tuning seeds, so the spread over
  seeds is that of fine-tuning alone; `--pretrain-seeds` adds pretraining's own. Attention-ResUNet
  has ResUNet's encoder, and starts from the same run. Encoders that were pretrained before, on
  better hardware maybe, are given with `--pretrained`.
- Pretraining sees all images, those held out for validation among them, but no labels.
- `--folds` holds out several folds in turn and pools their images: more of them than one fold has.
- The last checkpoint of every run is scored, not the best one: nothing is chosen on the validation
  images, which would be kind to whichever run fluctuates most.
- Starts are compared image by image, each image averaged over the seeds first.

Every run is a run folder of its own under STORAGE/NAME, trained like those of `train.finetune` and
`train.pretrain`, one after the other: a run takes the whole machine, or as much of a cluster as
--launch.num-workers asks for. The same command goes on where it was stopped.
"""

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from scribbleseg.checkpoint import read_model
from scribbleseg.cli import exit_status, say
from scribbleseg.config import (
    Architecture,
    FinetuneConfig,
    PretrainConfig,
    config_hash,
    flatten,
    parse_arguments,
    require,
    to_dict,
)
from scribbleseg.datasets.pictures import list_images
from scribbleseg.datasets.remote import inside
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Row
from scribbleseg.models import encoder_settings
from scribbleseg.report import curves, tables
from scribbleseg.report.page import template, variables
from scribbleseg.report.tables import Table
from scribbleseg.runs import RunFolder, find_checkpoint
from train.command import Order, base_config, carry_out, finetune_rank, pretrain_rank, usage
from train.estimate import time_steps
from train.launch import LaunchConfig, plan_resources, this_machine
from train.places import (
    absolute,
    absolute_data,
    absolute_pretraining,
    git_commit,
    require_own,
    tells_of,
)
from train.recipes import PRETRAIN_RECIPES, RECIPES
from tune.comparison import (
    STARTS,
    Cell,
    figures,
    percent,
    score_all,
    to_csv,
    to_markdown,
    to_tables,
)

PROG = "python -m tune.ablation"
PLAN = "ablation.json"

# Settings that the ablation gives its runs, and the option that decides them.
PLANNED = {
    "finetune.model.architecture": "--architectures",
    "finetune.train.seed": "--seeds",
    "finetune.data.share": "--shares",
    "finetune.init_from": "--pretrained or --practised",
    "pretrain.data.roots": "--images",
    "pretrain.train.seed": "--pretrain-seeds",
}


@dataclass(frozen=True, kw_only=True)
class AblationJob:
    """What is compared, and where."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings of every fine-tuning run."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Settings of every pretraining run; its network is that of --finetune.model."""
    data_root: Annotated[str, tyro.conf.arg(name="data.root", aliases=["--data-root"])] = ""
    """Folder of the data contract; short for --finetune.data.root."""
    images: tuple[str, ...] = ()
    """Folders of images to pretrain on, labels unused; none: those of all splits of the data, the
    validation images included.
    """
    architectures: tuple[Architecture, ...] = ("unet", "resunet", "attention_resunet")
    """Networks to compare."""
    seeds: int = 3
    """Fine-tuning runs per table cell and fold, of seeds 0, 1, ... (1 or more)."""
    folds: tuple[int, ...] = ()
    """Folds held out in turn, in runs of their own, and pooled; none: --finetune.data.fold alone.
    """
    shares: tuple[float, ...] = (1.0,)
    """Shares of the training labels to compare at, each in (0, 1]."""
    pretrain_seeds: int = 1
    """Pretraining runs per encoder; fine-tuning seed s starts from the encoder of seed s modulo
    this (1 to seeds).
    """
    pretrained: tuple[str, ...] = ()
    """Finished runs of `train.pretrain`, or checkpoints of them, whose encoders are taken as they
    are: one per kind of encoder; what is missing is pretrained.
    """
    practised: tuple[str, ...] = ()
    """Finished runs of `train.finetune practice`, or checkpoints of them, one per network:
    fine-tuning from these is compared too.
    """
    dino: bool = True
    """Compare DINO."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Hardware and storage."""
    name: str | None = None
    """Name of the ablation's folder; None: the recipe and a hash of the settings. The same command
    resumes.
    """


# Recipes whose encoder others have pretrained, and that for regions, have no partner.
JOBS: dict[str, Callable[[], AblationJob]] = {
    name: lambda name=name: AblationJob(finetune=RECIPES[name](), pretrain=PRETRAIN_RECIPES[name]())
    for name in PRETRAIN_RECIPES
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the plan."""

    name: str
    """Name of its folder."""
    config: FinetuneConfig | PretrainConfig
    """All its settings."""
    start: str = "pretraining"
    """What fine-tuning starts from: scratch, DINO or practice; pretraining for any other run."""

    @property
    def cell(self) -> Cell:
        """Where its figures belong."""
        share = self.config.data.share if isinstance(self.config, FinetuneConfig) else 1.0
        return Cell(self.start, self.config.model.architecture, share)

    @property
    def cost(self) -> Cell:
        """What decides how long it takes: the start of fine-tuning does not."""
        return self.cell._replace(start="finetuning") if self.start in STARTS else self.cell

    @property
    def title(self) -> str:
        """What people call it."""
        start, architecture, share = self.cell
        part = "" if share == 1 else f" with {percent(share)} of the labels"
        fold = getattr(self.config.data, "fold", None)
        held_out = "" if fold is None else f" fold {fold}"
        return f"{architecture} {start}{held_out} seed {self.config.train.seed}{part}"


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if arguments and arguments[0] in ("-h", "--help"):
        purpose = (
            "Compares networks from scratch, after DINO pretraining and after practice, over seeds."
        )
        sys.stdout.write(
            usage(PROG, "--data.root DIR", purpose, {name: RECIPES[name] for name in JOBS})
        )
        return
    has_recipe = bool(arguments) and not arguments[0].startswith("-")
    recipe, options = (arguments[0], arguments[1:]) if has_recipe else ("cpu", arguments)
    recipe, base = base_config(recipe, JOBS, AblationJob())
    job = parse_arguments(AblationJob, options, default=base, prog=f"{PROG} {recipe}")
    job = settle(job, base)
    settings = {k: v for k, v in to_dict(job).items() if k not in ("launch", "name")}
    storage = absolute(job.launch.storage)
    name = job.name or f"ablation-{recipe}-{config_hash(settings)}"
    folder, place = RunFolder.at(storage, name), inside(storage, name)
    require_own(folder, place, PLAN)
    record = folder.read_json(PLAN)
    if record is not None and not isinstance(record.get("runs"), list):
        raise InputError(f"{place}/{PLAN}: lists no runs; restore it from a copy")
    # One that trained nothing, because something was wrong with its data say, keeps no name.
    begun = record and any(folder.child(run).read_record() for run in record["runs"])
    asked = replace(job, launch=AblationJob().launch, name=None)
    if record and begun and not tells_of(record.get("settings"), asked):
        raise InputError(f"{place}: holds an ablation of other settings; choose another --name")
    if record and record.get("finished"):
        say(f"{place} is finished; another --name does it again beside it")
        return
    runs = plan(job, place, read_encoders(job), read_practised(job))
    record = {
        "format": 1,
        "recipe": recipe,
        "git_commit": git_commit(),
        "settings": settings,
        "runs": [run.name for run in runs],
        "finished": False,
    }
    try:
        folder.write_json(PLAN, record)
    except OSError as error:
        raise InputError(
            f"{place}: cannot be written ({error}); choose another --storage"
        ) from None
    train_all(runs, place, recipe, replace(job.launch, storage=place))
    write_results(runs, folder, place, job)
    folder.write_json(PLAN, record | {"finished": True})
    say(f"done: {place}/tables.md, tables.csv, report.html")


def settle(job: AblationJob, base: AblationJob) -> AblationJob:
    """Return the job with absolute paths and defaults filled in.

    Raises:
        InputError: something about it cannot be used.
    """
    require(job.seeds >= 1, "seeds", job.seeds, "1 or more")
    require(
        1 <= job.pretrain_seeds <= job.seeds, "pretrain_seeds", job.pretrain_seeds, "1 to seeds"
    )
    for key, values in (("architectures", job.architectures), ("shares", job.shares)):
        require(0 < len(values) == len(set(values)), key, values, "one or more, none of them twice")
    for share in job.shares:
        require(0 < share <= 1, "shares", share, "shares above 0, at most 1")
    last = job.finetune.data.num_folds - 1
    require(len(job.folds) == len(set(job.folds)), "folds", job.folds, "none of them twice")
    for fold in job.folds:
        require(0 <= fold <= last, "folds", fold, f"0 to {last}, by --finetune.data.num-folds")
    given, before = flatten(to_dict(job)), flatten(to_dict(base))
    for key in given:
        decides = "--finetune.model" if key.startswith("pretrain.model.") else PLANNED.get(key)
        if decides is not None and given[key] != before[key]:
            raise InputError(f"{key} is set by the ablation; expected {decides}")
    if not (job.dino or job.practised):
        raise InputError(
            "dino is False and practised is (); expected one of the two to compare with scratch"
        )
    if job.pretrained and not job.dino:
        raise InputError(
            f"dino is False, but pretrained is {job.pretrained}; expected one of the two"
        )
    data = job.finetune.data
    if not (job.data_root or data.root):
        raise InputError("data.root is not set; expected the folder of your data: --data.root DIR")
    root = absolute(job.data_root or data.root)
    if job.folds and data.val_split is not None:
        raise InputError(
            f"folds is {job.folds}, but finetune.data.val_split is {data.val_split}; expected one "
            "of the two"
        )
    if not job.folds and data.fold is None and data.val_split is None:
        raise InputError("finetune.data.fold and val_split are None; expected images to compare on")
    images = tuple(absolute(each) for each in job.images or (root,))
    if job.launch.is_local:
        # On a cluster the data are where the workers are, and are checked there.
        list_scenes(root, data.split, need_masks=True, cache_dir=data.cache_dir)
        list_images(images, job.pretrain.data.cache_dir)
    finetune = replace(job.finetune, data=absolute_data(replace(data, root=root)))
    return replace(
        job,
        finetune=finetune,
        pretrain=absolute_pretraining(job.pretrain),
        data_root=root,
        images=images,
        pretrained=tuple(map(absolute, job.pretrained)),
        practised=tuple(map(absolute, job.practised)),
    )


def read_encoders(job: AblationJob) -> dict[object, str]:
    """Return where the given encoders are, by their kind.

    Raises:
        InputError: one that cannot be read, is not from pretraining, or fits no network.
    """
    models = [replace(job.finetune.model, architecture=each) for each in job.architectures]
    wanted = {settings["encoder"]: settings for settings in map(encoder_settings, models)}
    found: dict[object, str] = {}
    for reference in job.pretrained:
        config = _read_config(reference)
        if not isinstance(config, PretrainConfig):
            raise InputError(
                f"pretrained: {reference} is a segmentation network; expected a run of "
                "`train.pretrain`"
            )
        given = encoder_settings(config.model)
        kind = given["encoder"]
        if wanted.get(kind) != given:
            raise InputError(
                f"pretrained: {reference} holds an encoder of {given}; expected one of "
                f"{', '.join(map(str, wanted.values()))}"
            )
        if kind in found:
            raise InputError(f"pretrained: {reference} and {found[kind]} are both of {given}")
        found[kind] = reference
    return found


def read_practised(job: AblationJob) -> dict[Architecture, str]:
    """Return where the networks are that have practised, by their architecture.

    Raises:
        InputError: one that cannot be read, is only an encoder, or is none of those that are
            compared; or some of those have none.
    """
    wanted = [replace(job.finetune.model, architecture=each) for each in job.architectures]
    found: dict[Architecture, str] = {}
    for reference in job.practised:
        config = _read_config(reference)
        if not isinstance(config, FinetuneConfig):
            raise InputError(
                f"practised: {reference} is an encoder; expected a run of `train.finetune practice`"
            )
        architecture = config.model.architecture
        if config.model not in wanted:
            raise InputError(
                f"practised: {reference} holds a network of {config.model}; expected one of "
                f"{', '.join(map(str, wanted))}"
            )
        if architecture in found:
            raise InputError(
                f"practised: {reference} and {found[architecture]} are both of {architecture}"
            )
        found[architecture] = reference
    missing = [each for each in job.architectures if each not in found]
    if found and missing:
        raise InputError(
            f"practised has no network of {', '.join(missing)}; expected one of each that "
            "--architectures names"
        )
    return found


def plan(
    job: AblationJob,
    place: str,
    given: Mapping[object, str],
    practised: Mapping[Architecture, str],
) -> list[Run]:
    """Return all runs in their order: encoders first, then every cell's first seed, and so on.

    Args:
        job: What is compared.
        place: Where the runs' folders are.
        given: Encoders that need no pretraining, see `read_encoders`.
        practised: Networks that have practised, see `read_practised`.
    """
    pretraining: dict[str, Run] = {}
    encoders = itertools.product(job.architectures, range(job.pretrain_seeds)) if job.dino else ()
    for architecture, seed in encoders:
        model = replace(job.finetune.model, architecture=architecture)
        kind = encoder_settings(model)["encoder"]
        if kind in given:
            continue
        name = f"pretrain-{kind}-s{seed}"
        config = replace(
            job.pretrain,
            model=model,
            data=replace(job.pretrain.data, roots=job.images),
            train=replace(job.pretrain.train, seed=seed),
        )
        pretraining.setdefault(name, Run(name=name, config=config))
    finetuning: list[Run] = []
    folds = job.folds or (job.finetune.data.fold,)
    cells = itertools.product(range(job.seeds), folds, job.shares, job.architectures)
    for seed, fold, share, architecture in cells:
        model = replace(job.finetune.model, architecture=architecture)
        kind = encoder_settings(model)["encoder"]
        origins: dict[str, str | None] = {"scratch": None}
        if job.dino:
            own = inside(place, f"pretrain-{kind}-s{seed % job.pretrain_seeds}")
            origins["DINO"] = given.get(kind, own)
        if practised:
            origins["practice"] = practised[architecture]
        for start, origin in origins.items():
            config = replace(
                job.finetune,
                model=model,
                data=replace(job.finetune.data, share=share, fold=fold),
                train=replace(job.finetune.train, seed=seed),
                init_from=origin,
            )
            name = f"{architecture}-{start.lower()}-s{seed}-share{share}"
            part = f"-fold{fold}" if job.folds else ""
            finetuning.append(Run(name=f"{name}{part}", config=config, start=start))
    return [*pretraining.values(), *finetuning]


def train_all(runs: Sequence[Run], place: str, recipe: str, launch: LaunchConfig) -> None:
    """Train what is not finished, and say after each run how long the rest will take."""
    spent = {run.name: record for run in runs if (record := _seconds(place, run)) is not None}
    expected = {run.cost: spent[run.name] for run in runs if run.name in spent}
    epochs = sum(run.config.train.epochs for run in runs)
    say(f"{place}: {len(runs)} runs of {epochs} epochs together, {len(spent)} of them finished")
    if launch.is_alone:
        resources = plan_resources(launch, [this_machine()], can_grow=False)
        for run in runs:
            if run.cost not in expected:
                pace = time_steps(run.config, resources)
                expected[run.cost] = pace.seconds
                say(
                    f"{run.title}: {pace.epochs} epochs of {pace.steps_per_epoch} steps, "
                    f"{pace.seconds_per_step:.2f} s each"
                )
        left = sum(expected[run.cost] for run in runs if run.name not in spent)
        say(f"about {tables.duration(left)}, by timed steps; loading and validating come on top")
    for number, run in enumerate(runs, start=1):
        if run.name in spent:
            continue
        rank = finetune_rank if isinstance(run.config, FinetuneConfig) else pretrain_rank
        order = Order(recipe=recipe, config=run.config, launch=launch, name=run.name, fresh=False)
        carry_out(order, rank)
        expected[run.cost] = seconds = _seconds(place, run) or 0.0
        rest = [expected.get(later.cost) for later in runs[number:] if later.name not in spent]
        known = [each for each in rest if each is not None]
        end = f"; about {tables.duration(sum(known))} left" if len(known) == len(rest) else ""
        metrics = RunFolder.at(place, run.name).read_metrics()[-1]
        miou = f"mIoU {metrics['miou']:.2f}, " if "miou" in metrics else ""
        say(f"[{number}/{len(runs)}] {run.title}: {miou}{tables.duration(seconds)}{end}")


def write_results(runs: Sequence[Run], folder: RunFolder, place: str, job: AblationJob) -> None:
    """Score the last checkpoint of every fine-tuning run; write tables and page."""
    finetuning = {
        inside(place, run.name): (run, run.config)
        for run in runs
        if isinstance(run.config, FinetuneConfig)
    }
    scored = score_all([(uri, config) for uri, (_, config) in finetuning.items()], job.launch)
    seeds: dict[Cell, dict[int, list[Row]]] = {}
    histories: dict[Cell, list[list[dict[str, Any]]]] = {}
    for (run, config), rows in zip(finetuning.values(), scored, strict=True):
        # A seed's folds hold other images each: together they are as one run's.
        seeds.setdefault(run.cell, {}).setdefault(config.train.seed, []).extend(rows)
        histories.setdefault(run.cell, []).append(RunFolder.at(place, run.name).read_metrics())
    scores = {cell: list(each.values()) for cell, each in seeds.items()}
    found = figures(scores)
    results = to_tables(found, explain(job, len(next(iter(scores.values()))[0])))
    charts = curves.compare(
        [
            (f"{cell.architecture}, {STARTS[cell.start]}", mean_history(each))
            for cell, each in histories.items()
            if cell.share == max(job.shares)
        ]
    )
    folder.write_file("tables.csv", to_csv(found).encode())
    folder.write_file("tables.md", to_markdown(results).encode())
    folder.write_file("report.html", to_page(results, charts).encode())


def mean_history(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean over runs of every epoch's figures, those that all of them have.

    A run that was trained with more workers than the others has some that they lack.
    """
    return [
        {
            key: statistics.fmean(row[key] for row in rows)
            for key in rows[0]
            if all(key in row for row in rows)
        }
        for rows in zip(*histories, strict=True)
    ]


def explain(job: AblationJob, num_images: int) -> str:
    """Return what a reader must know to read the tables right."""
    data = job.finetune.data
    folds = ", ".join(map(str, job.folds or (data.fold,)))
    named = f"folds {folds}, held out in turn" if len(job.folds) > 1 else f"fold {folds}"
    part = data.val_split or f"{data.split}, {named}"
    dino = (
        f"DINO: {job.pretrain_seeds} pretraining run(s) per encoder, on images without their labels"
        + (", the validation images among them" if job.images == (data.root,) else "")
        + (f"; given: {', '.join(job.pretrained)}. " if job.pretrained else ". ")
    )
    return (
        f"Mean ± standard deviation over {job.seeds} fine-tuning seed(s); {num_images} images of "
        f"{part}; the last checkpoint of each run, so nothing was chosen on these images. "
        + (dino if job.dino else "")
        + (f"Practice: {', '.join(job.practised)}. " if job.practised else "")
        + "Differences are taken image by image, each averaged over the seeds first, with a 95 % "
        "bootstrap interval over images: where it holds 0, the two may be equally good. It speaks "
        "of other images, not of other seeds, whose spread is the ± above."
    )


def to_page(results: Sequence[Table], charts: Sequence[curves.Chart]) -> str:
    """Return the report's page with these tables and curves, and no section about a single run."""
    page = {"title": "Ways to start", "charts": charts, "results": results}
    return template("page.html.jinja").render(variables([]) | page)


def _read_config(reference: str) -> FinetuneConfig | PretrainConfig:
    with tempfile.TemporaryDirectory() as scratch:
        return read_model(find_checkpoint(reference, Path(scratch) / "checkpoint")).config


def _seconds(place: str, run: Run) -> float | None:
    """Return the wall time of a finished run; None of any other."""
    record = RunFolder.at(place, run.name).read_record() or {}
    return float(record.get("wall_time", 0.0)) if record.get("finished") is True else None


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
