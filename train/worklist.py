"""What a batch prediction has to do, told by the names in its folders, and what is kept of it.

OUT/STEM.png            the masks
OUT/probabilities/      where they are wanted
OUT/predict.json        what made the masks, so that no others come between them
OUT/failed.csv          files that cannot be used, and why
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyarrow.fs import FileSelector, FileType

from scribbleseg.datasets.files import IMAGE_SUFFIXES, reason
from scribbleseg.datasets.scenes import LABEL_SUFFIXES
from scribbleseg.errors import InputError
from scribbleseg.predict import BULK
from scribbleseg.runs import RunFolder, open_storage
from train.masks import Drawn, Failure, Folders, is_whole

RECORD, FAILED = BULK, "failed.csv"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done, by file names alone."""

    drawn: list[Drawn]
    """Photographs without a mask, sorted."""
    failures: list[Failure]
    """Files that have no partner, or one too many."""
    num_masks: int
    """Photographs whose masks are there."""
    num_done: int
    """Photographs for which all is there that is wanted."""
    outdated: list[str]
    """Stems of those whose photograph or strokes were written after their mask, sorted."""


def list_work(folders: Folders, probabilities: bool) -> Work:
    """List the three folders, and return what is still to be done.

    Raises:
        InputError: a folder is missing, unreadable, or holds no photograph.
    """
    failures: list[Failure] = []
    images = _by_stem(folders.images, IMAGE_SUFFIXES, failures)
    scribbles = _by_stem(folders.scribbles, LABEL_SUFFIXES, failures)
    if not images:
        raise InputError(f"{folders.images}: found no .jpg or .png file, expected photographs")
    masks = _done(folders.target)
    done = masks.keys()
    if probabilities:
        done = done & _done(folders.target.child("probabilities")).keys()
    for lacking, folder, file in (
        (images.keys() - scribbles.keys(), folders.images, images),
        (scribbles.keys() - images.keys(), folders.scribbles, scribbles),
    ):
        other = folders.scribbles if folder == folders.images else folders.images
        failures += [
            Failure(
                f"{folder}/{file[stem].name}",
                f"no {_kinds(other, folders)} file of that stem in {other}",
            )
            for stem in sorted(lacking)
        ]
    both = sorted(images.keys() & scribbles.keys())
    return Work(
        drawn=[Drawn(images[stem].name, scribbles[stem].name) for stem in both if stem not in done],
        failures=failures,
        num_masks=sum(stem in masks for stem in both),
        num_done=sum(stem in done for stem in both),
        outdated=[
            stem
            for stem in both
            if stem in masks and masks[stem].time < max(images[stem].time, scribbles[stem].time)
        ],
    )


def _kinds(folder: str, folders: Folders) -> str:
    return " or ".join(LABEL_SUFFIXES if folder == folders.scribbles else IMAGE_SUFFIXES)


class _Listed(NamedTuple):
    """A file of a folder."""

    name: str
    """Without its folder."""
    time: int
    """When it was last written, in nanoseconds; 0: the storage does not say."""


def _by_stem(folder: str, suffixes: Sequence[str], failures: list[Failure]) -> dict[str, _Listed]:
    """Return the files by stem; of two with one stem, the second is a failure."""
    filesystem, path = open_storage(folder)
    try:
        infos = filesystem.get_file_info(FileSelector(path))
        files = sorted(_listed(info) for info in infos if info.type == FileType.File)
    except OSError as error:
        raise InputError(
            f"{folder}: {reason(error)[:300]}; expected a folder of {' or '.join(suffixes)} files"
        ) from None
    except UnicodeDecodeError as error:
        name = str(error.object)[2:-1]
        raise InputError(
            f"{folder}: found the file name {name}, which is not UTF-8; rename it, or use "
            "`scribbleseg predict`, which takes names as they are"
        ) from None
    found: dict[str, _Listed] = {}
    for file in files:
        stem, dot, suffix = file.name.rpartition(".")
        if file.name.startswith(".") or dot + suffix.lower() not in suffixes:
            continue
        if stem in found:
            failures.append(
                Failure(
                    f"{folder}/{file.name}", f"{found[stem].name} has the same stem, and is used"
                )
            )
            continue
        found[stem] = file
    return found


def _listed(info: Any) -> _Listed:
    return _Listed(info.base_name, info.mtime_ns or 0)


def _done(target: RunFolder) -> dict[str, _Listed]:
    """Return the PNG files in a folder, which may be missing, by stem."""
    try:
        infos = target.filesystem.get_file_info(FileSelector(target.path, allow_not_found=True))
    except OSError as error:
        raise InputError(
            f"{target.path}: {reason(error)[:300]}; expected a folder for the masks"
        ) from None
    files = (_listed(info) for info in infos if is_whole(info))
    return {file.name.removesuffix(".png"): file for file in files if file.name.endswith(".png")}


def require_same_masks(folders: Folders, record: Mapping[str, Any], work: Work) -> None:
    """Write what the masks of a folder are made by, or raise where others are there."""
    found = folders.target.read_json(RECORD)
    remedy = "give another --out, or remove it"
    if found is None and work.num_masks:
        raise InputError(
            f"{folders.out}: holds {work.num_masks} mask(s) and no {RECORD}, so nothing tells what "
            f"made them; {remedy}"
        )
    if found is not None and found != record:
        differ = ", ".join(key for key in record if found.get(key) != record[key])
        raise InputError(
            f"{folders.out}: holds masks that were made otherwise ({differ} differ); {remedy}"
        )
    if found is None:
        try:
            folders.target.write_json(RECORD, record)
        except OSError as error:
            raise InputError(
                f"{folders.out}: {reason(error)[:300]}; expected a folder or bucket that can be "
                "written: give another --out"
            ) from None


def write_failures(target: RunFolder, failures: Sequence[Failure]) -> None:
    """Write failed.csv; without failures, remove an older one."""
    if failures:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Failure._fields, *failures])
        target.write_file(FAILED, text.getvalue().encode())
        return
    older = f"{target.path}/{FAILED}"
    if target.filesystem.get_file_info(older).type == FileType.File:
        target.filesystem.delete_file(older)
