"""What the commands that train have in common: recipes, run names, and the way to Ray."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast

import tyro

from scribbleseg.checkpoint import read_model
from scribbleseg.config import (
    FinetuneConfig,
    from_yaml,
    parse_arguments,
    require_shares,
    to_dict,
    to_yaml,
)
from scribbleseg.datasets.remote import inside
from scribbleseg.datasets.workers import prepare_workers
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder, find_checkpoint
from train.launch import LaunchConfig, launch_job, uncollected
from train.places import absolute, choose_run, git_commit, sole

ConfigT = TypeVar("ConfigT")
Recipes = Mapping[str, Callable[[], ConfigT]]


def usage(
    prog: str,
    needs: str,
    purpose: str,
    recipes: Recipes[Any],
    others: str = "a YAML file of settings",
) -> str:
    """Return what a command says without a recipe."""
    listed = "\n".join(
        f"  {name:8} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in recipes.items()
    )
    return (
        f"usage: {prog} RECIPE {needs} [--section.field VALUE ...]\n\n"
        f"{purpose} RECIPE is one of\n{listed}\nor {others}.\n\n"
        f"Every setting, with its meaning and default: {prog} RECIPE --help\n"
    )


FURTHER = "further"
"""Name of the settings that go on from a trained network."""


def base_config(recipe: str, recipes: Recipes[ConfigT], plain: ConfigT) -> tuple[str, ConfigT]:
    """Return the name and the settings of a recipe, or of a YAML file put over `plain`.

    For fine-tuning, a trained network's too: its settings, to go on from it on other data.
    """
    if recipe in recipes:
        return recipe, recipes[recipe]()
    if Path(recipe).suffix in (".yaml", ".yml"):
        return Path(recipe).stem, from_yaml(plain, Path(recipe))
    if isinstance(plain, FinetuneConfig) and _is_place(recipe):
        with tempfile.TemporaryDirectory() as scratch:
            found = read_model(find_checkpoint(recipe, Path(scratch) / "start")).config
        if not isinstance(found, FinetuneConfig):
            raise InputError(
                f"{recipe}: holds a pretrained encoder, expected a segmentation network; name a "
                f"recipe, and the encoder by --init-from {recipe}"
            )
        return FURTHER, cast(ConfigT, found.going_on(absolute(recipe)))
    raise InputError(
        f"recipe {recipe!r} is unknown; expected {', '.join(recipes)} or a .yaml file of settings"
    )


def _is_place(recipe: str) -> bool:
    return recipe.startswith("released:") or "://" in recipe or Path(recipe).is_dir()


@dataclass(frozen=True, kw_only=True)
class Job(Generic[ConfigT]):
    """A run: what it computes, and where."""

    config: Annotated[ConfigT, tyro.conf.arg(name="")]
    launch: LaunchConfig
    """Hardware and storage."""
    name: str | None = None
    """Name of the run's folder; None: the recipe and a hash of the settings. The same command
    resumes.
    """
    fresh: bool = False
    """Start anew, in a folder beside an existing run's."""
    print_config: bool = False
    """Print the settings as YAML and exit; the file can be given in place of RECIPE."""


def read_job(
    arguments: Sequence[str],
    recipes: Recipes[ConfigT],
    plain: ConfigT,
    *,
    prog: str,
    needs: str,
    purpose: str,
) -> tuple[str, Job[ConfigT]] | None:
    """Return the recipe's name and the job that a command line asks for.

    None: help or settings were asked for, and have been printed.

    Raises:
        InputError: the command line cannot be understood.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        others = "a YAML file of settings"
        if isinstance(plain, FinetuneConfig):
            others += ", or a trained network to go on from: released:NAME, a run or a checkpoint"
        sys.stdout.write(usage(prog, needs, purpose, recipes, others))
        if not arguments:
            raise InputError("RECIPE is missing; expected one of the above")
        return None
    recipe, config = base_config(arguments[0], recipes, plain)
    job: Job[ConfigT] = parse_arguments(
        Job[type(plain)],
        arguments[1:],
        default=Job(config=config, launch=LaunchConfig()),
        prog=f"{prog} {arguments[0]}",
    )
    if job.print_config:
        sys.stdout.write(to_yaml(job.config))
        return None
    return recipe, job


@dataclass(frozen=True, kw_only=True)
class Order:
    """A run that is asked for."""

    recipe: str
    config: Any
    """Its settings, paths made absolute."""
    launch: LaunchConfig
    name: str | None
    """Name of its folder; None: by its settings."""
    fresh: bool
    """Start beside a run of that name."""


def finetune_rank(payload: dict[str, Any]) -> dict[str, str]:
    """Run one rank of fine-tuning, see `train.worker.train_worker`."""
    return import_worker(payload).train_worker(payload)


def pretrain_rank(payload: dict[str, Any]) -> dict[str, str]:
    """Run one rank of pretraining, see `train.worker.pretrain_worker`."""
    return import_worker(payload).pretrain_worker(payload)


def import_worker(payload: dict[str, Any]) -> Any:
    """Import what ranks need, where they are: the command, which starts Ray, does without.

    Modules stay, so nothing is collected while they come: that took a fifth of the time, or more.
    """
    if payload["cpus"] > 1 and payload["config"]["data"]["num_workers"] != 0:
        # Loader workers come from a process that imports the same meanwhile, on another core.
        prepare_workers("scribbleseg.datasets.multicrop")
    with uncollected():
        # Optimisers and DDP import it in any case.
        import_module("torch._dynamo")
        return import_module("train.worker")


def carry_out(
    order: Order, worker: Callable[[dict[str, Any]], dict[str, str]]
) -> tuple[str, RunFolder] | None:
    """Run a job to its end; return the place and the folder, or None where it had ended before.

    Raises:
        InputError: the input is wrong, or the folder is another run's, or a process trains it.
        DivergedError: the loss is no longer a number.
        RuntimeError: workers failed too often.
    """
    # Workers would say so too, but of a job that grows perhaps only after days.
    train = order.config.train
    least = order.config.least_images
    require_shares(train.batch_size, order.launch.num_workers, train.accumulate, least=least)
    storage = absolute(order.launch.storage)
    name, run = choose_run(
        order.config, storage, recipe=order.recipe, name=order.name, fresh=order.fresh
    )
    place = inside(storage, name)
    if run.finished():
        sys.stdout.write(f"{place} is finished; --fresh trains anew beside it\n")
        return None
    payload = {
        "config": to_dict(order.config),
        "recipe": order.recipe,
        "git_commit": git_commit(),
        "storage": storage,
        "name": name,
    }
    with sole(place):
        try:
            launch_job(worker, payload, order.launch, run)
        except KeyboardInterrupt:
            sys.stderr.write("the same command goes on\n")
            raise
    return place, run


def write_page(place: str, run: RunFolder, launch: LaunchConfig) -> None:
    """Write the page of a run that has ended, and say where it is, if all of it is here.

    Elsewhere the data need not be at hand; `scribbleseg report` makes the page there.
    """
    if run.local_path is None or not launch.is_local:
        return
    from scribbleseg.report.page import write_report

    page = write_report([place], run.local_path / "report.html")
    sys.stdout.write(f"curves and pictures: {page}\n")
