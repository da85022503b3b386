"""Image + strokes -> mask, with a network held in memory and at the image's own size.

The network sees the image at `data.long_side`; its logits, not its mask, are resized to the image's
own size, so that the outline is as smooth as the logits are.
"""

import logging
import math
import shlex
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from scribbleseg.checkpoint import list_broken, read_model, transfer
from scribbleseg.config import FinetuneConfig, Looker, StrokesConfig, require
from scribbleseg.datasets.doubts import Doubt, describe_doubts, find_doubts
from scribbleseg.datasets.files import IMAGE_SUFFIXES
from scribbleseg.datasets.scenes import (
    LABEL_SUFFIXES,
    RESPELL,
    UNLABELLED,
    Scene,
    ScenePaths,
    are_respelled,
    encode_png,
    is_predicted,
    list_files,
    read_scene,
)
from scribbleseg.datasets.transforms import normalise, to_network
from scribbleseg.device import find_device, pick_device
from scribbleseg.edges import follow_edges
from scribbleseg.errors import InputError
from scribbleseg.manifest import make_folder, write_bytes
from scribbleseg.models import build_model
from scribbleseg.runs import find_checkpoint
from scribbleseg.scribbles.encode import OBJECT

logger = logging.getLogger(__name__)

BULK = "predict.json"
"""What `train.predict` leaves beside its masks, to say what made them."""

# The coarsest stride of the deepest network (model.depth 6): divisible by every level's stride.
STRIDE = 32
# Probabilities that follow edges reach 0 and 1, whose logits are infinite: these are the last ones.
SURE = 1e-4


def predict_logits(
    model: nn.Module,
    image: UInt8[np.ndarray, "h w 3"],
    scribbles: UInt8[np.ndarray, "h w"],
    *,
    config: FinetuneConfig,
    device: torch.device | str,
    precision: torch.dtype | None = None,
) -> Float32[Tensor, "h w"]:
    """Return the logits of "object" at the image's own size.

    Args:
        model: maps (image "b 3 h w", strokes "b 2 h w") to an output with `.logits` "b 1 h w";
            it is run in evaluation mode, and left in the mode it was in.
        image: RGB, of any size.
        scribbles: 0 background, 1 object, 255 unlabelled.
        config: gives the scale, the strokes' encoding, and how logits are made.
        device: where the model is.
        precision: autocast dtype; None computes in float32.

    Returns:
        Logits on `device`, above 0 where the network's probability is above `predict.threshold`;
        made under inference mode (they cannot enter a backward pass).
    """
    (logits,) = predict_batch(
        model, [image], [scribbles], config=config, device=device, precision=precision
    )
    return logits


def predict_batch(
    model: nn.Module,
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    scribbles: Sequence[UInt8[np.ndarray, "h w"]],
    *,
    config: FinetuneConfig,
    device: torch.device | str,
    precision: torch.dtype | None = None,
) -> Float32[Tensor, "b h w"]:
    """Return the logits of several images of one size, from forward passes that they share.

    They differ from those of `predict_logits` in the last bits; see there for the rest.
    """
    device = torch.device(device)
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=precision, enabled=precision is not None),
        _evaluation_mode(model),
    ):
        looks = [
            _look(model, images, scribbles, config, device, round(scale * config.data.long_side))
            for scale in sorted(config.predict.scales)
        ]
        # On the finest one's grid.
        size = looks[-1].shape[-2:]
        logits = torch.stack([_resize(look, size) for look in looks]).mean(dim=0)
        logits -= log_odds(config.predict.threshold)
        if config.predict.edges:
            found = [
                torch.from_numpy(follow_edges(each.sigmoid().cpu().numpy(), image))
                for each, image in zip(logits, images, strict=True)
            ]
            logits = torch.stack(found).to(device).logit(eps=SURE)
        logits = _resize(logits, images[0].shape[:2])
        least = log_odds(config.predict.part_threshold) - log_odds(config.predict.threshold)
        if least > 0:
            logits = torch.stack(
                [
                    drop_parts(each, strokes, least)
                    for each, strokes in zip(logits, scribbles, strict=True)
                ]
            )
        return logits


def drop_parts(
    logits: Float32[Tensor, "h w"], strokes: UInt8[np.ndarray, "h w"], least: float
) -> Float32[Tensor, "h w"]:
    """Return the logits with those parts of the object below 0 that nothing speaks for.

    A part is a connected area, diagonals included, of logits above 0 and of object strokes. It
    stays if a stroke lies in it, or a logit of `least` or more. Of the others, what was above 0 is
    as far below, but no lower than -1: background, and not surely so (a probability of 0.73), which
    `sure` may ask for. Without object strokes all parts stay.
    """
    drawn = strokes == OBJECT
    if not drawn.any():
        return logits
    found = logits.cpu().numpy()
    above = found > 0
    number, parts = cv2.connectedComponents((above | drawn).astype(np.uint8))
    stays = np.zeros(number, dtype=bool)
    stays[parts[drawn | (found >= least)]] = True
    dropped = torch.from_numpy(above & ~stays[parts]).to(logits.device)
    return torch.where(dropped, -logits.clamp(max=1.0), logits)


def _look(
    model: nn.Module,
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    scribbles: Sequence[UInt8[np.ndarray, "h w"]],
    config: FinetuneConfig,
    device: torch.device,
    long_side: int,
) -> Float32[Tensor, "b h2 w2"]:
    """Return the logits at the network's scale, with this longer side."""
    inputs = [
        network_inputs(image, strokes, long_side, config.strokes, device)
        for image, strokes in zip(images, scribbles, strict=True)
    ]
    seen, drawn = (torch.cat(each) for each in zip(*inputs, strict=True))
    height, width = seen.shape[-2:]

    def logits(*inputs: Tensor) -> Tensor:
        return model(*pad(*inputs)).logits[:, 0, :height, :width].float()

    straight = logits(seen, drawn)
    if not config.predict.flip:
        return straight
    # One after the other: both at once would take more memory, and no less time on a CPU.
    mirrored = logits(seen.flip(-1), drawn.flip(-1))
    return (straight + mirrored.flip(-1)) / 2


def log_odds(probability: float) -> float:
    """Return the logit of a probability in [0, 1]: infinite at its ends."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


def _resize(logits: Float32[Tensor, "b h w"], size: Sequence[int]) -> Float32[Tensor, "b h2 w2"]:
    """Resize logits bilinearly to (height, width)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    size = list(size)
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def network_inputs(
    image: UInt8[np.ndarray, "h w 3"],
    scribbles: UInt8[np.ndarray, "h w"],
    long_side: int,
    strokes: StrokesConfig,
    device: torch.device,
) -> tuple[Float32[Tensor, "1 3 h2 w2"], Float32[Tensor, "1 2 h2 w2"]]:
    """Return the normalised image and the encoded strokes in [0, 1], with this longer side."""
    pixels, channels = to_network(
        image,
        scribbles,
        long_side=long_side,
        encoding=strokes.encoding,
        radius=strokes.radius,
    )
    return normalise(pixels.to(device)), channels.to(device).float() / 255


def pad(
    image: Float32[Tensor, "b 3 h w"], strokes: Float32[Tensor, "b 2 h w"]
) -> tuple[Float32[Tensor, "b 3 h2 w2"], Float32[Tensor, "b 2 h2 w2"]]:
    """Extend both to the right and downwards, to sizes that every level of a network divides.

    The image continues with its last pixels (zeros would be an edge to see); strokes do not.
    """
    height, width = image.shape[-2:]
    border = (0, -width % STRIDE, 0, -height % STRIDE)
    return F.pad(image, border, mode="replicate"), F.pad(strokes, border)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Generator[None]:
    """Switch the model to evaluation, and back to training if that is where it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def to_mask(
    logits: Float[Tensor, "h w"],
    scribbles: UInt8[np.ndarray, "h w"],
    *,
    honour_strokes: bool,
    sure: float = 0.5,
) -> UInt8[np.ndarray, "h w"]:
    """Return 1 where logits are above 0, else 0.

    With `honour_strokes`, pixels under a stroke take its label: the user has the last word. Other
    pixels whose label has a probability below `sure` [0.5, 1) become 255, ignore.
    """
    labels = (logits > 0).to(torch.uint8)
    mask = labels.masked_fill(logits.abs() < log_odds(sure), UNLABELLED).cpu().numpy()
    return np.where(scribbles == UNLABELLED, mask, scribbles) if honour_strokes else mask


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained network that turns photographs and strokes into masks."""

    config: FinetuneConfig
    """The settings it was trained with; `config.predict` says how logits become masks."""
    model: nn.Module
    """The network, in evaluation mode on `device`."""
    device: torch.device
    """Where it computes."""
    source: str
    """The checkpoint it came from, as the user named it."""

    def logits(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        strokes: UInt8[np.ndarray, "h w"],
    ) -> Float32[Tensor, "h w"]:
        """Return the logits of "object" at the image's own size; see `predict_logits`."""
        check_arrays(image, strokes)
        return predict_logits(
            self.model,
            image,
            strokes,
            config=self.config,
            device=self.device,
        )

    def logits_of(self, scenes: Sequence[Scene]) -> list[Float32[Tensor, "_ _"]]:
        """Return the logits of several scenes, in order; those of one size share forward passes."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, scene in enumerate(scenes):
            check_arrays(scene.image, scene.scribbles)
            groups.setdefault(scene.image.shape, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in groups.values():
            logits = predict_batch(
                self.model,
                [scenes[number].image for number in numbers],
                [scenes[number].scribbles for number in numbers],
                config=self.config,
                device=self.device,
            )
            found |= zip(numbers, logits, strict=True)
        return [found[number] for number in range(len(scenes))]

    def probabilities(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        strokes: UInt8[np.ndarray, "h w"],
    ) -> Float32[np.ndarray, "h w"]:
        """Return the probability of "object", in [0, 1], at the image's own size.

        It is shifted to be 0.5 where the network's is `predict.threshold`.

        Args:
            image: RGB, of any size.
            strokes: 0 background, 1 object, 255 unlabelled.

        Raises:
            InputError: Arrays of another type, shape or coding.
        """
        return self.logits(image, strokes).sigmoid().cpu().numpy()

    def predict(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        strokes: UInt8[np.ndarray, "h w"],
        *,
        honour_strokes: bool = True,
    ) -> UInt8[np.ndarray, "h w"]:
        """Return the mask, 0 background and 1 object, at the image's own size.

        Args:
            image: RGB, of any size.
            strokes: 0 background, 1 object, 255 unlabelled.
            honour_strokes: Pixels under a stroke take the stroke's label.

        Raises:
            InputError: Arrays of another type, shape or coding.
        """
        logits = self.logits(image, strokes)
        return to_mask(logits, strokes, honour_strokes=honour_strokes)


def check_arrays(image: np.ndarray, strokes: np.ndarray) -> None:
    """Raise an `InputError` unless the arrays are what `Predictor` documents."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(
            f"image: found {image.dtype} of shape {image.shape}, expected uint8 RGB (h, w, 3)"
        )
    if strokes.dtype != np.uint8 or strokes.shape != image.shape[:2]:
        raise InputError(
            f"strokes: found {strokes.dtype} of shape {strokes.shape}, expected uint8 of the "
            f"image's size {image.shape[:2]}"
        )
    others = sorted(set(np.unique(strokes).tolist()) - {0, 1, UNLABELLED})
    if others:
        raise InputError(
            f"strokes: found the values {others[:5]}, expected 0 background, 1 object and "
            f"{UNLABELLED} unlabelled"
        )


def load(
    checkpoint: str | Path,
    *,
    device: str | None = None,
    flip: bool | None = None,
    scales: tuple[float, ...] | None = None,
    edges: bool | None = None,
    threshold: float | None = None,
    part_threshold: float | None = None,
) -> Predictor:
    """Load a trained network, ready to predict.

    Args:
        checkpoint: A checkpoint folder, a run or sweep (its best is taken), as local path or URI,
            or "released:NAME".
        device: "cuda", "mps", "cpu", ...; None takes the first of these that the machine has.
        flip: Average with the mirrored image: a little better, twice the time; None: as the
            checkpoint's own settings say.
        scales: Average looks at these multiples of the network's size, 0.25 to 4; None: as the
            checkpoint's own settings say.
        edges: Follow the image's own edges; None: as the checkpoint's own settings say.
        threshold: Probability from which on a pixel is object, 0.01 to 0.99; None: as the
            checkpoint's own settings say.
        part_threshold: Probability that a part of the object without a stroke must reach somewhere
            to be kept, 0 to 1; None: as the checkpoint's own settings say.

    Raises:
        InputError: Not a whole checkpoint, one of another format, no such device, or scales or
            a threshold out of their range.
    """
    place = find_device(device) if device else pick_device()
    with tempfile.TemporaryDirectory(prefix="scribbleseg-") as scratch:
        found = read_model(find_checkpoint(str(checkpoint), Path(scratch) / "checkpoint"))
    if not isinstance(found.config, FinetuneConfig):
        raise InputError(
            f"{checkpoint}: holds a pretrained encoder, expected a segmentation network; fine-tune "
            f"it first: python -m train.finetune RECIPE --init-from {checkpoint}"
        )
    broken = list_broken(found.weights)
    if broken:
        raise InputError(
            f"{checkpoint}: NaN or infinity in {broken}; expected finite weights; take an earlier "
            "checkpoint, or train again"
        )
    # First without memory, which settings that do not belong to the weights could ask much of.
    with torch.device("meta"):
        transfer(build_model(found.config.model), found.weights)
    model = build_model(found.config.model)
    transfer(model, found.weights)
    own = found.config.predict
    chosen = replace(
        own,
        flip=own.flip if flip is None else flip,
        scales=own.scales if scales is None else scales,
        edges=own.edges if edges is None else edges,
        threshold=own.threshold if threshold is None else threshold,
        part_threshold=own.part_threshold if part_threshold is None else part_threshold,
    )
    return Predictor(
        config=replace(found.config, predict=chosen),
        # As in training: convolutions are faster so.
        model=model.eval().to(place, memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        device=place,
        source=str(checkpoint),
    )


def load_as_asked(command: Looker, *, device: str | None = None) -> Predictor:
    """Load the network that a command names, to look as the command says; see `load`."""
    return load(
        command.checkpoint,
        device=device,
        flip=command.flip,
        scales=command.scales,
        edges=command.edges,
        threshold=command.threshold,
        part_threshold=command.part_threshold,
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network makes of one scene, as PNG files."""

    mask: bytes
    """Indexed, 0 background and 1 object; 255 where that is not sure enough."""
    probabilities: bytes | None
    """8-bit grey, 255 x the probability of "object" before strokes are honoured; None: not asked
    for.
    """


def answer(
    predictor: Predictor,
    scene: Scene,
    *,
    probabilities: bool,
    honour_strokes: bool,
    sure: float = 0.5,
) -> Answer:
    """Predict one scene; a folder's masks are these, on one machine and on a cluster.

    Args:
        predictor: The network.
        scene: A photograph and its strokes.
        probabilities: Encode them too.
        honour_strokes: Pixels under a stroke take the stroke's label.
        sure: Pixels whose label is less probable become 255, ignore [0.5, 1).
    """
    logits = predictor.logits(scene.image, scene.scribbles)
    mask = to_mask(logits, scene.scribbles, honour_strokes=honour_strokes, sure=sure)
    return Answer(
        mask=mask_png(mask),
        probabilities=probabilities_png(logits) if probabilities else None,
    )


def mask_png(mask: UInt8[np.ndarray, "h w"]) -> bytes:
    """Return a mask as a PNG, indexed, that tells what made it."""
    return encode_png(mask, palette=True, predicted=True)


def probabilities_png(logits: Float[Tensor, "h w"]) -> bytes:
    """Return 255 x the probability of "object", rounded, as a grey PNG that tells what made it."""
    grey = (logits.sigmoid() * 255).round().to(torch.uint8).cpu().numpy()
    return encode_png(grey, predicted=True)


@dataclass(frozen=True, kw_only=True)
class MaskWritten:
    """One image of a folder is done."""

    stem: str
    """The image's file name without its suffix."""
    done: int
    """How many images are done, this one included."""
    total: int
    """How many images there are."""


def predict_folder(
    predictor: Predictor,
    images: Path,
    scribbles: Path,
    out: Path,
    *,
    probabilities: bool = False,
    honour_strokes: bool = True,
    sure: float = 0.5,
) -> Iterator[MaskWritten]:
    """Predict every image of a folder; iterate over the result to make it happen.

    Every file is read once before the first mask is written, so that bad input is found while there
    is still nothing to clean up.

    Args:
        predictor: The network.
        images: Folder of STEM.jpg or STEM.png.
        scribbles: Folder of STEM.png: 0 background, 1 object, 255 unlabelled.
        out: Folder for the masks STEM.png (indexed, 0 background and 1 object); made if missing.
        probabilities: Also write `out`/probabilities/STEM.png: 8-bit grey, 255 x the probability of
            "object" before strokes are honoured.
        honour_strokes: Pixels under a stroke take the stroke's label.
        sure: Pixels whose label is less probable become 255, ignore [0.5, 1).

    Raises:
        InputError: A folder is missing or empty, stems do not match, a file breaks the data
            contract, `out` is one of the folders that are read or holds files of these images
            that scribbleseg did not make, or `sure` is out of range.
    """
    require(0.5 <= sure < 1, "sure", sure, "a probability of 0.5 or more, below 1")
    scenes = _pair(images, scribbles)
    written = {out.resolve(), (out / "probabilities").resolve()}
    if written & {images.resolve(), scribbles.resolve()}:
        raise InputError(f"{out}: the masks would replace what is read; give another folder as out")
    for folder in (out, out / "probabilities") if probabilities else (out,):
        if folder.exists() and not folder.is_dir():
            raise InputError(
                f"{folder}: found a file, expected a folder for what is predicted; rename or "
                "remove it, or give another folder as out"
            )
        _require_own(folder, scenes)
    if (out / BULK).is_file():
        raise InputError(
            f"{out}: holds {BULK}, so its masks are of train.predict, which says there what made "
            "them; give another folder as out"
        )
    doubts: list[Doubt] = []
    for paths in scenes:
        doubts += find_doubts(read_scene(paths), paths.image, paths.scribbles)
    for line in describe_doubts(doubts):
        logger.warning("warning: %s", line)
    told = partial(
        answer,
        predictor,
        probabilities=probabilities,
        honour_strokes=honour_strokes,
        sure=sure,
    )
    return _write_masks(told, scenes, out)


def _require_own(out: Path, scenes: list[ScenePaths]) -> None:
    """Raise an `InputError` where masks would be replaced that may be the work of a hand."""
    there = [path for scene in scenes if (path := out / f"{scene.stem}.png").exists()]
    others = [path for path in there if not is_predicted(path)]
    if others:
        raise InputError(
            f"{others[0]}: {len(others)} file(s) in this folder were not made by scribbleseg, or "
            "were changed since; they would be replaced: give another folder as out, or remove them"
        )


def _pair(images: Path, scribbles: Path) -> list[ScenePaths]:
    """Return the images and the scribbles of equal stems, or raise an `InputError`."""
    photographs = list_files(images, IMAGE_SUFFIXES)
    if not photographs:
        raise InputError(f"{images}: found no .jpg or .png file, expected photographs")
    drawings = list_files(scribbles, LABEL_SUFFIXES)
    for lacking, there, folder in (
        (sorted(photographs.keys() - drawings.keys()), images, scribbles),
        (sorted(drawings.keys() - photographs.keys()), scribbles, images),
    ):
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            kinds = " or ".join(LABEL_SUFFIXES if folder == scribbles else IMAGE_SUFFIXES)
            remedy = "add the missing files or remove their partners"
            if are_respelled(photographs, drawings):
                remedy = RESPELL.format(shlex.join([str(images), str(scribbles)]))
            raise InputError(
                f"{folder}: no {kinds} file for {', '.join(lacking[:3])}{more}, which {there} has; "
                f"expected the same stems in both; {remedy}"
            )
    return [
        ScenePaths(stem=stem, image=path, scribbles=drawings[stem], ground_truth=None)
        for stem, path in photographs.items()
    ]


def _write_masks(
    told: Callable[[Scene], Answer], scenes: list[ScenePaths], out: Path
) -> Iterator[MaskWritten]:
    """Write one mask after the other; see `predict_folder`."""
    make_folder(out)
    for done, paths in enumerate(scenes, start=1):
        made = told(read_scene(paths))
        if made.probabilities is not None:
            (out / "probabilities").mkdir(exist_ok=True)
            write_bytes(out / "probabilities" / f"{paths.stem}.png", made.probabilities)
        write_bytes(out / f"{paths.stem}.png", made.mask)
        yield MaskWritten(stem=paths.stem, done=done, total=len(scenes))
