"""Mends wrong codings: writes a data folder anew so that it keeps the contract of `scenes`.

What a value means is decided once for all files of a kind, never file by file: a mask that holds 0
and 1 alone may be a class mask among others. Where the values leave a doubt, the user is asked.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from scribbleseg.datasets.coloured import StrokeColours, describe, read_drawing, to_labels
from scribbleseg.datasets.files import (
    bits_per_channel,
    eight_bits,
    has_alpha,
    new_folder,
    open_picture,
)
from scribbleseg.datasets.remote import local_copy
from scribbleseg.datasets.scenes import (
    BACKGROUND,
    FOLDERS,
    OBJECT,
    UNLABELLED,
    ScenePaths,
    is_predicted,
    label_values,
    list_scenes,
    list_splits,
    require_same_size,
    shows_black_on_white,
    write_png,
)
from scribbleseg.errors import InputError

NUM_VOC_CLASSES = 20
# Those of 0, 1 and 2, the only values of strokes that are told apart without being explained.
VOC_COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)


@dataclass(frozen=True, kw_only=True)
class StrokeCoding:
    """Which value of a scribble file means what."""

    object: int = OBJECT
    """Value of object strokes."""
    background: int = BACKGROUND
    """Value of background strokes."""
    unlabelled: int = UNLABELLED
    """Value of pixels without a stroke."""

    def __post_init__(self) -> None:
        """Check that the values can be told apart."""
        values = (self.object, self.background, self.unlabelled)
        if len(set(values)) < 3 or not all(0 <= value <= 255 for value in values):
            raise InputError(
                f"--strokes is {' '.join(map(str, values))}; expected three different values of "
                "0 to 255: OBJECT BACKGROUND UNLABELLED"
            )


@dataclass(frozen=True, kw_only=True)
class MaskCoding:
    """Which values of a mask mean object; all others mean background."""

    lowest: int = OBJECT
    """Lowest value that means object."""
    highest: int = OBJECT
    """Highest value that means object."""
    keep_ignore: bool = False
    """Keep 255 as "ignore" where it does not mean object; otherwise it becomes background."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.lowest <= self.highest <= 255:
            raise InputError(
                f"--masks is {self.lowest} {self.highest}; expected LOWEST HIGHEST, two values of "
                "0 to 255 in rising order"
            )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done to one file."""

    path: Path
    """The file that was read."""
    action: str
    """"copied", or what was changed."""

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.path}: {self.action}"


def convert(
    root: str | Path,
    out: Path,
    *,
    strokes: tuple[int, int, int] | None = None,
    stroke_colours: tuple[str, str] | None = None,
    masks: tuple[int, int] | None = None,
    keep_ignore: bool = False,
    progress: Callable[[Sequence[ScenePaths]], Iterable[ScenePaths]] = iter,
) -> list[Conversion]:
    """Write `root` anew as `out`, in the coding of the data contract; files that fit are copied.

    Images with 16 bits, transparent pixels or CMYK become 8-bit RGB. Sizes and stems that do not
    match are not mended.

    Args:
        root: Folder or URI of splits; it is only read.
        out: New folder; it appears when all is written.
        strokes: The values of object strokes, background strokes and unlabelled pixels; None:
            (1, 0, 255), (1, 2, 0) or (1, 0, 2), told by the values and by which covers most.
        stroke_colours: The colours in which strokes on the object and on the background are drawn,
            as "red" or "ff0000"; all else means nothing. Not with `strokes`.
        masks: The lowest and highest mask value that mean object; None: (1, 1), (255, 255) for
            masks of 0 and 255 alone, or (1, 20) for class masks like VOC's with a border of 255.
        keep_ignore: Keep the 255 border of class masks as "ignore" instead of background.
        progress: Wraps the samples of each of the two passes, for example in a progress bar.

    Raises:
        InputError: values that leave a doubt (the message names the option that settles it), files
            that cannot be read or do not match, or `out` exists.
    """
    if strokes is not None and stroke_colours is not None:
        raise InputError(
            "--strokes and --stroke-colours are both given; expected one of them: the values of "
            "labels, or the colours of drawings"
        )
    colours = None if stroke_colours is None else StrokeColours.parse(*stroke_colours)
    root = local_copy(root)
    scenes = {
        split: list_scenes(root, split, need_masks=(root / split / "ground_truth").is_dir())
        for split in list_splits(root)
    }
    if not scenes:
        raise InputError(f"{root}: found no SPLIT/images; expected a folder of splits, as train/")
    every = [paths for split in scenes.values() for paths in split]
    stroke_counts, mask_counts = _count_values(progress(every), colours)
    if colours is not None:
        # What is read by its colours is in the contract's coding already.
        _require_drawn(stroke_counts, root)
        stroke_coding = StrokeCoding()
    elif strokes is not None:
        stroke_coding = StrokeCoding(
            object=strokes[0], background=strokes[1], unlabelled=strokes[2]
        )
    else:
        stroke_coding = detect_strokes(stroke_counts, root)
        if stroke_coding != StrokeCoding():
            _require_plain_palettes(every)
    if masks is None:
        mask_coding = detect_masks(mask_counts, root, keep_ignore=keep_ignore)
        _require_white_objects(every)
    else:
        mask_coding = MaskCoding(lowest=masks[0], highest=masks[1], keep_ignore=keep_ignore)
    done: list[Conversion] = []
    with new_folder(out) as folder:
        for split in scenes:
            for name in FOLDERS:
                if (root / split / name).is_dir():
                    (folder / split / name).mkdir(parents=True)
        for paths in progress(every):
            target = folder / paths.image.parent.parent.name
            done += _convert_scene(paths, target, colours, stroke_coding, mask_coding)
    return done


def detect_strokes(counts: Int[np.ndarray, "256"], where: Path) -> StrokeCoding:
    """Tell the coding of strokes from the number of pixels of each value in all files together.

    Raises:
        InputError: the values fit no known coding, or more than one.
    """
    values = set(np.flatnonzero(counts).tolist())
    most = int(counts.argmax())
    match most:
        # Strokes cover little: the value that covers most of the images is the unlabelled one.
        case 255 if OBJECT in values and values <= {0, 1, 255}:
            return StrokeCoding()
        case 0 if 2 in values and values <= {0, 1, 2}:
            return StrokeCoding(object=1, background=2, unlabelled=0)
        case 2 if OBJECT in values and values <= {0, 1, 2}:
            return StrokeCoding(object=1, background=0, unlabelled=2)
        case _:
            raise InputError(
                f"{where}: found scribbles of {_describe(counts)}; expected 1 object, 0 background "
                "and mostly 255 unlabelled; say what they mean with --strokes OBJECT BACKGROUND "
                "UNLABELLED, as --strokes 1 2 0"
            )


def detect_masks(
    counts: Int[np.ndarray, "256"], where: Path, *, keep_ignore: bool = False
) -> MaskCoding:
    """Tell the coding of masks from the number of pixels of each value in all files together.

    Raises:
        InputError: the values fit no known coding, or more than one.
    """
    values = set(np.flatnonzero(counts).tolist())
    if values <= {0} or (OBJECT in values and values <= {0, 1, 255}):
        return MaskCoding(keep_ignore=True)
    if values <= {0, 255}:
        return MaskCoding(lowest=255, highest=255)
    if {0, 255} < values <= {*range(NUM_VOC_CLASSES + 1), 255}:
        return MaskCoding(lowest=1, highest=NUM_VOC_CLASSES, keep_ignore=keep_ignore)
    raise InputError(
        f"{where}: found masks of {_describe(counts)}, expected 0 background, 1 object; say which "
        "values mean object with --masks LOWEST HIGHEST, as --masks 128 255"
    )


def recode_strokes(
    labels: UInt8[np.ndarray, "h w"], coding: StrokeCoding
) -> UInt8[np.ndarray, "h w"]:
    """Return strokes as 0 background, 1 object, 255 unlabelled.

    Raises:
        ValueError: a value that the coding does not know.
    """
    meaning = {
        coding.unlabelled: UNLABELLED,
        coding.background: BACKGROUND,
        coding.object: OBJECT,
    }
    unknown = set(label_values(labels)) - set(meaning)
    if unknown:
        raise ValueError(f"found values {_join(sorted(unknown))}, expected {_join(list(meaning))}")
    table = np.zeros(256, np.uint8)
    table[list(meaning)] = list(meaning.values())
    return table[labels]


def recode_mask(labels: UInt8[np.ndarray, "h w"], coding: MaskCoding) -> UInt8[np.ndarray, "h w"]:
    """Return a mask as 0 background, 1 object and, if the coding keeps it, 255 ignore."""
    table = np.full(256, BACKGROUND, np.uint8)
    if coding.keep_ignore:
        table[UNLABELLED] = UNLABELLED
    table[coding.lowest : coding.highest + 1] = OBJECT
    return table[labels]


def mend_image(path: Path) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Return a photograph as 8-bit RGB, and what had to be changed ("" for nothing).

    16-bit values lose their low byte, transparent pixels are laid on white, and CMYK is converted
    without a colour profile.

    Raises:
        InputError: the file cannot be read, or holds pixels of another kind.
    """
    changes: list[str] = []
    with open_picture(path, ("JPEG", "PNG")) as picture:
        if bits_per_channel(path) > 8:
            changes.append("16 bits -> 8 bits")
        picture = eight_bits(picture)
        if has_alpha(picture):
            picture = picture.convert("RGBA")
            if picture.getchannel("A").getextrema() != (255, 255):
                changes.append("transparent pixels -> white")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        elif picture.mode == "CMYK":
            changes.append("CMYK -> RGB")
        elif picture.mode not in ("1", "L", "P", "RGB"):
            raise InputError(f"{path}: found {picture.mode} pixels; expected RGB, RGBA or CMYK")
        return np.array(picture.convert("RGB")), ", ".join(changes)


def read_labels(
    path: Path, colours: StrokeColours | None = None
) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """Return a file's labels as they are coded, and what had to be changed ("" for nothing).

    Three equal channels become one, an opaque alpha channel is dropped, and 16-bit labels become
    8-bit (65535, their white, becomes 255).

    Args:
        path: The file.
        colours: Those of strokes, which are 1, 0 and 255 then; None: it holds labels.

    Raises:
        InputError: the file cannot be read, or holds colours that nobody explained, transparency
            or values above 255.
    """
    if colours is not None:
        return to_labels(read_drawing(path), colours), "colours -> labels"
    changes: list[str] = []
    deep = bits_per_channel(path) > 8
    with open_picture(path, ("PNG",)) as picture:
        if deep and not picture.mode.startswith("I"):
            # Of several channels Pillow keeps the upper 8 bits alone, where no label is.
            raise InputError(
                f"{path}: found 16 bits in several channels, expected one grey channel of labels; "
                "export it so"
            )
        if has_alpha(picture) and picture.mode != "P":
            changes.append("alpha dropped")
            *bands, alpha = picture.convert("RGBA").split()
            if alpha.getextrema() != (255, 255):
                raise InputError(
                    f"{path}: found transparent pixels, expected labels; export without alpha, or, "
                    "of strokes in colours, say --stroke-colours OBJECT BACKGROUND, as red lime"
                )
            picture = Image.merge("RGB", bands)
        labels = np.array(picture)
    if labels.ndim == 3:
        changes.append("three channels -> one")
        if not (labels == labels[..., :1]).all():
            raise InputError(
                f"{path}: found {describe(labels)}, expected one channel of labels; export grey "
                "values, or, of strokes, say --stroke-colours OBJECT BACKGROUND, as ff0000 00ff00"
            )
        labels = np.ascontiguousarray(labels[..., 0])
    if deep:
        changes.append("16 bits -> 8 bits")
        labels = np.where(labels == 65535, 255, labels)
        if labels.max() > 255:
            raise InputError(f"{path}: found the value {labels.max()}, expected labels 0 to 255")
    return labels.astype(np.uint8), ", ".join(changes)


def _count_values(
    scenes: Iterable[ScenePaths], colours: StrokeColours | None
) -> tuple[Int[np.ndarray, "256"], Int[np.ndarray, "256"]]:
    """Count the pixels of each value in all scribbles and in all masks."""
    counts = np.zeros((2, 256), np.int64)
    for paths in scenes:
        for row, path in enumerate((paths.scribbles, paths.ground_truth)):
            if path is not None:
                labels, _ = read_labels(path, colours if path == paths.scribbles else None)
                counts[row] += np.bincount(labels.ravel(), minlength=256)
    return counts[0], counts[1]


def _require_plain_palettes(scenes: Iterable[ScenePaths]) -> None:
    """Raise an `InputError` where indices have colours of their own, in whatever order they are.

    Grey ones, and those that VOC and others give to labels, say nothing.
    """
    for paths in scenes:
        with open_picture(paths.scribbles, ("PNG",)) as picture:
            if picture.mode != "P":
                continue
            labels, colours = np.array(picture), np.array(picture.convert("RGB"))
        grey = colours == colours[..., :1]
        if not grey.all() and not np.array_equal(colours, VOC_COLOURS[labels]):
            raise InputError(
                f"{paths.scribbles}: found labels {_join(label_values(labels))} in "
                f"{describe(colours)}; expected grey ones, whose meaning is told by their values; "
                "say --stroke-colours OBJECT BACKGROUND, as red lime, or --strokes OBJECT "
                "BACKGROUND UNLABELLED, as 1 2 0"
            )


def _require_white_objects(scenes: Iterable[ScenePaths]) -> None:
    """Raise an `InputError` where a mask's palette shows what would be its object in black."""
    for paths in scenes:
        if paths.ground_truth is not None and shows_black_on_white(paths.ground_truth):
            raise InputError(
                f"{paths.ground_truth}: found a palette that shows 1 in black and 0 in white; "
                "where white is the object, save masks as grey 0 and 255; where black is, say "
                "--masks 1 1"
            )


def _require_drawn(counts: Int[np.ndarray, "256"], where: Path) -> None:
    """Raise an `InputError` where nothing has been drawn in one of the colours."""
    for label, name in ((OBJECT, "first"), (BACKGROUND, "second")):
        if counts[label] == 0:
            raise InputError(
                f"{where}: found no pixel of the {name} of --stroke-colours in any scribble; leave "
                "the option out to be told which colours are there"
            )


def _convert_scene(
    paths: ScenePaths,
    target: Path,
    colours: StrokeColours | None,
    stroke_coding: StrokeCoding,
    mask_coding: MaskCoding,
) -> list[Conversion]:
    """Write one sample into the split folder `target`."""
    image, change = mend_image(paths.image)
    if change:
        write_png(target / "images" / f"{paths.stem}.png", image)
    else:
        shutil.copyfile(paths.image, target / "images" / paths.image.name)
    done = [Conversion(path=paths.image, action=change or "copied")]
    for path, drawn_in, recode in (
        (paths.scribbles, colours, partial(recode_strokes, coding=stroke_coding)),
        (paths.ground_truth, None, partial(recode_mask, coding=mask_coding)),
    ):
        if path is None:
            continue
        labels, change = read_labels(path, drawn_in)
        require_same_size(path, labels, paths.image, image)
        try:
            recoded = recode(labels)
        except ValueError as error:
            raise InputError(f"{path}: {error}; give --strokes all that they hold") from None
        coded = mask_coding.lowest == OBJECT == mask_coding.highest
        if path == paths.ground_truth and coded and not is_predicted(path):
            _require_object(path, recoded)
        if path == paths.ground_truth and shows_black_on_white(path):
            change = "black and white -> a palette of labels"
        if not np.array_equal(recoded, labels):
            values = f"values {_describe_change(labels, recoded)}"
            change = f"{change}, {values}" if change else values
        if change:
            write_png(target / path.parent.name / path.name, recoded, palette=True)
        else:
            shutil.copyfile(path, target / path.parent.name / path.name)
        done.append(Conversion(path=path, action=change or "copied"))
    return done


def _require_object(path: Path, mask: UInt8[np.ndarray, "h w"]) -> None:
    """Raise an `InputError` where a mask among those coded 0 and 1 seems to be coded 0 and 255."""
    if (mask == UNLABELLED).any() and not (mask == OBJECT).any():
        raise InputError(
            f"{path}: found 255 and no 1, which other masks of this folder have; where both mean "
            "object, say --masks 1 255"
        )


def _describe(counts: Int[np.ndarray, "256"]) -> str:
    """Return the values and how much they cover: "values 0 (98%), 1 (1%), 3 (1%)"."""
    values = np.flatnonzero(counts).tolist()
    shares = [f"{value} ({counts[value] / counts.sum():.1%})" for value in values[:6]]
    more = f" and {len(values) - 6} more" if len(values) > 6 else ""
    return f"values {', '.join(shares)}{more}"


def _describe_change(labels: UInt8[np.ndarray, "h w"], recoded: UInt8[np.ndarray, "h w"]) -> str:
    """Return what became of the first values: "0 -> 255, 1 -> 1, 2 -> 0"."""
    values, first = np.unique(labels, return_index=True)
    pairs = zip(values.tolist(), recoded.ravel()[first].tolist(), strict=True)
    return _join([f"{old} -> {new}" for old, new in pairs])


def _join(values: Sequence[int | str]) -> str:
    """Return the first values as words."""
    return ", ".join(str(value) for value in values[:6]) + (" ..." if len(values) > 6 else "")
