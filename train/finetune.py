"""`python -m train.finetune RECIPE`: segmentation training on Ray Train."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from scribbleseg.cli import exit_status, scoring_command
from scribbleseg.config import FinetuneConfig
from scribbleseg.datasets.scenes import list_scenes
from scribbleseg.errors import InputError
from train.command import Order, carry_out, finetune_rank, read_job, write_page
from train.places import absolute, absolute_data
from train.recipes import RECIPES

PROG = "python -m train.finetune"


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = read_job(
        arguments,
        RECIPES,
        FinetuneConfig(),
        prog=PROG,
        needs="--data.root DIR",
        purpose="Trains a segmentation network on images with strokes.",
    )
    if asked is None:
        return
    recipe, job = asked
    config, launch = job.config, job.launch
    if not config.data.root:
        raise InputError("data.root is not set; expected the folder of your data: --data.root DIR")
    config = replace(config, data=absolute_data(config.data))
    if config.init_from is not None:
        config = replace(config, init_from=absolute(config.init_from))
    if launch.is_local:
        # On a cluster the data are where the workers are, and are checked there.
        data = config.data
        list_scenes(data.root, data.split, need_masks=False, cache_dir=data.cache_dir)
    order = Order(recipe=recipe, config=config, launch=launch, name=job.name, fresh=job.fresh)
    done = carry_out(order, finetune_rank)
    if done is None:
        return
    place, run = done
    write_page(place, run, launch)
    sys.stdout.write(f"done: {place}\nevaluate it: {scoring_command(place, config.data)}\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
