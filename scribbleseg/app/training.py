"""From what was accepted on the page to a training: its settings, and the command to run."""

import hashlib
import shlex
from dataclasses import replace
from http import HTTPStatus
from os.path import abspath, exists

from scribbleseg.app.folder import Folder
from scribbleseg.app.models import Model
from scribbleseg.app.refusal import Refusal, not_written
from scribbleseg.config import FinetuneConfig, to_yaml
from scribbleseg.manifest import write_bytes

SETTINGS = "finetune.yaml"
_OURS = "# Written by scribbleseg app, anew for every training.\n"
# With few samples, all are trained on; from this many in each fold on, one fold is held out.
_LEAST_PER_FOLD = 4


def finetune_command(folder: Folder, model: Model) -> tuple[str, int]:
    """Write ROOT/finetune.yaml; return the command that trains with it, and on how many samples.

    The run is kept in ROOT/runs, from where the page can load it.

    Raises:
        Refusal: nothing was accepted, the network is elsewhere, or a file cannot be written, or is
            somebody else's.
    """
    if model.config is None:
        raise Refusal(
            HTTPStatus.CONFLICT,
            "the network is on another machine; start the page with --checkpoint to train",
        )
    split, masks = folder.collect()
    if not masks:
        raise Refusal(HTTPStatus.CONFLICT, "no mask was accepted yet; accept one first")
    # The command may be run from any folder.
    start = abspath(model.name) if exists(model.name) else model.name
    text = to_yaml(_settings(model.config, start, abspath(folder.root), split, len(masks)))
    path = folder.root / SETTINGS
    try:
        if path.exists() and not path.read_text(errors="replace").startswith(_OURS):
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"{path}: was not written by the page, which keeps the settings of a training "
                "there; give it another name",
            )
        write_bytes(path, (_OURS + text).encode())
    except OSError as error:
        raise not_written(error, path) from None
    # Other masks are another run: one that is finished would not start again.
    digest = hashlib.sha256(f"{text}{masks}".encode()).hexdigest()[:6]
    line = ["python", "-m", "train.finetune", abspath(path), "--storage", abspath(folder.runs)]
    return shlex.join([*line, "--name", f"drawn-{len(masks)}-{digest}"]), len(masks)


def _settings(
    config: FinetuneConfig, start: str, root: str, split: str, number: int
) -> FinetuneConfig:
    """Return the settings that a checkpoint was trained with, changed to go on from it."""
    config = config.going_on(start)
    folds = config.data.num_folds
    held_out = number >= _LEAST_PER_FOLD * folds
    trained_on = number - (number + folds - 1) // folds if held_out else number
    batch_size = min(config.train.batch_size, trained_on)
    return replace(
        config,
        data=replace(config.data, root=root, split=split, fold=0 if held_out else None),
        train=replace(
            config.train,
            batch_size=batch_size,
            accumulate=min(config.train.accumulate, batch_size),
        ),
    )
