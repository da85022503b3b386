"""A sweep's folder: what is written is read again, and the best is who deserves it."""

import json
from dataclasses import replace

import pytest

from scribbleseg.cli import exit_status, run_line
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import (
    Trial,
    choose,
    is_sweep,
    rank,
    read_info,
    read_table,
    read_trial,
    read_trials,
    seconds_left,
    smoothed,
    status,
    write_best,
    write_table,
    write_trial,
)


@pytest.fixture
def sweep(tmp_path):
    return RunFolder.at(str(tmp_path), "sweep")


def train(sweep, trial, mious, seconds=10.0):
    """Write what a trial's run would have written."""
    run = sweep.child(trial.name)
    write_trial(sweep, trial)
    run.write_metrics([{"epoch": n, "miou": miou} for n, miou in enumerate(mious, start=1)])
    run.write_json("run.json", {"wall_time": seconds})
    best = max(range(len(mious)), key=mious.__getitem__)
    run.write_best(best + 1, "miou", mious[best])


def test_a_score_is_the_best_mean_of_three_validations_in_a_row():
    rows = [{"miou": value} for value in (0.1, 0.9, 0.1, 0.5, 0.5, 0.6)]
    assert smoothed([rows[0], {"loss": 1.0}, *rows[1:]]) == pytest.approx((0.5 + 0.5 + 0.6) / 3)
    assert smoothed(rows[:2]) == pytest.approx(0.5)
    assert smoothed([{"loss": 1.0}]) is None


def test_one_lucky_validation_does_not_win(sweep):
    train(sweep, Trial(number=0, state="finished"), [0.5, 0.95, 0.5, 0.5])
    train(sweep, Trial(number=1, state="stopped"), [0.7, 0.7, 0.7, 0.7])
    train(sweep, Trial(number=2, state="finished"), [0.7, 0.7, 0.7, 0.7])
    write_trial(sweep, Trial(number=3, state="failed", reason="why not"))
    trials = read_trials(sweep)
    assert [trial.number for trial in rank(trials)] == [1, 2, 0]
    assert choose(trials) == trials[1] and trials[0].miou == 0.95
    assert choose(trials[3:]) is None


def test_a_trial_is_read_as_it_was_written(sweep):
    params = {"model.architecture": "unet", "optim.learning_rate": 0.1, "model.width": 8}
    train(sweep, Trial(number=7, state="stopped", params=params), [0.2, 0.4], seconds=3.5)
    trial = read_trial(sweep, "trial_0007")
    assert trial is not None and trial.params == params and trial.state == "stopped"
    assert (trial.epochs, trial.miou, trial.best_epoch, trial.seconds) == (2, 0.4, 2, 3.5)
    assert trial.score == pytest.approx(0.3)
    assert read_trial(sweep, "trial_0008") is None


def test_a_confirmation_is_no_trial_of_its_own(sweep):
    again = Trial(number=7, seed=2, params={"a": 1})
    train(sweep, again, [0.5])
    assert read_trial(sweep, "confirm_0007_s2") == replace(
        again, epochs=1, score=0.5, miou=0.5, best_epoch=1, seconds=10.0
    )
    assert read_trials(sweep) == []


def test_a_table_is_read_as_it_was_written(sweep):
    trials = [
        Trial(number=0, params={"a": 8, "b": "8"}, state="failed", reason='a "reason", with all\n'),
        Trial(number=1, params={"a": 0.25}, epochs=3, score=0.5, miou=0.6, best_epoch=2),
        Trial(number=2, params={"b": None}),
    ]
    write_table(sweep, trials)
    assert read_table(sweep) == trials
    header = (sweep.read_file("trials.csv") or b"").decode().splitlines()[0]
    assert header == "number,state,epochs,score,miou,best_epoch,seconds,reason,a,b"


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "number,state\nx,running\n", "number,state\n1,up\n"]
)
def test_a_table_that_is_none_is_named(sweep, text):
    sweep.write_file("trials.csv", text.encode())
    with pytest.raises(InputError, match=r"trials\.csv: not a table of trials"):
        read_table(sweep)


@pytest.mark.parametrize("content", ["[]", "{}", '{"number": 1, "state": "up"}', "{"])
def test_a_damaged_trial_is_named(sweep, content):
    sweep.write_file("trial_0001/trial.json", content.encode())
    with pytest.raises(InputError, match=r"trial_0001/trial\.json"):
        read_trials(sweep)


def test_status_counts_and_looks_at_runs_in_progress(sweep, capsys):
    done = Trial(number=0, state="finished", params={"optim.learning_rate": 0.0012345})
    train(sweep, done, [0.5, 0.6, 0.7])
    failed = Trial(number=2, state="failed", reason="diverged")
    write_table(sweep, [*read_trials(sweep), Trial(number=1), failed])
    train(sweep, Trial(number=1), [0.3, 0.4], seconds=4.0)
    sweep.write_json("sweep.json", {"num_trials": 5, "concurrent": 2, "finished": False})
    write_best(sweep, sweep.child("trial_0000"), {"trial": 0})
    found = status(sweep.path)
    assert found.counts == {"running": 1, "finished": 1, "failed": 1, "waiting": 2}
    assert found.trials[1].epochs == 2 and not found.finished
    # Two wait for 10 s each and one has 6 s to go, one at a time.
    assert found.seconds_left == pytest.approx(2 * 10 + 6)
    assert seconds_left(found.trials, 5, places_left=1) == pytest.approx((2 * 10 + 6) / 2)
    assert found.best is not None and found.best["run"] == "trial_0000"
    run_line(["status", sweep.path])
    said = capsys.readouterr().out
    assert "not finished, 5 trials: 1 running, 1 finished, 1 failed, 2 waiting" in said
    assert "trial_0000  finished  mIoU 0.600  epoch   3  optim.learning_rate=0.00123" in said
    assert "trial_0002  failed: diverged" in said and "best: trial_0000, mIoU 0.7000" in said


def test_a_trial_is_expected_to_take_as_long_as_those_that_took_longer():
    spent = [Trial(number=n, state="stopped", seconds=10.0) for n in range(3)]
    spent.append(Trial(number=3, state="finished", seconds=90.0))

    def left(seconds):
        return seconds_left([*spent, Trial(number=4, seconds=seconds)], 5)

    assert [left(seconds) for seconds in (0.0, 10.0, 60.0, 99.0)] == [30.0, 80.0, 30.0, 0.0]


def test_nothing_has_ended_so_nothing_is_known_of_the_end():
    assert seconds_left([Trial(number=0, seconds=5.0)], 3) is None


def test_what_is_no_sweep_is_named(sweep, capsys):
    assert not is_sweep(sweep.path)
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        status(sweep.path)


def test_pulling_from_an_empty_or_half_written_sweep_is_one_line(sweep, tmp_path, capsys):
    sweep.write_json("sweep.json", {"num_trials": 5})
    for _ in range(2):
        line = ["pull", sweep.path, "--out", str(tmp_path / "out")]
        assert exit_status(lambda line=line: run_line(line)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sweep.path in error
        # A best.json whose checkpoint was never finished.
        sweep.write_json("best.json", {"run": "trial_0000", "checkpoint": "checkpoint_0001"})
        (tmp_path / "sweep" / "trial_0000" / "checkpoint_0001").mkdir(parents=True, exist_ok=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["../other", "a/b", ".hidden"])
def test_a_best_outside_the_sweep_is_refused(sweep, tmp_path, run, capsys):
    sweep.write_file(
        "best.json", json.dumps({"run": run, "checkpoint": "checkpoint_0001"}).encode()
    )
    line = ["pull", sweep.path, "--out", str(tmp_path / "out")]
    assert exit_status(lambda: run_line(line)) == 2
    assert "does not name a run folder" in capsys.readouterr().err


HEADER = "number,state,epochs,score,miou,best_epoch,seconds,reason"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        HEADER[:25].encode(),
        b"\xff\xfe\x00",
        b"a,b\n1,2\n",
        f"{HEADER}\n0,finished,1,nan,,,1,\n".encode(),
        f"{HEADER}\n0,finished,1,,,,inf,\n".encode(),
        f"{HEADER}\n../../x,finished,1,,,,1,\n".encode(),
        f"{HEADER}\n0,gone,1,,,,1,\n".encode(),
        f"{HEADER}\n0,finished,1,,,,1,,surplus\n".encode(),
        f"{HEADER},a\n0,finished,1,,,,1,,{'[' * 100_000}\n".encode(),
        f"{HEADER}\n0,finished,1,,,,1,{'x' * 200_000}\n".encode(),
        f"{HEADER}\n{'9' * 5000},finished,1,,,,1,\n".encode(),
    ],
    ids=range(12),
)
def test_a_hostile_table_gives_one_line(sweep, content):
    sweep.write_file("trials.csv", content)
    with pytest.raises(InputError, match="trials.csv: not a table of trials") as caught:
        read_table(sweep)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("field", ["confirmed", "pretrained", "confirm", "finished", "space"])
def test_a_hostile_record_gives_one_line(sweep, field):
    sweep.write_json("sweep.json", {field: 5})
    with pytest.raises(InputError, match=f"{field} is 5, not what a sweep writes"):
        read_info(sweep)


@pytest.mark.parametrize("change", [{"more": 1}, {"reason": 5}, {"reason": None}])
def test_a_hostile_trial_gives_one_line_or_is_read(sweep, change):
    sweep.child("trial_0000").write_json(
        "trial.json",
        {"number": 0, "params": {}, "seed": None, "state": "failed", "reason": "no"} | change,
    )
    if "reason" not in change:
        trial = read_trial(sweep, "trial_0000")
        assert trial is not None and trial.reason == "no"
        return
    with pytest.raises(InputError, match="trial.json: not what a sweep writes"):
        read_trial(sweep, "trial_0000")


@pytest.mark.parametrize("number", [None, "7", [1], 1.5, {"a" * 9999: 1}])
def test_a_hostile_number_of_trials_gives_one_line(sweep, number):
    sweep.write_json("sweep.json", {"num_trials": number})
    with pytest.raises(InputError, match="num_trials is .*, not what a sweep writes") as caught:
        status(f"{sweep.path}")
    assert len(str(caught.value)) < 1000


def test_a_best_that_names_no_run_gives_one_line(sweep):
    sweep.write_json("sweep.json", {"num_trials": 1})
    sweep.write_best(1, "miou", 0.5)
    with pytest.raises(InputError, match=r"best\.json: does not name the run") as refused:
        status(sweep.path)
    assert "\n" not in str(refused.value)
