"""DINO pretraining: the step against a slow one, resuming, ranks, collapse, handing over."""

import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scribbleseg import checkpoint as checkpoints
from scribbleseg import manifest
from scribbleseg.config import FinetuneConfig, PretrainConfig, override
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.loops.pretrain import (
    Schedule,
    collapse,
    fit,
    init_state,
    open_data,
    pretrain_step,
    resolve,
)
from scribbleseg.loops.state import init_state as init_finetuning
from scribbleseg.loops.steps import EpochDone, SaveDue, StepDone
from scribbleseg.models import build_model
from tests.loops.test_segment import same
from tests.ranks import spawn

CPU = torch.device("cpu")


def settings(root, **changes):
    return override(
        PretrainConfig(),
        {
            "data.roots": [str(root)],
            "data.num_workers": 0,
            "crops.global_size": 64,
            "crops.local_size": 32,
            "crops.num_local": 2,
            "model.width": 8,
            "model.depth": 3,
            "model.norm": "group",
            "dino.out_dim": 32,
            "dino.hidden_dim": 16,
            "dino.bottleneck_dim": 8,
            "train.batch_size": 4,
            "train.epochs": 2,
            "train.precision": "fp32",
        }
        | {key.replace("__", "."): value for key, value in changes.items()},
    )


def start(config):
    data = open_data(config)
    resolved = resolve(config, len(data.samples))
    return resolved, init_state(resolved, CPU, None), data


def run(config, state, data, stop_after=None):
    events, saved = [], None
    for event in fit(state, data, config, device=CPU, precision=None):
        events.append(event)
        if isinstance(event, SaveDue):
            saved = copy.deepcopy(state.to_dict())
            if event.epoch == stop_after:
                break
    return events, saved


def random_batch(num_images, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    crops = config.crops
    return {
        "global": torch.randint(
            256,
            (num_images, 2, 3, crops.global_size, crops.global_size),
            dtype=torch.uint8,
            generator=generator,
        ),
        "local": torch.randint(
            256,
            (num_images, crops.num_local, 3, crops.local_size, crops.local_size),
            dtype=torch.uint8,
            generator=generator,
        ),
        "stem": [str(number) for number in range(num_images)],
    }


def take(state, batch, config, *, step=0, num_steps=10, hold=False):
    return pretrain_step(
        state,
        state.student,
        batch,
        config,
        Schedule.at(step, num_steps, config),
        device=CPU,
        precision=None,
        hold_prototypes=hold,
    )


def slow_loss(student, teacher, centre, batch, temperature, student_temperature):
    """Algorithm 1 of the paper, crop by crop and image by image: loss and teacher logits."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def logits_of(network, crops):
        features = torch.stack([network.backbone(crop[None])[0] for crop in crops])
        standard = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
        bottlenecks = [network.head.mlp(row) for row in standard]
        prototypes = network.head.prototypes.weight
        return [
            torch.stack([torch.cosine_similarity(row, each, dim=0) for each in prototypes])
            for row in bottlenecks
        ]

    views = [
        [(view.float() / 255 - mean) / deviation for view in (*both, *local)]
        for both, local in zip(batch["global"], batch["local"], strict=True)
    ]
    num_views = len(views[0])
    targets = logits_of(teacher, [view for crops in views for view in crops[:2]])
    logits = logits_of(student, [view for crops in views for view in crops])
    terms = []
    for image in range(len(views)):
        for i in range(2):
            target = targets[image * 2 + i].detach()
            probability = ((target - centre) / temperature).softmax(0)
            for j in range(num_views):
                if j != i:
                    logit = logits[image * num_views + j]
                    terms.append(
                        -(probability * (logit / student_temperature).log_softmax(0)).sum()
                    )
    return torch.stack(terms).mean(), torch.stack(targets).detach()


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_equals_a_slow_one(tiny_data, num_local, accumulate):
    config = settings(tiny_data, crops__num_local=num_local, train__accumulate=accumulate)
    config = resolve(config, 14)
    state = init_state(config, CPU, None)
    # The second step: by then teacher and student differ and the centre has moved.
    take(state, random_batch(4, config, seed=1), config)
    student, teacher = copy.deepcopy(state.student), copy.deepcopy(state.teacher)
    centre = state.centre.value.clone()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in student.parameters() if p.ndim > 1]},
            {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    batch, schedule = random_batch(4, config, seed=2), Schedule.at(1, 10, config)
    size = 4 // accumulate
    parts = [
        {key: values[start : start + size] for key, values in batch.items()}
        for start in range(0, 4, size)
    ]
    slow = [slow_loss(student, teacher, centre, p, schedule.temperature, 0.1) for p in parts]
    loss = torch.stack([part for part, _ in slow]).mean()
    logits = torch.cat([part for _, part in slow])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(student.parameters(), config.optim.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate
    optimizer.step()

    figures = take(state, batch, config, step=1)
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(figures["grad_norm"], norm, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        state.centre.value, 0.9 * centre + 0.1 * logits.mean(0), rtol=1e-4, atol=1e-5
    )
    for ours, theirs in zip(state.student.parameters(), student.parameters(), strict=True):
        # AdamW divides a gradient by its own size, rounding errors of tiny ones too.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.1 * schedule.learning_rate)
    m = schedule.momentum
    for ours, old, new in zip(
        state.teacher.parameters(), teacher.parameters(), state.student.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, m * old + (1 - m) * new)
        assert ours.grad is None and not ours.requires_grad


def test_prototypes_are_held_and_then_move(tiny_data):
    config = resolve(settings(tiny_data), 14)
    state = init_state(config, CPU, None)
    before = state.student.head.prototypes.weight.clone()
    take(state, random_batch(4, config), config, hold=True)
    assert torch.equal(before, state.student.head.prototypes.weight)
    take(state, random_batch(4, config), config, step=1)
    assert not torch.equal(before, state.student.head.prototypes.weight)


def test_a_step_that_overflows_leaves_the_epochs_figures_finite(tiny_data):
    config = resolve(settings(tiny_data), 14)
    state = init_state(config, CPU, None)
    state.student.head.prototypes.weight.register_hook(lambda gradient: gradient * math.inf)
    assert take(state, random_batch(4, config), config)["grad_norm"] == 0


def test_weight_decay_may_begin_at_zero(tiny_data):
    changes = {"optim__weight_decay": 0.0, "optim__final_weight_decay": 0.1}
    config = resolve(settings(tiny_data, **changes), 14)
    state = init_state(config, CPU, None)
    take(state, random_batch(4, config), config, step=9)
    kernels, vectors = (group["weight_decay"] for group in state.optimizer.param_groups)
    assert kernels == Schedule.at(9, 10, config).weight_decay > 0
    assert vectors == 0


def test_settings_follow_the_number_of_images_and_can_be_set(tiny_data):
    few, many = (resolve(PretrainConfig(), number) for number in (500, 1_000_000))
    assert few.dino.out_dim < many.dino.out_dim
    assert few.dino.teacher_temperature < many.dino.teacher_temperature
    assert few.dino.ema_momentum < many.dino.ema_momentum
    assert few.crops.global_scale[0] < many.crops.global_scale[0]
    assert resolve(settings(tiny_data), 500).dino.out_dim == 32
    assert resolve(few, 1_000_000) == few


def test_events_rows_and_the_probe(tiny_data):
    config = settings(tiny_data, probe__root=str(tiny_data), probe__long_side=64, train__epochs=3)
    events, _ = run(*start(config))
    # 18 images (14 and 4) make 4 batches of 4.
    kinds = "".join(type(event).__name__[:2] for event in events)
    assert kinds == 3 * ("St" * 4 + "SaEp")
    rows = [event.metrics for event in events if isinstance(event, EpochDone)]
    for row in rows:
        assert 0 <= row["entropy"] <= math.log(32) and 0 < row["deviation"] < 1
        assert row["loss"] == pytest.approx(row["entropy"] + row["kl"], abs=1e-4)
        assert 0 <= row["probe_miou"] <= 1 and row["grad_norm"] > 0
        assert 0 < row["dimensions"] <= 1
    assert rows[0]["ema_momentum"] < rows[-1]["ema_momentum"] < 1


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [("unet", "batch"), pytest.param("vit_unet", "group", marks=pytest.mark.slow)],
)
def test_a_killed_and_resumed_run_equals_the_undisturbed_one(tiny_data, architecture, norm):
    changes = {"model__architecture": architecture, "model__norm": norm, "train__epochs": 4}
    config = settings(tiny_data, **changes)
    _, undisturbed = run(*start(config))
    _, half = run(*start(config), stop_after=2)
    # By a loader worker: what it draws must not depend on when it was started, or that it was.
    resolved, state, data = start(settings(tiny_data, data__num_workers=1, **changes))
    state.load_dict(half)
    events, resumed = run(resolved, state, data)
    assert isinstance(events[0], StepDone) and events[0].step == 9
    assert same(undisturbed, resumed)


@pytest.mark.parametrize(
    ("figures", "words", "settings"),
    [
        (
            {"loss": math.log(32)},
            "nothing is learned",
            ["dino.teacher_temperature", "train.batch_size", "optim.learning_rate"],
        ),
        (
            {"entropy": 0.0},
            "one prototype",
            ["dino.teacher_temperature", "dino.centre_momentum"],
        ),
        ({"deviation": 0.001}, "look alike", ["optim.learning_rate", "dino.ema_momentum"]),
    ],
)
def test_a_collapse_is_named_with_the_settings_to_change(figures, words, settings):
    healthy = {"loss": 2.5, "entropy": 1.5, "kl": 1.0, "deviation": 0.6}
    assert collapse(healthy, 32) is None
    warning = collapse(healthy | figures, 32)
    assert words in warning and "\n" not in warning
    assert re.findall(r"(?:dino|train|optim)\.\w+", warning) == settings


def test_a_collapse_planted_on_purpose_raises_the_alarm(tiny_data):
    # The teacher is blunt: its targets are uniform, and there is nothing to learn.
    planted = {"dino__teacher_temperature": 1e4, "dino__teacher_temperature_start": 1e4}
    events, _ = run(*start(settings(tiny_data, **planted)))
    warnings = [event.warning for event in events if isinstance(event, EpochDone)]
    assert all(warning and "teacher_temperature" in warning for warning in warnings)
    with pytest.raises(DivergedError, match="nothing is learned"):
        run(*start(settings(tiny_data, dino__stop_on_collapse=True, **planted)))


def write_pretrained(folder, config):
    """Write the checkpoint of a run after two steps."""
    state = init_state(config, CPU, None)
    for step in range(2):
        take(state, random_batch(4, config, seed=step), config, step=step)
    checkpoints.write_model(folder, config=config, weights=state.weights(), metrics={})
    manifest.write_manifest(folder)
    return state.encoder.eval()


@pytest.mark.parametrize(
    ("pretrained", "finetuned"),
    [
        ("unet", "unet"),
        ("resunet", "attention_resunet"),
        ("attention_resunet", "resunet"),
        ("vit_unet", "vit_unet"),
    ],
)
def test_the_handed_over_encoder_is_the_teachers(tiny_data, tmp_path, pretrained, finetuned):
    config = resolve(settings(tiny_data, model__architecture=pretrained, model__norm="batch"), 14)
    teacher = write_pretrained(tmp_path / "checkpoint", config)
    begun = override(
        FinetuneConfig(model=config.model),
        {"init_from": str(tmp_path / "checkpoint"), "model.architecture": finetuned},
    )
    model = init_finetuning(begun, CPU, None).model.eval()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(model.encoder(image), teacher(image), strict=True):
        assert torch.equal(ours, theirs)
    # Every tensor, the statistics of batch normalisation among them.
    assert same(dict(model.encoder.state_dict()), dict(teacher.state_dict()))
    # Strokes do not change what the network sees at step 0.
    strokes = torch.rand(2, 2, 64, 64)
    torch.testing.assert_close(
        model(image, strokes).logits, model(image, torch.zeros_like(strokes)).logits
    )


def test_an_encoder_of_another_network_is_refused_by_its_settings(tiny_data, tmp_path):
    write_pretrained(tmp_path / "checkpoint", resolve(settings(tiny_data), 14))
    for changes, words in (
        ({"model.width": 16}, "width 8.*expected.*width 16"),
        ({"model.width": 8, "model.architecture": "resunet"}, "encoder unet.*encoder resunet"),
    ):
        config = override(
            FinetuneConfig(),
            {"init_from": str(tmp_path / "checkpoint"), "model.depth": 3, "model.norm": "group"}
            | changes,
        )
        with pytest.raises(InputError, match=words):
            init_finetuning(config, CPU, None)


def test_a_pretrained_encoder_does_not_predict(tiny_data, tmp_path):
    from scribbleseg.predict import load

    write_pretrained(tmp_path / "checkpoint", resolve(settings(tiny_data), 14))
    with pytest.raises(InputError, match="pretrained encoder.*--init-from"):
        load(tmp_path / "checkpoint")


@pytest.mark.parametrize("frozen", [0, 1])
def test_the_encoder_has_its_own_learning_rate_and_may_be_frozen(tiny_data, frozen):
    from tests.loops.test_segment import run as run_finetuning
    from tests.loops.test_segment import settings as finetuning
    from tests.loops.test_segment import start as start_finetuning

    config = finetuning(
        tiny_data, train__epochs=2, optim__encoder_scale=0.25, optim__frozen_encoder_epochs=frozen
    )
    state, data = start_finetuning(config)
    before = build_model(config.model)
    before.load_state_dict(copy.deepcopy(state.model.state_dict()))
    run_finetuning(config, state, data, stop_after=1)
    moved = [
        not torch.equal(old, new)
        for old, new in zip(
            before.encoder.parameters(), state.model.encoder.parameters(), strict=True
        )
    ]
    assert any(moved) != bool(frozen)
    assert not torch.equal(before.head.weight, state.model.head.weight)
    rates = {group["scale"]: group["lr"] for group in state.optimizer.param_groups}
    assert rates[0.25] == pytest.approx(0.25 * rates[1.0])


def step_on_a_rank(rank, world_size, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    config = resolve(settings(folder), 14)
    state = init_state(config, CPU, None)
    from scribbleseg.distributed import data_parallel

    network = data_parallel(state.student, CPU)
    whole = random_batch(4, config)
    share = {key: values[rank::world_size] for key, values in whole.items()}
    for step in range(2):
        pretrain_step(
            state,
            network,
            share,
            config,
            Schedule.at(step, 10, config),
            device=CPU,
            precision=None,
            hold_prototypes=False,
        )
    torch.save(state.to_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# Three ranks have 2, 1 and 1 of the 4 images.
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_step_as_one_process_with_the_whole_batch(tmp_path, num_ranks):
    spawn(step_on_a_rank, (num_ranks, str(tmp_path)), num_ranks)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    assert torch.equal(ranks[0]["centre"]["value"], ranks[1]["centre"]["value"])
    assert same(ranks[0]["teacher"], ranks[1]["teacher"])
    config = resolve(settings(tmp_path), 14)
    alone = init_state(config, CPU, None)
    for step in range(2):
        take(alone, random_batch(4, config), config, step=step)
    torch.testing.assert_close(ranks[0]["centre"]["value"], alone.centre.value)
    for name, ours in alone.teacher.state_dict().items():
        torch.testing.assert_close(ranks[0]["teacher"][name], ours, rtol=1e-4, atol=2e-5)
