"""Lists of stems: folds, and a held-out part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scribbleseg.config import require
from scribbleseg.datasets.files import new_folder
from scribbleseg.datasets.scenes import fold_stems, list_scenes
from scribbleseg.errors import InputError


def split(
    root: str | Path,
    name: str,
    num_folds: int,
    out: Path,
    *,
    holdout: float = 0.0,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Write lists of a split's stems into the new folder `out`, one stem per line.

    `foldK.txt` holds the stems validated in fold K, by the rule of `scenes.fold_stems`, which
    training follows without any list. With a hold-out, `train.txt` and `val.txt` as well.

    Args:
        root: Folder or URI of the data contract.
        name: Name of the split.
        num_folds: Number of folds (2 or more).
        out: New folder for the lists.
        holdout: Share of the stems drawn into `val.txt` [0, 1); 0: neither list.
        seed: Seed of that draw (0 or more).

    Returns:
        The stems of each list, by file name.

    Raises:
        InputError: the split cannot be listed, a setting is out of range, or `out` exists.
    """
    require(seed >= 0, "seed", seed, "0 or more")
    require(num_folds >= 2, "folds", num_folds, "2 or more")
    stems = [paths.stem for paths in list_scenes(root, name, need_masks=False)]
    lists = {f"fold{fold}.txt": fold_stems(stems, fold, num_folds)[1] for fold in range(num_folds)}
    if holdout:
        generator = np.random.default_rng(seed)
        lists["train.txt"], lists["val.txt"] = hold_out(stems, holdout, generator)
    for stem in stems:
        if stem.splitlines() != [stem]:
            raise InputError(
                f"{root}: the file name {stem!r} of split {name} holds a line break, and lists "
                "have one name per line; rename its files"
            )
    with new_folder(out) as folder:
        for file, listed in lists.items():
            (folder / file).write_text("".join(f"{stem}\n" for stem in listed))
    return lists


def hold_out(
    stems: Sequence[str], share: float, generator: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Draw a share of the stems (at least one) and return (the others, the drawn), both sorted.

    Raises:
        InputError: the share is out of range, or leaves nothing to train on.
    """
    num_drawn = max(1, round(share * len(stems))) if 0 < share < 1 else 0
    if not 0 < num_drawn < len(stems):
        raise InputError(
            f"holdout is {share} of {len(stems)} samples; expected a share between 0 and 1 that "
            "leaves at least one sample on either side"
        )
    drawn = set(generator.permutation(len(stems))[:num_drawn].tolist())
    ordered = sorted(stems)
    return (
        [stem for position, stem in enumerate(ordered) if position not in drawn],
        [stem for position, stem in enumerate(ordered) if position in drawn],
    )
