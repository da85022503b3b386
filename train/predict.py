"""`python -m train.predict`: masks for millions of photographs, on Ray Data.

The names are listed once, and dealt out in small tables; pictures are read, predicted and written
by the workers, one at a time, so that neither the driver nor Ray's object store ever holds any. A
mask that is there is not made again: the same command goes on after any loss.
"""

import hashlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from scribbleseg.cli import exit_status, say
from scribbleseg.config import Looker, parse_arguments, require, to_dict
from scribbleseg.datasets.doubts import Doubt, describe_doubts
from scribbleseg.datasets.files import MAX_MEGAPIXELS
from scribbleseg.errors import InputError
from scribbleseg.predict import Predictor, load_as_asked
from train.launch import (
    ClusterConfig,
    Resources,
    living_nodes,
    plan_resources,
    start_ray,
    this_machine,
    wait_for_room,
)
from train.masks import (
    SCENES_AHEAD,
    Drawn,
    Failure,
    Folders,
    MaskActor,
    MaskMaker,
    Outcome,
    Wishes,
    outcome_of,
)
from train.places import absolute, marked
from train.worklist import FAILED, list_work, require_same_masks, write_failures

PROG = "python -m train.predict"
# Enough that the workers end together, and no more, since Ray keeps a record of each.
TABLES_PER_WORKER = 100
SECONDS_TO_FIRST, SECONDS_BETWEEN_LINES = 5.0, 60.0


@dataclass(frozen=True, kw_only=True)
class PredictJob(Looker):
    """Turn photographs and strokes into masks on a cluster; the same command goes on."""

    images: str
    """Folder or URI of photographs, STEM.jpg or STEM.png."""
    scribbles: str
    """Folder or URI of strokes, STEM.png: 0 background, 1 object, 255 unlabelled."""
    out: str
    """Folder or URI for the masks, STEM.png: 0 background, 1 object. Masks that are there are not
    made again; failed.csv lists the files that cannot be used.
    """
    probabilities: bool = False
    """Also write OUT/probabilities/STEM.png: 255 x the probability of object."""
    honour_strokes: bool = True
    """Pixels under a stroke take the stroke's label."""
    sure: float = 0.5
    """Pixels whose label has a probability below this become 255, ignore [0.5, 1); 0.5: none do."""
    max_megapixels: float = 100.0
    """Larger photographs are listed as failed and not read: a worker has memory for one such (at
    most 178).
    """
    launch: ClusterConfig = field(default_factory=ClusterConfig)
    """Hardware."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0.5 <= self.sure < 1, "sure", self.sure, "a probability of 0.5 or more, below 1")
        # Pillow decodes no larger one.
        most = self.max_megapixels
        require(
            0 < most <= MAX_MEGAPIXELS,
            "max_megapixels",
            most,
            f"more than 0 and at most {MAX_MEGAPIXELS}",
        )

    @property
    def folders(self) -> Folders:
        """What is read and written, as workers find it."""
        images, scribbles, out = map(absolute, (self.images, self.scribbles, self.out))
        return Folders(images=images, scribbles=scribbles, out=out)

    @property
    def wishes(self) -> Wishes:
        """How masks are made."""
        return Wishes(
            probabilities=self.probabilities,
            honour_strokes=self.honour_strokes,
            sure=self.sure,
            max_pixels=round(1e6 * self.max_megapixels),
        )


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    job: PredictJob = parse_arguments(PredictJob, arguments, prog=PROG)
    folders, target = job.folders, job.folders.target
    read = {place.rstrip("/") for place in (folders.images, folders.scribbles)}
    out = folders.out.rstrip("/")
    if len(read) < 2:
        raise InputError(
            f"images and scribbles are both {job.images}; expected two folders: the photographs, "
            "and the strokes drawn on them"
        )
    if read & {out, f"{out}/probabilities"}:
        raise InputError(f"{job.out}: the masks would replace what is read; give another --out")
    predictor = load_as_asked(job, device="cpu")
    work = list_work(folders, job.probabilities)
    require_same_masks(folders, _record(predictor, job), work)
    total = len(work.drawn) + work.num_done + len(work.failures)
    say(f"{job.images}: {total} photograph(s), {work.num_done} with a mask already")
    if work.outdated:
        sys.stderr.write(
            f"warning: {job.out}/{work.outdated[0]}.png: older than its photograph or strokes, as "
            f"{len(work.outdated)} mask(s) are; remove them to have them made again\n"
        )
    told: list[Failure | Doubt] = []
    if work.drawn:
        outcomes = predict_here(predictor, job, work.drawn)
        if not job.launch.is_alone:
            outcomes = predict_on_ray(predictor, job, work.drawn)
        told = list(_watch(outcomes, len(work.drawn)))
    failures = [*work.failures, *(each for each in told if isinstance(each, Failure))]
    write_failures(target, failures)
    for line in describe_doubts(each for each in told if isinstance(each, Doubt)):
        sys.stderr.write(f"warning: {line}\n")
    say(f"{job.out}: {total - len(failures)} mask(s)")
    if failures:
        first = failures[0]
        raise InputError(
            f"{len(failures)} of {total} photograph(s) got no mask, listed with the reasons in "
            f"{job.out}/{FAILED}, such as {first.file}: {first.reason}; mend or remove them, and "
            "the same command does the rest"
        )


def predict_here(
    predictor: Predictor, job: PredictJob, drawn: Sequence[Drawn]
) -> Iterator[Sequence[Outcome]]:
    """Make the masks in this process; see `predict_on_ray`."""
    cpus, gpus = this_machine()
    resources = plan_resources(job.launch, [(cpus, gpus)], can_grow=False)
    maker = _maker(predictor, job, resources)
    for outcome in maker.make(drawn):
        yield [outcome]


def predict_on_ray(
    predictor: Predictor, job: PredictJob, drawn: Sequence[Drawn]
) -> Iterator[Sequence[Outcome]]:
    """Make the masks on Ray; yield what became of each photograph, in any order.

    Raises:
        InputError: the workers can never be placed, or have another folder of masks.
        OSError: a mask cannot be written.
    """
    import ray

    # Ray's core warns that what actors are made of could be lost; the driver holds it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    start_ray(job.launch)
    # Ray tells of every operator and lost worker; what a person needs is said here.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    launch = job.launch
    resources = plan_resources(launch, living_nodes(), can_grow=not launch.is_local)
    wait_for_room(launch, resources)
    held = ray.put(predictor)
    left = {each.stem: each for each in drawn}
    with marked(job.folders.target) as mark:
        for attempt in range(launch.max_failures + 1):
            # What was lost is dealt out one by one, so that what kills its worker is found out.
            share = len(left) / (TABLES_PER_WORKER * launch.num_workers)
            size = max(1 if attempt else SCENES_AHEAD, math.ceil(share))
            for rows in _deal(list(left.values()), size, (held, mark), job, resources):
                first = rows[0]
                if not first["stem"]:
                    if not first["file"]:
                        raise InputError(first["reason"])
                    raise OSError(f"{first['file']}: {first['reason']}")
                for row in rows:
                    left.pop(row["stem"], None)
                yield [outcome_of(row) for row in rows]
            if not left:
                return
    why = f"its worker was lost {launch.max_failures + 1} times; is it too large for its memory?"
    yield [Failure(f"{job.folders.images}/{each.image}", why) for each in left.values()]


def _deal(
    drawn: Sequence[Drawn],
    size: int,
    given: tuple[Any, str],
    job: PredictJob,
    resources: Resources,
) -> Iterator[list[dict[str, str]]]:
    """Deal photographs out to workers, `size` at a time; yield the rows that `MaskActor` returns.

    What was lost with a worker is missing among them. `given` is the reference of the predictor,
    and the mark in the folder of the masks.
    """
    import ray.data

    held, mark = given
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray's own way to try again gives up at once where a lost node leaves no room for its worker,
    # or never.
    context.max_errored_blocks = -1
    tables = [
        pa.Table.from_pylist([row._asdict() for row in drawn[start : start + size]])
        for start in range(0, len(drawn), size)
    ]
    with warnings.catch_warnings():
        # Ray means to name the number of retries otherwise, and does not say how yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        made = ray.data.from_arrow(tables).map_batches(
            MaskActor,
            batch_size=size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(job.launch.least_workers, len(tables)),
                max_size=min(job.launch.num_workers, len(tables)),
                # What waits at a worker is lost with it.
                max_tasks_in_flight_per_actor=1 if size == 1 else None,
            ),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
            fn_constructor_args=([held], job.folders, job.wishes, mark),
            fn_constructor_kwargs={"cpus": resources.cpus, "gpus": resources.gpus},
            max_task_retries=0,
        )
    results: Any = made.iter_batches(batch_size=None, batch_format="pyarrow")
    yield from (rows for table in results if (rows := table.to_pylist()))


def _maker(predictor: Predictor, job: PredictJob, resources: Resources) -> MaskMaker:
    return MaskMaker(predictor, job.folders, job.wishes, cpus=resources.cpus, gpus=resources.gpus)


def _watch(outcomes: Iterable[Sequence[Outcome]], total: int) -> Iterator[Failure | Doubt]:
    """Show how far the work is, and yield what there is to be told of.

    On a terminal as a bar; elsewhere a line now and then, for whoever reads the log.
    """
    done = at_first = 0
    began = told = time.monotonic()
    bar: Any = tqdm(total=total, unit="image", leave=False, disable=None, smoothing=0.05)
    with bar:
        for part in outcomes:
            done += len(part)
            bar.update(len(part))
            yield from (outcome for outcome in part if outcome is not None)
            now = time.monotonic()
            if not at_first:
                # What came before is the workers' start, which says nothing of their pace.
                # The first line comes soon: it tells whether this is a matter of minutes or days.
                at_first, began, told = done, now, now - SECONDS_BETWEEN_LINES + SECONDS_TO_FIRST
            elif bar.disable and now - told > SECONDS_BETWEEN_LINES:
                told = now
                pace = (done - at_first) / (now - began)
                sys.stderr.write(
                    f"{done} of {total} images, {pace:.2f} a second, about "
                    f"{(total - done) / pace / 60:.0f} min left\n"
                )


def _record(predictor: Predictor, job: PredictJob) -> dict[str, Any]:
    """Return what decides about the masks' pixels."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "images": job.folders.images,
        "scribbles": job.folders.scribbles,
        "weights": digest.hexdigest(),
        "predict": to_dict(predictor.config)["predict"],
        "honour_strokes": job.honour_strokes,
        "sure": job.sure,
    }


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
