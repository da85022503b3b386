"""Sweeps: what is refused, and whole ones on a real local Ray, killed here and there."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray.tune

from scribbleseg.cli import exit_status, run_line
from scribbleseg.errors import InputError
from scribbleseg.manifest import verify
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, read_trials
from tests.train.test_finetune import driving, wait_for
from train.launch import LaunchConfig, Resources
from tune import carrier
from tune.request import SweepJob, plan_hardware, prepare
from tune.spaces import SPACES
from tune.sweep import main
from tune.trial import FAILED

ROOT = Path(__file__).resolve().parents[2]


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
        (["core", "--data.root", "x", "--recipe", "released:best"], "is a trained network"),
    ],
)
def test_bad_command_lines_are_one_line_and_status_2(arguments, words, capsys):
    assert exit_status(lambda: main(arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("theirs", ["run.json", "ablation.json", "best.json", "tune/work.py"])
def test_a_folder_of_something_else_is_left_alone(tiny_data, tmp_path, theirs):
    RunFolder.at(str(tmp_path), "s").write_file(theirs, b"{}")
    with pytest.raises(InputError, match=f"s: holds {theirs.partition('/')[0]} of something else"):
        main(command(tiny_data, tmp_path)[3:])
    assert [path.name for path in (tmp_path / "s").iterdir()] == [theirs.partition("/")[0]]


def test_a_sweep_of_failed_trials_has_not_finished(tiny_data, tmp_path, monkeypatch, capsys):
    for name in ("start_ray", "estimate"):
        monkeypatch.setattr(f"tune.sweep.{name}", lambda *_: None)
    monkeypatch.setattr("tune.sweep.living_nodes", lambda: [(2, 0)])

    def search(plan, study, ledger, concurrent):
        while not study.done:
            name = f"t{len(ledger.trials)}"
            leg = study.suggest(name)
            study.on_trial_complete(name, {FAILED: "no such disk"})
            trial: Any = SimpleNamespace(config=leg, last_result={FAILED: "no such disk"})
            ledger.on_trial_complete(0, [], trial)

    monkeypatch.setattr(carrier, "search", search)
    for _ in range(2):
        assert exit_status(lambda: main(command(tiny_data, tmp_path, "--num-trials=2")[3:])) == 1
        assert "choose another --name" in capsys.readouterr().err
    assert (RunFolder.at(str(tmp_path), "s").read_json("sweep.json") or {})["finished"] is False


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
    # Trials of one worker ask for it, and a cluster that grows knows what it lacks; those of
    # several only wait for theirs.
    nodes = [(0, 0), (8, 1), (8, 1)]
    for workers, once in ((1, 100), (2, 1), (3, 1)):
        job = SweepJob(launch=LaunchConfig(num_workers=workers, cpus_per_worker=4), num_trials=100)
        assert plan_hardware(job, nodes, can_grow=True)[1] == once
    few = SweepJob(num_trials=3, max_concurrent=9)
    assert plan_hardware(few, [(16, 0)], can_grow=False)[1] == 3


def test_a_trial_that_can_never_be_placed_is_an_error_with_numbers():
    job = SweepJob(launch=LaunchConfig(num_workers=3, cpus_per_worker=2))
    with pytest.raises(InputError, match=r"3 worker\(s\) with 2 CPU and 0 GPU each; .* 4 CPUs"):
        plan_hardware(job, [(4, 0)], can_grow=False)
    assert plan_hardware(job, [(4, 0)], can_grow=True) == (Resources(cpus=2, gpus=0), 1)


def test_a_trial_whose_repeat_can_never_succeed_is_left_out(tmp_path, monkeypatch, capsys):
    sweep = RunFolder.at(str(tmp_path), "s")
    asked = []

    def fit(plan, config, space, follower):
        for name in space["run"]["grid_search"]:
            asked.append(name)
            result = {"miou": 0.7}
            if name == "confirm_0001_s2":
                result = {FAILED: "the loss is no longer a number"}
            else:
                run = sweep.child(name)
                run.write_metrics([{"epoch": 1, "miou": 0.7}])
                run.write_json("run.json", {"format": 1, "finished": True})
            trial = SimpleNamespace(config={"run": name}, last_result=result)
            follower.on_trial_complete(0, [], trial)

    monkeypatch.setattr(carrier, "_fit", fit)
    monkeypatch.setattr(carrier, "write_best", lambda *_: None)
    chosen = [Trial(number=number, params={}) for number in (0, 1)]
    plan: Any = SimpleNamespace(base={"train": {"seed": 0}}, launch=LaunchConfig())
    for _ in range(2):
        found = carrier.confirm(plan, sweep, chosen, 2, 1)
        assert [(each["trial"], each["mean"]) for each in found] == [(0, 0.7)]
        assert "trial 1 is not confirmed: confirm_0001_s2: the loss" in capsys.readouterr().err
    # The second start asks for nothing again.
    assert asked == [f"confirm_000{trial}_s{seed}" for trial in (0, 1) for seed in (1, 2)]


def test_only_what_tune_wrote_is_removed_from_a_storage_with_options(
    tiny_data, tmp_path, monkeypatch
):
    storage = f"file://{tmp_path}?x=1"
    made = prepare(["smoke", f"--data.root={tiny_data}", f"--storage={storage}", "--name=s"])
    assert made.folder.path == RunFolder.open(made.place).path == str(tmp_path / "s")
    for kept in ("other/run.json", "s/sweep.json", "s/tune/old"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).write_text("{}")
    seen = []

    class Tuner:
        def __init__(self, *_, **__):
            pass

        def fit(self):
            seen.extend(path for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.setattr(ray.tune, "Tuner", Tuner)
    needs = Resources(cpus=1, gpus=0)
    plan: Any = SimpleNamespace(sweep=made.place, resources=needs, launch=LaunchConfig())
    carrier._fit(plan, ray.tune.TuneConfig(), {}, ray.tune.Callback())
    kept = {tmp_path / "other" / "run.json", tmp_path / "s" / "sweep.json"}
    assert set(seen) == kept == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "s" / "tune").exists()


def test_a_sweep_from_command_line_to_the_best_checkpoint(tiny_data, tmp_path, capsys):
    done = sweep(tiny_data, tmp_path, "--num-trials=3", "--confirm=1x2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "[3/3] trial_000" in done.stderr
    folder = RunFolder.at(str(tmp_path), "s")
    trials = read_trials(folder)
    # All come to the rung, one epoch, and the best of the three to its end.
    assert sorted(trial.state for trial in trials) == ["finished", "stopped", "stopped"]
    assert [int(row["number"]) for row in table(tmp_path)] == [0, 1, 2]
    first = {trial.number: folder.child(trial.name).read_metrics()[0]["miou"] for trial in trials}
    [ended] = [trial.number for trial in trials if trial.state == "finished"]
    assert ended == max(first, key=first.__getitem__)
    assert f"trial_000{ended} finished after 2 epochs" in done.stderr
    for trial in trials:
        run = folder.child(trial.name)
        epochs = [1, 2] if trial.state == "finished" else [1]
        assert [row["epoch"] for row in run.read_metrics()] == epochs
        assert run.last() == epochs[-1] and run.finished() == (trial.state == "finished")
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
        told = [folder.child(name).read_json("trial.json") or {} for name in each["runs"]]
        assert [again["state"] for again in told] == ["finished", "finished"]
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

    order = command(tiny_data, tmp_path, "--num-trials=3", "--confirm=1x2")[3:]
    assert exit_status(lambda: main(order)) == 0
    assert "is finished" in capsys.readouterr().out
    # What was confirmed stays so, though nobody says it again.
    before = folder.read_json("sweep.json"), folder.best()
    assert exit_status(lambda: main(order[:-1])) == 0
    assert "is finished" in capsys.readouterr().out
    assert (folder.read_json("sweep.json"), folder.best()) == before
    assert exit_status(lambda: main([*order, "--seed=1"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a sweep of another seed" in error
    # One of an older version lacks the settings that came later.
    record = folder.read_json("sweep.json") or {}
    del record["settings"]["predict"]["part_threshold"]
    folder.write_json("sweep.json", record)
    assert exit_status(lambda: main(order)) == 0
    assert "is finished" in capsys.readouterr().out
    folder.write_json("sweep.json", record | {"settings": {}})
    assert exit_status(lambda: main(order)) == 2
    assert "a sweep of another settings" in capsys.readouterr().err


def family(process):
    """The processes that a process has started, and theirs."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [each for each in found if each.is_running()]


def trial_processes(process):
    """Those of them that train trials of one worker: Tune's actors."""
    return [each for each in family(process) if "ImplicitFunc" in " ".join(each.cmdline())]


LONGER = ("--train.epochs=12", "--stopping=none", "--max-concurrent=2")


@pytest.mark.slow
def test_a_killed_driver_repeats_no_finished_trial_and_the_table_is_whole(tiny_data, tmp_path):
    folder = RunFolder.at(str(tmp_path), "s")

    def num_finished():
        return sum(trial.state == "finished" for trial in read_trials(folder))

    words = command(tiny_data, tmp_path, "--num-trials=10", *LONGER)
    with driving(words, tmp_path / "log") as driver:
        wait_for(lambda: num_finished() >= 5, driver)
        processes = family(driver)
    # The block's end killed the driver.
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
def test_a_killed_driver_costs_no_trial_its_place_on_the_rungs(tiny_data, tmp_path):
    settings = ("--num-trials=9", "--train.epochs=12", "--max-concurrent=2")
    folder = RunFolder.at(str(tmp_path), "s")

    def has_come_far():
        return any(trial.epochs > 3 for trial in read_trials(folder))

    with driving(command(tiny_data, tmp_path, *settings), tmp_path / "log") as driver:
        wait_for(has_come_far, driver)
        processes = family(driver)
    # The block's end killed the driver.
    psutil.wait_procs(processes, timeout=60)
    before = read_trials(folder)

    done = sweep(tiny_data, tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    after = read_trials(folder)
    assert [trial.params for trial in after[: len(before)]] == [trial.params for trial in before]
    assert len(after) == 9 and {trial.state for trial in after} <= {"finished", "stopped"}
    for trial in after:
        assert trial.epochs in ((12,) if trial.state == "finished" else (1, 3, 9))
        rows = folder.child(trial.name).read_metrics()
        assert [row["epoch"] for row in rows] == list(range(1, trial.epochs + 1))
    # The best third of a rung has gone on, whenever the last of them came.
    for rung in (1, 3, 9):
        reached = [trial for trial in after if trial.epochs >= rung]
        gone_on = [trial for trial in after if trial.epochs > rung]
        assert len(gone_on) >= len(reached) // 3
    assert any(trial.state == "finished" for trial in after)
    assert [(int(row["epochs"]), row["state"]) for row in table(tmp_path)] == [
        (trial.epochs, trial.state) for trial in after
    ]


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1])
def test_a_killed_worker_costs_no_other_trial(tiny_data, tmp_path, retries):
    settings = ("--num-trials=6", f"--launch.max-failures={retries}", *LONGER)
    folder, log = RunFolder.at(str(tmp_path), "s"), tmp_path / "log"
    with driving(command(tiny_data, tmp_path, *settings), log) as driver:
        wait_for(lambda: sum(trial.epochs >= 2 for trial in read_trials(folder)) >= 2, driver)
        trial_processes(driver)[0].kill()
        assert driver.wait(timeout=400) == 0, log.read_text()
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
    trials = read_trials(folder)
    # None of two is among the best third of them, but one has to finish.
    assert sorted((trial.state, trial.epochs) for trial in trials) == [
        ("finished", 3), ("stopped", 2)
    ]  # fmt: skip
    for trial in trials:
        assert (folder.child(trial.name).read_json("run.json") or {})["world_size"] == 2
