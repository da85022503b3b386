"""Resources, run names and exit statuses; nothing here starts Ray."""

import gc
import itertools
import os
import pickle
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import ray

from scribbleseg.config import FinetuneConfig, override, to_dict
from scribbleseg.errors import InputError
from scribbleseg.runs import RunFolder
from train import places
from train.command import Order, carry_out
from train.estimate import Pace, time_steps
from train.launch import (
    CLUSTER,
    ClusterConfig,
    LaunchConfig,
    Resources,
    call_remotely,
    plan_resources,
    start_ray,
    uncollected,
    wait_for_room,
)
from train.places import absolute, choose_run, git_commit, marked, require_mark, sole


@pytest.mark.parametrize(
    ("wishes", "nodes", "expected"),
    [
        ({}, [(2, 0)], Resources(cpus=2, gpus=0)),
        ({"num_workers": 2}, [(2, 0)], Resources(cpus=1, gpus=0)),
        ({"num_workers": 3}, [(8, 0)], Resources(cpus=2, gpus=0)),
        ({}, [(8, 1)], Resources(cpus=8, gpus=1)),
        ({"num_workers": 8}, [(0, 0), (48, 4), (48, 4)], Resources(cpus=12, gpus=1)),
        ({"num_workers": 2, "gpus_per_worker": 0}, [(4, 1)], Resources(cpus=2, gpus=0)),
        ({"num_workers": 2, "cpus_per_worker": 3}, [(8, 0)], Resources(cpus=3, gpus=0)),
        ({"num_workers": 3}, [(4, 0), (2, 0)], Resources(cpus=2, gpus=0)),
        ({"num_workers": 4, "min_workers": 1}, [(0, 0), (16, 1)], Resources(cpus=16, gpus=1)),
        ({"num_workers": 2, "min_workers": 1}, [(16, 1), (8, 1)], Resources(cpus=8, gpus=1)),
    ],
)
def test_workers_get_as_much_cpu_as_fits(wishes, nodes, expected):
    assert plan_resources(LaunchConfig(**wishes), nodes, can_grow=False) == expected


def test_workers_that_can_never_be_placed_are_refused_with_numbers():
    launch = LaunchConfig(num_workers=4, gpus_per_worker=1)
    with pytest.raises(InputError, match="num_workers is 4, .* 1 GPU .* 16 CPUs and 2 GPUs .* 2"):
        plan_resources(launch, [(8, 1), (8, 1)], can_grow=False)
    launch = LaunchConfig(num_workers=4, min_workers=3, gpus_per_worker=1)
    with pytest.raises(InputError, match="min_workers is 3, .* 1 GPU .* 2 GPUs .* 2"):
        plan_resources(launch, [(8, 1), (8, 1)], can_grow=False)


def test_what_a_worker_gets_on_nodes_to_come_is_not_guessed():
    def plan(nodes, **wishes):
        return plan_resources(LaunchConfig(num_workers=4, **wishes), nodes, can_grow=True)

    head = (0, 0)
    with pytest.raises(InputError, match="--launch.cpus-per-worker and --launch.gpus-per-worker"):
        plan([head])
    with pytest.raises(InputError, match="gets: --launch.gpus-per-worker$"):
        plan([head], cpus_per_worker=8)
    with pytest.raises(InputError, match="gets: --launch.cpus-per-worker$"):
        plan([head, (8, 1)], gpus_per_worker=1)
    wishes = {"cpus_per_worker": 8, "gpus_per_worker": 1}
    assert plan([head], **wishes) == plan([head, (8, 1)], **wishes) == Resources(cpus=8, gpus=1)
    # There is room for all: nothing has to grow.
    assert plan([head, (32, 4)]) == Resources(cpus=8, gpus=1)


class Autoscaler:
    """Stands for a cluster that grows after the second look, or never."""

    def __init__(self, monkeypatch, sizes):
        self.asked, self.sizes = [], iter(sizes)
        note = self.asked.append
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: note(bundles))
        monkeypatch.setattr("train.launch.living_nodes", lambda: [(next(self.sizes), 0)])
        monkeypatch.setattr("train.launch.time.sleep", lambda _: None)


def test_a_job_takes_back_what_it_asked_of_the_cluster(monkeypatch):
    launch = LaunchConfig(num_workers=2, address="auto", wait_minutes=0.001)
    resources, wish = Resources(cpus=1, gpus=0), [{"CPU": 1}] * 2
    grown = Autoscaler(monkeypatch, [0, 0, 1, 2])
    wait_for_room(launch, resources)
    assert grown.asked == [wish, wish, []]
    never = Autoscaler(monkeypatch, itertools.repeat(0))
    with pytest.raises(InputError, match="found no room within 0.001 minutes"):
        wait_for_room(launch, resources)
    assert never.asked[0] == wish and never.asked[-1] == []
    # What a job that was killed had asked for is taken back by the next one.
    there = Autoscaler(monkeypatch, [2])
    wait_for_room(launch, resources)
    assert there.asked == [[]]


@pytest.mark.parametrize(
    "field",
    [
        "num_workers",
        "min_workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "wait_minutes",
        "max_failures",
    ],
)
def test_impossible_wishes_are_refused_at_birth(field):
    with pytest.raises(InputError, match=f"launch.{field} is -1"):
        LaunchConfig(**{field: -1})


def test_more_workers_than_images_of_a_batch_are_refused_before_any_is_started(tmp_path):
    config = override(FinetuneConfig(), {"train.batch_size": 4, "train.accumulate": 2})
    launch = LaunchConfig(num_workers=3, min_workers=1, storage=str(tmp_path))
    order = Order(recipe="cpu", config=config, launch=launch, name=None, fresh=False)
    with pytest.raises(InputError, match="train.batch_size is 4; expected at least 6"):
        carry_out(order, lambda payload: pytest.fail("it was started"))
    assert not list(tmp_path.iterdir())


def test_the_same_settings_find_the_same_run_and_others_are_refused(tmp_path):
    config, storage = FinetuneConfig(), str(tmp_path)
    with pytest.raises(InputError, match="is a file, expected a folder; .* --storage"):
        choose_run(config, __file__, recipe="cpu", name=None, fresh=False)
    name, run = choose_run(config, storage, recipe="cpu", name=None, fresh=False)
    assert name.startswith("cpu-") and not run.exists()
    run.write_json("run.json", {"config": to_dict(config), "finished": True})
    again, run = choose_run(config, storage, recipe="cpu", name=None, fresh=False)
    assert again == name and run.finished()
    other = override(config, {"train.seed": 1})
    assert choose_run(other, storage, recipe="cpu", name=None, fresh=False)[0] != name
    with pytest.raises(InputError, match=r"other settings \(train.seed is 0, here 1\); .*--fresh"):
        choose_run(other, storage, recipe="cpu", name=name, fresh=False)
    beside, run = choose_run(other, storage, recipe="cpu", name=name, fresh=True)
    assert beside == f"{name}--2" and not run.exists()
    run.write_json("run.json", {"config": to_dict(other)})
    assert choose_run(other, storage, recipe="cpu", name=name, fresh=True)[0] == f"{name}--3"


def test_a_run_goes_on_with_other_loaders_and_never_over_another_programs_files(tmp_path):
    config, storage = FinetuneConfig(), str(tmp_path)
    name, run = choose_run(config, storage, recipe="cpu", name=None, fresh=False)
    run.write_json("run.json", {"config": to_dict(config)})
    changed = override(config, {"data.num_workers": 1, "train.keep": 5})
    assert choose_run(changed, storage, recipe="cpu", name=None, fresh=False) == (name, run)
    assert choose_run(changed, storage, recipe="cpu", name=name, fresh=False) == (name, run)
    for number, theirs in enumerate(("checkpoint_0001/model.pt", "best.json", "sweep.json")):
        other = RunFolder.at(storage, f"theirs{number}")
        other.write_file(theirs, b"work")
        with pytest.raises(InputError, match=f"holds {theirs.partition('/')[0]} of something else"):
            choose_run(config, storage, recipe="cpu", name=other.name, fresh=False)
    RunFolder.at(storage, "notes").write_file("notes.txt", b"work")
    assert choose_run(config, storage, recipe="cpu", name="notes", fresh=False)[0] == "notes"


def test_a_path_and_its_uri_are_one_place(tmp_path):
    with sole(f"{tmp_path}/a"), sole(f"{tmp_path}/b"):
        with pytest.raises(InputError, match="another process"), sole(f"file://{tmp_path}/a"):
            pass


def test_a_fresh_name_keeps_dashes_of_its_own(tmp_path):
    config, storage = FinetuneConfig(), str(tmp_path)
    for wanted in ("cats--night", "cats--night--2", "cats--night--3"):
        name, run = choose_run(config, storage, recipe="cpu", name="cats--night", fresh=True)
        assert name == wanted
        run.write_json("run.json", {"config": to_dict(config)})


def test_a_record_that_lacks_later_settings_is_of_the_same_run(tmp_path):
    config, storage = override(FinetuneConfig(), {"train.seed": 3}), str(tmp_path)
    older = to_dict(config)
    del older["strokes"]["correct_probability"]
    RunFolder.at(storage, "first").write_json("run.json", {"config": older})
    name, run = choose_run(config, storage, recipe="cpu", name="first", fresh=False)
    assert name == "first" and run.exists()
    for faulty, message in (
        (older | {"strokes": {"shape": 1}}, "other settings"),
        ({"dino": {}}, "other settings"),
        (None, "config is None, not what a run writes"),
        ("cpu", "config is 'cpu', not what a run writes"),
    ):
        RunFolder.at(storage, "first").write_json("run.json", {"config": faulty})
        with pytest.raises(InputError, match=message):
            choose_run(config, storage, recipe="cpu", name="first", fresh=False)


def test_locations_are_made_absolute_and_uris_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == str(tmp_path / "runs")
    for uri in ("s3://bucket/runs", "s3://bucket/runs/", "s3://bucket/runs//"):
        assert absolute(uri) == "s3://bucket/runs"
    assert absolute("released:best") == "released:best"


@pytest.mark.parametrize(("probability", "seconds"), [(0.0, 1.0), (0.25, 1.5), (1.0, 3.0)])
def test_an_estimate_counts_corrected_steps_by_their_probability(monkeypatch, probability, seconds):
    def timed(config, _device):
        asked.append(config.strokes.correct_probability)
        return Pace(epochs=2, steps_per_epoch=5, seconds_per_step=1.0 + 2.0 * asked[-1])

    asked = []
    monkeypatch.setattr("train.estimate._time", timed)
    config = override(FinetuneConfig(), {"strokes.correct_probability": probability})
    pace = time_steps(config, Resources(cpus=1, gpus=0))
    assert set(asked) == ({probability} if probability in (0, 1) else {0.0, 1.0})
    assert (pace.seconds_per_step, pace.seconds) == (seconds, 10 * seconds)


def test_what_is_imported_is_never_collected_and_everything_later_is():
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def test_wishes_that_travel_name_the_cluster(monkeypatch):
    """A trial's process on a node does not have the address that its command was given."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    launch = LaunchConfig(num_workers=2)
    carried = pickle.dumps(launch.named())
    assert not launch.is_local
    monkeypatch.delenv("RAY_ADDRESS")
    assert launch.is_local and launch.named() == launch
    assert not pickle.loads(carried).is_local


@pytest.mark.parametrize(
    ("variable", "address", "is_local", "is_here"),
    [
        (None, None, True, True),
        ("", None, True, True),
        ("local", None, False, True),
        (None, "local", False, True),
        ("auto", None, False, False),
        ("", "10.0.0.1:6379", False, False),
    ],
)
def test_ray_of_this_machine_alone_keeps_to_loopback(
    monkeypatch, variable, address, is_local, is_here
):
    """An empty RAY_ADDRESS names no cluster, and "local" none that others are meant to reach."""
    asked, told = {}, []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr("train.loopback.stay_on_loopback", lambda: told.append(True))
    launch = ClusterConfig(address=address)
    assert (launch.is_local, launch.is_here) == (is_local, is_here)
    start_ray(launch)
    assert asked["address"] == (address or variable or "local")
    assert bool(told) == is_here


def test_a_process_that_ray_has_started_gets_the_settings_too(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    start_ray(ClusterConfig(address="auto"))
    assert {name: os.environ.get(name) for name in CLUSTER} == CLUSTER


def test_a_mark_tells_a_folder_from_another_one(tmp_path):
    """A path of a cluster's machine is another folder on each, unless it is mounted."""
    run = RunFolder.at(str(tmp_path / "here"), "run")
    with marked(run) as word:
        require_mark(run, word)
        for other in (RunFolder.at(str(tmp_path / "there"), "run"), run):
            with pytest.raises(InputError, match=r"run: is another folder on .*s3://BUCKET/PATH"):
                require_mark(other, "another" if other == run else word)
    assert not list((tmp_path / "here").iterdir())
    with marked(run):
        run.write_json("run.json", {})
    assert [path.name for path in (tmp_path / "here" / "run").iterdir()] == ["run.json"]


def test_a_storage_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"run: cannot be written .*expected a folder"),
        marked(RunFolder.at(str(tmp_path / "file"), "run")),
    ):
        pytest.fail("it was begun")


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:port"])
def test_an_address_that_is_none_is_one_line(address):
    with pytest.raises(InputError, match=f"launch.address is '{address}'") as caught:
        start_ray(ClusterConfig(address=address))
    assert "\n" not in str(caught.value)


def test_a_token_that_is_missing_is_one_line(monkeypatch):
    def init(**_):
        raise ray.exceptions.AuthenticationError("no token was found\nfor this cluster")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=r"\(no token was found\); `ray get-auth-token") as caught:
        start_ray(ClusterConfig(address="auto"))
    assert "\n" not in str(caught.value)


def test_bad_input_on_a_node_keeps_its_words(monkeypatch):
    def get(tasks):
        error = InputError("data: x is missing")
        raise ray.exceptions.RayTaskError("f", "Traceback\n\x1b[36m", error).as_instanceof_cause()

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(ray, "remote", lambda _: task)
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(InputError) as caught:
        call_remotely(len, [("x",)])
    assert str(caught.value) == "data: x is missing"


def test_two_processes_do_not_write_one_run(tmp_path):
    order = Order(
        recipe="cpu",
        config=FinetuneConfig(),
        launch=LaunchConfig(storage=str(tmp_path)),
        name="run",
        fresh=False,
    )
    with sole(f"{tmp_path}/run"), pytest.raises(InputError, match="another process on this mach"):
        carry_out(order, lambda payload: {})
    with sole(f"{tmp_path}/run"), sole(f"{tmp_path}/other"):
        pass


def test_the_commit_is_that_of_this_code_alone(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
                       cwd=tmp_path, check=True, capture_output=True)  # fmt: skip

    inside = tmp_path / "places.py"
    shutil.copy(places.__file__, inside)
    monkeypatch.setattr(places, "__file__", str(inside))
    git("init")
    git("commit", "--allow-empty", "-m", "another project's")
    assert git_commit() is None
    git("add", "places.py")
    git("commit", "-m", "ours")
    commit = git_commit()
    assert commit is not None and len(commit) == 40
    inside.write_text("")
    assert git_commit() == commit + "+changes"
