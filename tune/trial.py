"""What one trial of a sweep does, in a process that Ray Tune gave it.

A trial is a run folder like any other. With one worker it trains in this very process, which then
serves the next trial: starting a second set of processes would take longer than a short trial.
With several it starts a Ray Train job of its own, and only waits.
"""

import platform
from dataclasses import dataclass, replace
from typing import Any

import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from scribbleseg.config import FinetuneConfig, from_dict, to_dict
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.loops.steps import Row
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, read_trial
from train.launch import LaunchConfig, Resources, launch_job
from train.places import SHARED
from train.progress import Board
from train.worker import assemble_finetune, train_run, train_worker
from tune.spaces import apply

FAILED = "failed"
"""Key of a report that tells why a trial can never succeed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all trials of a sweep have in common; plain values, so that it travels."""

    sweep: str
    """Folder or URI of the sweep."""
    base: dict[str, Any]
    """Settings that the drawn ones are put over."""
    recipe: str
    git_commit: str | None
    launch: LaunchConfig
    """Hardware of one trial; its storage is the sweep's folder."""
    resources: Resources
    """What each of its workers has."""


def run_trial(plan: Plan, name: str, until: int | None) -> None:
    """Train a run of the sweep, from where it is to the end of an epoch; None: to its own end.

    Every validation is reported, and why the run can never succeed.
    """
    sweep = RunFolder.open(plan.sweep)
    run = sweep.child(name)
    try:
        trial = read_trial(sweep, name)
        if trial is None:
            raise InputError(f"{plan.sweep}: holds no {name} on {platform.node()}; {SHARED}")
        if not run.finished():
            _train(plan, trial, run, until)
    # Nothing that a second attempt could mend, so Tune is not given a reason for one.
    except (DivergedError, InputError) as error:
        ray.tune.report({FAILED: str(error)})


def _train(plan: Plan, trial: Trial, run: RunFolder, until: int | None) -> None:
    config = apply(from_dict(FinetuneConfig, plan.base), trial.params)
    if trial.seed is not None:
        config = replace(config, train=replace(config.train, seed=trial.seed))
    payload = {
        "config": to_dict(config),
        "recipe": plan.recipe,
        "git_commit": plan.git_commit,
        "storage": plan.sweep,
        "name": run.name,
        "until": until,
    }
    if plan.launch.num_workers > 1:
        launch_job(train_worker, payload, plan.launch, run, callbacks=[TuneReportCallback()])
        return
    here = {"board": Board(), "cpus": plan.resources.cpus, "gpus": plan.resources.gpus}
    train_run(payload | here, assemble_finetune, _report)


def _report(run: RunFolder, history: list[Row], saved_epoch: int | None) -> None:
    """Tell Tune about the last epoch, if it was validated; its checkpoint stays where it is."""
    if "miou" in history[-1]:
        ray.tune.report(dict(history[-1]))
