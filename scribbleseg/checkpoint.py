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
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import reprlib
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from scribbleseg.config import FinetuneConfig, PretrainConfig, flatten, from_dict, to_dict
from scribbleseg.errors import InputError

FORMAT = 1
"""Layout of the folder; a reader refuses every other number."""
MODEL = "model.safetensors"
CONFIG = "config.json"
TRAINER = "trainer.pt"
MANIFEST = "manifest.json"
BEST = "best.json"
RELEASED = Path(__file__).parent / "released"
"""Folder of the checkpoints that ship with the package."""

# What a checkpoint is of, and the settings of the runs that write such ones.
_KINDS: dict[str, type[FinetuneConfig | PretrainConfig]] = {
    "segmentation": FinetuneConfig,
    "dino": PretrainConfig,
}
_MAX_JSON_BYTES = 1_000_000
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
class FileStamp:
    """What a manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of the content, 64 hexadecimal digits."""


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
        raise ValueError(f"the training state is not plain: {_one_line(error)}") from None
    write_bytes(folder / TRAINER, buffer.getbuffer())


def write_manifest(folder: Path) -> None:
    """Write the size and sha256 of every file in the folder; done last, it makes a checkpoint.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    write_bytes(folder / MANIFEST, to_json({"format": FORMAT, "files": files}))


def parse_manifest(text: str | bytes, where: str) -> dict[str, FileStamp]:
    """Return what a manifest says of each file.

    Args:
        text: content of manifest.json.
        where: its path, for the error.

    Raises:
        InputError: not a manifest, one of another format number, or one with unsafe file names.
    """
    tree = parse_json(text, where)
    _require_format(tree, where)
    files = tree.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{where}: lists no files, expected a name, size and sha256 of each")
    stamps: dict[str, FileStamp] = {}
    for name, entry in cast(dict[str, Any], files).items():
        match entry:
            case {"size": int(size), "sha256": str(digest)} if is_plain_name(name):
                stamps[name] = FileStamp(size=size, sha256=digest)
            case _:
                raise InputError(
                    f"{where}: entry {_shown(name)} is not a plain file name with size and sha256"
                )
    return stamps


def verify(folder: Path, *, hashed: Collection[str] | None = None) -> list[str]:
    """Hold a folder against its manifest.

    Args:
        folder: the checkpoint folder.
        hashed: files whose content is compared too; None: all. Sizes always are.

    Returns:
        One line per fault; an empty list means that the checkpoint is whole.
    """
    try:
        stamps = _read_manifest(folder)
    except InputError as error:
        return [str(error)]
    faults: list[str] = []
    for name, stamp in stamps.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing, although the manifest lists it")
        elif path.stat().st_size != stamp.size:
            faults.append(f"{path}: {path.stat().st_size} bytes, the manifest says {stamp.size}")
        elif (hashed is None or name in hashed) and _sha256(path) != stamp.sha256:
            faults.append(f"{path}: its content does not match the manifest's sha256")
    return faults


def read_model(folder: Path) -> Checkpoint:
    """Read weights and settings.

    Raises:
        InputError: not a checkpoint folder, not whole, of another format number, or damaged.
    """
    _require_whole(folder, MODEL, CONFIG)
    path = folder / CONFIG
    tree = parse_json(_read_small(path), str(path))
    _require_format(tree, str(path))
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{path}: kind is {_shown(kind)}, expected {' or '.join(_KINDS)}")
    return Checkpoint(
        config=_parse_config(tree.get("config"), _KINDS[kind], path),
        weights=_read_weights(folder / MODEL),
        metrics=_parse_metrics(tree.get("metrics"), path),
    )


def slim(folder: Path) -> None:
    """Make a checkpoint fit to be given away, in place.

    Weights become half precision, which prediction turns back into float32. What only the run that
    wrote it could use goes: the state of training, and the folders of its data.

    Raises:
        InputError: not a whole checkpoint.
        OSError: the files cannot be written.
    """
    found = read_model(folder)
    if isinstance(found.config, FinetuneConfig):
        data = dataclasses.replace(found.config.data, root="", extra=(), cache_dir=None)
        config = dataclasses.replace(found.config, data=data, init_from=None)
    else:
        probe = dataclasses.replace(found.config.probe, root=None)
        data = dataclasses.replace(found.config.data, roots=(), cache_dir=None)
        config = dataclasses.replace(found.config, data=data, probe=probe)
    halved = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in found.weights.items()
    }
    (folder / MANIFEST).unlink()
    (folder / TRAINER).unlink(missing_ok=True)
    write_model(folder, config=config, weights=halved, metrics=found.metrics)
    write_manifest(folder)


def read_trainer(folder: Path) -> dict[str, Any]:
    """Read the state that a resumed run continues from, onto the CPU.

    Raises:
        InputError: not a checkpoint folder, not whole, or damaged.
    """
    _require_whole(folder, TRAINER)
    path = folder / TRAINER
    try:
        _require_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A hostile archive reaches code that raises nearly anything.
        raise InputError(
            f"{path}: not a training state of scribbleseg ({_one_line(error)})"
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


def resolve(reference: str) -> Path:
    """Find the checkpoint folder that a user means.

    Args:
        reference: a checkpoint folder, a run or sweep folder (its best checkpoint is taken), or
            `released:NAME`. Local only: `runs.find_checkpoint` takes URIs as well.

    Raises:
        InputError: nothing of the kind is there.
    """
    if reference.startswith("released:"):
        return _resolve_released(reference.removeprefix("released:"))
    if "://" in reference:
        raise InputError(f"{reference}: on remote storage; fetch it with `scribbleseg pull` first")
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{reference}: no such folder; expected a checkpoint, a run, or released:NAME"
        )
    if (folder / MANIFEST).is_file():
        return folder
    if not (folder / BEST).is_file():
        raise InputError(
            f"{reference}: holds neither {MANIFEST} nor {BEST}; expected a checkpoint folder, "
            "or a run that has saved its best checkpoint"
        )
    return folder / best_location(_read_small(folder / BEST), str(folder / BEST))


def best_location(text: str | bytes, where: str) -> str:
    """Return where a best.json points: a path below its own folder, with forward slashes.

    A run's names a `checkpoint`; a sweep's also names the `run` that holds it.

    Args:
        text: content of best.json.
        where: its path, for the error.

    Raises:
        InputError: not a best.json, or one that points outside its folder.
    """
    tree = parse_json(text, where)
    parts = [tree[key] for key in ("run", "checkpoint") if key in tree]
    if "checkpoint" not in tree or not all(map(is_plain_name, parts)):
        raise InputError(f"{where}: does not name a checkpoint folder; expected 'checkpoint': NAME")
    return "/".join(parts)


def is_plain_name(name: object) -> bool:
    """Say whether a name is one file or folder, and nowhere else: no separators, no "..", no drive.

    Hidden names are refused too, since nothing in a checkpoint or run that others read is hidden.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 255 or name.startswith("."):
        return False
    return name.isprintable() and not set(name) & set('/\\:*?"<>|')


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed.

    Raises:
        OSError: it cannot be written; nothing is left behind and an older file stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def to_json(tree: Mapping[str, Any], *, indent: int | None = 2) -> bytes:
    """Return JSON that ends in a line break; `indent` None: on one line.

    Raises:
        ValueError: a number is not finite; JSON has no such numbers.
    """
    return (json.dumps(tree, indent=indent, allow_nan=False) + "\n").encode()


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Args:
        text: the JSON.
        where: its path, for the error.

    Raises:
        InputError: not JSON, or not an object.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON ({_one_line(error)})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: holds {type(tree).__name__}, expected a JSON object")
    return cast(dict[str, Any], tree)


def _resolve_released(name: str) -> Path:
    available = sorted(path.parent.name for path in RELEASED.glob(f"*/{MANIFEST}"))
    if name not in available:
        listed = ", ".join(available) or "none ships with this version"
        raise InputError(f"released:{name}: no such released checkpoint; available: {listed}")
    return RELEASED / name


def _require_whole(folder: Path, *names: str) -> None:
    """Raise unless the folder is a whole checkpoint that holds `names`, whose content is hashed."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a checkpoint folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: holds no {MANIFEST}, so it is no checkpoint or an unfinished one; "
            "give a folder that a training run finished writing"
        )
    faults = verify(folder, hashed=names)
    if faults:
        raise InputError(f"{faults[0]}; the checkpoint is damaged, fetch or train it again")
    for name in names:
        if name not in _read_manifest(folder):
            raise InputError(f"{folder}: its manifest lists no {name}; expected one that does")


def _require_format(tree: Mapping[str, Any], where: str) -> None:
    found = tree.get("format")
    if type(found) is not int or found != FORMAT:
        raise InputError(
            f"{where}: format is {_shown(found)}, expected {FORMAT}; "
            "read it with the scribbleseg version that wrote it"
        )


def _read_manifest(folder: Path) -> dict[str, FileStamp]:
    path = folder / MANIFEST
    return parse_manifest(_read_small(path), str(path))


def _read_small(path: Path) -> bytes:
    """Read a JSON file that is never large, so that a hostile one cannot fill the memory."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MAX_JSON_BYTES:
        raise InputError(f"{path}: over {_MAX_JSON_BYTES} bytes, expected a small JSON file")
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    # Not memory-mapped: the weights outlive a file that is then overwritten, pruned or truncated.
    try:
        return safetensors.torch.load(path.read_bytes())
    except Exception as error:  # A hostile header reaches code that raises nearly anything.
        raise InputError(f"{path}: not readable as safetensors ({_one_line(error)})") from None


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
        raise InputError(f"{path}: 'config' is {_shown(tree)}, expected the settings of a run")
    try:
        # Compared first: a foreign key must not reach the command-line parser, as "help" would.
        known = flatten(to_dict(settings()))
        given = flatten(cast(dict[str, Any], tree))
        unknown = [key for key in given if key not in known]
        if unknown:
            raise InputError(f"unknown settings in 'config': {_list(unknown)}")
        return from_dict(settings, cast(dict[str, Any], tree))
    except (InputError, RecursionError) as error:
        raise InputError(f"{path}: {_one_line(error)}") from None


def _parse_metrics(tree: object, path: Path) -> dict[str, float]:
    if not isinstance(tree, dict):
        raise InputError(f"{path}: 'metrics' is {_shown(tree)}, expected names and numbers")
    metrics: dict[str, float] = {}
    for name, value in cast(dict[str, object], tree).items():
        match value:
            case int() | float() if type(value) is not bool and abs(value) <= sys.float_info.max:
                metrics[name] = float(value)
            case _:
                raise InputError(
                    f"{path}: metric {_shown(name)} is {_shown(value)}, expected a finite number"
                )
    return metrics


def _not_exempt(names: Iterable[str], exempt: Sequence[str]) -> list[str]:
    return [
        name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)
    ]


def _list(names: Sequence[str]) -> str:
    """Join names, and count those past the first few: a model has hundreds of tensors."""
    shown = ", ".join(name[:80] for name in names[:_MAX_NAMES_SHOWN])
    rest = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _shown(value: object) -> str:
    """A value for an error message, cut short: the file that holds it may be hostile."""
    return " ".join(reprlib.repr(value).split())[:80]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
