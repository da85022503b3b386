"""`python -m tune.sweep SPACE`: Ray Tune and Optuna search settings for the best validation mIoU.

- Every trial is a fine-tuning run with a run folder under STORAGE/NAME; see `scribbleseg.sweeps`
  for the sweep's own files. Status, pull and report need these alone.
- Optuna's multivariate TPE draws; by ASHA a trial stops after a few epochs, and goes on only while
  it is among the best third of those that came as far. The first trial has the recipe's own
  settings.
- A trial is chosen by the mean of three consecutive validations, not by its luckiest one; --confirm
  trains the best again over seeds that the search did not see, and the recipe's own settings with
  them; the winner is by mean, and its gain is given with an interval.
- Only the validation samples are looked at; a test split has no part in a sweep.
- The same command goes on where the sweep was stopped, whatever was killed.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scribbleseg.cli import exit_status, say, scoring_command
from scribbleseg.config import FinetuneConfig, to_dict
from scribbleseg.datasets.remote import inside
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Row
from scribbleseg.loops.batches import open_data
from scribbleseg.report import tables
from scribbleseg.sweeps import SWEEP, Trial, rank, read_info, read_trials
from train.estimate import time_steps
from train.launch import (
    Resources,
    call_remotely,
    living_nodes,
    start_ray,
    this_machine,
    wait_for_room,
)
from train.places import git_commit, require_own, sole, tells_of
from tune.comparison import paired_difference, score_all
from tune.request import PROG, Sweep, plan_hardware, prepare
from tune.rungs import rung_epochs
from tune.spaces import SPACES, defaults

# Environment variables that Ray Tune reads; the user's own are never overwritten.
TUNE = {
    # Everything that Tune would write about a trial is in the trial's run folder.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed for good reports its reason instead of a metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text())
        if not arguments:
            raise InputError("SPACE is missing; expected one of the above")
        return
    sweep = prepare(arguments)
    require_own(sweep.folder, sweep.place, SWEEP)
    known = read_trials(sweep.folder)
    record = read_info(sweep.folder)
    if record is not None:
        # Settings of an older version lack what came later.
        same = tells_of(record.get("settings"), sweep.job.config)
        differing = [
            key
            for key, value in sweep.identity.items()
            if record.get(key) != value and not (key == "settings" and same)
        ]
        if differing:
            raise InputError(
                f"{sweep.place}: holds a sweep of another {', '.join(differing)}; choose another "
                "--name"
            )
        if sweep.job.confirm is None:
            # What was confirmed once is not forgotten for want of a word.
            sweep = replace(sweep, job=replace(sweep.job, confirm=record.get("confirm")))
        done = record.get("finished") and record.get("confirm") == sweep.job.confirm
        if done and sum(trial.ended for trial in known) >= sweep.job.num_trials:
            say(f"{sweep.place} is finished; more --num-trials make it go on")
            return
    with sole(sweep.place):
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
        wait_for_room(launch, resources)
        # Before any trial reads them.
        call_remotely(_open, [(job.config,)], cpus=resources.cpus)
    # What was confirmed stays until it is confirmed again.
    record |= {
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
        f"{sweep.place}: {job.num_trials} trials, {len(known)} of them begun before; at most "
        f"{concurrent} at once, {launch.num_workers} worker(s) each with {resources.cpus} CPU and "
        f"{resources.gpus} GPU"
    )
    # Imported here because they bring Ray Tune, which `--help` does without.
    from tune.carrier import Ledger, confirm, search
    from tune.study import Study, make_search, settle
    from tune.trial import Plan

    plan = Plan(
        sweep=sweep.place,
        base=to_dict(job.config),
        recipe=job.recipe,
        git_commit=git_commit(),
        launch=replace(
            launch.named(),
            storage=sweep.place,
            cpus_per_worker=resources.cpus,
            gpus_per_worker=resources.gpus,
        ),
        resources=resources,
    )
    rungs = rung_epochs(job.config.train, job.grace) if job.stopping == "asha" else ()
    known = settle(sweep.folder, known, rungs)
    drawn = make_search(
        sweep.space, job.config, sweep.pretrained, known, kind=job.search, seed=job.seed
    )
    study = Study(drawn, sweep.folder, known, rungs, job.num_trials)
    ledger = Ledger(study, known)
    if not study.done:
        search(plan, study, ledger, concurrent)
    confirmed: list[dict[str, Any]] = []
    num_confirmed, num_seeds = job.repeats
    chosen = rank(ledger.ended())[:num_confirmed]
    if chosen:
        # The recipe's own settings are what the others have to beat.
        ranked = rank(ledger.ended())
        plain = defaults(sweep.space, job.config, sweep.pretrained)
        own = [trial for trial in ranked if trial.params == plain][:1]
        chosen += [trial for trial in own if trial not in chosen]
        confirmed = confirm(plan, sweep.folder, chosen, num_seeds, concurrent)
        if own and any(each["trial"] == own[0].number for each in confirmed):
            confirmed = compare(sweep, confirmed, own[0].number)
    record |= {"wall_time": time.monotonic() - began, "confirmed": confirmed}
    # One that has found nothing has not come to its end, whatever its trials did.
    record["finished"] = sweep.folder.best() is not None
    sweep.folder.write_json(SWEEP, record)
    conclude(sweep, confirmed)


def compare(sweep: Sweep, confirmed: Sequence[dict[str, Any]], own: int) -> list[dict[str, Any]]:
    """Add to each confirmed trial its "gain" over the recipe's own settings: mean, low, high.

    The last checkpoints are scored: no epoch of theirs was chosen by these images.
    """
    rows: dict[int, list[list[Row]]] = {}
    for each in confirmed:
        runs = [(inside(sweep.place, name), sweep.job.config) for name in each["runs"]]
        rows[each["trial"]] = score_all(runs, sweep.job.launch)
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
    left = max(0, job.num_trials - sum(trial.ended for trial in known))
    best, seeds = job.repeats
    # The recipe's own settings are trained again beside the best.
    again = (best + 1) * seeds if best else 0
    confirming = f" and {again} more to confirm the best" if again else ""
    say(
        f"the recipe's own trial: {pace.epochs} epochs of {pace.steps_per_epoch} steps, "
        f"{pace.seconds_per_step:.2f} s each; {left} like it{confirming} take about "
        f"{tables.duration((left + again) * pace.seconds / concurrent)} if none is stopped early, "
        "loading and validating apart"
    )


def _open(config: FinetuneConfig) -> None:
    open_data(config)


def conclude(sweep: Sweep, confirmed: Sequence[dict[str, Any]]) -> None:
    """Say what was found and how to use it."""
    best = sweep.folder.best()
    if best is None:
        raise RuntimeError(
            f"{sweep.place}: no trial has saved a checkpoint; see trials.csv for why, mend it and "
            "choose another --name"
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
    say(f"evaluate it: {scoring_command(sweep.place, sweep.job.config.data)}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
