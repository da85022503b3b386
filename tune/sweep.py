"""`python -m tune.sweep SPACE`: Ray Tune and Optuna search settings for the best validation mIoU.

- Every trial is a fine-tuning run with a run folder under STORAGE/NAME; see `scribbleseg.sweeps`
  for the sweep's own files. Status, pull and report need these alone.
- Optuna's multivariate TPE draws; ASHA stops trials that lag behind the others
  at the same epoch. The first trial has the recipe's own settings.
- A trial is chosen by the mean of three consecutive validations, not by its luckiest one; --confirm
  trains the best again over seeds that the search did not see, and the recipe's own settings with
  them; the winner is by mean, and its gain is given with an interval.
- Only the validation samples are looked at; a test split has no part in a sweep.
- The same command goes on where the sweep was stopped, whatever was killed.
"""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from scribbleseg.cli import evaluate_command, exit_status, say
from scribbleseg.config import (
    FinetuneConfig,
    config_hash,
    override,
    parse_arguments,
    require,
    to_dict,
)
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Row
from scribbleseg.loops.batches import open_data
from scribbleseg.report import tables
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import SWEEP, Trial, rank, read_trials
from train.command import base_config
from train.estimate import time_steps
from train.launch import (
    LaunchConfig,
    Resources,
    absolute,
    git_commit,
    living_nodes,
    num_places,
    start_ray,
    this_machine,
)
from train.recipes import RECIPES
from tune.comparison import paired_difference, score_all
from tune.spaces import (
    SETTINGS,
    SPACES,
    Pretrained,
    Space,
    check_space,
    defaults,
    read_pretrained,
    read_space,
    to_tree,
)

PROG = "python -m tune.sweep"

# Environment variables that Ray Tune reads; the user's own are never overwritten.
TUNE = {
    # Everything that Tune would write about a trial is in the trial's run folder.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed for good reports its reason instead of a metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What is searched, and where."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(
        default_factory=FinetuneConfig
    )
    launch: LaunchConfig = field(default_factory=lambda: LaunchConfig(max_failures=1))
    """Hardware of one trial, and storage; a trial that was lost is tried again max_failures times.
    """
    recipe: str = "cpu"
    """Recipe, or YAML file of settings, that the searched settings are put over."""
    num_trials: int = 24
    """Trials altogether, those of earlier starts included (1 or more)."""
    max_concurrent: int | None = None
    """Trials at once (1 or more); None: as many as the cluster has room for."""
    search: Literal["tpe", "random"] = "tpe"
    """tpe: learns from the trials before; random: does not."""
    stopping: Literal["asha", "none"] = "asha"
    """asha: trials that lag behind are stopped early (arXiv 1810.05934); none: all are trained to
    their end.
    """
    grace: int | None = None
    """Epochs before a trial can be stopped (1 or more); None: a ninth of train.epochs."""
    seed: int = 0
    """Seed of the search; that of the trials is train.seed."""
    pretrained: tuple[str, ...] = ()
    """Pretraining runs that a trial may start from, where its network fits one."""
    confirm: str | None = None
    """KxS: the K best are trained again with S other seeds each, and the winner is by mean."""
    name: str | None = None
    """Name of the sweep's folder; None: the space and a hash of the settings. The same command goes
    on.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_trials >= 1, "num_trials", self.num_trials, "1 or more")
        for key in ("max_concurrent", "grace"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "1 or more, or None")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(
            self.confirm is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.confirm) is not None,
            "confirm",
            self.confirm,
            "KxS, such as 3x3: the 3 best, over 3 seeds each",
        )

    @property
    def repeats(self) -> tuple[int, int]:
        """How many trials are confirmed, over how many seeds each."""
        top, seeds = (self.confirm or "0x0").split("x")
        return int(top), int(seeds)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that can begin: everything about it is checked."""

    job: SweepJob
    space: Space
    pretrained: tuple[Pretrained, ...]
    folder: RunFolder
    place: str
    """The folder, as people write it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What may not differ between two starts of one sweep."""
        job = self.job
        return {
            "space": to_tree(self.space),
            "recipe": job.recipe,
            "settings": to_dict(job.config),
            "search": job.search,
            "stopping": job.stopping,
            "grace": job.grace,
            "seed": job.seed,
            "pretrained": list(job.pretrained),
        }


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        if not arguments:
            raise InputError("SPACE is missing; expected one of the above")
        return
    sweep = prepare(arguments)
    known = read_trials(sweep.folder)
    record = sweep.folder.read_json(SWEEP)
    if record is not None:
        differing = [key for key, value in sweep.identity.items() if record.get(key) != value]
        if differing:
            raise InputError(
                f"{sweep.place}: holds a sweep of another {', '.join(differing)}; choose another "
                "--name"
            )
        done = record.get("finished") and record.get("confirm") == sweep.job.confirm
        if done and sum(trial.ended for trial in known) >= sweep.job.num_trials:
            say(f"{sweep.place} is finished; more --num-trials make it go on")
            return
    run(sweep, known, record or {})


def help_text() -> str:
    """Return what the command says without a space."""
    listed = "\n".join(f"  {name:8} {', '.join(space)}" for name, space in SPACES.items())
    return (
        f"usage: {PROG} SPACE --data.root DIR [--num-trials N] [--storage URI] [--recipe RECIPE] "
        "[--section.field VALUE ...]\n\n"
        "Searches settings for the best validation mIoU. SPACE is one of\n"
        f"{listed}\n"
        "or a YAML file with lines such as\n"
        "  optim.learning_rate: {log: [3.0e-4, 1.0e-2]}\n"
        "  augment.strength: {range: [0.0, 1.5]}\n"
        "  model.width: {choice: [16, 24, 32]}\n\n"
        f"Every option, and every setting of the recipe: {PROG} SPACE --help\n"
    )


def prepare(arguments: Sequence[str]) -> Sweep:
    """Read a command line, and check all that can be checked without Ray.

    Raises:
        InputError: something about it cannot be used.
    """
    name, options = arguments[0], list(arguments[1:])
    space = read_space(name)
    title = name if name in SPACES else os.path.splitext(os.path.basename(name))[0]
    recipe, base = base_config(
        _option(options, "--recipe", "demo" if name == "smoke" else "cpu"),
        RECIPES,
        FinetuneConfig(),
    )
    # A trial has one core as a rule: a loader of its own would only compete for it. Only the best
    # checkpoint of a trial is ever asked for, and the last to go on from.
    base = override(base, {"data.num_workers": 0, "train.keep": 1} | SETTINGS.get(name, {}))
    job: SweepJob = parse_arguments(
        SweepJob, options, default=SweepJob(config=base, recipe=recipe), prog=f"{PROG} {name}"
    )
    data = job.config.data
    if not data.root:
        raise InputError("data.root is not set; expected the folder of your data: --data.root DIR")
    if data.fold is None and data.val_split is None:
        raise InputError("data.fold and data.val_split are None; expected samples to validate on")
    if job.config.init_from is not None:
        raise InputError("init_from is set; expected --pretrained RUN, from which trials may start")
    config = replace(job.config, data=replace(data, root=absolute(data.root)))
    check_space(space, config)
    pretrained = tuple(map(absolute, job.pretrained))
    job = replace(job, config=config, recipe=recipe, pretrained=pretrained)
    storage = absolute(job.launch.storage)
    sweep = Sweep(
        job=job,
        space=space,
        pretrained=tuple(map(read_pretrained, pretrained)),
        folder=RunFolder.at(storage, "none"),
        place="",
    )
    title = job.name or f"sweep-{title}-{config_hash(sweep.identity)}"
    folder = RunFolder.at(storage, title)
    if job.launch.is_local:
        # On a cluster the data are where the workers are, and are checked there.
        list_scenes(config.data.root, data.split, need_masks=False)
    return replace(sweep, folder=folder, place=f"{storage}/{title}")


def _option(options: Sequence[str], name: str, default: str) -> str:
    """Return the value of an option that decides the defaults of all others."""
    for number, word in enumerate(options):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and number + 1 < len(options):
            return options[number + 1]
    return default


def plan_hardware(
    job: SweepJob, nodes: Sequence[tuple[int, int]], *, can_grow: bool
) -> tuple[Resources, int]:
    """Return what each worker of a trial gets, and how many trials run at once.

    Args:
        job: Wishes.
        nodes: (CPUs, GPUs) of each living node.
        can_grow: Whether an autoscaler may add nodes, so that too little now is no error.

    Raises:
        InputError: a trial can never be placed; the message has the numbers.
    """
    launch = job.launch
    gpus = launch.gpus_per_worker
    if gpus is None:
        gpus = int(any(node_gpus > 0 for _, node_gpus in nodes))
    shares = [cpus * gpus // node_gpus for cpus, node_gpus in nodes if node_gpus >= gpus > 0]
    # Several small trials on a core each get more done than one on all cores.
    cpus = launch.cpus_per_worker or max(1, min(shares, default=1))
    resources = Resources(cpus=cpus, gpus=gpus)
    room = num_places(nodes, resources) // launch.num_workers
    if room == 0 and not can_grow:
        raise InputError(
            f"a trial needs {launch.num_workers} worker(s) with {cpus} CPU and {gpus} GPU each; "
            f"this cluster has {sum(c for c, _ in nodes)} CPUs and {sum(g for _, g in nodes)} GPUs "
            f"on {len(nodes)} node(s); ask for less with --launch.num-workers or "
            "--launch.cpus-per-worker"
        )
    return resources, min(job.num_trials, job.max_concurrent or max(1, room))


def run(sweep: Sweep, known: Sequence[Trial], record: dict[str, Any]) -> None:
    """Search, confirm, and record the best."""
    job, launch = sweep.job, sweep.job.launch
    began = time.monotonic() - float(record.get("wall_time", 0.0))
    if launch.is_local:
        resources, concurrent = plan_hardware(job, [this_machine()], can_grow=False)
        estimate(sweep, known, resources, concurrent)
    for name, value in TUNE.items():
        os.environ.setdefault(name, value)
    start_ray(launch)
    resources, concurrent = plan_hardware(job, living_nodes(), can_grow=not launch.is_local)
    if not launch.is_local:
        check_data(job.config, resources)
    record = {
        "format": 1,
        "kind": "sweep",
        **sweep.identity,
        "num_trials": job.num_trials,
        "confirm": job.confirm,
        "concurrent": concurrent,
        "git_commit": git_commit(),
        "started": record.get("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
        "wall_time": record.get("wall_time", 0.0),
        "finished": False,
    }
    try:
        sweep.folder.write_json(SWEEP, record)
    except OSError as error:
        raise InputError(
            f"{sweep.place}: cannot be written ({error}); choose another --storage"
        ) from None
    say(
        f"{sweep.place}: {job.num_trials} trials, {len(known)} of them begun before; {concurrent} "
        f"at once, {launch.num_workers} worker(s) each with {resources.cpus} CPU and "
        f"{resources.gpus} GPU"
    )
    # Imported here because they bring Ray Tune, which `--help` does without.
    from tune.carrier import Ledger, confirm, search, stop_early, stop_none
    from tune.study import Study, make_search
    from tune.trial import Plan

    plan = Plan(
        sweep=sweep.place,
        base=to_dict(job.config),
        recipe=job.recipe,
        git_commit=git_commit(),
        launch=replace(
            launch,
            storage=sweep.place,
            cpus_per_worker=resources.cpus,
            gpus_per_worker=resources.gpus,
        ),
        resources=resources,
    )
    ledger = Ledger(sweep.folder, known, job.num_trials, concurrent)
    if len(ledger.ended()) < job.num_trials:
        drawn = make_search(
            sweep.space, job.config, sweep.pretrained, known, kind=job.search, seed=job.seed
        )
        epochs = job.config.train.epochs
        scheduler = stop_early(epochs, job.grace) if job.stopping == "asha" else stop_none()
        study = Study(drawn, sweep.folder, known)
        search(plan, study, ledger, scheduler, job.num_trials, concurrent)
    confirmed: list[dict[str, Any]] = []
    num_confirmed, num_seeds = job.repeats
    chosen = rank(ledger.ended())[:num_confirmed]
    if chosen:
        # The recipe's own settings are what the others have to beat.
        own = [
            trial for trial in ledger.ended() if trial.params == defaults(sweep.space, job.config)
        ]
        chosen += [trial for trial in own[:1] if trial not in chosen]
        confirmed = confirm(plan, sweep.folder, chosen, num_seeds, concurrent)
        if own:
            confirmed = compare(sweep, confirmed, own[0].number)
    record |= {"wall_time": time.monotonic() - began, "finished": True, "confirmed": confirmed}
    sweep.folder.write_json(SWEEP, record)
    conclude(sweep, confirmed)


def compare(sweep: Sweep, confirmed: Sequence[dict[str, Any]], own: int) -> list[dict[str, Any]]:
    """Add to each confirmed trial its "gain" over the recipe's own settings: mean, low, high.

    The last checkpoints are scored: no epoch of theirs was chosen by these images.
    """
    rows: dict[int, list[list[Row]]] = {}
    for each in confirmed:
        uris = [f"{sweep.place}/{name}" for name in each["runs"]]
        rows[each["trial"]] = score_all(uris, sweep.job.config, sweep.job.launch)
    return [
        each
        if each["trial"] == own
        else each | {"gain": paired_difference(rows[each["trial"]], rows[own], "miou")}
        for each in confirmed
    ]


def estimate(sweep: Sweep, known: Sequence[Trial], resources: Resources, concurrent: int) -> None:
    """Say how long a sweep takes at most, by a few steps of its base."""
    job = sweep.job
    if job.launch.num_workers > 1:
        return
    pace = time_steps(job.config, resources)
    left = job.num_trials - sum(trial.ended for trial in known)
    say(
        f"the recipe's own trial: {pace.epochs} epochs of {pace.steps_per_epoch} steps, "
        f"{pace.seconds_per_step:.2f} s each; {left} like it take about "
        f"{tables.duration(left * pace.seconds / concurrent)} if none is stopped early, loading "
        "and validating apart"
    )


def check_data(config: FinetuneConfig, resources: Resources) -> None:
    """Read the data on a worker, before any trial does.

    Raises:
        InputError: what is wrong with it.
    """
    import ray
    from ray.exceptions import RayTaskError

    task: Any = ray.remote(_open).options(num_cpus=resources.cpus)
    try:
        ray.get(task.remote(config))
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def _open(config: FinetuneConfig) -> None:
    open_data(config)


def conclude(sweep: Sweep, confirmed: Sequence[dict[str, Any]]) -> None:
    """Say what was found and how to use it."""
    best = sweep.folder.best()
    if best is None:
        raise RuntimeError(
            f"{sweep.place}: no trial has saved a checkpoint; see trials.csv for why"
        )
    for each in confirmed:
        say(
            f"trial {each['trial']} over {len(each['scores'])} seeds: mIoU {each['mean']:.4f}"
            + ("" if each["deviation"] is None else f" ± {each['deviation']:.4f}")
            + ("" if "gain" not in each else ", {:+.4f} ({:+.4f} to {:+.4f})".format(*each["gain"]))
            + ("" if "gain" not in each else " against the recipe's own, image by image")
        )
    say(f"best: {best['run']}, mIoU {best['value']:.4f} at epoch {best['epoch']}")
    say(f"done: {sweep.place}")
    say(f"look: scribbleseg report {sweep.place}")
    say(f"take: scribbleseg pull {sweep.place} --out best")
    say(f"evaluate it: {evaluate_command(sweep.place, sweep.job.config.data)}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
