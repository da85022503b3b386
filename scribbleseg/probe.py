"""Frozen features + strokes -> mask, with nothing trained: a look at an encoder while it pretrains.

Each pixel takes the label of the stroke that is nearest in feature space. The figure rises when
pixels of one object come to look alike to the encoder and different from their surroundings, which
is what fine-tuning needs; it costs milliseconds per image and has no settings to tune.

The levels at strides 4 to 16 count, and count the same. Finer ones know colour and edges, for which
random weights do as well; with them the figure hardly told a pretrained encoder from a random one
whose normalisation had seen a few images. On coarser ones a stroke and what is beside it are one.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor, nn

from scribbleseg.config import ProbeConfig, StrokesConfig
from scribbleseg.datasets.scenes import Scene, ScenePaths, list_scenes
from scribbleseg.errors import InputError
from scribbleseg.losses.dino import effective_rank
from scribbleseg.metrics import confusion
from scribbleseg.models.vit import VitEncoder
from scribbleseg.predict import network_inputs, pad, to_mask

T = TypeVar("T")

GRID_STRIDE = 4
"""Network pixels per cell of the grid on which features are compared."""
PERCENTILES = (0.02, 0.98)
"""Shares of a picture's values that become black and full brightness."""
FINEST_STRIDE, COARSEST_STRIDE = 4, 16
"""Of the levels that count, in network pixels."""
# Similarities are computed for this many pixels at a time: all at once they grow with the square
# of the image's area.
CHUNK = 4096


def list_probe_scenes(config: ProbeConfig, cache_dir: str | None = None) -> list[ScenePaths]:
    """Return `num_images` labelled samples, spread evenly over the sorted stems.

    There are fewer where fewer have a mask, and none where no root is set. Remote ones are kept in
    `cache_dir`, see `remote.local_copy`.

    Raises:
        InputError: the split is missing, breaks the data contract, or has no mask at all.
    """
    if config.root is None:
        return []
    scenes = list_scenes(config.root, config.split, need_masks=False, cache_dir=cache_dir)
    labelled = [scene for scene in scenes if scene.ground_truth is not None]
    if not labelled:
        raise InputError(
            f"{config.root}/{config.split}/ground_truth: found no mask of any image, and the probe "
            "needs some; name another --probe.split, or set --probe.root None for no probe"
        )
    return choose_evenly(labelled, config.num_images)


def choose_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items, evenly spread in order, the first and the last among them."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[position] for position in positions]


def probe(
    encoder: nn.Module,
    scenes: Iterable[Scene],
    config: ProbeConfig,
    device: torch.device | str,
) -> float:
    """Return the mean over images of the nearest stroke's mIoU, in [0, 1].

    Every image is scored at its own size, and pixels under a stroke get no help from it.

    Args:
        encoder: Maps an image "1 3 h w" to feature maps; it is run in evaluation mode, and left in
            the mode it was in.
        scenes: Samples with masks, at least one.
        config: Gives the scale.
        device: Where the encoder is.
    """
    scores: list[float] = []
    with _frozen(encoder):
        for scene in scenes:
            assert scene.mask is not None, f"{scene.stem} has no mask to be scored against"
            features, strokes, seen = _look(encoder, scene, config, device)
            logits = _enlarge(nearest_stroke_logits(features, strokes)[None], GRID_STRIDE, seen)
            size = scene.mask.shape
            logits = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)
            prediction = to_mask(logits[0, 0], scene.scribbles, honour_strokes=False)
            scores.append(confusion(prediction, scene.mask).miou)
    return fmean(scores)


def dimensions(encoder: nn.Module, views: Float[Tensor, "n 3 h w"]) -> float:
    """Return which share of its channels an encoder makes use of, in (0, 1]; no label is needed.

    At every level, the effective rank of the features at some positions of all views over the
    number of channels; then the mean over levels. Deviation and entropy miss a collapse to a few
    dimensions (arXiv 2110.09348): images still differ, but most channels repeat what others say.

    Args:
        encoder: Maps images to feature maps; it is run in evaluation mode, and left in the mode it
            was in.
        views: Normalised RGB, where the encoder is. More positions than channels are wanted.
    """
    with _frozen(encoder):
        # A few views at a time: the finest maps of all together are large.
        parts = [list(map(_some_pixels, encoder(part))) for part in views.split(8)]
        levels = [torch.cat(same_level) for same_level in zip(*parts, strict=True)]
        return fmean(effective_rank(level).item() / level.shape[1] for level in levels)


def _some_pixels(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "m c"]:
    """Return the features at the points of a grid, at most 8 by 8 in each map."""
    height, width = (min(8, side) for side in maps.shape[-2:])
    return F.interpolate(maps, size=(height, width), mode="nearest").movedim(1, -1).flatten(0, 2)


def levels_that_count(
    maps: Sequence[Float[Tensor, "1 _ _ _"]], image: Float[Tensor, "1 3 h w"]
) -> list[Float[Tensor, "1 _ _ _"]]:
    """Return those of an encoder's maps that have a stride of 4 to 16, or else its coarsest one."""
    strides = [image.shape[-1] / each.shape[-1] for each in maps]
    kept = [
        each
        for each, stride in zip(maps, strides, strict=True)
        if FINEST_STRIDE <= stride <= COARSEST_STRIDE
    ]
    return kept or [maps[-1]]


def dense_features(
    maps: Sequence[Float[Tensor, "1 _ _ _"]], size: tuple[int, int]
) -> Float[Tensor, "d h w"]:
    """Bring all feature maps of one image to one size and stack their channels.

    Each map is L2-normalised at every pixel and weighted so that the cosine of two pixels is the
    mean of their cosines in the single maps, whatever their channels and magnitudes.

    Args:
        maps: An encoder's output, of any strides that cover the same area.
        size: Height and width of what comes out.
    """
    levels = [F.normalize(_resize(each, size), dim=1) for each in maps]
    return torch.cat(levels, dim=1)[0] / len(levels) ** 0.5


def nearest_stroke_logits(
    features: Float[Tensor, "d h w"], strokes: Bool[Tensor, "2 h w"]
) -> Float[Tensor, "h w"]:
    """Return the cosine similarity to the nearest object stroke minus that to the nearest other.

    With strokes of one kind alone, everything is of that kind: 1 (object) or -1 (background)
    everywhere. Without any, -1: nothing says that there is an object.

    Args:
        features: One vector per pixel.
        strokes: Pixels under object strokes, then those under background strokes.
    """
    has_object, has_background = strokes.flatten(1).any(dim=1).tolist()
    if not (has_object and has_background):
        return features.new_full(features.shape[1:], 1 if has_object else -1)
    pixels = F.normalize(features.flatten(1), dim=0)
    nearest_object, nearest_background = (
        torch.cat([(chunk.T @ pixels[:, kind]).amax(dim=1) for chunk in pixels.split(CHUNK, dim=1)])
        for kind in strokes.flatten(1)
    )
    return (nearest_object - nearest_background).unflatten(0, features.shape[1:])


def feature_picture(
    encoder: nn.Module, scene: Scene, config: ProbeConfig, device: torch.device | str
) -> UInt8[np.ndarray, "h w 3"]:
    """Show the first three principal components of the features as red, green and blue.

    Pixels of like colour look alike to the encoder. The picture has the network's scale; arguments
    are those of `probe`.
    """
    with _frozen(encoder):
        features, _, seen = _look(encoder, scene, config, device)
        return _picture(_enlarge(_principal_components(features.cpu()), GRID_STRIDE, seen))


def attention_picture(
    encoder: VitEncoder, scene: Scene, config: ProbeConfig, device: torch.device | str
) -> UInt8[np.ndarray, "h w 3"]:
    """Show in grey how much the CLS token attends to each patch, on average over the last heads.

    The picture has the network's scale; arguments are those of `probe`.
    """
    with _frozen(encoder):
        image, _, seen = _inputs(scene, config, device)
        attention = encoder.attention_of_cls(image).mean(dim=1).cpu()
        return _picture(_enlarge(attention, encoder.patch_size, seen).expand(3, -1, -1))


@contextmanager
def _frozen(encoder: nn.Module) -> Generator[None]:
    """Switch to evaluation and inference mode, and every module back to the mode it was in."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _inputs(
    scene: Scene, config: ProbeConfig, device: torch.device | str
) -> tuple[Float32[Tensor, "1 3 h w"], Float32[Tensor, "1 2 h w"], tuple[int, int]]:
    """Return image and strokes, padded so that all levels divide them, and their size before."""
    image, strokes = network_inputs(
        scene.image,
        scene.scribbles,
        config.long_side,
        StrokesConfig(encoding="raw"),
        torch.device(device),
    )
    height, width = image.shape[-2:]
    return *pad(image, strokes), (height, width)


def _look(
    encoder: nn.Module, scene: Scene, config: ProbeConfig, device: torch.device | str
) -> tuple[Float[Tensor, "d h w"], Bool[Tensor, "2 h w"], tuple[int, int]]:
    """Return features and strokes on the grid, and the image's size at the network's scale."""
    image, strokes, seen = _inputs(scene, config, device)
    # The largest of each cell: a thin stroke must not vanish.
    drawn = F.max_pool2d(strokes, GRID_STRIDE)[0] > 0
    height, width = drawn.shape[-2:]
    features = dense_features(levels_that_count(encoder(image), image), (height, width))
    # Cells that hold nothing but padding are left out.
    rows, columns = (-(-side // GRID_STRIDE) for side in seen)
    return features[:, :rows, :columns], drawn[:, :rows, :columns], seen


def _resize(maps: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Resize bilinearly, or by averages where the maps shrink."""
    if size[0] < maps.shape[-2]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _enlarge(
    maps: Float[Tensor, "c h w"], stride: int, size: tuple[int, int]
) -> Float[Tensor, "c h2 w2"]:
    """Bring maps of this stride to the network's scale, without the padding's part."""
    enlarged = F.interpolate(maps[None], scale_factor=stride, mode="bilinear", align_corners=False)
    return enlarged[0, :, : size[0], : size[1]]


def _principal_components(features: Float[Tensor, "d h w"]) -> Float[Tensor, "3 h w"]:
    """Project every pixel on the three directions in which features vary most.

    A direction has no sign of its own; its largest entry is made positive.
    """
    pixels = features.flatten(1)
    pixels = pixels - pixels.mean(dim=1, keepdim=True)
    directions = torch.linalg.eigh(pixels @ pixels.T).eigenvectors[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return ((directions * largest.sign()).T @ pixels).unflatten(1, features.shape[1:])


def _picture(channels: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Stretch each channel from its low to its high percentile over 0 to 255."""
    values = channels.numpy()
    low, high = np.quantile(values, PERCENTILES, axis=(1, 2), keepdims=True)
    # A channel that is constant but for rounding errors stays dark.
    shares = ((values - low) / np.maximum(high - low, 1e-5)).clip(0, 1)
    return np.rint(255 * shares).astype(np.uint8).transpose(1, 2, 0)
