"""DINO pretraining (arXiv 2104.14294): data, state, one optimiser step, and `fit`.

The step reads like the paper's algorithm 1: the student sees all crops, the teacher the global
ones; then the optimiser moves the student, and the centre and the teacher follow.

Where we deviate: weights are averaged into the teacher once per optimiser step also when gradients
are accumulated, and settings that depend on the size of the data set are filled in by `resolve`.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scribbleseg.config import PretrainConfig
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.datasets.multicrop import FEW_IMAGES, MultiCrop, resolve_crops
from scribbleseg.datasets.pictures import ImageCache, list_images
from scribbleseg.datasets.transforms import normalise
from scribbleseg.distributed import broadcast_float, data_parallel, rank, reduce_gradients
from scribbleseg.errors import DivergedError
from scribbleseg.loops.batches import Batch, BatchPlan, cut, make_loader, make_plan
from scribbleseg.loops.state import decay_groups
from scribbleseg.loops.steps import Event, Progress, Row, no_notice, run_steps
from scribbleseg.losses.dino import (
    batch_mean,
    dino_loss,
    feature_deviation,
    next_centre,
    teacher_entropy,
    teacher_probabilities,
)
from scribbleseg.models import build_model, set_recompute
from scribbleseg.models.dino import (
    Centre,
    DinoHead,
    DinoNetwork,
    hold_last_layer,
    make_backbone,
    make_teacher,
    update_teacher,
)
from scribbleseg.probe import choose_evenly, dimensions, list_probe_scenes, probe
from scribbleseg.schedules import cosine, linear_warmup, warmup_cosine

T = TypeVar("T")

# A collapse is looked for once this share of the steps is done: at first nothing has been learned.
SHARE_BEFORE_ALARM = 0.1
# Images whose views the encoder's dimensions are counted on.
NUM_COUNTED = 32


def resolve(config: PretrainConfig, num_images: int) -> PretrainConfig:
    """Fill in the settings that follow the size of the data set, where they are None.

    From 20,000 images on they are the paper's for ImageNet. Fewer images support fewer prototypes
    and a sharper teacher, and their short runs need a teacher that moves faster.
    """
    few = num_images < FEW_IMAGES
    dino = config.dino

    def pick(value: T | None, if_few: T, if_many: T) -> T:
        return value if value is not None else if_few if few else if_many

    return replace(
        config,
        crops=resolve_crops(config.crops, num_images),
        dino=replace(
            dino,
            out_dim=pick(dino.out_dim, 1024, 65536),
            teacher_temperature=pick(dino.teacher_temperature, 0.04, 0.07),
            teacher_temperature_start=pick(dino.teacher_temperature_start, 0.02, 0.04),
            ema_momentum=pick(dino.ema_momentum, 0.99, 0.996),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PretrainData:
    """The images of one run, and the labelled scenes that its encoder is probed on."""

    samples: MultiCrop
    """Views, keyed by (epoch, image)."""
    probed: SceneCache | None
    """Decoded scenes for the probe; None: the run is not probed."""

    @property
    def cache(self) -> ImageCache:
        """Decoded images."""
        return self.samples.cache

    def views(self, device: torch.device) -> Tensor:
        """Return normalised global views (n, 3, s, s) of some images, the same in every epoch."""
        chosen = choose_evenly(range(len(self.samples)), NUM_COUNTED)
        pixels = torch.stack([self.samples[0, index]["global"] for index in chosen])
        return to_views(pixels, device).flatten(0, 1)

    def plan(self, config: PretrainConfig, start_step: int = 0) -> BatchPlan:
        """Return this rank's batches from `start_step` on."""
        return make_plan(len(self.samples), config.train, start_step)

    def loader(
        self, config: PretrainConfig, start_step: int, device: torch.device
    ) -> DataLoader[Any]:
        """Return a loader of all remaining batches."""
        return make_loader(
            self.samples, self.plan(config, start_step), config.data.num_workers, device
        )


def open_data(config: PretrainConfig) -> PretrainData:
    """List, decode and cache the images that `config` names.

    Raises:
        InputError: whatever is wrong with them, with the file and the remedy; single images that
            cannot be read are skipped, and listed by the cache.
    """
    images = list_images(config.data.roots, config.data.cache_dir)
    # Twice a global crop: a crop of a quarter of the image is not enlarged.
    cache = ImageCache.open(
        images, config.data.cache_dir, max_short_side=2 * config.crops.global_size
    )
    probed = None
    if config.probe.root is not None:
        probed = SceneCache.open(
            list_probe_scenes(config.probe, config.data.cache_dir), config.data.cache_dir
        )
    samples = MultiCrop(
        cache=cache, crops=resolve_crops(config.crops, len(cache)), seed=config.train.seed
    )
    return PretrainData(samples=samples, probed=probed)


@dataclass(kw_only=True)
class PretrainState:
    """Bare modules (never a DDP or compiled wrapper), optimiser and counters of one run."""

    student: DinoNetwork
    """The network that is trained."""
    teacher: DinoNetwork
    """Average of its weights; its encoder is what is handed over."""
    centre: Centre
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales fp16 losses; does nothing in other precisions."""
    progress: Progress = field(default_factory=Progress)
    """How far the run is."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as tensors and plain types."""
        parts = ("student", "teacher", "centre", "optimizer", "scaler")
        return {name: getattr(self, name).state_dict() for name in parts} | {
            "progress": self.progress.to_dict()
        }

    def load_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `to_dict` returned."""
        for name in ("student", "teacher", "centre", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])
        self.progress.load_dict(saved["progress"], self.centre.value.device)

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder, which is probed and handed over."""
        return self.teacher.backbone.get_submodule("encoder")

    def weights(self) -> dict[str, Tensor]:
        """Return what fine-tuning starts from: the state of the teacher's encoder."""
        return self.encoder.state_dict()


def init_state(
    config: PretrainConfig, device: torch.device, precision: torch.dtype | None
) -> PretrainState:
    """Return the state of a run before its first step; its weights follow from the seed alone.

    Args:
        config: Settings, as `resolve` returns them.
        device: Where the networks will be.
        precision: Autocast dtype.
    """
    assert config.dino.out_dim is not None, "resolve the settings first"
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        backbone = make_backbone(build_model(config.model).encoder)
        head = DinoHead(backbone.dim, config.dino, config.dino.out_dim)
    student = DinoNetwork(backbone, head)
    student.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return PretrainState(
        student=student,
        teacher=make_teacher(student),
        centre=Centre(config.dino.out_dim).to(device),
        optimizer=torch.optim.AdamW(
            decay_groups(student.parameters(), config.optim.weight_decay, scale=1.0),
            lr=config.optim.learning_rate,
            fused=True,
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What changes from step to step."""

    learning_rate: float
    weight_decay: float
    temperature: float
    """The teacher's."""
    momentum: float
    """The teacher's."""

    @staticmethod
    def at(step: int, num_steps: int, config: PretrainConfig) -> "Schedule":
        """Return the settings of the step after `step` steps."""
        dino, optim = config.dino, config.optim
        assert dino.teacher_temperature is not None and dino.teacher_temperature_start is not None
        assert dino.ema_momentum is not None
        factor = warmup_cosine(step, num_steps=num_steps, warmup=optim.warmup)
        lowest = optim.final_learning_rate
        return Schedule(
            learning_rate=lowest + (optim.learning_rate - lowest) * factor,
            weight_decay=cosine(
                step, num_steps=num_steps, start=optim.weight_decay, end=optim.final_weight_decay
            ),
            temperature=linear_warmup(
                step,
                num_warmup=round(dino.temperature_warmup * num_steps),
                start=dino.teacher_temperature_start,
                end=dino.teacher_temperature,
            ),
            momentum=cosine(step, num_steps=num_steps, start=dino.ema_momentum, end=1.0),
        )


def pretrain_step(
    state: PretrainState,
    network: nn.Module,
    batch: Batch,
    config: PretrainConfig,
    schedule: Schedule,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    hold_prototypes: bool,
) -> dict[str, Tensor]:
    """Take one optimiser step; return its figures, detached, on the device.

    Args:
        state: Changed in place, except for its progress.
        network: The student, or a DDP or compiled wrapper of it.
        batch: uint8 "global" (b, 2, 3, s, s) and "local" (b, n, 3, s2, s2).
        config: Settings, as `resolve` returns them.
        schedule: Settings of this step.
        device: Where the networks are.
        precision: Autocast dtype; None computes in float32.
        hold_prototypes: The last layer stays as it is.

    Returns:
        "loss"; "entropy" of the teacher and "kl" between teacher and student, in nats; "deviation"
        of the student's features, times sqrt(d), so that 1 is as spread as can be; "grad_norm"
        before clipping, 0 where fp16 overflowed.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = schedule.learning_rate
        if any(parameter.ndim > 1 for parameter in group["params"]):
            group["weight_decay"] = schedule.weight_decay
    loss, entropy, deviation = torch.zeros(3, device=device).unbind()
    mean = torch.zeros_like(state.centre.value)
    for part in cut(batch, config.train):
        views = [to_views(part.batch[kind], device) for kind in ("global", "local")]
        crops = [view.flatten(0, 1) for view in views if len(view) > 0]
        num_images = views[0].shape[1]
        with reduce_gradients(network, part.is_last):
            with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                with torch.no_grad():
                    teacher_logits, _ = state.teacher(crops[:1])
                student_logits, features = network(crops)
            teacher_logits = teacher_logits.unflatten(0, (-1, num_images))
            target = teacher_probabilities(teacher_logits, state.centre.value, schedule.temperature)
            part_loss = dino_loss(
                student_logits.unflatten(0, (-1, num_images)),
                target,
                config.dino.student_temperature,
            )
            state.scaler.scale(part_loss * part.weight).backward()
        mean += batch_mean(teacher_logits, part.weight)
        loss += part_loss.detach() * part.weight
        entropy += teacher_entropy(target) * part.weight
        spread = feature_deviation(features[:num_images]) * math.sqrt(features.shape[1])
        deviation += spread * part.weight
    state.scaler.unscale_(state.optimizer)
    if hold_prototypes:
        hold_last_layer(state.student.head)
    grad_norm = nn.utils.clip_grad_norm_(state.student.parameters(), config.optim.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)

    state.centre.value.copy_(next_centre(state.centre.value, mean, config.dino.centre_momentum))
    update_teacher(state.teacher, state.student, schedule.momentum)
    return {
        "loss": loss,
        "entropy": entropy,
        "kl": loss - entropy,
        "deviation": deviation,
        # Where fp16 overflows, no step is taken; in the epoch's mean it counts as 0.
        "grad_norm": grad_norm.detach().nan_to_num(nan=0.0, posinf=0.0),
    }


def to_views(pixels: Tensor, device: torch.device) -> Tensor:
    """Return normalised views (v, b, 3, s, s) from uint8 (b, v, 3, s, s).

    The first axis of what comes out is the view, because the loss compares view with view.
    """
    num_images, num_views = pixels.shape[:2]
    # Put in order on the device: a copy made before it would no longer be pinned.
    by_view = pixels.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
    views = normalise(by_view)
    views = views.contiguous(memory_format=torch.channels_last)
    return views.unflatten(0, (num_views, num_images))


def collapse(row: Row, out_dim: int) -> str | None:
    """Return what an epoch's figures say has collapsed, and what to change; None where nothing has.

    Three signs (field reports to the authors' repositories): the loss stays at ln(out_dim), where
    teacher and student know nothing; the teacher's entropy is 0, one prototype for all images; the
    features are the same for all images.
    """
    if row["loss"] > 0.995 * math.log(out_dim):
        return (
            f"collapse: the loss is {row['loss']:.2f}, ln(out_dim) = {math.log(out_dim):.2f}: "
            "nothing is learned; lower dino.teacher_temperature, raise train.batch_size or "
            "optim.learning_rate"
        )
    if row["entropy"] < 1e-3:
        return (
            f"collapse: the teacher's entropy is {row['entropy']:.4f}: one prototype takes every "
            "image; raise dino.teacher_temperature, or lower dino.centre_momentum"
        )
    if row["deviation"] < 0.05:
        return (
            f"collapse: the features' deviation is {row['deviation']:.4f}: all images look alike; "
            "lower optim.learning_rate, or raise dino.ema_momentum"
        )
    return None


def fit(
    state: PretrainState,
    data: PretrainData,
    config: PretrainConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    notice: Callable[[], bool] = no_notice,
    until: int | None = None,
) -> Generator[Event]:
    """Pretrain from `state` to the end of the run, or of an epoch; see `run_steps` for the events.

    Args:
        state: Changed in place.
        data: From `open_data`.
        config: Settings, as `resolve` returns them.
        device: Where the networks are.
        precision: Autocast dtype; None computes in float32.
        notice: See `run_steps`.
        until: See `run_steps`.

    Raises:
        DivergedError: the loss became NaN or infinite, or, with `dino.stop_on_collapse`, training
            has collapsed.
    """
    plan = data.plan(config, state.progress.step)
    out_dim = config.dino.out_dim
    assert out_dim is not None
    set_recompute(state.student, config.train.recompute)
    network = data_parallel(state.student, device)
    if config.train.compile:
        network.compile()

    def take_step(batch: Batch) -> dict[str, Tensor]:
        step = state.progress.step
        return pretrain_step(
            state,
            network,
            batch,
            config,
            Schedule.at(step, plan.num_steps, config),
            device=device,
            precision=precision,
            hold_prototypes=step < config.dino.freeze_last_layer * plan.steps_per_epoch,
        )

    def finish_epoch(row: Row, validated: bool) -> str | None:
        schedule = Schedule.at(state.progress.step - 1, plan.num_steps, config)
        row["learning_rate"] = schedule.learning_rate
        row["teacher_temperature"] = schedule.temperature
        row["ema_momentum"] = schedule.momentum
        if validated:
            share = dimensions(state.encoder, data.views(device)) if rank() == 0 else 0.0
            row["dimensions"] = broadcast_float(share, device)
            if data.probed is not None:
                value = 0.0
                if rank() == 0:
                    scenes = (data.probed[index] for index in range(len(data.probed)))
                    value = probe(state.encoder, scenes, config.probe, device)
                row["probe_miou"] = broadcast_float(value, device)
        if state.progress.step < SHARE_BEFORE_ALARM * plan.num_steps:
            return None
        warning = collapse(row, out_dim)
        if warning is not None and config.dino.stop_on_collapse:
            raise DivergedError(warning)
        return warning

    state.student.train()
    yield from run_steps(
        state.progress,
        data.loader(config, state.progress.step, device),
        plan,
        config.train,
        network=network,
        device=device,
        take_step=take_step,
        finish_epoch=finish_epoch,
        notice=notice,
        until=until,
    )
