"""The training loop: events, learning, resuming to the last bit, ranks, divergence."""

import copy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scribbleseg.config import FinetuneConfig, override
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.loops.batches import BatchPlan, make_loader, open_data, sample_order
from scribbleseg.loops.segment import fit
from scribbleseg.loops.state import init_state
from scribbleseg.loops.steps import EpochDone, LossWatch, SaveDue, StepDone
from scribbleseg.losses.segmentation import segmentation_loss
from tests.ranks import spawn

CPU = torch.device("cpu")


def settings(root, **changes):
    return override(
        FinetuneConfig(),
        {
            "data.root": str(root),
            "data.long_side": 64,
            "data.crop_size": 64,
            "data.num_workers": 0,
            "model.width": 8,
            "model.depth": 3,
            "model.norm": "group",
            "train.batch_size": 4,
            "train.epochs": 2,
            "train.precision": "fp32",
        }
        | {key.replace("__", "."): value for key, value in changes.items()},
    )


def start(config):
    return init_state(config, CPU, None), open_data(config)


def run(config, state, data, stop_after=None):
    """Iterate `fit`; return the events and the state's dictionary at the last SaveDue."""
    events, saved = [], None
    for event in fit(state, data, config, device=CPU, precision=None):
        events.append(event)
        if isinstance(event, SaveDue):
            saved = copy.deepcopy(state.to_dict())
            if event.epoch == stop_after:
                break
    return events, saved


# Figures that differ from one time to the next.
TIMES = {"seconds", "waiting", "all_reduce"}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_events_come_in_order_and_the_rows_are_whole(tiny_data):
    config = settings(tiny_data, train__epochs=3, train__validate_every=2)
    events, _ = run(config, *start(config))
    kinds = "".join(type(event).__name__[:2] for event in events)
    # 11 training samples (3 of 14 are held out) make 2 batches of 4.
    assert kinds == "StStEp" + "StStSaEp" + "StStSaEp"
    rows = [event.metrics for event in events if isinstance(event, EpochDone)]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["samples"] for row in rows] == [8, 16, 24]
    assert ["miou" in row for row in rows] == [False, True, True]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert np.isclose(rows[0]["loss"], np.mean([float(e.loss) for e in steps[:2]]))


@pytest.mark.parametrize(("share", "count"), [(1.0, 11), (0.5, 6), (0.4, 4), (0.1, 1)])
def test_a_share_of_the_labels_leaves_validation_alone(tiny_data, share, count):
    whole = open_data(settings(tiny_data))
    part = open_data(settings(tiny_data, data__share=share))
    assert len(part.samples) == count and part.num_validation == whole.num_validation
    stems = [[data.cache.stems[i] for i in data.samples.indices] for data in (part, whole)]
    assert set(stems[0]) <= set(stems[1]) and len(set(stems[0])) == count


def test_further_splits_are_trained_on_and_never_validated_on(tiny_data, tmp_path):
    from tests.conftest import write_scenes

    write_scenes(tmp_path, "more", 5, seed=9)
    whole = open_data(settings(tiny_data))
    extended = open_data(settings(tiny_data, data__extra=[f"{tmp_path}/more/"]))
    assert len(extended.samples) == len(whole.samples) + 5
    assert [extended.cache.stems[i] for i in extended.validation] == [
        whole.cache.stems[i] for i in whole.validation
    ]
    with pytest.raises(InputError, match="no such split"):
        open_data(settings(tiny_data, data__extra=[f"{tmp_path}/less"]))


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"data__extra": ["linked"]}, "3 of the 3"),
        ({"data__extra": ["linked"], "data__fold": None}, None),
        ({"data__fold": None, "data__val_split": "train"}, "14 of the 14"),
        ({"data__fold": None, "data__val_split": "test"}, None),
    ],
)
def test_images_that_are_trained_on_and_validated_are_told_of(tiny_data, tmp_path, changes, known):
    (tmp_path / "linked").symlink_to(tiny_data / "train")
    if "data__extra" in changes:
        changes = changes | {"data__extra": [str(tmp_path / "linked")]}
    warnings = open_data(settings(tiny_data, **changes)).warnings
    assert [f"{known} validation images" in line for line in warnings] == ([True] if known else [])


@pytest.mark.parametrize("changes", [{}, {"loss__supervision": "strokes"}])
def test_data_without_masks_are_told_how_to_be_trained_on(tmp_path, changes):
    from tests.conftest import write_scenes

    write_scenes(tmp_path, "train", 8, masks=False)
    with pytest.raises(InputError, match="ground_truth: no such folder.*strokes --data.fold None"):
        open_data(settings(tmp_path, **changes))


def test_it_learns(tiny_data):
    config = settings(tiny_data, train__epochs=40, train__validate_every=40, augment__strength=0.5)
    events, _ = run(config, *start(config))
    rows = [event.metrics for event in events if isinstance(event, EpochDone)]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["miou"] > 0.85


def test_stroke_supervision_needs_no_masks(tmp_path):
    from tests.conftest import write_scenes

    write_scenes(tmp_path, "train", 8, masks=False)
    config = settings(tmp_path, loss__supervision="strokes", data__fold=None)
    events, saved = run(config, *start(config))
    rows = [event.metrics for event in events if isinstance(event, EpochDone)]
    assert all(np.isfinite(row["loss"]) and "miou" not in row for row in rows)
    assert saved is not None


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [
        ("unet", "batch"),
        pytest.param("attention_resunet", "group", marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_equals_the_undisturbed_one(tiny_data, architecture, norm):
    changes = {"model__architecture": architecture, "model__norm": norm, "train__epochs": 4}
    config = settings(tiny_data, **changes)
    _, undisturbed = run(config, *start(config))
    _, half = run(config, *start(config), stop_after=2)
    # By a loader worker: what it draws must not depend on when it was started, or that it was.
    config = settings(tiny_data, data__num_workers=1, **changes)
    state, data = start(config)
    state.load_dict(half)
    events, resumed = run(config, state, data)
    assert isinstance(events[0], StepDone) and events[0].step == 5
    assert same(undisturbed, resumed)


@pytest.mark.parametrize("wish", [{"train__save_minutes": 1e-9}, {"train__save_steps": 3}])
def test_a_checkpoint_inside_an_epoch_resumes_to_the_last_bit_too(tiny_data, monkeypatch, wish):
    if "train__save_minutes" in wish:
        monkeypatch.setattr("scribbleseg.loops.steps.STEPS_BETWEEN_CHECKS", 1)
    config = settings(tiny_data, train__batch_size=2, **wish)
    _, undisturbed = run(config, *start(config))
    state, data = start(config)
    for event in fit(state, data, config, device=CPU, precision=None):
        if isinstance(event, SaveDue):
            half = copy.deepcopy(state.to_dict())
            break
    assert half["progress"]["step"] == (1 if "train__save_minutes" in wish else 3)
    state, data = start(config)
    state.load_dict(half)
    _, resumed = run(config, state, data)
    assert same(undisturbed, resumed)


def test_checkpoints_inside_epochs_come_every_so_many_steps(tiny_data):
    config = settings(tiny_data, train__batch_size=2, train__save_steps=2)
    events, _ = run(config, *start(config))
    saves = [(n, e) for n, e in enumerate(events) if isinstance(e, SaveDue)]
    steps = [sum(isinstance(e, StepDone) for e in events[:n]) for n, _ in saves]
    # An epoch has 5 steps; its own checkpoint comes besides.
    assert steps == [2, 4, 5, 6, 8, 10]
    assert [event.epoch for _, event in saves] == [1, 1, 1, 2, 2, 2]
    assert [event.final for _, event in saves] == 5 * [False] + [True]


def test_an_epoch_that_is_not_validated_may_end_with_such_a_checkpoint(tiny_data):
    changes = {"train__batch_size": 2, "train__epochs": 3, "train__validate_every": 3}
    config = settings(tiny_data, **changes, train__save_steps=5)
    events, saved = run(config, *start(config))
    saves = [(n, e) for n, e in enumerate(events) if isinstance(e, SaveDue)]
    assert [sum(isinstance(e, StepDone) for e in events[:n]) for n, _ in saves] == [5, 10, 15]
    assert [event.final for _, event in saves] == [False, False, True]
    state, data = start(config)
    for event in fit(state, data, config, device=CPU, precision=None):
        if isinstance(event, SaveDue):
            third = copy.deepcopy(state.to_dict())
            break
    state, data = start(config)
    state.load_dict(third)
    assert same(run(config, state, data)[1], saved)


def test_a_run_that_ends_in_between_goes_on_as_if_it_had_not(tiny_data):
    config = settings(tiny_data, train__epochs=4, train__validate_every=2)
    _, undisturbed = run(config, *start(config))
    kinds, saved = [], None
    # The first ends where nothing is validated; nothing is left to the third; the last is the end.
    for until in (1, 2, 2, None):
        state, data = start(config)
        if saved is not None:
            state.load_dict(saved)
        events = []
        for event in fit(state, data, config, device=CPU, precision=None, until=until):
            events.append(event)
            if isinstance(event, SaveDue):
                saved = copy.deepcopy(state.to_dict())
        kinds.append("".join(type(event).__name__[:2] for event in events))
        finals = [event.final for event in events if isinstance(event, SaveDue)]
        assert finals == [True] * len(finals)
    assert kinds == ["StStSaEp", "StStSaEp", "", "StStEpStStSaEp"]
    assert same(undisturbed, saved)


def test_a_notice_that_the_machine_will_go_saves_at_once(tiny_data, monkeypatch):
    # However slow a busy machine makes the steps.
    monkeypatch.setattr("scribbleseg.loops.steps.SECONDS_BETWEEN_CHECKS", 1e9)
    monkeypatch.setattr("scribbleseg.loops.steps.STEPS_BETWEEN_CHECKS", 2)
    config = settings(tiny_data, train__batch_size=2)
    answers = iter([False, True, False, False, False])
    state, data = start(config)
    events = list(
        fit(state, data, config, device=CPU, precision=None, notice=lambda: next(answers))
    )
    # Asked after steps 1, 3, 6 and 8 of 10; those after steps 5 and 10 are the epochs' own.
    saves = [n for n, event in enumerate(events) if isinstance(event, SaveDue)]
    assert [sum(isinstance(e, StepDone) for e in events[:n]) for n in saves] == [3, 5, 10]
    assert list(answers) == [False]


def test_slow_steps_are_looked_up_from_more_often(tiny_data, monkeypatch):
    monkeypatch.setattr("scribbleseg.loops.steps.SECONDS_BETWEEN_CHECKS", 1e-9)
    monkeypatch.setattr("scribbleseg.loops.steps.STEPS_BETWEEN_CHECKS", 3)
    config = settings(tiny_data, train__batch_size=1, train__epochs=1)
    asked = []
    state, data = start(config)
    for _ in fit(
        state, data, config, device=CPU, precision=None,
        notice=lambda: bool(asked.append(state.progress.step)),
    ):  # fmt: skip
        pass
    assert asked == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_epochs_that_are_not_validated_do_not_put_off_a_checkpoint(tiny_data, monkeypatch):
    # However slow a busy machine makes the steps.
    monkeypatch.setattr("scribbleseg.loops.steps.SECONDS_BETWEEN_CHECKS", 1e9)
    monkeypatch.setattr("scribbleseg.loops.steps.STEPS_BETWEEN_CHECKS", 3)
    config = settings(tiny_data, train__epochs=4, train__validate_every=4, train__save_minutes=1e-9)
    events, _ = run(config, *start(config))
    # Epochs of two steps, looked up from after steps 1, 4 (the end of an epoch), 7 and 8.
    kinds = "".join(type(event).__name__[:2] for event in events)
    assert kinds == "StSaStEpStStEpSaStStEpStSaStSaEp"


def resume_rank(rank, world_size, path, config, saved, rows):
    """One rank of a run that is saved within its first epoch, or of one resumed from there."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size
        )
    state, data = start(config)
    if Path(saved).exists():
        state.load_dict(torch.load(saved, weights_only=True))
    for event in fit(state, data, config, device=CPU, precision=None):
        if isinstance(event, SaveDue) and not Path(saved).exists():
            # Rank 0's state alone, as in a checkpoint.
            if rank == 0:
                torch.save(state.to_dict(), f"{saved}.partial")
            if world_size > 1:
                dist.barrier()
            break
        if isinstance(event, EpochDone) and rank == 0:
            rows.append(event.metrics)
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_resumed_by_another_number_of_workers_draws_what_it_would_have(tiny_data, tmp_path):
    config = settings(tiny_data, train__batch_size=2, train__save_steps=3)
    with mp.Manager() as manager:
        rows = [manager.list() for _ in range(3)]
        saved = tmp_path / "saved.pt"
        spawn(resume_rank, (2, tmp_path / "two", config, str(saved), rows[0]), 2)
        Path(f"{saved}.partial").rename(saved)
        for number, workers in ((1, 1), (2, 2)):
            arguments = (workers, tmp_path / f"again-{workers}", config, str(saved), rows[number])
            spawn(resume_rank, arguments, workers)
        by_one, by_two = [list(each) for each in rows[1:]]
    events, _ = run(config, *start(config))
    whole = [event.metrics for event in events if isinstance(event, EpochDone)]
    assert len(by_one) == len(by_two) == len(whole) == 2
    for ours, theirs, plain in zip(by_one, by_two, whole, strict=True):
        for key in plain.keys() - TIMES:
            assert ours[key] == pytest.approx(plain[key], abs=2e-3), key
            assert theirs[key] == pytest.approx(plain[key], abs=2e-3), key


def train_rank(rank, world_size, path, config, losses):
    """One rank of a run; appends this rank's losses to a shared list."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size
        )
    state, data = start(config)
    for event in fit(state, data, config, device=CPU, precision=None):
        if isinstance(event, StepDone):
            losses.append((event.step, float(event.loss)))
        if isinstance(event, EpochDone) and rank == 0:
            row = event.metrics
            assert 0 <= row["waiting"] <= 1 and ("all_reduce" in row) == (world_size > 1)
            assert 0 <= row.get("all_reduce", 0) <= 1
            row = {key: value for key, value in row.items() if key not in TIMES}
            losses.append((f"epoch {event.epoch}", row))
    if world_size > 1:
        dist.destroy_process_group()


def loss_curve(world_size, path, config):
    with mp.Manager() as manager:
        losses = manager.list()
        spawn(train_rank, (world_size, path, config, losses), world_size)
        values, rows = {}, []
        for step, value in losses:
            if isinstance(step, str):
                rows.append(value)
            else:
                values.setdefault(step, []).append(value)
    return [np.mean(values[step]) for step in sorted(values)], rows


# Three workers have 2, 2 and 1 images of a batch of 5; two, in two parts each, 1 + 2 and 1 + 1.
@pytest.mark.parametrize(
    ("workers", "batch", "accumulate"),
    [
        (2, 4, 1),
        pytest.param(3, 5, 1, marks=pytest.mark.slow),
        pytest.param(2, 5, 2, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_gives_the_single_workers_curve(
    tiny_data, tmp_path, workers, batch, accumulate
):
    config = settings(tiny_data, train__epochs=8, train__validate_every=4, train__batch_size=batch)
    one, one_rows = loss_curve(1, tmp_path / "one", config)
    parts = override(config, {"train.accumulate": accumulate})
    many, rows = loss_curve(workers, tmp_path / "many", parts)
    assert len(one) == len(many) == 16
    assert np.abs(np.subtract(one, many)).max() < 1e-4
    for a, b in zip(one_rows, rows, strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tiny_data, monkeypatch):
    calls = 0

    def bad_at_the_third_step(*arguments):
        nonlocal calls
        calls += 1
        loss = segmentation_loss(*arguments)
        return loss * float("nan") if calls == 3 else loss

    monkeypatch.setattr("scribbleseg.loops.segment.segmentation_loss", bad_at_the_third_step)
    # However slow a busy machine makes the steps.
    monkeypatch.setattr("scribbleseg.loops.steps.SECONDS_BETWEEN_CHECKS", 1e9)
    config = settings(tiny_data)
    state, data = start(config)
    events = []
    with pytest.raises(DivergedError, match="step 4") as caught:
        for event in fit(state, data, config, device=CPU, precision=None):
            events.append(event)
    named = {word.strip(",;") for word in str(caught.value).split() if word.startswith("scene_")}
    held = set(data.cache.stems[: len(data.samples)])
    assert 4 <= len(named) <= 8 and named <= held
    assert sum(isinstance(event, SaveDue) for event in events) == 1


def test_only_some_of_many_samples_are_named():
    stems = [f"scene_{number:03d}" for number in range(200)]
    watch = LossWatch(finite=torch.tensor(True))
    watch.see(torch.tensor(float("nan")), stems)
    with pytest.raises(DivergedError, match="scene_007 and 192 more; look at them"):
        watch.check(1)


def test_training_starts_from_a_given_checkpoint(tiny_data, tmp_path):
    from scribbleseg import checkpoint as checkpoints
    from scribbleseg import manifest

    config = settings(tiny_data)
    state, data = start(config)
    run(config, state, data)
    folder = tmp_path / "start"
    folder.mkdir()
    weights = state.ema.state_dict()
    checkpoints.write_model(folder, config=config, weights=weights, metrics={})
    manifest.write_manifest(folder)
    begun = init_state(override(config, {"init_from": str(folder)}), CPU, None)
    assert all(torch.equal(weights[k], v) for k, v in begun.model.state_dict().items())
    with pytest.raises(InputError, match="init_from is .*found a network of model.width 8, exp"):
        init_state(override(config, {"init_from": str(folder), "model.width": 16}), CPU, None)


def test_numbers_that_are_none_are_neither_started_from_nor_scored(tiny_data, tmp_path):
    from scribbleseg import checkpoint as checkpoints
    from scribbleseg import manifest

    config = settings(tiny_data, model__norm="batch")
    state, data = start(config)
    variances = [b for name, b in state.ema.named_buffers() if name.endswith("running_var")]
    variances[0][1] = torch.inf
    checkpoints.write_model(tmp_path, config=config, weights=state.ema.state_dict(), metrics={})
    manifest.write_manifest(tmp_path)
    with pytest.raises(InputError, match=r"NaN or infinity in encoder\.levels\.0.*running_var"):
        init_state(override(config, {"init_from": str(tmp_path)}), CPU, None)
    # The loss of training, which normalises by the batch, does not show it.
    with pytest.raises(DivergedError, match=r"NaN or infinite in encoder\.levels\.0.*running_var"):
        run(config, state, data)


def test_the_plan_deals_global_batches_to_ranks():
    plans = [
        BatchPlan(num_samples=11, batch_size=4, epochs=2, seed=3, rank=r, world_size=2)
        for r in (0, 1)
    ]
    whole = BatchPlan(num_samples=11, batch_size=4, epochs=2, seed=3)
    for batch, *shares in zip(whole, *plans, strict=True):
        assert sorted(batch) == sorted(shares[0] + shares[1])
    late = BatchPlan(num_samples=11, batch_size=4, epochs=2, seed=3, start_step=3)
    assert list(late) == list(whole)[3:] and len(late) == 1
    assert sorted(sample_order(11, 3, 0)) == list(range(11))
    assert list(sample_order(11, 3, 0)) != list(sample_order(11, 3, 1))


@pytest.mark.parametrize(
    ("key", "plan"), [("11", {"batch_size": 12}), ("6", {"world_size": 3, "num_parts": 2})]
)
def test_batches_that_cannot_be_made_are_refused(key, plan):
    with pytest.raises(InputError, match=f"train.batch_size is .*expected.*{key}"):
        BatchPlan(**{"num_samples": 11, "batch_size": 4, "epochs": 1, "seed": 0} | plan)


@pytest.mark.parametrize(
    ("asked", "device", "threads", "expected"),
    [
        (None, "cpu", 1, 0),
        (None, "cpu", 2, 1),
        (None, "cuda", 1, 1),
        (1, "cpu", 1, 1),
        (0, "cpu", 2, 0),
    ],
)
def test_a_single_core_loads_its_own_batches(
    tiny_data, monkeypatch, asked, device, threads, expected
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    data = open_data(settings(tiny_data))
    loader = make_loader(data.samples, data.plan(settings(tiny_data)), asked, torch.device(device))
    assert loader.num_workers == expected


def test_waiting_is_measured(tiny_data, monkeypatch):
    from scribbleseg.datasets.transforms import TrainSamples

    original = TrainSamples.__getitem__

    def slow(self, key):
        time.sleep(0.02)
        return original(self, key)

    monkeypatch.setattr(TrainSamples, "__getitem__", slow)
    config = settings(tiny_data, train__epochs=1)
    events, _ = run(config, *start(config))
    step = next(event for event in events if isinstance(event, StepDone))
    assert 0.08 <= step.wait_seconds <= step.step_seconds


def test_some_steps_show_the_network_where_its_average_errs(tiny_data):
    """The same steps whenever the run is made, and each image one stroke more, or none."""
    seen = {}
    for probability in (0.0, 0.5, 1.0):
        config = settings(tiny_data, train__epochs=4, strokes__correct_probability=probability)
        for attempt in range(2):
            state, data = start(config)
            shown = seen[probability, attempt] = []
            state.model.register_forward_pre_hook(
                lambda _, inputs, shown=shown: shown.append(inputs[1].clone())
            )
            list(fit(state, data, config, device=CPU, precision=None))
    for probability in (0.0, 0.5, 1.0):
        assert same(seen[probability, 0], seen[probability, 1])
    plain, some, every = (seen[probability, 0] for probability in (0.0, 0.5, 1.0))
    more = [(a > b).flatten(1).any(dim=1) for a, b in zip(every, plain, strict=True)]
    assert all((a >= b).all() for a, b in zip(every, plain, strict=True))
    assert torch.cat(more).float().mean() > 0.5
    corrected = [not torch.equal(a, b) for a, b in zip(some, plain, strict=True)]
    assert 0 < sum(corrected) < len(corrected)
