"""Sweeps: what is refused, and whole ones on a real local Ray, killed here and there."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.tune.schedulers import TrialScheduler

from scribbleseg.checkpoint import verify
from scribbleseg.cli import exit_status, run_line
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, read_trials, smoothed
from tests.train.test_finetune import wait_for
from train.launch import LaunchConfig, Resources
from train.recipes import RECIPES
from tune.carrier import stop_early, stop_none
from tune.request import SweepJob, plan_hardware
from tune.spaces import SPACES
from tune.study import Study, make_search
from tune.sweep import main

ROOT = Path(__file__).resolve().parents[2]
BASE = RECIPES["cpu"]()


def command(data, storage, *arguments):
    return [
        sys.executable, "-m", "tune.sweep", "smoke", f"--data.root={data}",
        f"--storage={storage}", "--name=s", "--train.batch-size=4", "--model.norm=group",
        *arguments,
    ]  # fmt: skip


def sweep(*arguments, timeout=580):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def table(storage):
    with (Path(storage) / "s" / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SPACE is missing"),
        (["cor"], "'cor' is unknown; expected core, full, smoke"),
        (["core"], "data.root is not set"),
        (["core", "--data.root", "/nowhere"], "/nowhere"),
        (["core", "--data.root", "x", "--num-trials", "-1"], "num_trials is -1"),
        (["core", "--data.root", "x", "--num-trials", "0"], "num_trials is 0"),
        (["core", "--data.root", "x", "--max-concurrent", "0"], "max_concurrent is 0"),
        (["core", "--data.root", "x", "--confirm", "3"], "confirm is '3'"),
        (["core", "--data.root", "x", "--recipe", "fast"], "recipe 'fast' is unknown"),
        (["core", "--data.root", "x", "--data.fold", "None"], "expected samples to validate on"),
        (["core", "--data.root", "x", "--init-from", "y"], "expected --pretrained RUN"),
        (["core", "--data.root", "x", "--pretrained", "/no/run"], "/no/run: is no pretraining run"),
        (["core", "--data.root", "x", "--train.epochs", "0"], "train.epochs is 0"),
    ],
)
def test_bad_command_lines_are_one_line_and_status_2(arguments, words, capsys):
    assert exit_status(lambda: main(arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_help_explains(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert "python -m tune.sweep SPACE --data.root DIR" in said and "core" in said


def test_a_storage_that_cannot_be_written_is_one_line_and_status_2(tiny_data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = ["smoke", f"--data.root={tiny_data}", f"--storage={tmp_path / 'file'}"]
    assert exit_status(lambda: main([*arguments, "--train.batch-size=4"])) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1


def test_as_many_trials_run_at_once_as_there_is_room_for():
    def plan(nodes, **launch):
        job = SweepJob(launch=LaunchConfig(**launch), num_trials=100)
        return plan_hardware(job, nodes, can_grow=False)

    assert plan([(2, 0)]) == (Resources(cpus=1, gpus=0), 2)
    assert plan([(2, 0)], cpus_per_worker=2) == (Resources(cpus=2, gpus=0), 1)
    assert plan([(16, 4), (16, 4), (8, 0)]) == (Resources(cpus=4, gpus=1), 8)
    assert plan([(16, 4), (16, 4)], num_workers=3) == (Resources(cpus=4, gpus=1), 2)
    few = SweepJob(num_trials=3, max_concurrent=9)
    assert plan_hardware(few, [(16, 0)], can_grow=False)[1] == 3


def test_a_trial_that_can_never_be_placed_is_an_error_with_numbers():
    job = SweepJob(launch=LaunchConfig(num_workers=3, cpus_per_worker=2))
    with pytest.raises(InputError, match=r"3 worker\(s\) with 2 CPU and 0 GPU each; .* 4 CPUs"):
        plan_hardware(job, [(4, 0)], can_grow=False)
    assert plan_hardware(job, [(4, 0)], can_grow=True) == (Resources(cpus=2, gpus=0), 24)


def stopped_at(scheduler, curves):
    """Feed curves to a scheduler one by one; return the epochs at which it stopped them."""
    ends = []
    for number, curve in enumerate(curves):
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        for epoch, miou in enumerate(curve, start=1):
            row = {"epoch": epoch, "best_miou": miou}
            if scheduler.on_trial_result(None, trial, row) == TrialScheduler.STOP:
                break
        ends.append(epoch)
    return ends


def test_trials_that_lag_behind_are_stopped_and_none_at_its_last_epoch():
    good, bad = [0.5] * 9, [0.1] * 9
    assert stopped_at(stop_early(9, None), [good, bad, good, bad]) == [9, 1, 9, 1]
    assert stopped_at(stop_early(9, 3), [good, bad]) == [9, 3]
    # Behind from the sixth epoch on: after the last rung, which is 3, a trial comes to its end.
    assert stopped_at(stop_early(9, None), [good, [0.5] * 5 + [0.1] * 4]) == [9, 9]
    assert stopped_at(stop_early(1, None), [[0.5], [0.1]]) == [1, 1]
    assert stopped_at(stop_none(), [good, bad]) == [9, 9]


def make_study(sweep, known=(), kind="tpe"):
    search = make_search(SPACES["core"], BASE, [], known, kind=kind, seed=0)
    return Study(search, sweep, known)


def test_the_first_trial_has_the_recipes_own_settings(tmp_path):
    folder = RunFolder.at(str(tmp_path), "s")
    assert make_study(folder).suggest("a") == {"run": "trial_0000"}
    [trial] = read_trials(folder)
    assert trial.params == {
        "model.architecture": "unet", "optim.learning_rate": 2e-3, "augment.strength": 0.5
    }  # fmt: skip


def test_a_study_that_goes_on_hands_out_what_it_knows_and_then_something_else(tmp_path):
    folder = RunFolder.at(str(tmp_path), "s")
    study = make_study(folder)
    for name in "abc":
        study.suggest(name)
    known = read_trials(folder)
    again = make_study(folder, known)
    names = [again.suggest(name) for name in "abcd"]
    assert names == [{"run": f"trial_000{number}"} for number in range(4)]
    trials = read_trials(folder)
    assert trials[:3] == known and trials[3].params not in [trial.params for trial in known]


def test_optuna_hears_the_smoothed_score_whatever_is_reported_twice(tmp_path):
    study = make_study(RunFolder.at(str(tmp_path), "s"))
    mious = [0.2, 0.6, 0.5, 0.7, 0.3]
    study.suggest("a")
    for epoch in (1, 2, 1, 2, 3, 4):
        study.on_trial_result("a", {"epoch": epoch, "miou": mious[epoch - 1]})
    study.on_trial_complete("a", {"epoch": 5, "miou": mious[4]})
    study.suggest("b")
    study.on_trial_result("b", {"epoch": 1, "miou": 0.9})
    study.on_trial_complete("b", {"failed": "diverged"})
    one, other = study.search._ot_study.trials
    assert one.value == smoothed([{"miou": miou} for miou in mious]) == pytest.approx(0.6)
    assert other.state.name == "FAIL" and other.value is None


def test_the_sampler_learns_what_a_study_knew_before(tmp_path):
    """Where the learning rate alone decides, TPE draws near the good ones; random does not."""
    distances = {}
    for kind in ("tpe", "random"):
        folder = RunFolder.at(str(tmp_path), kind)
        known = [
            Trial(number=n, params={"model.architecture": "unet", "augment.strength": 0.5,
                                    "optim.learning_rate": 3e-4 * (10 / 0.3) ** (n / 19)})
            for n in range(20)
        ]  # fmt: skip
        study = make_study(folder, known, kind)
        drawn = []
        for number in range(36):
            name = f"tune{number}"
            study.suggest(name)
            trial = known[number] if number < len(known) else read_trials(folder)[-1]
            distance = abs(trial.params["optim.learning_rate"] - 1e-3)
            if number >= len(known):
                drawn.append(distance)
            study.on_trial_complete(name, {"epoch": 1, "miou": 1 - 100 * distance})
        distances[kind] = sorted(drawn)[8]
    assert distances["tpe"] < distances["random"] / 2


def test_a_sweep_from_command_line_to_the_best_checkpoint(tiny_data, tmp_path, capsys):
    done = sweep(tiny_data, tmp_path, "--num-trials=3", "--stopping=none", "--confirm=1x2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "[3/3] trial_000" in done.stderr
    folder = RunFolder.at(str(tmp_path), "s")
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert [int(row["number"]) for row in table(tmp_path)] == [0, 1, 2]
    for trial in trials:
        run = folder.child(trial.name)
        assert [row["epoch"] for row in run.read_metrics()] == [1, 2]
        assert float(table(tmp_path)[trial.number]["score"]) == trial.score
        config = (run.read_json("run.json") or {})["config"]
        assert config["optim"]["learning_rate"] == trial.params["optim.learning_rate"]
    record = folder.read_json("sweep.json") or {}
    assert record["finished"] is True and record["space"].keys() == SPACES["smoke"].keys()
    # The best of the search, and the recipe's own settings.
    highest = max(trials, key=lambda trial: trial.score)
    assert {each["trial"] for each in record["confirmed"]} == {0, highest.number}
    for each in record["confirmed"]:
        assert each["runs"] == [f"confirm_{each['trial']:04d}_s{seed}" for seed in (1, 2)]
        assert ("gain" in each) == (each["trial"] != 0)
    winner, best = record["confirmed"][0], folder.best() or {}
    assert best["trial"] == winner["trial"] and best["run"] in winner["runs"]

    run_line(["pull", folder.path, "--out", str(tmp_path / "best")])
    said = capsys.readouterr().out
    assert "95 % interval over images" in said and "scribbleseg evaluate" in said
    assert verify(tmp_path / "best") == []
    run_line(["evaluate", "--checkpoint", str(tmp_path / "best"), "--data", str(tiny_data),
              "--split", "train", "--fold", "0"])  # fmt: skip
    # In float32 here, in bfloat16 in training, where the hardware has it.
    shown = float(capsys.readouterr().out.split("mIoU")[1].split()[0])
    assert shown == pytest.approx(best["value"], abs=0.02)

    again = sweep(tiny_data, tmp_path, "--num-trials=3", "--stopping=none", "--confirm=1x2")
    assert again.returncode == 0 and "is finished" in again.stdout
    other = sweep(tiny_data, tmp_path, "--num-trials=3", "--stopping=none", "--seed=1")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "a sweep of another seed" in other.stderr


def family(process):
    """The processes that a process has started, and theirs."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [each for each in found if each.is_running()]


def trial_processes(process):
    """Those of them that train trials of one worker: Tune's actors."""
    return [each for each in family(process) if "ImplicitFunc" in " ".join(each.cmdline())]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


LONGER = ("--train.epochs=12", "--stopping=none", "--max-concurrent=2")


@pytest.mark.slow
def test_a_killed_driver_repeats_no_finished_trial_and_the_table_is_whole(tiny_data, tmp_path):
    driver = start(tiny_data, tmp_path, "--num-trials=10", *LONGER)
    folder = RunFolder.at(str(tmp_path), "s")

    def num_finished():
        return sum(trial.state == "finished" for trial in read_trials(folder))

    wait_for(lambda: num_finished() >= 5, driver)
    processes = family(driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stderr.close()
    psutil.wait_procs(processes, timeout=60)
    before = {trial.name: trial for trial in read_trials(folder)}
    ended = [name for name, trial in before.items() if trial.ended]
    assert 5 <= len(ended) < 10
    times = {name: (tmp_path / "s" / name / "run.json").stat().st_mtime_ns for name in ended}

    done = sweep(tiny_data, tmp_path, "--num-trials=10", *LONGER)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of them begun before" in done.stdout
    assert times == {n: (tmp_path / "s" / n / "run.json").stat().st_mtime_ns for n in ended}
    after = read_trials(folder)
    assert [trial.number for trial in after] == list(range(10))
    assert all(trial.state == "finished" and trial.epochs == 12 for trial in after)
    assert all(trial.params == before[trial.name].params for trial in after[: len(before)])
    assert len({json.dumps(trial.params, sort_keys=True) for trial in after}) == 10
    assert [int(row["number"]) for row in table(tmp_path)] == list(range(10))
    for trial in after:
        rows = folder.child(trial.name).read_metrics()
        assert [row["epoch"] for row in rows] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1])
def test_a_killed_worker_costs_no_other_trial(tiny_data, tmp_path, retries):
    settings = ("--num-trials=6", f"--launch.max-failures={retries}", *LONGER)
    driver = start(tiny_data, tmp_path, *settings)
    folder = RunFolder.at(str(tmp_path), "s")
    wait_for(lambda: sum(trial.epochs >= 2 for trial in read_trials(folder)) >= 2, driver)
    trial_processes(driver)[0].kill()
    _, errors = driver.communicate(timeout=400)
    assert driver.returncode == 0, errors
    trials = read_trials(folder)
    assert len(trials) == 6
    failed = [trial for trial in trials if trial.state == "failed"]
    assert len(failed) == 1 - retries
    assert all("died" in trial.reason for trial in failed), failed
    assert all(t.state == "finished" and t.epochs == 12 for t in trials if t not in failed)


@pytest.mark.slow
def test_a_trial_that_fails_again_and_again_is_marked_with_its_reason(tiny_data, tmp_path):
    space = tmp_path / "space.yaml"
    # Each setting is allowed, but a crop of 36 pixels does not go with a stride of 8.
    space.write_text("model.depth: {choice: [3, 4]}\ndata.crop_size: {choice: [36, 64]}\n")
    arguments = command(tiny_data, tmp_path, "--num-trials=4", "--recipe=demo",
                        "--model.width=8", "--model.depth=3", "--data.long-side=64",
                        "--train.epochs=1", "--data.crop-size=64", "--search=random")  # fmt: skip
    arguments[3] = str(space)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    trials = read_trials(RunFolder.at(str(tmp_path), "s"))
    bad = {"model.depth": 4, "data.crop_size": 36}
    assert any(trial.params == bad for trial in trials), "the seed draws it"
    for trial in trials:
        assert trial.state == ("failed" if trial.params == bad else "finished")
    row = next(row for row in table(tmp_path) if row["state"] == "failed")
    assert "data.crop_size is 36; expected a multiple of 8" in row["reason"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_trials_of_two_workers_go_through_ray_train(tiny_data, tmp_path):
    done = sweep(tiny_data, tmp_path, "--num-trials=2", "--launch.num-workers=2",
                 "--train.validate-every=2", "--train.epochs=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = RunFolder.at(str(tmp_path), "s")
    for trial in read_trials(folder):
        record = folder.child(trial.name).read_json("run.json") or {}
        assert trial.state == "finished" and record["world_size"] == 2
