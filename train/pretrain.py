"""`python -m train.pretrain RECIPE`: DINO pretraining on Ray Train; its encoder is handed over."""

import sys
from collections.abc import Sequence

from scribbleseg.cli import exit_status
from scribbleseg.config import PretrainConfig
from scribbleseg.datasets.pictures import list_images
from train.command import Order, carry_out, pretrain_rank, read_job, write_page
from train.places import absolute_pretraining
from train.recipes import PRETRAIN_RECIPES

PROG = "python -m train.pretrain"


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = read_job(
        arguments,
        PRETRAIN_RECIPES,
        PretrainConfig(),
        prog=PROG,
        needs="--data.roots DIR ...",
        purpose="Pretrains a network's encoder on images without labels (DINO).",
    )
    if asked is None:
        return
    recipe, job = asked
    config, launch = absolute_pretraining(job.config), job.launch
    data = config.data
    if launch.is_local or not data.roots:
        # On a cluster the images are where the workers are, and are looked for there.
        list_images(data.roots, data.cache_dir)
    order = Order(recipe=recipe, config=config, launch=launch, name=job.name, fresh=job.fresh)
    done = carry_out(order, pretrain_rank)
    if done is not None:
        from scribbleseg.report.records import finetune_command

        place, run = done
        write_page(place, run, launch)
        command = finetune_command(place, config.model)
        sys.stdout.write(f"done: {place}\nfine-tune it: {command}\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
