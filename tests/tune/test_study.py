"""Studies and what is written of them, without Ray: legs are handed out, and their ends made up."""

import csv
from types import SimpleNamespace

import pytest
from ray.tune.search import Searcher

from benchmarks.asha_replay import replay
from scribbleseg.manifest import write_manifest
from scribbleseg.runs import RunFolder
from scribbleseg.sweeps import Trial, read_trials, smoothed, write_trial
from train.recipes import RECIPES
from tune.carrier import Ledger
from tune.spaces import SPACES
from tune.study import Study, make_search, settle

BASE = RECIPES["cpu"]()
EPOCHS = 9
RUNGS = (1, 3)
MIOUS = [0.3, 0.5, 0.1, 0.4, 0.6, 0.2, 0.55, 0.7, 0.45, 0.35]


@pytest.fixture
def folder(tmp_path):
    return RunFolder.at(str(tmp_path), "s")


def make_study(folder, *, kind="tpe", rungs=(), num_trials=100):
    """A study as a sweep makes it that begins or goes on."""
    known = settle(folder, read_trials(folder), rungs)
    search = make_search(SPACES["core"], BASE, [], known, kind=kind, seed=0)
    return Study(search, folder, known, rungs, num_trials)


def write_run(folder, name, mious, *, finished=False):
    """What a run leaves behind that has these validations."""
    run = folder.child(name)
    run.write_metrics([{"epoch": n, "miou": miou} for n, miou in enumerate(mious, start=1)])
    run.write_json("run.json", {"wall_time": 10.0 * len(mious), "finished": finished})
    run.write_best(len(mious), "miou", mious[-1])
    with run.scratch() as checkpoint:
        (checkpoint / "file").write_text("x")
        write_manifest(checkpoint)
        run.save_checkpoint(len(mious), checkpoint)


def train(folder, leg, mious=MIOUS):
    """Do what the training of a leg does to its run, which has the same mIoU in all epochs."""
    miou = mious[int(leg["run"].removeprefix("trial_"))]
    until = leg["until"] or EPOCHS
    write_run(folder, leg["run"], [miou] * until, finished=until == EPOCHS)


def drive(folder, study, num_legs=1000, mious=MIOUS):
    """Train one leg after the other; return them, by run and epoch."""
    legs = []
    while not study.done and len(legs) < num_legs:
        name = f"leg{len(legs)}"
        leg = study.suggest(name)
        train(folder, leg, mious)
        study.on_trial_complete(name, {})
        legs.append((leg["run"], leg["until"]))
    return legs


def told(study):
    """What Optuna has been told, by the order of trials."""
    return [trial.value for trial in study.search._ot_study.trials]


def test_the_first_trial_has_the_recipes_own_settings(folder):
    assert make_study(folder).suggest("a") == {"run": "trial_0000", "until": None}
    [trial] = read_trials(folder)
    assert trial.params == {
        "model.architecture": "unet", "optim.learning_rate": 2e-3, "augment.strength": 0.5
    }  # fmt: skip


def test_a_study_that_goes_on_hands_out_what_was_cut_off_and_then_something_else(folder):
    study = make_study(folder)
    for name in "abc":
        study.suggest(name)
    known = read_trials(folder)
    again = make_study(folder)
    names = [again.suggest(name)["run"] for name in "abcd"]
    assert names == [f"trial_000{number}" for number in range(4)]
    trials = read_trials(folder)
    assert trials[:3] == known and trials[3].params not in [trial.params for trial in known]


def test_optuna_hears_the_smoothed_score_and_of_failures(folder):
    study = make_study(folder)
    mious = [0.2, 0.6, 0.5, 0.7, 0.3]
    for name, result, error in (("a", {}, False), ("b", {"failed": "why"}, False), ("c", {}, True)):
        leg = study.suggest(name)
        write_run(folder, leg["run"], mious, finished=True)
        study.on_trial_complete(name, result, error=error)
    one, *others = study.search._ot_study.trials
    assert one.value == smoothed([{"miou": miou} for miou in mious]) == pytest.approx(0.6)
    assert [(each.state.name, each.value) for each in others] == [("FAIL", None)] * 2


def test_the_sampler_learns_what_a_study_knew_before(tmp_path):
    """Where the learning rate alone decides, TPE draws near the good ones; random does not."""

    def score(trial):
        distance = abs(trial.params["optim.learning_rate"] - 1e-3)
        return distance, [1 - 100 * distance]

    distances = {}
    for kind in ("tpe", "random"):
        folder = RunFolder.at(str(tmp_path), kind)
        for n in range(20):
            params = {"model.architecture": "unet", "augment.strength": 0.5,
                      "optim.learning_rate": 3e-4 * (10 / 0.3) ** (n / 19)}  # fmt: skip
            trial = Trial(number=n, params=params)
            write_trial(folder, trial)
            write_run(folder, trial.name, score(trial)[1], finished=True)
        study = make_study(folder, kind=kind)
        drawn = []
        for number in range(16):
            leg = study.suggest(str(number))
            distance, mious = score(read_trials(folder)[-1])
            drawn.append(distance)
            write_run(folder, leg["run"], mious, finished=True)
            study.on_trial_complete(str(number), {})
        distances[kind] = sorted(drawn)[8]
    assert distances["tpe"] < distances["random"] / 2


@pytest.mark.parametrize("num_trials", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("num_legs", [1, 2, 1000], ids=["always", "often", "never"])
def test_a_study_trains_what_the_replay_does_however_often_it_is_started(
    folder, num_trials, num_legs
):
    legs = []
    while True:
        study = make_study(folder, rungs=RUNGS, num_trials=num_trials)
        if study.done:
            break
        legs += drive(folder, study, num_legs)
    # No leg twice.
    assert len(set(legs)) == len(legs) and {until for _, until in legs} <= {*RUNGS, None}
    trials = read_trials(folder)
    expected = replay(
        [[{"epoch": n, "miou": miou} for n in range(1, EPOCHS + 1)] for miou in MIOUS[:num_trials]],
        RUNGS,
    )
    assert sum(trial.epochs for trial in trials) == expected.epochs
    for trial in trials:
        assert (trial.epochs == EPOCHS) == (study.states[trial.name] == "finished")
        assert trial.epochs in (*RUNGS, EPOCHS)


def test_without_rungs_every_trial_is_one_leg(folder):
    study = make_study(folder, num_trials=4)
    assert drive(folder, study) == [(f"trial_000{number}", None) for number in range(4)]
    assert set(study.states.values()) == {"finished"}


def test_a_free_place_waits_for_those_that_run_only_where_nothing_else_is_to_do(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=3)
    legs = [study.suggest(name) for name in "abc"]
    assert [leg["run"] for leg in legs] == ["trial_0000", "trial_0001", "trial_0002"]
    assert study.suggest("d") is None
    for name, leg in zip("abc", legs, strict=True):
        assert study.suggest("d") is None
        train(folder, leg)
        study.on_trial_complete(name, {})
    assert study.suggest("d") == {"run": "trial_0001", "until": 3}
    assert study.suggest("e") is None and not study.done
    train(folder, {"run": "trial_0001", "until": 3})
    study.on_trial_complete("d", {})
    # It is alone at its rung, but no other will come.
    assert study.suggest("e") == {"run": "trial_0001", "until": None}
    train(folder, {"run": "trial_0001", "until": None})
    study.on_trial_complete("e", {})
    assert study.suggest("f") == Searcher.FINISHED and study.done


def test_optuna_is_told_when_a_trial_first_stops(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=4)
    drive(folder, study, 2)
    assert told(study) == [MIOUS[0], MIOUS[1]]
    # The third is the best of three, and goes on at once: its score is told when it stops.
    leg = study.suggest("x")
    write_run(folder, leg["run"], [0.9])
    study.on_trial_complete("x", {})
    assert told(study) == [MIOUS[0], MIOUS[1], None]
    assert study.suggest("x") == {"run": "trial_0002", "until": 3}
    write_run(folder, leg["run"], [0.9, 0.8, 0.7])
    study.on_trial_complete("x", {})
    assert told(study) == [MIOUS[0], MIOUS[1], pytest.approx(0.8)]


def test_what_was_killed_is_settled_by_the_runs(folder):
    for number in range(6):
        write_trial(folder, Trial(number=number, params={"optim.learning_rate": 1e-3}))
    write_trial(folder, Trial(number=6, state="failed", reason="why", params={}))
    write_run(folder, "trial_0000", [0.1] * EPOCHS, finished=True)
    write_run(folder, "trial_0001", [0.1] * 3)
    # Between two rungs.
    write_run(folder, "trial_0002", [0.1] * 2)
    # The third epoch is measured, but its checkpoint was not whole.
    write_run(folder, "trial_0003", [0.1] * 2)
    folder.child("trial_0003").write_metrics([{"epoch": n, "miou": 0.1} for n in (1, 2, 3)])
    # The first epoch was not yet done.
    write_run(folder, "trial_0006", [0.1] * 3)
    states = [trial.state for trial in settle(folder, read_trials(folder), RUNGS)]
    assert states == ["finished", "stopped", "running", "running", "running", "running", "failed"]
    assert [trial.state for trial in read_trials(folder)] == states
    assert read_trials(folder)[6].reason == "why"


def test_a_failed_trial_has_no_place_on_a_rung(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=4)
    for name in "abcd":
        train(folder, study.suggest(name))
    for name in "ab":
        study.on_trial_complete(name, {})
    study.on_trial_complete("c", {}, error=True)
    assert study.suggest("e") is None
    study.on_trial_complete("d", {})
    # The best of the three that have not failed.
    assert study.suggest("e") == {"run": "trial_0001", "until": 3}
    assert study.states["trial_0002"] == "failed"


def test_more_trials_let_old_ones_go_on(folder):
    mious = [0.3, 0.5, 0.4, 0.1, 0.2, 0.15]
    drive(folder, make_study(folder, rungs=RUNGS, num_trials=5), mious=mious)
    assert [trial.epochs for trial in read_trials(folder)] == [1, EPOCHS, 1, 1, 1]
    study = make_study(folder, rungs=RUNGS, num_trials=6)
    assert not study.done
    # Of six, the second best is among the best third.
    assert drive(folder, study, mious=mious) == [("trial_0005", 1), ("trial_0002", 3)]


def tune_trial(leg, **facts):
    """A leg as Tune's callbacks see it."""
    return SimpleNamespace(config=leg, **{"last_result": {}, "error_file": None} | facts)


def test_the_ledger_says_and_writes_who_stops_and_who_goes_on(folder, capsys):
    study = make_study(folder, rungs=RUNGS, num_trials=3)
    ledger = Ledger(study, [])

    def rows():
        lines = (folder.read_file("trials.csv") or b"").decode().splitlines()
        return [(row["state"], int(row["epochs"])) for row in csv.DictReader(lines)]

    def go(name, **facts):
        leg = study.suggest(name)
        ledger.on_trial_start(0, [], tune_trial(leg))
        train(folder, leg)
        study.on_trial_complete(name, facts.get("last_result", {}))
        ledger.on_trial_complete(0, [], tune_trial(leg, **facts))

    for name in "abc":
        go(name)
    assert rows() == [("stopped", 1), ("stopped", 1), ("stopped", 1)]
    leg = study.suggest("d")
    ledger.on_trial_start(0, [], tune_trial(leg))
    assert rows() == [("stopped", 1), ("running", 1), ("stopped", 1)]
    # It is as good as before, although it has not ended.
    assert (folder.best() or {})["run"] == "trial_0001"
    train(folder, leg)
    study.on_trial_complete("d", {})
    ledger.on_trial_complete(0, [], tune_trial(leg))
    go("e")
    assert rows() == [("stopped", 1), ("finished", 9), ("stopped", 1)]
    assert [trial.state for trial in read_trials(folder)] == ["stopped", "finished", "stopped"]
    said = [line.split(", ")[0] for line in capsys.readouterr().err.splitlines() if line[:1] == "["]
    assert said == [
        "[1/3] trial_0000 stopped after 1 epoch",
        "[2/3] trial_0001 stopped after 1 epoch",
        "[3/3] trial_0002 stopped after 1 epoch",
        "[2/3] trial_0001 goes on after 1 epoch",
        "[2/3] trial_0001 goes on after 3 epochs",
        "[3/3] trial_0001 finished after 9 epochs",
    ]


def test_the_ledger_of_a_sweep_that_goes_on_mends_the_table(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=3)
    drive(folder, study)
    assert folder.read_file("trials.csv") is None and folder.best() is None
    folder.write_file("best.json", b"{cut")
    known = settle(folder, read_trials(folder), RUNGS)
    ledger = Ledger(make_study(folder, rungs=RUNGS, num_trials=3), known)
    assert len(ledger.ended()) == 3
    assert b"finished" in (folder.read_file("trials.csv") or b"")
    assert (folder.best() or {})["run"] == "trial_0001"


def test_what_was_confirmed_stays_the_best_while_a_sweep_goes_on(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=3)
    drive(folder, study)
    folder.write_json("best.json", {"run": "confirm_0000_s1", "checkpoint": "checkpoint_0009"})
    known = settle(folder, read_trials(folder), RUNGS)
    Ledger(make_study(folder, rungs=RUNGS, num_trials=3), known)
    assert (folder.read_json("best.json") or {})["run"] == "confirm_0000_s1"


def test_a_trial_whose_process_never_came_to_be_is_noted(folder):
    study = make_study(folder, rungs=RUNGS, num_trials=1)
    ledger = Ledger(study, [])
    leg = study.suggest("a")
    study.on_trial_complete("a", error=True)
    ledger.on_trial_error(0, [], tune_trial(leg))
    assert [trial.state for trial in read_trials(folder)] == ["failed"]
