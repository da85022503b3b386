"""The data contract: a folder of photographs, scribbles and masks becomes typed samples.

    ROOT/SPLIT/images/STEM.jpg|png      RGB, any size
    ROOT/SPLIT/scribbles/STEM.png       0 background, 1 object, 255 unlabelled
    ROOT/SPLIT/ground_truth/STEM.png    0 background, 1 object, 255 ignore; may be absent

Everything that reads data goes through here, so nothing is ever guessed: a file that does not keep
the contract raises an `InputError` that names it and the command that mends it. Pixels are taken as
they are stored (an EXIF orientation is not applied), because strokes are drawn on stored pixels.
"""

import hashlib
import io
import os
import shlex
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scribbleseg.config import DataConfig
from scribbleseg.datasets.files import (
    DECODE_ERRORS,
    IMAGE_SUFFIXES,
    File,
    bits_per_channel,
    has_alpha,
    open_picture,
    reason,
    write_picture,
)
from scribbleseg.datasets.remote import local_copy
from scribbleseg.errors import InputError

# Masks use the values of strokes; there 255 means "ignore".
from scribbleseg.scribbles.encode import BACKGROUND, OBJECT, UNLABELLED

FOLDERS = ("images", "scribbles", "ground_truth")
"""Of a split."""
LABEL_SUFFIXES = (".png",)
# How to mend names that `are_respelled`; {} are their folders.
RESPELL = (
    "their names differ only in how Unicode spells accented letters, as a Mac's do: spell them "
    "alike with `convmv -r --notest -f utf8 -t utf8 --nfc {}`"
)

# A keyword of the PNG standard: "Software used to create the image".
_SOFTWARE = "Software"
# Stands in the masks: those of anybody else are never replaced.
_OURS = "scribbleseg"
# Keyword of the note in masks that a person accepted on the page: for strokes of which revision.
_ACCEPTED_FOR = "scribbleseg accepted for strokes"
# Keyword of the note that says of which pixels the others speak.
_PIXELS = "scribbleseg pixels"
# Black, orange-red and cream: 0, 1 and 255 are told apart at a glance, on masks and on strokes.
_PALETTE = {BACKGROUND: (0, 0, 0), OBJECT: (226, 74, 51), UNLABELLED: (240, 236, 220)}


@dataclass(frozen=True, kw_only=True)
class ScenePaths:
    """One sample on disk."""

    stem: str
    """File name without its suffix, the same for all three files."""
    image: Path
    """The photograph."""
    scribbles: Path
    """The strokes."""
    ground_truth: Path | None
    """The mask, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One decoded sample, at the image's own size."""

    stem: str
    """File name without its suffix."""
    image: UInt8[np.ndarray, "h w 3"]
    """RGB, 0 to 255."""
    scribbles: UInt8[np.ndarray, "h w"]
    """0 background, 1 object, 255 unlabelled."""
    mask: UInt8[np.ndarray, "h w"] | None
    """0 background, 1 object, 255 ignore; None where there is no ground truth."""


def list_files(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return the files of `folder` that have one of `suffixes`, by stem, sorted.

    Hidden files and files with other suffixes are passed over.

    Raises:
        InputError: the folder is missing or unreadable, or two files share a stem.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: {reason(error)}; expected a folder of {' or '.join(suffixes)} files"
        ) from None
    files: dict[str, Path] = {}
    for path in paths:
        if path.name.startswith(".") or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if path.stem in files:
            raise InputError(
                f"{folder}: found {files[path.stem].name} and {path.name}; expected one file per "
                "stem; remove or rename one of them"
            )
        files[path.stem] = path
    return dict(sorted(files.items()))


def require_utf8(path: Path) -> None:
    """Raise an `InputError` where a file's name cannot be written into lists and tables of text."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        name = str(os.fsencode(path.name))[2:-1]
        raise InputError(
            f"{path.parent}: found the file name {name}, which is not UTF-8; rename the files of "
            "that stem (a folder of such names: convmv -f latin1 -t utf8)"
        ) from None


def list_splits(root: Path) -> list[str]:
    """Return the names of the folders in `root` that hold an images/ folder, sorted.

    Raises:
        InputError: `root` is not a folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; expected ROOT that holds SPLIT/images")
    return sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())


def require_above_splits(root: Path) -> None:
    """Raise an `InputError` where a folder is a split instead of one that holds splits."""
    if (root / "images").is_dir():
        raise InputError(
            f"{root}: found images/, so this is one split; expected the folder above it: give "
            f"{root.absolute().parent}"
        )


def list_scenes(
    root: str | Path, split: str, *, need_masks: bool, cache_dir: str | Path | None = None
) -> list[ScenePaths]:
    """Return the samples of ROOT/SPLIT, sorted by stem; no file is opened.

    Args:
        root: Folder or URI that holds the splits; of a remote one, the split is fetched first.
        split: Name of the split.
        need_masks: Every sample must have a ground truth; otherwise those that exist are listed.
        cache_dir: Where remote data are kept; see `remote.local_copy`.

    Raises:
        InputError: a folder is missing, it holds no images, stems do not match, or a name is not
            UTF-8; remote data cannot be fetched.
    """
    root = local_copy(root, cache_dir, below=split)
    folder = root / split
    if not folder.is_dir():
        require_above_splits(root)
        found = ", ".join(list_splits(root)) or "no split"
        raise InputError(f"{folder}: no such split; {root} holds {found}; name one that exists")
    images = list_files(folder / "images", IMAGE_SUFFIXES)
    if not images:
        raise InputError(
            f"{folder / 'images'}: found no .jpg or .png file, expected the photographs"
        )
    for path in images.values():
        require_utf8(path)
    scribbles = list_files(folder / "scribbles", LABEL_SUFFIXES)
    _require_same_stems(images, scribbles, folder / "images", folder / "scribbles")
    masks: dict[str, Path] = {}
    truth = folder / "ground_truth"
    if need_masks and not truth.exists():
        raise InputError(
            f"{truth}: no such folder; expected a mask for every image; add them, or train on "
            "strokes alone, without validation: --loss.supervision strokes --data.fold None"
        )
    if need_masks or truth.is_dir():
        masks = list_files(truth, LABEL_SUFFIXES)
    if need_masks:
        _require_same_stems(images, masks, folder / "images", truth)
    return [
        ScenePaths(stem=stem, image=path, scribbles=scribbles[stem], ground_truth=masks.get(stem))
        for stem, path in images.items()
    ]


def read_image(path: File) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a photograph as 8-bit RGB.

    Grey and palette images become RGB; an alpha channel is dropped where it is opaque everywhere.

    Raises:
        InputError: unreadable or truncated, 16-bit, CMYK, or with transparent pixels.
    """
    with open_picture(path, ("JPEG", "PNG")) as picture:
        if bits_per_channel(path) > 8:
            raise _unfit(path, "16 bits per channel", "8-bit RGB")
        if has_alpha(picture):
            picture = picture.convert("RGBA")
            if picture.getchannel("A").getextrema() != (255, 255):
                raise _unfit(path, "transparent pixels", "opaque RGB")
        elif picture.mode not in ("1", "L", "P", "RGB"):
            raise _unfit(path, f"{picture.mode} pixels", "8-bit RGB")
        return np.array(picture.convert("RGB"))


def read_scribbles(path: File) -> UInt8[np.ndarray, "h w"]:
    """Decode strokes: 0 background, 1 object, 255 unlabelled.

    Raises:
        InputError: unreadable, more than one distinct channel, or values other than 0, 1 and 255.
    """
    scribbles = _read_labels(path)
    _require_contract_values(path, scribbles, "0 background, 1 object, 255 unlabelled")
    return scribbles


def read_mask(path: Path) -> UInt8[np.ndarray, "h w"]:
    """Decode a mask: 0 background, 1 object, 255 ignore.

    Raises:
        InputError: unreadable, more than one distinct channel, values other than 0, 1 and 255, or
            255 without any 1, which is the 0/255 coding: there 255 means object. (A mask that
            scribbleseg predicted is not coded so: there was no object that it was sure of.) Or its
            palette shows the object in black on white.
    """
    mask = _read_labels(path, is_mask=True)
    if shows_black_on_white(path):
        raise InputError(
            f"{path}: found a palette that shows 1, the object, in black, and 0 in white; expected "
            "what is shown and what is stored to agree: where white is the object, save masks as "
            "grey 0 and 255; where black is, `scribbleseg data convert --masks 1 1`"
        )
    values = _require_contract_values(path, mask, "0 background, 1 object, 255 ignore")
    if UNLABELLED in values and OBJECT not in values and not is_predicted(path):
        raise _unfit(path, f"values {_join(values)}", "object pixels coded 1 (255 means ignore)")
    return mask


def shows_black_on_white(path: File) -> bool:
    """Return whether an indexed PNG shows its 1 in black and its 0 in white.

    Programs that reduce a black-and-white mask to two colours number the more frequent one first,
    and that is the background whatever its colour: such indices say nothing about the object.
    """
    with path.open("rb") as file, Image.open(file, formats=("PNG",)) as picture:
        # Known from the header: other masks are not decoded once more.
        if picture.mode != "P":
            return False
        colours = np.array(picture.getpalette("RGB") or [], int).reshape(-1, 3)[:2]
        used = np.bincount(np.array(picture).ravel(), minlength=2)
    dark, light = 64, 192
    return (
        len(colours) == 2
        and bool(used[BACKGROUND] and used[OBJECT])
        and bool(colours[OBJECT].max() < dark and colours[BACKGROUND].min() >= light)
    )


def read_scene(paths: ScenePaths) -> Scene:
    """Decode one sample.

    Raises:
        InputError: a file does not keep the contract, or the sizes differ.
    """
    scene = read_drawn(paths.stem, paths.image, paths.scribbles)
    if paths.ground_truth is None:
        return scene
    mask = read_mask(paths.ground_truth)
    require_same_size(paths.ground_truth, mask, paths.image, scene.image)
    return replace(scene, mask=mask)


def read_drawn(stem: str, image_file: File, scribbles_file: File) -> Scene:
    """Decode an image and the strokes drawn on it, from disk or memory.

    Raises:
        InputError: a file does not keep the contract, or the sizes differ.
    """
    image = read_image(image_file)
    scribbles = read_scribbles(scribbles_file)
    require_same_size(scribbles_file, scribbles, image_file, image)
    return Scene(stem=stem, image=image, scribbles=scribbles, mask=None)


def fold_stems(stems: Sequence[str], fold: int, num_folds: int) -> tuple[list[str], list[str]]:
    """Split stems into those to train on and those to validate on.

    The rule needs no list and no seed: stems are sorted, and the one at position p is validated in
    fold p modulo `num_folds`.

    Raises:
        InputError: no such fold, or a fold would be empty.
    """
    if not 2 <= num_folds <= len(stems):
        raise InputError(
            f"{num_folds} fold(s) of {len(stems)} sample(s); expected 2 folds or more, each with a "
            "sample; take fewer folds, add samples, or do without: train with --data.fold None, "
            "evaluate without --fold"
        )
    if not 0 <= fold < num_folds:
        raise InputError(f"fold is {fold}; expected 0 to {num_folds - 1}")
    ordered = sorted(stems)
    train = [stem for position, stem in enumerate(ordered) if position % num_folds != fold]
    return train, ordered[fold::num_folds]


def choose_stems(stems: Sequence[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """Return those stems of `data.split` that a run trains on, and those it holds out, sorted.

    Raises:
        InputError: a fold would be empty.
    """
    train, held_out = sorted(stems), list[str]()
    if data.fold is not None:
        train, held_out = fold_stems(stems, data.fold, data.num_folds)
    count = max(1, round(data.share * len(train)))
    return [train[index * len(train) // count] for index in range(count)], held_out


def write_png(path: Path, array: UInt8[np.ndarray, "h w *c"], *, palette: bool = False) -> None:
    """Write uint8 pixels (h, w) or (h, w, 3) as a PNG, whole or not at all; its folder must exist.

    Args:
        path: The file; an older one is replaced.
        array: The pixels.
        palette: Write (h, w) labels as an indexed PNG whose colours make 0, 1 and 255 visible in
            any viewer; the stored values stay the same.
    """
    write_picture(path, _picture(array, palette), "PNG")


def encode_png(
    array: UInt8[np.ndarray, "h w *c"],
    *,
    palette: bool = False,
    predicted: bool = False,
    accepted_for: str | None = None,
) -> bytes:
    """Return the bytes of the file that `write_png` writes, with notes of how it came about.

    Args:
        array: The pixels.
        palette: See `write_png`.
        predicted: A network made it, and nobody has looked at it.
        accepted_for: A person accepted it for strokes of this revision; None: nobody has.
    """
    file, notes = io.BytesIO(), PngInfo()
    if predicted:
        notes.add_text(_SOFTWARE, _OURS)
    if accepted_for is not None:
        notes.add_text(_ACCEPTED_FOR, accepted_for)
    if predicted or accepted_for is not None:
        notes.add_text(_PIXELS, _digest(array))
    _picture(array, palette).save(file, format="PNG", pnginfo=notes)
    return file.getvalue()


def is_predicted(path: Path) -> bool:
    """Say whether a PNG is a mask of scribbleseg's making that nobody has changed since."""
    return _note(path, _SOFTWARE) == _OURS


def revision_accepted_for(path: Path) -> str | None:
    """Return the revision of the strokes that a mask was accepted for.

    None: it does not say, or was changed since.
    """
    return _note(path, _ACCEPTED_FOR)


def _note(path: Path, keyword: str) -> str | None:
    """Return a note in a PNG; None where there is none, or no PNG.

    Editors keep the notes of what they open, but what they save is a person's work: a note counts
    only beside the pixels that it was written for.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            note = picture.info.get(keyword)
            if note is None or picture.info.get(_PIXELS) != _digest(np.asarray(picture)):
                return None
            return note
    except DECODE_ERRORS:
        return None


def _digest(array: UInt8[np.ndarray, "h w *c"]) -> str:
    """Return 16 hexadecimal digits that stand for pixels."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]


def _picture(array: UInt8[np.ndarray, "h w *c"], palette: bool) -> Image.Image:
    """Return pixels as Pillow's picture; see `write_png`."""
    picture = Image.fromarray(array)
    if palette:
        colours = np.zeros((256, 3), np.uint8)
        for value, colour in _PALETTE.items():
            colours[value] = colour
        picture.putpalette(colours.tobytes())
    return picture


def require_same_size(path: File, labels: np.ndarray, image_path: File, image: np.ndarray) -> None:
    """Raise an `InputError` unless labels (h, w) are as large as their image (h, w, 3)."""
    (height, width), (image_height, image_width) = labels.shape, image.shape[:2]
    if (height, width) != (image_height, image_width):
        # A viewer that turns photographs upright by their EXIF tag swaps width and height.
        turned = (height, width) == (image_width, image_height)
        remedy = "store the image upright" if turned else "export both at the same size"
        raise InputError(
            f"{path}: found {width}x{height} pixels, expected {image_width}x{image_height} as in "
            f"{image_path}; {remedy} (sizes are never changed for you)"
        )


def label_values(labels: np.ndarray) -> list[int]:
    """Return the distinct values of a uint8 array, sorted."""
    return np.unique(labels).tolist()


def _read_labels(path: File, *, is_mask: bool = False) -> UInt8[np.ndarray, "h w"]:
    """Decode one channel of labels, or three equal ones; palette images give their indices."""
    with open_picture(path, ("PNG",)) as picture:
        if bits_per_channel(path) > 8:
            raise _unfit(path, "16 bits per channel", "8-bit labels")
        if picture.mode not in ("1", "L", "P", "RGB"):
            if is_mask and has_alpha(picture) and picture.getchannel("A").getextrema()[0] != 255:
                # Strokes are drawn on transparent canvases, which `data convert` knows to read.
                raise InputError(
                    f"{path}: found transparent pixels, expected one channel of labels; export the "
                    "mask without alpha"
                )
            raise _unfit(path, f"{picture.mode} pixels", "one channel of labels")
        labels = np.array(picture, dtype=np.uint8)
    if labels.ndim == 2:
        return labels
    first = np.ascontiguousarray(labels[..., 0])
    if not (labels == first[..., None]).all():
        raise _unfit(path, "colours", "one channel of labels, or three equal ones")
    return first


def _require_contract_values(path: File, labels: np.ndarray, expected: str) -> list[int]:
    """Return the distinct values, or raise an `InputError` if any is not in the contract."""
    values = label_values(labels)
    if not {BACKGROUND, OBJECT, UNLABELLED}.issuperset(values):
        raise _unfit(path, f"values {_join(values)}", expected)
    return values


def _require_same_stems(
    images: Collection[str], labels: Collection[str], image_folder: Path, label_folder: Path
) -> None:
    """Raise an `InputError` unless both folders hold the same stems."""
    for missing, where, there in (
        (sorted(set(images) - set(labels)), label_folder, image_folder),
        (sorted(set(labels) - set(images)), image_folder, label_folder),
    ):
        if missing:
            remedy = f"add the files, or remove those in {there}"
            if are_respelled(images, labels):
                remedy = RESPELL.format(shlex.quote(str(image_folder.parent)))
            raise InputError(
                f"{where}: found no file for {_join(missing)}; expected the {len(images)} stems of "
                f"{image_folder}; {remedy}"
            )


def are_respelled(stems: Collection[str], others: Collection[str]) -> bool:
    """Return whether a stem that only one side has is on the other in another Unicode spelling."""
    only_here, only_there = (
        {unicodedata.normalize("NFC", stem) for stem in set(one) - set(two)}
        for one, two in ((stems, others), (others, stems))
    )
    return not only_here.isdisjoint(only_there)


def _unfit(path: File, found: str, expected: str) -> InputError:
    """Return the error of a file that `data convert` may mend."""
    return InputError(
        f"{path}: found {found}, expected {expected}; `scribbleseg data convert` mends this"
    )


def _join(items: Sequence[object], limit: int = 5) -> str:
    """Return the first items as words: "a, b, c and 4 more"."""
    text = ", ".join(str(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"
