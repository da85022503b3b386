"""`python -m train.pretrain RECIPE`: DINO pretraining on Ray Train; its encoder is handed over."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from scribbleseg.cli import exit_status
from scribbleseg.config import PretrainConfig, parse_arguments
from scribbleseg.datasets.pictures import list_images
from scribbleseg.errors import InputError
from train.command import Order, base_config, carry_out, print_settings, usage
from train.launch import LaunchConfig, absolute
from train.recipes import PRETRAIN_RECIPES

PROG = "python -m train.pretrain"


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """A run: what it computes, and where."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
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


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        purpose = "Pretrains a network's encoder on images without labels (DINO)."
        sys.stdout.write(usage(PROG, "--data.roots DIR ...", purpose, PRETRAIN_RECIPES))
        if not arguments:
            raise InputError("RECIPE is missing; expected one of the above")
        return
    recipe, config = base_config(arguments[0], PRETRAIN_RECIPES, PretrainConfig())
    job: PretrainJob = parse_arguments(
        PretrainJob,
        arguments[1:],
        default=PretrainJob(config=config, launch=LaunchConfig()),
        prog=f"{PROG} {arguments[0]}",
    )
    config, launch = job.config, job.launch
    if job.print_config:
        print_settings(config)
        return
    roots = tuple(absolute(root) for root in config.data.roots)
    config = replace(config, data=replace(config.data, roots=roots))
    if config.probe.root is not None:
        config = replace(config, probe=replace(config.probe, root=absolute(config.probe.root)))
    if launch.is_local or not roots:
        # On a cluster the images are where the workers are, and are looked for there.
        list_images(roots)
    # Imported here because it brings Ray, which `--help` and loader processes do without.
    from train.worker import pretrain_worker

    order = Order(recipe=recipe, config=config, launch=launch, name=job.name, fresh=job.fresh)
    done = carry_out(order, pretrain_worker)
    if done is not None:
        from scribbleseg.report.records import finetune_command

        place, run = done
        if run.local_path is not None and launch.is_local:
            # Elsewhere `scribbleseg report` makes the page.
            from scribbleseg.report.page import write_report

            page = write_report([place], run.local_path / "report.html")
            sys.stdout.write(f"curves and pictures: {page}\n")
        command = finetune_command(place, config.model)
        sys.stdout.write(f"done: {place}\nfine-tune it: {command}\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
