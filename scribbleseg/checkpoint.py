"""A checkpoint folder: weights, settings and training state, written and read without pickle.

```
model.safetensors   the weights to use
config.json         format number, version, settings and metrics: enough to rebuild the model
trainer.pt          what only a resumed run needs; plain types and tensors (weights_only)
manifest.json       size and sha256 of every other file, written last
```

A checkpoint exists when its manifest matches. That needs no rename, so it holds on object stores
too, and a folder that a killed process left half-written is never taken for one.

Readers trust nothing: whatever a folder holds, they return a checkpoint or raise an `InputError`.
"""

import dataclasses
import fnmatch
import importlib.metadata
import io
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from scribbleseg.config import FinetuneConfig, PretrainConfig, flatten, from_dict, to_dict
from scribbleseg.errors import InputError
from scribbleseg.manifest import (
    CONFIG,
    FORMAT,
    MANIFEST,
    MODEL,
    TRAINER,
    one_line,
    parse_json,
    read_small,
    require_format,
    require_whole,
    shown,
    to_json,
    write_bytes,
    write_manifest,
)

# What a checkpoint is of, and the settings of the runs that write such ones.
_KINDS: dict[str, type[FinetuneConfig | PretrainConfig]] = {
    "segmentation": FinetuneConfig,
    "dino": PretrainConfig,
}
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What prediction, or a run that starts from it, needs of a checkpoint."""

    config: FinetuneConfig | PretrainConfig
    """Settings of the run that wrote it; they tell what it is of."""
    weights: dict[str, Tensor]
    """State of the segmentation network, or of the pretrained encoder; on the CPU."""
    metrics: dict[str, float | int]
    """Validation figures at that moment; may be empty."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of every tensor when weights were carried into a model."""

    loaded: list[str]
    """Copied into the model."""
    missing: list[str]
    """Of the model, absent from the weights: left as they were."""
    unexpected: list[str]
    """Of the weights, unknown to the model: left out."""
    mis_shaped: list[str]
    """In both, with different shapes or kinds of number: left as they were."""


def write_model(
    folder: Path,
    *,
    config: FinetuneConfig | PretrainConfig,
    weights: Mapping[str, Tensor],
    metrics: Mapping[str, float | int],
) -> None:
    """Write the weights and all that is needed to rebuild the model; the folder is made.

    Args:
        folder: the checkpoint folder.
        config: settings of the run.
        weights: the model's state, on any device, in any memory layout.
        metrics: finite figures to keep beside the weights; may be empty.

    Raises:
        OSError: the files cannot be written, such as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / MODEL, safetensors.torch.save(_plain(weights)))
    description = {
        "format": FORMAT,
        "version": importlib.metadata.version("scribbleseg"),
        "kind": next(kind for kind, settings in _KINDS.items() if isinstance(config, settings)),
        "config": to_dict(config),
        "metrics": {name: float(value) for name, value in metrics.items()},
    }
    write_bytes(folder / CONFIG, to_json(description))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as safetensors wants them: on the CPU, contiguous, none shares memory.

    What is so already is not copied: a copy, made in a thread beside training, would take threads.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage()
        if storage.nbytes() != whole.nbytes or storage.data_ptr() in storages:
            whole = whole.clone()
        storages.add(whole.untyped_storage().data_ptr())
        plain[name] = whole
    return plain


def write_trainer(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state that a resumed run continues from: plain types and tensors only.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
        ValueError: the state holds a type that could not be read back without pickle.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Serialised to memory first: torch.save reports a full disk as a RuntimeError of its own.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"the training state is not plain: {one_line(error)}") from None
    write_bytes(folder / TRAINER, buffer.getbuffer())


def read_model(folder: Path) -> Checkpoint:
    """Read weights and settings.

    Raises:
        InputError: not a checkpoint folder, not whole, of another format number, or damaged.
    """
    require_whole(folder, MODEL, CONFIG)
    path = folder / CONFIG
    tree = parse_json(read_small(path), str(path))
    require_format(tree, str(path))
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{path}: kind is {shown(kind)}, expected {' or '.join(_KINDS)}")
    return Checkpoint(
        config=_parse_config(tree.get("config"), _KINDS[kind], path),
        weights=_read_weights(folder / MODEL),
        metrics=_parse_metrics(tree.get("metrics"), path),
    )


def slim(folder: Path) -> None:
    """Make a checkpoint fit to be given away, in place.

    Kernels become half precision, which prediction turns back into float32; vectors are few, and
    among them are variances, which can be larger than half precision knows. What only the run that
    wrote it could use goes: the state of training, and the folders of its data.

    Raises:
        InputError: not a whole checkpoint.
        OSError: the files cannot be written.
    """
    found = read_model(folder)
    halved = {
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for name, tensor in found.weights.items()
    }
    (folder / MANIFEST).unlink()
    (folder / TRAINER).unlink(missing_ok=True)
    write_model(folder, config=without_places(found.config), weights=halved, metrics=found.metrics)
    write_manifest(folder)


def without_places(config: FinetuneConfig | PretrainConfig) -> FinetuneConfig | PretrainConfig:
    """Return settings without the folders of the machine that they were given on."""
    if isinstance(config, FinetuneConfig):
        data = dataclasses.replace(config.data, root="", extra=(), cache_dir=None)
        return dataclasses.replace(config, data=data, init_from=None)
    probe = dataclasses.replace(config.probe, root=None)
    data = dataclasses.replace(config.data, roots=(), cache_dir=None)
    return dataclasses.replace(config, data=data, probe=probe)


def list_broken(weights: Mapping[str, Tensor]) -> str:
    """Return the names of tensors that hold NaN or infinity; empty where all are whole.

    Waits for the device.
    """
    return _list(
        [
            name
            for name, tensor in weights.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
    )


def read_trainer(folder: Path) -> dict[str, Any]:
    """Read the state that a resumed run continues from, onto the CPU.

    Raises:
        InputError: not a checkpoint folder, not whole, or damaged.
    """
    require_whole(folder, TRAINER)
    path = folder / TRAINER
    try:
        _require_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A hostile archive reaches code that raises nearly anything.
        raise InputError(
            f"{path}: not a training state of scribbleseg ({one_line(error)})"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds {type(state).__name__}, expected a training state")
    return cast(dict[str, Any], state)


def transfer(
    model: nn.Module, weights: Mapping[str, Tensor], *, exempt: Sequence[str] = ()
) -> Transfer:
    """Copy weights into a model, exactly, except where a name is exempted.

    Args:
        model: changed in place, and only if everything that is not exempted fits.
        weights: tensors by their name in the model's state.
        exempt: patterns (`fnmatch`: "decoder.*") of names that may be missing, unexpected or
            mis-shaped. A tensor of an exempted name that fits is copied like any other.

    Raises:
        InputError: a tensor that does not fit and is not exempted; the message names them.
    """
    state = model.state_dict()
    shared = [name for name in state if name in weights]
    fits = {
        name: state[name].shape == weights[name].shape
        and state[name].is_floating_point() == weights[name].is_floating_point()
        for name in shared
    }
    report = Transfer(
        loaded=[name for name in shared if fits[name]],
        missing=[name for name in state if name not in weights],
        unexpected=[name for name in weights if name not in state],
        mis_shaped=[name for name in shared if not fits[name]],
    )
    faults = {
        "missing": _not_exempt(report.missing, exempt),
        "unexpected": _not_exempt(report.unexpected, exempt),
        "mis-shaped": _not_exempt(report.mis_shaped, exempt),
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_list(names)}" for kind, names in faults.items() if names)
        raise InputError(
            f"weights do not fit the model; {listed}; "
            "build the model from the checkpoint's own settings, or exempt these names"
        )
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(weights[name])
    return report


def _read_weights(path: Path) -> dict[str, Tensor]:
    # Not memory-mapped: the weights outlive a file that is then overwritten, pruned or truncated.
    try:
        return safetensors.torch.load(path.read_bytes())
    except Exception as error:  # A hostile header reaches code that raises nearly anything.
        raise InputError(f"{path}: not readable as safetensors ({one_line(error)})") from None


def _require_stored(path: Path) -> None:
    """Raise unless a file is an archive that unpacks to no more than its own size.

    torch.save writes no other; it reads compressed members too, and old files without an archive,
    both of which can ask for any amount of memory.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it unpacks to more than its size")


def _parse_config(
    tree: object, settings: type[FinetuneConfig | PretrainConfig], path: Path
) -> FinetuneConfig | PretrainConfig:
    if not isinstance(tree, dict):
        raise InputError(f"{path}: 'config' is {shown(tree)}, expected the settings of a run")
    try:
        # Compared first: a foreign key must not reach the command-line parser, as "help" would.
        known = flatten(to_dict(settings()))
        given = flatten(cast(dict[str, Any], tree))
        unknown = [key for key in given if key not in known]
        if unknown:
            raise InputError(f"unknown settings in 'config': {_list(unknown)}")
        return from_dict(settings, cast(dict[str, Any], tree))
    except (InputError, RecursionError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def _parse_metrics(tree: object, path: Path) -> dict[str, float]:
    if not isinstance(tree, dict):
        raise InputError(f"{path}: 'metrics' is {shown(tree)}, expected names and numbers")
    metrics: dict[str, float] = {}
    for name, value in cast(dict[str, object], tree).items():
        match value:
            case int() | float() if type(value) is not bool and abs(value) <= sys.float_info.max:
                metrics[name] = float(value)
            case _:
                raise InputError(
                    f"{path}: metric {shown(name)} is {shown(value)}, expected a finite number"
                )
    return metrics


def _not_exempt(names: Iterable[str], exempt: Sequence[str]) -> list[str]:
    return [
        name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)
    ]


def _list(names: Sequence[str]) -> str:
    """Join names, and count those past the first few: a model has hundreds of tensors."""
    listed = ", ".join(name[:80] for name in names[:_MAX_NAMES_SHOWN])
    rest = len(names) - _MAX_NAMES_SHOWN
    return f"{listed} and {rest} more" if rest > 0 else listed
