"""The `scribbleseg` command: data, predict, app, evaluate, status, pull, export, report.

Every command is a dataclass (its fields are the options, their docstrings the help) and a branch of
`run_line`. Heavy modules are imported where they are used, so that `--help` answers at once.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, assert_never

from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from scribbleseg.config import DataConfig, FinetuneConfig, Looker, parse_arguments
from scribbleseg.errors import InputError
from scribbleseg.progress import narrated

if TYPE_CHECKING:
    from scribbleseg.predict import Predictor

T = TypeVar("T")

TRIALS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class DataDemo:
    """Make the demo data: composites of photographs that scikit-image ships."""

    out: Path
    """Folder to make."""
    seed: int = 0
    """The same seed gives the same data, to the last bit."""


@dataclass(frozen=True, kw_only=True)
class DataVoc:
    """Build the benchmark's images and masks from PASCAL VOC 2012 (downloads about 2 GB)."""

    out: Path
    """Folder to make."""
    downloads: Path | None = None
    """Folder for VOC's own archive, kept for the next time; None: in the cache,
    $SCRIBBLESEG_CACHE or ~/.cache/scribbleseg.
    """


@dataclass(frozen=True, kw_only=True)
class DataPets:
    """Build scribbled data from Oxford-IIIT Pet (downloads about 800 MB)."""

    out: Path
    """Folder to make."""
    downloads: Path | None = None
    """Folder for the data set's own archives, kept for the next time; None: in the cache,
    $SCRIBBLESEG_CACHE or ~/.cache/scribbleseg.
    """


@dataclass(frozen=True, kw_only=True)
class DataRegions:
    """Make data to practise on from photographs without labels: regions as masks, with strokes."""

    images: tuple[str, ...]
    """Folders or URIs of photographs; all their subfolders are searched, those of labels passed
    over.
    """
    out: Path
    """Folder to make."""
    per_image: int = 4
    """Regions of each photograph (1 or more)."""
    seed: int = 0
    """Seed of all regions and strokes."""


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """Read a data folder once, say what it holds and everything that is wrong with it."""

    root: Positional[str]
    """Folder or URI that holds SPLIT/images, SPLIT/scribbles and SPLIT/ground_truth."""
    out: Path | None = None
    """JPEG file for the contact sheet; None: ROOT-check.jpg in the present folder."""


@dataclass(frozen=True, kw_only=True)
class DataConvert:
    """Write a data folder anew in the right coding: masks 0/255, strokes 1/2 or in colours."""

    root: Positional[str]
    """Folder or URI to read; it is left as it is."""
    out: Path
    """Folder to make."""
    strokes: tuple[int, int, int] | None = None
    """Values of object strokes, background strokes and unlabelled pixels; None: told by the data.
    """
    stroke_colours: tuple[str, str] | None = None
    """Colours of object strokes and background strokes that were drawn, as red lime or ff0000
    00ff00; None: scribbles hold labels.
    """
    masks: tuple[int, int] | None = None
    """Lowest and highest mask value that mean object; None: told by the data."""
    keep_ignore: bool = False
    """Keep the 255 border of class masks as "ignore" instead of background."""


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """Write lists of folds, and of a hold-out if asked, one stem per line."""

    root: Positional[str]
    """Folder or URI of the data contract."""
    out: Path
    """Folder to make."""
    split: str = "train"
    """Split to divide."""
    folds: int = 5
    """Number of folds (2 or more)."""
    holdout: float = 0.0
    """Share of the stems drawn into val.txt [0, 1); the folds are of all stems, these too."""
    seed: int = 0
    """Seed of that draw."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make, fetch, check, convert and split data."""

    command: (
        Annotated[DataDemo, subcommand("demo")]
        | Annotated[DataVoc, subcommand("voc")]
        | Annotated[DataPets, subcommand("pets")]
        | Annotated[DataRegions, subcommand("regions")]
        | Annotated[DataCheck, subcommand("check")]
        | Annotated[DataConvert, subcommand("convert")]
        | Annotated[DataSplit, subcommand("split")]
    )


@dataclass(frozen=True, kw_only=True)
class Predict(Looker):
    """Turn images and strokes into masks at the images' own sizes."""

    images: Path
    """Folder of photographs, STEM.jpg or STEM.png."""
    scribbles: Path
    """Folder of strokes, STEM.png: 0 background, 1 object, 255 unlabelled."""
    out: Path
    """Folder for the masks, STEM.png: 0 background, 1 object; masks in it that this command did not
    make are never replaced.
    """
    probabilities: bool = False
    """Also write OUT/probabilities/STEM.png: 255 x the probability of object."""
    honour_strokes: bool = True
    """Pixels under a stroke take the stroke's label."""
    sure: float = 0.5
    """Pixels whose label is less probable become 255, ignore, for training on such masks [0.5, 1).
    """


@dataclass(frozen=True, kw_only=True)
class App:
    """Open a page in the browser to draw strokes on photographs, and see the masks follow."""

    checkpoint: str | None = None
    """Checkpoint, run or sweep folder or URI, or released:NAME."""
    server: str | None = None
    """Instead of a checkpoint: URL of a deployed predictor (python -m deploy.serve), to which
    $SCRIBBLESEG_TOKEN is shown.
    """
    data: Path = Path("drawn")
    """Folder of the data contract that is drawn into; made if missing."""
    split: str = "train"
    """Split that is drawn into."""
    compare: str | None = None
    """Another checkpoint, shown side by side on the same strokes."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback, a token is needed: $SCRIBBLESEG_TOKEN, or a new one.
    """
    port: int = 0
    """Port to listen on; 0 takes a free one."""
    browse: bool = True
    """Open the page in a browser, where there is a screen."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Looker):
    """Score a checkpoint on a split that has masks."""

    data: str
    """Folder or URI (s3://, gs://) that holds the splits."""
    split: str = "train"
    """Split to score."""
    fold: int | None = None
    """Only this fold of the split (the one that training held out); None: all of it."""
    out: Path | None = None
    """Folder for scores.csv, summary.json and report.html; None: print only."""
    honour_strokes: bool = True
    """Pixels under a stroke take the stroke's label before they are scored."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Say how far a run or a sweep is, from its folder alone."""

    run: Positional[str]
    """Run or sweep folder or URI."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Copy the best checkpoint of a run or sweep to this machine, held against its hashes."""

    run: Positional[str]
    """Run or sweep folder or URI."""
    out: Path
    """Folder to make."""
    half: bool = False
    """To give away: weights in half precision, without where the data lay and without the state
    that a resumed run needs. A tenth of the size.
    """


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about one run or several, or about a sweep: curves, tables, gallery."""

    runs: Positional[tuple[str, ...]]
    """Run folders or URIs, or that of one sweep."""
    data: str | None = None
    """Folder or URI that holds the splits, if it is not where the run read it."""
    split: str | None = None
    """Split to score and to show; None: what the run held out."""
    out: Path | None = None
    """File to write; None: report.html in the first run's folder."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a network as one ONNX file, checked against PyTorch."""

    checkpoint: Positional[str]
    """Checkpoint, run or sweep folder or URI, or released:NAME."""
    out: Path
    """File to write, such as model.onnx."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Image + strokes -> mask. To train: python -m train.finetune --help."""

    command: (
        Annotated[Data, subcommand("data")]
        | Annotated[Predict, subcommand("predict")]
        | Annotated[App, subcommand("app")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Status, subcommand("status")]
        | Annotated[Pull, subcommand("pull")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Export, subcommand("export")]
    )


def main() -> None:
    """Run the command line and exit: 0 done, 2 the input is wrong, 1 anything else."""
    sys.exit(exit_status(lambda: run_line(sys.argv[1:])))


def run_line(arguments: Sequence[str]) -> None:
    """Run one command line."""
    program: Program = parse_arguments(
        OmitArgPrefixes[OmitSubcommandPrefixes[Program]], arguments, prog="scribbleseg"
    )
    match program.command:
        case Data():
            run_data(program.command)
        case Predict():
            predict(program.command)
        case App():
            app(program.command)
        case Evaluate():
            evaluate(program.command)
        case Status():
            status(program.command)
        case Pull():
            pull(program.command)
        case Export():
            export(program.command)
        case Report():
            report(program.command)
        case _:
            assert_never(program.command)


def exit_status(command: Callable[[], None]) -> int:
    """Run a command; turn what went wrong into one line and an exit status."""
    # Pillow's warning of pictures of half the size that it refuses, which cameras take.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    try:
        with narrated(_tell):
            command()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


def _tell(line: str) -> None:
    """Write a line of progress."""
    tqdm.write(line, file=sys.stderr)


def say(text: str) -> None:
    """Write a line for the user, who may be reading a log that is being written."""
    # What the terminal has no letters for is told by its number; so are names that are not UTF-8.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def bar(items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """Show progress over images where there is a terminal."""
    shown: Any = tqdm(items, total=total, unit="image", leave=False, disable=None)
    return shown


def run_data(data: Data) -> None:
    """`scribbleseg data ...`."""
    from scribbleseg.datasets import sources
    from scribbleseg.datasets.convert import convert
    from scribbleseg.datasets.split import split

    command = data.command
    match command:
        case DataDemo():
            made = sources.make_demo(command.out, command.seed, progress=bar)
            say(f"{command.out}: {'made' if made else 'is there already'}")
        case DataVoc():
            made = sources.make_voc(command.out, command.downloads, progress=bar)
            say(f"{command.out}: {'made' if made else 'is there already'}")
        case DataPets():
            made = sources.make_pets(command.out, command.downloads, progress=bar)
            say(f"{command.out}: {'made' if made else 'is there already'}")
        case DataRegions():
            skipped = sources.make_regions(
                command.images,
                command.out,
                per_image=command.per_image,
                seed=command.seed,
                progress=bar,
            )
            for path, why in skipped or ():
                say(f"skipped {path}: {why}")
            say(f"{command.out}: {'is there already' if skipped is None else 'made'}")
        case DataCheck():
            check_data(command)
        case DataConvert():
            done = convert(
                command.root,
                command.out,
                strokes=command.strokes,
                stroke_colours=command.stroke_colours,
                masks=command.masks,
                keep_ignore=command.keep_ignore,
                progress=bar,
            )
            changed = [conversion for conversion in done if conversion.action != "copied"]
            for conversion in changed:
                say(str(conversion))
            say(f"{command.out}: {len(changed)} of {len(done)} file(s) mended, the rest copied")
        case DataSplit():
            lists = split(
                command.root,
                command.split,
                command.folds,
                command.out,
                holdout=command.holdout,
                seed=command.seed,
            )
            for name, stems in lists.items():
                say(f"{command.out / name}: {len(stems)} stems")
        case _:
            assert_never(command)


def check_data(command: DataCheck) -> None:
    """`scribbleseg data check`: exits 2 where anything is wrong, after saying all of it."""
    from scribbleseg.datasets.check import check

    sheet = command.out or Path(f"{Path(command.root).resolve().name}-check.jpg")
    result = check(command.root, sheet, progress=bar)
    say(result.text())
    if result.errors:
        raise InputError(f"{command.root}: {len(result.errors)} error(s), listed above")
    say(f"contact sheet: {sheet}")


def _load(command: Looker) -> "Predictor":
    """Return the checkpoint's predictor; this process does nothing else but predict."""
    from scribbleseg.device import num_threads, prepare_cpu
    from scribbleseg.predict import load_as_asked

    prepare_cpu(num_threads())
    return load_as_asked(command)


def predict(command: Predict) -> None:
    """`scribbleseg predict`."""
    from scribbleseg.datasets.files import IMAGE_SUFFIXES
    from scribbleseg.datasets.scenes import list_files
    from scribbleseg.predict import predict_folder

    written = predict_folder(
        _load(command),
        command.images,
        command.scribbles,
        command.out,
        probabilities=command.probabilities,
        honour_strokes=command.honour_strokes,
        sure=command.sure,
    )
    num_images = len(list_files(command.images, IMAGE_SUFFIXES))
    done = sum(1 for _ in bar(written, total=num_images))
    say(f"{command.out}: {done} mask(s)")


def app(command: App) -> None:
    """`scribbleseg app`."""
    from scribbleseg.app.serve import serve

    serve(
        command.checkpoint,
        command.data,
        server=command.server,
        compare=command.compare,
        split=command.split,
        host=command.host,
        port=command.port,
        browse=command.browse,
        say=say,
    )


def evaluate(command: Evaluate) -> None:
    """`scribbleseg evaluate`."""
    from scribbleseg import evaluate as evaluation

    predictor = _load(command)
    result = evaluation.evaluate(
        predictor,
        command.data,
        command.split,
        command.out,
        fold=command.fold,
        honour_strokes=command.honour_strokes,
        watch=bar,
    )
    for line in result.warnings:
        _tell(f"warning: {line}")
    say(evaluation.format_table(result))
    if command.out is not None:
        from scribbleseg.report.page import write_evaluation_page

        say(f"pictures: {write_evaluation_page(predictor, result, command.out)}")


def status(command: Status) -> None:
    """`scribbleseg status`."""
    from scribbleseg.runs import status as read_status
    from scribbleseg.sweeps import is_sweep

    if is_sweep(command.run):
        sweep_status(command.run)
        return
    found = read_status(command.run)
    epochs = "?" if found.epochs is None else found.epochs
    line = f"{found.name}: {'finished' if found.finished else 'not finished'}, "
    line += f"epoch {found.epoch} of {epochs}"
    if found.seconds_left:
        line += f", about {found.seconds_left / 60:.0f} min of training left"
    say(line)
    if found.best is not None and found.best["metric"] == "epoch":
        say(f"to use: the checkpoint of epoch {found.best['epoch']}, the last (none was scored)")
    elif found.best is not None:
        say(f"best {found.best['metric']} {found.best['value']:.4f} at epoch {found.best['epoch']}")


def sweep_status(uri: str) -> None:
    """`scribbleseg status` of a sweep: its best trials, and those in progress."""
    from scribbleseg.sweeps import rank
    from scribbleseg.sweeps import status as read_status

    found = read_status(uri)
    line = f"{found.name}: {'finished' if found.finished else 'not finished'}, "
    line += f"{found.num_trials} trials: "
    line += ", ".join(f"{count} {state}" for state, count in found.counts.items())
    if found.seconds_left and not found.finished:
        line += f", about {found.seconds_left / 60:.0f} min left"
    say(line)
    best = rank(found.trials)[:TRIALS_SHOWN]
    running = [trial for trial in found.trials if not trial.ended and trial not in best]
    for trial in [*best, *running]:
        score = "     " if trial.score is None else f"{trial.score:.3f}"
        drawn = "  ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
        say(f"{trial.name}  {trial.state:8}  mIoU {score}  epoch {trial.epochs:>3}  {drawn}")
    for trial in found.trials:
        if trial.state == "failed":
            say(f"{trial.name}  failed: {trial.reason}")
    if found.best is not None:
        say(f"best: {found.best['run']}, mIoU {found.best['value']:.4f}")
        say(f"take it: scribbleseg pull {uri} --out best")


def _short(value: object) -> str:
    """Return a drawn value as people read it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def scoring_command(checkpoint: str, data: DataConfig) -> str:
    """Return the command that scores a checkpoint on the samples its training held out.

    Where it held out none, that stands before it, and the user has to name other data: scores on
    samples that were trained on say nothing, and training on strokes alone needs no masks.
    """
    from scribbleseg.evaluate import evaluate_command

    split = data.val_split if data.fold is None else data.split
    if split is None:
        command = evaluate_command(checkpoint, "OTHER", "SPLIT", None)
        return f"on other data, since this run held nothing out: {command}"
    return evaluate_command(checkpoint, data.root or "DATA", split, data.fold)


def pull(command: Pull) -> None:
    """`scribbleseg pull`."""
    from scribbleseg.checkpoint import read_model, slim
    from scribbleseg.config import to_yaml
    from scribbleseg.runs import pull as pull_best

    folder = pull_best(command.run, command.out)
    if command.half:
        slim(folder)
    found = read_model(folder)
    say(to_yaml(found.config).rstrip())
    for name, value in found.metrics.items():
        say(f"{name}: {value:.4f}")
    if "miou_error" in found.metrics:
        miou, margin = found.metrics["miou"], 1.96 * found.metrics["miou_error"]
        interval = f"{miou - margin:.4f} to {miou + margin:.4f}"
        say(f"mIoU {miou:.4f}, 95 % interval over images {interval}")
    say(f"verified: {folder}")
    if isinstance(found.config, FinetuneConfig):
        say(f"evaluate it: {scoring_command(str(folder), found.config.data)}")
    else:
        say(f"fine-tune it: python -m train.finetune RECIPE --init-from {folder}")


def export(command: Export) -> None:
    """`scribbleseg export`."""
    from scribbleseg.export import export_onnx
    from scribbleseg.predict import load

    export_onnx(load(command.checkpoint, device="cpu"), command.out)
    say(f"{command.out}: {command.out.stat().st_size / 1e6:.1f} MB, checked against PyTorch")


def report(command: Report) -> None:
    """`scribbleseg report`."""
    from scribbleseg.report.page import write_report
    from scribbleseg.report.sweep import write_sweep_report
    from scribbleseg.runs import RunFolder
    from scribbleseg.sweeps import is_sweep

    if not command.runs:
        raise InputError("no run is given; expected the folder of at least one")
    out = command.out or (RunFolder.open(command.runs[0]).local_path or Path()) / "report.html"
    sweeps = [run for run in command.runs if is_sweep(run)]
    if sweeps:
        if len(command.runs) > 1:
            raise InputError(f"{sweeps[0]} is a sweep; expected it alone, or runs alone")
        say(str(write_sweep_report(sweeps[0], out, data_root=command.data)))
        return
    say(str(write_report(command.runs, out, data_root=command.data, split=command.split)))
