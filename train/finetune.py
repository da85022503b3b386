"""`python -m train.finetune RECIPE`: segmentation training on Ray Train."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from scribbleseg.cli import evaluate_command, exit_status
from scribbleseg.config import (
    FinetuneConfig,
    from_yaml,
    parse_arguments,
    to_dict,
    to_yaml,
)
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from train.launch import (
    LaunchConfig,
    absolute,
    choose_run,
    git_commit,
    launch_job,
)
from train.recipes import RECIPES

PROG = "python -m train.finetune"


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """A run: what it computes, and where."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
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


def usage() -> str:
    """Return what the command says without a recipe."""
    recipes = "\n".join(
        f"  {name:8} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()
    )
    return (
        f"usage: {PROG} RECIPE --data.root DIR [--section.field VALUE ...]\n\n"
        "Trains a segmentation network on images with strokes. RECIPE is one of\n"
        f"{recipes}\n"
        "or a YAML file of settings.\n\n"
        f"Every setting, with its meaning and default: {PROG} RECIPE --help\n"
    )


def base_config(recipe: str) -> tuple[str, FinetuneConfig]:
    """Return the name and the settings of a recipe or of a YAML file."""
    if recipe in RECIPES:
        return recipe, RECIPES[recipe]()
    if Path(recipe).suffix in (".yaml", ".yml"):
        return Path(recipe).stem, from_yaml(FinetuneConfig(), Path(recipe))
    raise InputError(
        f"recipe {recipe!r} is unknown; expected {', '.join(RECIPES)} or a .yaml file of settings"
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        if not arguments:
            raise InputError("RECIPE is missing; expected one of the above")
        return
    recipe, config = base_config(arguments[0])
    job: FinetuneJob = parse_arguments(
        FinetuneJob,
        arguments[1:],
        default=FinetuneJob(config=config, launch=LaunchConfig()),
        prog=f"{PROG} {arguments[0]}",
    )
    if job.print_config:
        sys.stdout.write(to_yaml(job.config))
        return
    if not job.config.data.root:
        raise InputError("data.root is not set; expected the folder of your data: --data.root DIR")
    config = replace(job.config, data=replace(job.config.data, root=absolute(job.config.data.root)))
    launch = replace(job.launch, storage=absolute(job.launch.storage))
    if launch.is_local:
        # On a cluster the data are where the workers are, and are checked there.
        list_scenes(config.data.root, config.data.split, need_masks=False)
    # Imported here because it brings Ray, which `--help` and loader processes do without.
    from train.worker import train_worker

    name, run = choose_run(config, launch, recipe=recipe, name=job.name, fresh=job.fresh)
    if run.finished():
        sys.stdout.write(f"{launch.storage}/{name} is finished; --fresh trains anew beside it\n")
        return
    launch_job(
        train_worker,
        {
            "config": to_dict(config),
            "recipe": recipe,
            "git_commit": git_commit(),
            "storage": launch.storage,
            "name": name,
        },
        launch,
        run,
    )
    place = f"{launch.storage}/{name}"
    if run.local_path is not None and launch.is_local:
        # Elsewhere the data need not be at hand; `scribbleseg report` makes the page there.
        from scribbleseg.report.page import write_report

        page = write_report([place], run.local_path / "report.html")
        sys.stdout.write(f"curves and pictures: {page}\n")
    sys.stdout.write(f"done: {place}\nevaluate it: {evaluate_command(place, config.data)}\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
