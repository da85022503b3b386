"""What a sweep is asked for on the command line, checked as far as it can be without Ray."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from scribbleseg.config import (
    FinetuneConfig,
    config_hash,
    override,
    parse_arguments,
    require,
    to_dict,
)
from scribbleseg.datasets.remote import inside
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from train.command import FURTHER, base_config
from train.launch import LaunchConfig, Resources, num_places, require_named
from train.places import absolute, absolute_data
from train.recipes import RECIPES
from tune.spaces import (
    SETTINGS,
    SPACES,
    Pretrained,
    Space,
    fit_space,
    read_pretrained,
    read_space,
    to_tree,
)

PROG = "python -m tune.sweep"


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What is searched, and where."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(
        default_factory=FinetuneConfig
    )
    launch: LaunchConfig = field(default_factory=lambda: LaunchConfig(max_failures=1))
    """Hardware of one trial, and storage; one that was lost is tried again max_failures times, anew
    whenever it goes on from where it stopped.
    """
    recipe: str = "cpu"
    """Recipe, or YAML file of settings, that the searched settings are put over."""
    num_trials: int = 24
    """Trials altogether, those of earlier starts included (1 or more)."""
    max_concurrent: int | None = None
    """Trials at once (1 or more); None: as many as the cluster has room for, or gets it; those of
    several workers as many as there is room for at the start.
    """
    search: Literal["tpe", "random"] = "tpe"
    """tpe: learns from the trials before; random: does not."""
    stopping: Literal["asha", "none"] = "asha"
    """asha: trials stop early, and those among the best third of all that came as far go on (arXiv
    1810.05934); none: all are trained to their end.
    """
    grace: int | None = None
    """Epochs before a trial stops for the first time (1 or more), and each next time after three
    times as many; None: a ninth of train.epochs.
    """
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
    identity: dict[str, Any]
    """What may not differ between two starts of it."""
    folder: RunFolder
    place: str
    """The folder, as people write it."""


def prepare(arguments: Sequence[str]) -> Sweep:
    """Read a command line, and check all that can be checked without Ray.

    Raises:
        InputError: something about it cannot be used.
    """
    name, options = arguments[0], list(arguments[1:])
    space = read_space(name)
    title = name if name in SPACES else os.path.splitext(os.path.basename(name))[0]
    asked = _option(options, "--recipe", "demo" if name == "smoke" else "cpu")
    recipe, base = base_config(asked, RECIPES, FinetuneConfig())
    if recipe == FURTHER:
        raise InputError(
            f"--recipe {asked}: is a trained network; expected a recipe or a .yaml file of "
            "settings, since the trials of a sweep start anew"
        )
    if recipe not in RECIPES:
        # As it can be given again: the report names a command that trains by it.
        recipe = os.path.basename(asked)
    # Only the best checkpoint of a trial is ever asked for, and the last to go on from.
    base = override(base, {"train.keep": 1} | SETTINGS.get(name, {}))
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
    config = replace(job.config, data=absolute_data(data))
    space = fit_space(space, config)
    job = replace(
        job, config=config, recipe=recipe, pretrained=tuple(map(absolute, job.pretrained))
    )
    pretrained = tuple(map(read_pretrained, job.pretrained))
    storage = absolute(job.launch.storage)
    identity = identify(job, space)
    title = job.name or f"sweep-{title}-{config_hash(identity)}"
    if job.launch.is_local:
        # On a cluster the data are where the workers are, and are checked there.
        list_scenes(config.data.root, data.split, need_masks=False, cache_dir=data.cache_dir)
    return Sweep(
        job=job,
        space=space,
        pretrained=pretrained,
        identity=identity,
        folder=RunFolder.at(storage, title),
        place=inside(storage, title),
    )


def identify(job: SweepJob, space: Space) -> dict[str, Any]:
    """Return what may not differ between two starts of one sweep."""
    return {
        "space": to_tree(space),
        "recipe": job.recipe,
        "settings": to_dict(job.config),
        "search": job.search,
        "stopping": job.stopping,
        "grace": job.grace,
        "seed": job.seed,
        "pretrained": list(job.pretrained),
    }


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
        can_grow: Whether an autoscaler may add nodes, so that too little now is no error, and the
            cluster itself sets how many trials of one worker run at once. A trial of several only
            waits for them and asks for nothing: all would wait at once.

    Raises:
        InputError: a trial can never be placed; the message has the numbers. Or none fits now,
            and the wishes leave open what is to come.
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
    if room == 0:
        require_named(launch, nodes)
    most = job.num_trials if can_grow and launch.num_workers == 1 else max(room, 1)
    most = job.max_concurrent or most
    return resources, min(job.num_trials, most)
