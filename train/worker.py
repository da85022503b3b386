"""One rank of a run: iterates `fit` and acts on its events.

What differs between fine-tuning and pretraining is put together by `assemble_finetune` and
`assemble_pretrain`; everything after that is the same. Rank 0 writes the run folder; every rank
reports every epoch to Ray, which hangs otherwise. A sweep's trial of one worker is carried by
`train_run` too, and reports to Ray Tune.
"""

import contextlib
import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from scribbleseg import checkpoint as checkpoints
from scribbleseg.config import (
    FinetuneConfig,
    PretrainConfig,
    config_hash,
    from_dict,
    to_dict,
)
from scribbleseg.datasets.cache import SceneCache
from scribbleseg.device import autocast_dtype, pick_device, prepare_cpu
from scribbleseg.distributed import barrier, broadcast, gather, rank, world_size
from scribbleseg.errors import DivergedError, InputError
from scribbleseg.loops import pretrain, segment
from scribbleseg.loops.batches import BatchPlan, open_data
from scribbleseg.loops.state import TrainState, init_state
from scribbleseg.loops.steps import EpochDone, Event, Row, SaveDue, StepDone, no_notice
from scribbleseg.progress import narrated
from scribbleseg.report.pretraining import NUM_SCENES, draw_picture, picture_name
from scribbleseg.runs import RunFolder
from train.places import require_mark
from train.progress import Board, RemoteBoard
from train.saving import Saver, attempt, note_best

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Config = FinetuneConfig | PretrainConfig
State = TrainState | pretrain.PretrainState
T = TypeVar("T")

SECONDS_BETWEEN_POSTS = 1.0
SKIPPED_SHOWN = 5
# Figures of an epoch that its line shows, by key, where it has them.
SHOWN = {
    "miou": "mIoU",
    "object_iou": "object",
    "background_iou": "background",
    "entropy": "entropy",
    "kl": "KL",
    "deviation": "spread",
    "dimensions": "dimensions",
    "probe_miou": "probe mIoU",
}
# What a step waited for, by key: shares, shown in per cent.
WAITS = {"waiting": "waiting", "all_reduce": "all-reduce"}
# How long a run takes is told after these steps, unless it is so short that nobody plans with it.
STEPS_TIMED, SHORT_SECONDS = 4, 60
VERSIONED = ("scribbleseg", "torch", "ray", "albumentations", "numpy")


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One rank's part of a run, ready to be iterated."""

    kind: str
    """segmentation or dino."""
    config: Config
    """All settings, those that follow from the data too."""
    state: State
    plan: BatchPlan
    fingerprint: str
    """Of the data."""
    subject: str
    """What is trained on what, in a few words."""
    warnings: list[str]
    """What a person should know before the start."""
    events: Callable[..., Generator[Event]]
    """Begins the training: `fit`, without anything but `notice` and `until` to be given."""
    draw: Callable[[], bytes] | None = None
    """Returns a picture of what the encoder sees now, as a JPEG; None: there are no pictures."""


def train_worker(payload: dict[str, Any]) -> dict[str, str]:
    """Run one rank of fine-tuning; see `train.launch.launch_job`.

    Args:
        payload: "config" (a dictionary), "recipe", "git_commit", "storage", "name", "board",
            "cpus", "gpus"; "mark", where the command left one, see `train.places.marked`; and
            "until" where it is to end after that epoch, to go on another time.
    """
    return _last_words(payload, assemble_finetune)


def pretrain_worker(payload: dict[str, Any]) -> dict[str, str]:
    """Run one rank of DINO pretraining; the payload is that of `train_worker`."""
    return _last_words(payload, assemble_pretrain)


def assemble_finetune(settings: dict[str, Any], device: torch.device, *, resumed: bool) -> Assembly:
    """Put a fine-tuning run together."""
    config = from_dict(FinetuneConfig, settings)
    precision = autocast_dtype(config.train.precision, device)
    data = open_data(config)
    state = init_state(config, device, precision, resumed=resumed)
    numbers = sum(parameter.numel() for parameter in state.model.parameters())
    return Assembly(
        kind="segmentation",
        config=config,
        state=state,
        plan=data.plan(config),
        fingerprint=data.cache.fingerprint,
        subject=(
            f"{config.model.architecture} ({numbers / 1e6:.1f} M parameters) on "
            f"{len(data.samples)} images, validated on {data.num_validation}"
        ),
        warnings=[f"warning: {line}" for line in data.warnings],
        events=partial(segment.fit, state, data, config, device=device, precision=precision),
    )


def assemble_pretrain(settings: dict[str, Any], device: torch.device, *, resumed: bool) -> Assembly:
    """Put a pretraining run together; a resumed one gets its weights from its own checkpoint."""
    config = from_dict(PretrainConfig, settings)
    precision = autocast_dtype(config.train.precision, device)
    data = pretrain.open_data(config)
    resolved = pretrain.resolve(config, len(data.samples))
    state = pretrain.init_state(resolved, device, precision)
    numbers = sum(parameter.numel() for parameter in state.encoder.parameters())
    probed = data.probed

    def draw(scenes: SceneCache) -> bytes:
        shown = (scenes[index] for index in range(min(NUM_SCENES, len(scenes))))
        return draw_picture(state.encoder, shown, config.probe, device)

    skipped = data.cache.skipped
    warnings = [f"skipped {path}: {reason}" for path, reason in skipped[:SKIPPED_SHOWN]]
    if len(skipped) > SKIPPED_SHOWN:
        warnings.append(f"... and {len(skipped) - SKIPPED_SHOWN} more skipped")
    if probed is not None:
        warnings += [f"warning: {line}" for line in probed.doubts]
    return Assembly(
        kind="dino",
        config=resolved,
        state=state,
        plan=data.plan(resolved),
        fingerprint=data.cache.fingerprint,
        subject=(
            f"DINO of {config.model.architecture}'s encoder ({numbers / 1e6:.1f} M parameters, "
            f"{resolved.dino.out_dim} prototypes) on {len(data.samples)} images, "
            f"{len(skipped)} skipped"
        ),
        warnings=warnings,
        events=partial(pretrain.fit, state, data, resolved, device=device, precision=precision),
        draw=None if probed is None else lambda: draw(probed),
    )


def _last_words(payload: dict[str, Any], assemble: Callable[..., Assembly]) -> dict[str, str]:
    """Run one rank; return what a restart cannot mend, so that Ray does not try."""
    try:
        train_run(payload, assemble, _report, Notice())
    except InputError as error:
        return {"input_error": str(error)}
    except DivergedError as error:
        return {"diverged": str(error)}
    return {}


def train_run(
    payload: dict[str, Any],
    assemble: Callable[..., Assembly],
    report: Callable[[RunFolder, list[Row], int | None], None],
    notice: Callable[[], bool] = no_notice,
) -> None:
    """Run one rank from the last whole checkpoint, where there is one, as far as it is to go.

    A run that is to end before its last epoch has its checkpoint written, and is not finished.

    Args:
        payload: See `train_worker`.
        assemble: Puts the run together.
        report: Tells whoever runs this rank about the last of these epochs, and of which epoch the
            last whole checkpoint is, as rank 0 knows; it may raise to end the rank.
        notice: Says whether this machine will soon be taken away; see `run_steps`.

    Raises:
        InputError: the input is wrong.
        DivergedError: the loss is no longer a number.
        OSError: the last checkpoint cannot be written.
    """
    device = worker_device(payload)
    if device.type == "cpu":
        # Ray sets OMP_NUM_THREADS only where nothing else has; this decides the speed on CPUs.
        prepare_cpu(payload["cpus"])
    run = RunFolder.at(payload["storage"], payload["name"])
    mark = payload.get("mark")
    if mark is not None:
        _on_all_ranks(lambda: require_mark(run, mark))
    resumed = _last_checkpoint(run)
    say = payload["board"].say
    # Every machine fetches its own copy of remote data, so each says who it is.
    node = f"{platform.node()}: " if world_size() > 1 else ""
    with narrated(lambda line: say(node + line)):
        job = _on_all_ranks(
            lambda: assemble(payload["config"], device, resumed=resumed is not None)
        )
    check_data(gather(job.fingerprint), run, resumed=resumed is not None)
    if resumed is not None:
        _on_all_ranks(lambda: _resume(job, run, resumed))
    epochs, history = job.config.train.epochs, job.state.progress.history
    screen = Screen(board=payload["board"], num_epochs=epochs, num_steps=job.plan.num_steps)
    screen.say(_headline(job, run, device))
    for line in job.warnings:
        screen.say(line)
    record = RunRecord.start(payload, job, run)
    saver = Saver(run, job.config, resumed)
    # Closed here and not when they are collected: a sweep's process goes on with another run.
    events = job.events(notice=notice, until=payload.get("until"))
    with record, saver, contextlib.closing(events):
        for event in events:
            match event:
                case StepDone():
                    screen.step(event)
                case SaveDue():
                    saver.save(event, job.state)
                case EpochDone():
                    screen.epoch(event)
                    record.epoch(event, history)
                    report(run, history, saver.saved_epoch)
        if job.state.progress.step == job.plan.num_steps:
            record.finish(history)
    barrier()


def _resume(job: Assembly, run: RunFolder, epoch: int) -> None:
    """Put a run's state back to what it was at a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.fetch(epoch, Path(scratch) / "resumed")
        job.state.load_dict(checkpoints.read_trainer(folder))
        if rank() == 0:
            # What was killed between a checkpoint and the record of the best could not say so.
            note_best(run, job.config, epoch, checkpoints.read_model(folder).metrics)


@dataclass
class Notice:
    """Says, once for each, whether Ray has told that nodes of this job will be taken away.

    Ray answers every rank alike, and only when all of them have asked.
    """

    told: ray.train.PreemptionInfo | None = None
    """What was said before."""

    def __call__(self) -> bool:
        """Ask Ray."""
        before, self.told = self.told, ray.train.get_preemption_info()
        return self.told is not None and self.told != before


def _last_checkpoint(run: RunFolder) -> int | None:
    """Return the epoch of the checkpoint to go on from, which is rank 0's choice for all."""
    epoch = None
    if rank() == 0:
        run.finish_save()
        epoch = run.last(hashed=True)
    return broadcast(epoch)


def _on_all_ranks(make: Callable[[], T]) -> T:
    """Return what this rank has made once every rank has.

    Raises:
        InputError: the input of some rank is wrong, such as data that only one node has: alone, the
            others would wait for it until they time out.
    """
    made, fault = None, None
    try:
        made = make()
    except InputError as error:
        fault = str(error)
    faults = [each for each in gather(fault) if each is not None]
    if faults:
        raise InputError(faults[0])
    return cast(T, made)


def check_data(fingerprints: list[str], run: RunFolder, *, resumed: bool) -> None:
    """See that all ranks have the same data, and a run that goes on those it began with.

    Other data have other epochs: the checkpoint's steps would count for other ones, and what was
    written since would look older than what was there.

    Args:
        fingerprints: Every rank's.
        run: Its record has the fingerprint of the data it began with.
        resumed: The run goes on from a checkpoint.

    Raises:
        InputError: the data differ.
    """
    if len(set(fingerprints)) > 1:
        raise InputError(
            f"data of {run.name}: the workers' copies differ (fingerprints "
            f"{', '.join(each[:8] for each in fingerprints)}); expected the same files on every "
            "node; copy them anew"
        )
    # Every rank reads the record, so that all of them refuse.
    record = run.read_record() if resumed else None
    before = (record or {}).get("data_fingerprint")
    if before is not None and before != fingerprints[0]:
        raise InputError(
            f"data of {run.name}: they have changed since the run began (fingerprint "
            f"{fingerprints[0][:8]}, it was {before[:8]}); --fresh starts anew beside it, or put "
            "back the data that were there"
        )


def worker_device(payload: dict[str, Any]) -> torch.device:
    """Return the device that this rank computes on: Ray's choice where it runs several."""
    if dist.is_initialized():
        return ray.train.torch.get_device()
    return pick_device(gpus=payload["gpus"] > 0)


def _report(run: RunFolder, history: list[Row], saved_epoch: int | None) -> None:
    """Tell Ray about the epoch; rank 0 points at our own checkpoint, which Ray does not copy."""
    pointer = None
    if rank() == 0 and saved_epoch is not None:
        pointer = ray.train.Checkpoint(run.checkpoint_path(saved_epoch), run.filesystem)
    ray.train.report(
        dict(history[-1]),
        checkpoint=pointer,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )


def _headline(job: Assembly, run: RunFolder, device: torch.device) -> str:
    """Return what a run is about to do, in one line."""
    precision = autocast_dtype(job.config.train.precision, device) or torch.float32
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    step = job.state.progress.step
    return (
        f"{run.name}: {job.subject}; "
        f"{job.config.train.epochs} epochs of {job.plan.steps_per_epoch} steps; "
        f"{world_size()} worker(s) on {device.type}{threads}, "
        f"{str(precision).removeprefix('torch.')}"
        + (f", going on after step {step:,}" if step else "")
    )


@dataclass(kw_only=True)
class Screen:
    """Posts rank 0's progress to the driver's board, not more often than eyes can follow."""

    board: Board | RemoteBoard
    num_epochs: int
    num_steps: int
    posted: float = 0.0
    figures: str = ""
    timed: tuple[int, float] | None = None
    """The first step here, and when it had been taken."""

    def say(self, line: str) -> None:
        """Show a line that stays."""
        if rank() == 0:
            self.board.say(line)

    def step(self, event: StepDone) -> None:
        """Show a step, if the last one shown is old enough."""
        if rank() != 0:
            return
        self._estimate(event)
        now = time.monotonic()
        if now - self.posted < SECONDS_BETWEEN_POSTS:
            return
        self.posted = now
        text = f"epoch {event.epoch}/{self.num_epochs} loss {event.loss.item():.3f}{self.figures}"
        self.board.post(event.step, self.num_steps, text)

    def _estimate(self, event: StepDone) -> None:
        """Say once, after a few steps, how long the run will take: an epoch can take hours.

        The first step does not count: it waits for loaders to start and kernels to be chosen.
        """
        first, began = self.timed or (event.step, None)
        if event.step - first not in (0, STEPS_TIMED):
            return
        # The device may be steps behind; reading the loss waits for it.
        event.loss.item()
        now = time.monotonic()
        if began is None:
            self.timed = (first, now)
            return
        left = (self.num_steps - event.step) * (now - began) / STEPS_TIMED
        if left > SHORT_SECONDS:
            self.say(f"about {_duration(left)} to go, by its first steps; validation on top")

    def epoch(self, event: EpochDone) -> None:
        """Show the figures of an epoch."""
        row = event.metrics
        left = (self.num_epochs - event.epoch) * row["seconds"]
        shown = "".join(f"  {name} {row[key]:.3f}" for key, name in SHOWN.items() if key in row)
        shown += "".join(f"  {name} {row[key]:.0%}" for key, name in WAITS.items() if key in row)
        if "miou" in row:
            self.figures = f" mIoU {row['miou']:.3f}"
        self.say(
            f"epoch {event.epoch:>4}/{self.num_epochs}  loss {row['loss']:.3f}{shown}"
            f"  {row['seconds']:.0f} s  about {_duration(left)} left"
        )
        if event.warning is not None:
            self.say(f"warning: {event.warning}")


def _duration(seconds: float) -> str:
    """Return a time a person can plan with: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(kw_only=True)
class RunRecord:
    """Rank 0's run.json, metrics.jsonl, pictures and TensorBoard files; other ranks write none."""

    run: RunFolder
    facts: dict[str, Any]
    draw: Callable[[], bytes] | None
    began: float
    num_shown: int
    """Epochs that TensorBoard's files hold."""
    folder: Path
    """Where they are written: on this machine, because TensorBoard writes nowhere else."""
    writer: "SummaryWriter | None" = None

    @staticmethod
    def start(payload: dict[str, Any], job: Assembly, run: RunFolder) -> "RunRecord":
        """Write run.json as the run begins, or goes on."""
        before = run.read_record() or {}
        spent = float(before.get("wall_time", 0.0))
        facts = {
            "format": 1,
            "kind": job.kind,
            "recipe": payload["recipe"],
            # As it was asked for: the same command must find the same run again.
            "config": payload["config"],
            "config_hash": config_hash(payload["config"]),
            "resolved": to_dict(job.config),
            "git_commit": payload["git_commit"],
            "data_fingerprint": job.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
            "seed": job.config.train.seed,
            "world_size": world_size(),
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
            "wall_time": spent,
            "finished": False,
        }
        if rank() == 0:
            run.write_json("run.json", facts)
        return RunRecord(
            run=run,
            facts=facts,
            draw=job.draw,
            began=time.monotonic() - spent,
            num_shown=len(job.state.progress.history),
            folder=run.local_path / "tensorboard" if run.local_path else Path(tempfile.mkdtemp()),
        )

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_writer()
        if self.run.local_path is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def epoch(self, event: EpochDone, history: list[Row]) -> None:
        """Write the metrics of all epochs so far."""
        if rank() != 0:
            return
        self.facts["wall_time"] = time.monotonic() - self.began
        # The next epoch writes all of it again, so a full disk costs nothing here.
        attempt(lambda: self.run.write_metrics(history))
        attempt(lambda: self.run.write_json("run.json", self.facts))
        attempt(lambda: self._write_scalars(history))
        draw = self.draw
        if draw is not None and "probe_miou" in event.metrics:
            name = picture_name(event.epoch)
            attempt(lambda: self.run.write_file(name, draw()))

    def _write_scalars(self, history: list[Row]) -> None:
        """Write what TensorBoard's files lack, and copy them to a run that is elsewhere."""
        try:
            if self.writer is None:
                # Imported when the first epoch is done: the way to the first step is shorter.
                from torch.utils.tensorboard import SummaryWriter

                # An epoch that is computed again after a restart replaces the one lost.
                self.writer = SummaryWriter(str(self.folder), purge_step=self.num_shown + 1)
            for row in history[self.num_shown :]:
                for key, value in row.items():
                    self.writer.add_scalar(key, value, int(row["epoch"]))
            self.writer.flush()
        except OSError:
            # One that has failed writes nothing more, ever.
            self._close_writer()
            raise
        if self.run.local_path is None:
            for file in self.folder.iterdir():
                self.run.write_file(f"tensorboard/{file.name}", file.read_bytes())
        self.num_shown = len(history)

    def _close_writer(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
            self.writer = None

    def finish(self, history: list[Row]) -> None:
        """Mark the run as finished."""
        if rank() == 0:
            self.facts |= {"finished": True, "wall_time": time.monotonic() - self.began}
            self.run.write_metrics(history)
            self.run.write_json("run.json", self.facts)
