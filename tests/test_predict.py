"""Prediction: sizes, padding, flipping, strokes, checkpoints and folders."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from scribbleseg.checkpoint import write_model
from scribbleseg.config import DataConfig, FinetuneConfig, ModelConfig, PredictConfig
from scribbleseg.datasets.scenes import Scene
from scribbleseg.datasets.transforms import normalise
from scribbleseg.errors import InputError
from scribbleseg.manifest import write_manifest
from scribbleseg.models import build_model
from scribbleseg.predict import (
    Predictor,
    check_arrays,
    drop_parts,
    load,
    predict_folder,
    predict_logits,
    to_mask,
)


class RedAsLogits(nn.Module):
    """Stands in for a network: its logits are the red channel it sees; remembers its input."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.was_training: list[bool] = []

    def forward(self, image: Tensor, strokes: Tensor) -> SimpleNamespace:
        """Return the red channel."""
        self.seen.append((image, strokes))
        self.was_training.append(self.training)
        return SimpleNamespace(logits=image[:, :1])


class ColumnAsLogits(nn.Module):
    """Stands in for a network whose logits are the column's number."""

    def forward(self, image: Tensor, strokes: Tensor) -> SimpleNamespace:
        """Return the columns' numbers."""
        column = torch.arange(image.shape[-1], dtype=torch.float32)
        return SimpleNamespace(logits=column.expand(len(image), 1, *image.shape[-2:]))


class Constant(nn.Module):
    """Stands in for a network that says the same of every pixel."""

    def __init__(self, logit: float):
        super().__init__()
        self.logit = logit

    def forward(self, image: Tensor, strokes: Tensor) -> SimpleNamespace:
        """Return the one logit."""
        return SimpleNamespace(logits=torch.full_like(image[:, :1], self.logit))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width), 255, np.uint8)


def logits_of(model: nn.Module, image: np.ndarray, strokes: np.ndarray, long_side: int, **options):
    return predict_logits(
        model,
        image,
        strokes,
        config=FinetuneConfig(
            data=DataConfig(long_side=long_side), predict=PredictConfig(**options)
        ),
        device="cpu",
    )


def test_logits_at_network_size_are_the_models_own():
    image = noise(45, 64)
    logits = logits_of(RedAsLogits(), image, blank(45, 64), long_side=64)
    expected = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])[0, 0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert logits.dtype == torch.float32


def test_logits_are_resized_bilinearly_to_the_images_own_size():
    image = cv2.resize(noise(8, 8), (128, 96), interpolation=cv2.INTER_LINEAR)
    small = cv2.resize(image, (64, 48), interpolation=cv2.INTER_AREA)
    red = normalise(torch.from_numpy(small).permute(2, 0, 1)[None])[0, 0].numpy()
    expected = cv2.resize(red, (128, 96), interpolation=cv2.INTER_LINEAR)
    logits = logits_of(RedAsLogits(), image, blank(96, 128), long_side=64)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(33, 64), (64, 40), (3, 64), (64, 64)])
def test_padding_repeats_the_image_and_adds_no_strokes(size: tuple[int, int]):
    model = RedAsLogits()
    height, width = size
    everywhere = np.ones(size, np.uint8)
    assert logits_of(model, noise(*size), everywhere, long_side=64).shape == size
    image, strokes = model.seen[0]
    assert all(side % 32 == 0 for side in image.shape[-2:])
    assert (strokes[:, 0, :height, :width] == 1).all()
    assert (strokes[:, :, height:] == 0).all() and (strokes[..., width:] == 0).all()
    assert (image[..., height:, :width] == image[..., height - 1 : height, :width]).all()
    assert (image[..., width:] == image[..., width - 1 : width]).all()


def test_flip_averages_logits_with_those_of_the_mirrored_input():
    image = noise(32, 50)
    # 50 columns are padded to 64: were the padding mirrored too, the mean would not be 24.5.
    logits = logits_of(ColumnAsLogits(), image, blank(32, 50), long_side=50, flip=True)
    torch.testing.assert_close(logits, torch.full((32, 50), 24.5))
    plain = logits_of(RedAsLogits(), image, blank(32, 50), long_side=50)
    flipped = logits_of(RedAsLogits(), image, blank(32, 50), long_side=50, flip=True)
    torch.testing.assert_close(flipped, plain)


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_an_object_begins_at_the_threshold(threshold: float, edges: bool):
    """Whatever the resizing and the edges do to probabilities, those of one value stay one."""
    for off in (-0.02, 0.02):
        logit = float(np.log((threshold + off) / (1 - threshold - off)))
        logits = logits_of(
            Constant(logit), noise(48, 64), blank(48, 64), 64, threshold=threshold, edges=edges
        )
        assert (to_mask(logits, blank(48, 64), honour_strokes=True) == (off > 0)).all()
        shifted = logit - np.log(threshold / (1 - threshold))
        torch.testing.assert_close(logits, torch.full((48, 64), shifted), atol=1e-3, rtol=0)


def test_a_threshold_is_asked_for_or_the_checkpoints_own(checkpoint: Path):
    assert load(checkpoint, device="cpu").config.predict.threshold == 0.5
    assert load(checkpoint, device="cpu", threshold=0.7).config.predict.threshold == 0.7
    with pytest.raises(InputError, match=r"predict.threshold is 1.0; expected 0.01 to 0.99"):
        load(checkpoint, device="cpu", threshold=1.0)


def test_parts_that_nothing_speaks_for_are_dropped():
    """Two parts under strokes, one sure of itself, one that is neither, and one met diagonally."""
    logits = torch.full((9, 20), -1.0)
    logits[1:4, 1:4] = 2.0  # a stroke in it
    logits[4, 4] = 2.0  # touches it by a corner
    logits[1:4, 7:10] = 2.0  # nothing in it
    logits[1:4, 12:15] = 2.0
    logits[2, 13] = 5.0  # sure of itself
    logits[6:8, 7:10] = 2.0
    strokes = blank(9, 20)
    strokes[2, 2] = 1
    strokes[6, 11:13] = 1  # ends one pixel before a part: no part of it
    strokes[2, 8] = 0
    dropped = torch.zeros(9, 20, dtype=torch.bool)
    dropped[1:4, 7:10] = True
    dropped[6:8, 7:10] = True
    found = drop_parts(logits, strokes, 4.0)
    assert torch.equal(found[~dropped], logits[~dropped])
    # Background, but a mask for training that wants 0.75 leaves it out.
    assert (found[dropped] == -1).all()
    assert (to_mask(found, blank(9, 20), honour_strokes=True, sure=0.75)[dropped] == 255).all()
    strokes[6, 10] = 1  # and now beside it: one part
    dropped[6:8, 7:10] = False
    assert torch.equal(drop_parts(logits, strokes, 4.0) < 0, (logits < 0) | dropped)
    strokes[strokes == 1] = 255
    assert torch.equal(drop_parts(logits, strokes, 4.0), logits)


@pytest.mark.parametrize("edges", [False, True])
def test_part_thresholds_are_probabilities_of_the_network(edges: bool):
    """Its red is its logit: an area with a stroke, and one without, of 0.65."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[8:56, 8:40, 0], image[8:56, 56:88, 0] = 200, 160
    strokes = blank(64, 96)
    strokes[30, 10:30] = 1
    logit = float(normalise(torch.tensor([[[[160]], [[0]], [[0]]]], dtype=torch.uint8))[0, 0, 0, 0])
    own = float(1 / (1 + np.exp(-logit)))
    for off, kept in ((-0.02, True), (0.02, False)):
        found = logits_of(
            RedAsLogits(),
            image,
            strokes,
            96,
            threshold=0.6,
            part_threshold=own + off,
            edges=edges,
        )
        assert bool((found[20:44, 64:80] > 0).all()) is kept
        assert bool((found[20:44, 64:80] > 0).any()) is kept
        assert (found[20:44, 16:32] > 0).all()


def test_a_part_threshold_is_asked_for_or_the_checkpoints_own(checkpoint: Path):
    assert load(checkpoint, device="cpu").config.predict.part_threshold == 0.0
    asked = load(checkpoint, device="cpu", part_threshold=1.0)
    assert asked.config.predict.part_threshold == 1.0
    with pytest.raises(InputError, match=r"predict.part_threshold is -0.5; expected 0 to 1"):
        load(checkpoint, device="cpu", part_threshold=-0.5)


def test_scales_are_asked_for_or_the_checkpoints_own(checkpoint: Path):
    assert load(checkpoint, device="cpu").config.predict.scales == (1.0,)
    found = load(checkpoint, device="cpu", scales=(0.5, 1.0))
    assert found.config.predict.scales == (0.5, 1.0)
    with pytest.raises(InputError, match=r"predict.scales is \(5.0,\)"):
        load(checkpoint, device="cpu", scales=(5.0,))


def test_edges_are_the_photographs_own():
    """A border off the network's grid, whose pixels are eight of the photograph's wide."""
    image = np.full((256, 512, 3), 90, np.uint8)
    image[:, 260:] = 250
    plain, along = (
        logits_of(RedAsLogits(), image, blank(256, 512), long_side=64, edges=edges) > 0
        for edges in (False, True)
    )
    wanted = torch.from_numpy(image[..., 0] > 124)
    assert (plain != wanted).any()
    assert (along == wanted).all()


def test_looks_at_several_scales_are_averaged_on_the_finest_grid():
    image = noise(96, 128)
    small, large = (
        logits_of(RedAsLogits(), image, blank(96, 128), long_side=64, scales=(scale,))
        for scale in (1.0, 2.0)
    )
    model = RedAsLogits()
    both = logits_of(model, image, blank(96, 128), long_side=64, scales=(2.0, 1.0))
    assert [tuple(seen[0].shape[-2:]) for seen in model.seen] == [(64, 64), (96, 128)]
    torch.testing.assert_close(both, (small + large) / 2)


def test_a_look_may_be_smaller_than_a_network_is_trained_at():
    model = RedAsLogits()
    logits_of(model, noise(96, 128), blank(96, 128), long_side=64, scales=(0.25, 1.0))
    assert [tuple(seen[0].shape[-2:]) for seen in model.seen] == [(32, 32), (64, 64)]


@pytest.mark.parametrize("training", [True, False])
def test_model_runs_in_evaluation_mode_and_returns_to_its_own(training: bool):
    model = RedAsLogits().train(training)
    logits_of(model, noise(32, 32), blank(32, 32), long_side=32)
    assert model.was_training == [False]
    assert model.training is training


@pytest.mark.parametrize("architecture", ["unet", "resunet", "attention_resunet"])
def test_real_models_predict_at_any_size(architecture):
    size = (37, 61)
    model = build_model(ModelConfig(architecture=architecture, width=8, depth=6))
    logits = logits_of(model, noise(*size), blank(*size), long_side=64, flip=True)
    assert logits.shape == size
    assert torch.isfinite(logits).all()


def test_strokes_have_the_last_word():
    strokes = np.array([[0, 1, 255, 255]], np.uint8)
    logits = torch.tensor([[3.0, -3.0, 2.0, -2.0]])
    assert to_mask(logits, strokes, honour_strokes=True).tolist() == [[0, 1, 1, 0]]
    assert to_mask(logits, strokes, honour_strokes=False).tolist() == [[1, 0, 1, 0]]


def test_what_is_not_sure_enough_is_left_out_of_a_mask_to_train_on():
    strokes = np.array([[0, 255, 255, 255, 255]], np.uint8)
    # Probabilities of the likelier label: 0.62, 0.62, 0.62, 0.95, 0.95.
    logits = torch.tensor([[0.5, 0.5, -0.5, 3.0, -3.0]])
    found = to_mask(logits, strokes, honour_strokes=True, sure=0.9)
    assert found.tolist() == [[0, 255, 255, 1, 0]]


@pytest.fixture
def predictor() -> Predictor:
    config = FinetuneConfig(data=DataConfig(long_side=64))
    device = torch.device("cpu")
    return Predictor(config=config, model=RedAsLogits(), device=device, source="a test")


def test_probabilities_are_the_sigmoid_and_the_mask_is_their_half(predictor: Predictor):
    image, strokes = noise(48, 64), blank(48, 64)
    probabilities = predictor.probabilities(image, strokes)
    logits = predictor.logits(image, strokes).numpy()
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    mask = predictor.predict(image, strokes)
    assert mask.dtype == np.uint8
    with pytest.raises(InputError, match=r"values \[2\]"):
        predictor.predict(image, np.full_like(strokes, 2))
    np.testing.assert_array_equal(mask, probabilities > 0.5)


@pytest.mark.parametrize(
    ("image", "strokes", "expected"),
    [
        (noise(8, 8).astype(np.float32), blank(8, 8), "image: found float32"),
        (noise(8, 8)[..., 0], blank(8, 8), r"image: found uint8 of shape \(8, 8\)"),
        (noise(8, 8), blank(8, 9), r"strokes: found uint8 of shape \(8, 9\)"),
        (noise(8, 8), np.full((8, 8), 2, np.uint8), r"strokes: found the values \[2\]"),
    ],
)
def test_arrays_that_break_the_contract_are_refused(image, strokes, expected):
    with pytest.raises(InputError, match=expected) as refused:
        check_arrays(image, strokes)
    assert "\n" not in str(refused.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = FinetuneConfig(data=DataConfig(long_side=64), model=ModelConfig(width=8, depth=3))
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint_0003"
    folder.mkdir()
    write_model(folder, config=config, weights=build_model(config.model).state_dict(), metrics={})
    write_manifest(folder)
    return folder


def test_load_gives_back_the_network_that_was_saved(checkpoint: Path):
    torch.manual_seed(0)
    # In the order in memory that `load` gives it: sums are then the same to the last bit.
    model = build_model(ModelConfig(width=8, depth=3)).to(memory_format=torch.channels_last)
    image, strokes = noise(40, 64), blank(40, 64)
    predictor = load(checkpoint, device="cpu")
    assert predictor.source == str(checkpoint)
    assert not predictor.model.training
    expected = logits_of(model, image, strokes, long_side=64)
    assert torch.equal(predictor.logits(image, strokes), expected)


def test_load_refuses_what_is_no_checkpoint_and_no_device(checkpoint: Path, tmp_path: Path):
    with pytest.raises(InputError, match="device is 'banana'"):
        load(checkpoint, device="banana")
    with pytest.raises(InputError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_load_refuses_weights_that_are_no_numbers(tmp_path: Path):
    config = FinetuneConfig(model=ModelConfig(width=8, depth=3))
    weights = build_model(config.model).state_dict()
    name = next(iter(weights))
    weights[name][0] = float("nan")
    write_model(tmp_path, config=config, weights=weights, metrics={})
    write_manifest(tmp_path)
    with pytest.raises(InputError, match=f"NaN or infinity in {name}; expected finite weights"):
        load(tmp_path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    images, scribbles, out = (tmp_path / name for name in ("images", "scribbles", "out"))
    for number, (height, width) in enumerate([(40, 64), (64, 33)]):
        for folder, pixels in (
            (images, noise(height, width)),
            (scribbles, blank(height, width)),
        ):
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"photo {number}.png")
    return images, scribbles, out


def test_a_folders_masks_can_leave_out_what_is_not_sure(predictor: Predictor, folders):
    images, scribbles, out = folders
    assert len(list(predict_folder(predictor, images, scribbles, out, sure=0.999))) == 2
    assert (np.array(Image.open(out / "photo 0.png")) == 255).mean() > 0.5
    with pytest.raises(InputError, match=r"sure is 1.0; expected a probability of 0.5 or more"):
        predict_folder(predictor, images, scribbles, out, sure=1.0)


def test_folder_gets_one_mask_per_image(predictor: Predictor, folders):
    images, scribbles, out = folders
    steps = list(predict_folder(predictor, images, scribbles, out, probabilities=True))
    assert [(step.stem, step.done, step.total) for step in steps] == [
        ("photo 0", 1, 2),
        ("photo 1", 2, 2),
    ]
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert found == [
        "photo 0.png",
        "photo 1.png",
        "probabilities/photo 0.png",
        "probabilities/photo 1.png",
    ]
    assert not [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    for stem in ("photo 0", "photo 1"):
        image = np.array(Image.open(images / f"{stem}.png"))
        strokes = np.array(Image.open(scribbles / f"{stem}.png"))
        with Image.open(out / f"{stem}.png") as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.array(picture), predictor.predict(image, strokes))
        grey = np.array(Image.open(out / "probabilities" / f"{stem}.png"))
        expected = 255 * predictor.probabilities(image, strokes)
        np.testing.assert_allclose(grey, expected, atol=0.501)


def remove_image(images: Path, scribbles: Path) -> None:
    (images / "photo 1.png").unlink()


def remove_scribbles(images: Path, scribbles: Path) -> None:
    (scribbles / "photo 1.png").unlink()


def truncate_image(images: Path, scribbles: Path) -> None:
    path = images / "photo 1.png"
    path.write_bytes(path.read_bytes()[:-200])


def shrink_scribbles(images: Path, scribbles: Path) -> None:
    Image.fromarray(blank(64, 32)).save(scribbles / "photo 1.png")


def recode_scribbles(images: Path, scribbles: Path) -> None:
    Image.fromarray(np.full((64, 33), 2, np.uint8)).save(scribbles / "photo 1.png")


def remove_folder(images: Path, scribbles: Path) -> None:
    images.rename(images.with_name("elsewhere"))


def empty_folder(images: Path, scribbles: Path) -> None:
    for path in (*images.iterdir(), *scribbles.iterdir()):
        path.unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        remove_image,
        remove_scribbles,
        truncate_image,
        shrink_scribbles,
        recode_scribbles,
        remove_folder,
        empty_folder,
    ],
)
def test_bad_folders_are_refused_before_anything_is_written(predictor, folders, spoil):
    images, scribbles, out = folders
    spoil(images, scribbles)
    with pytest.raises(InputError) as refused:
        predict_folder(predictor, images, scribbles, out)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_masks_never_replace_what_is_read(predictor: Predictor, folders):
    images, scribbles, _ = folders
    for out in (images, scribbles, images / ".." / "scribbles"):
        with pytest.raises(InputError, match="another folder"):
            predict_folder(predictor, images, scribbles, out)


def test_a_place_that_cannot_be_written_is_one_line(predictor: Predictor, folders):
    images, scribbles, out = folders
    out.touch()
    with pytest.raises(InputError, match="not a directory; expected a folder that can be written"):
        list(predict_folder(predictor, images, scribbles, out / "below"))


@pytest.mark.parametrize("name", ["probabilities", "s.png", "probabilities/s.png"])
def test_what_stands_in_the_way_is_told_before_anything_is_written(
    predictor: Predictor, folders, name: str
):
    images, scribbles, out = folders
    blocked = out / name.replace("s.png", f"{min(images.iterdir()).stem}.png")
    blocked.parent.mkdir(parents=True)
    if blocked.suffix:
        blocked.mkdir()
    else:
        blocked.touch()
    with pytest.raises(InputError, match="give another folder as out"):
        predict_folder(predictor, images, scribbles, out, probabilities=True)
    assert not list(out.glob("*.png")) or blocked.parent == out


@pytest.mark.parametrize("notes_kept", [False, True])
def test_masks_of_a_hand_are_not_replaced_and_its_own_are(
    predictor: Predictor, folders, notes_kept: bool
):
    images, scribbles, out = folders
    out.mkdir()
    (out / "photo 1.png").write_bytes(b"a mask")
    with pytest.raises(InputError, match=r"photo 1.png: 1 file\(s\) in this folder were not made"):
        predict_folder(predictor, images, scribbles, out)
    (out / "photo 1.png").rename(out / "another.png")
    for _ in range(2):
        assert len(list(predict_folder(predictor, images, scribbles, out))) == 2
    # Corrected in an editor, some of which hand on what they do not know.
    mask = Image.open(out / "photo 1.png")
    notes = PngInfo()
    for keyword, text in mask.info.items() if notes_kept else ():
        notes.add_text(keyword, text)
    Image.fromarray(1 - np.array(mask)).save(out / "photo 1.png", pnginfo=notes)
    with pytest.raises(InputError, match="or were changed since"):
        predict_folder(predictor, images, scribbles, out)


def test_probabilities_of_a_hand_are_not_replaced_either(predictor: Predictor, folders):
    images, scribbles, out = folders
    (out / "probabilities").mkdir(parents=True)
    (out / "probabilities" / "photo 1.png").write_bytes(b"kept")
    with pytest.raises(InputError, match="probabilities/photo 1.png: .* were not made by"):
        predict_folder(predictor, images, scribbles, out, probabilities=True)
    (out / "probabilities" / "photo 1.png").unlink()
    for _ in range(2):
        told = predict_folder(predictor, images, scribbles, out, probabilities=True)
        assert len(list(told)) == 2


@pytest.mark.parametrize(("unlabelled", "number"), [(0, 2), (255, 0)])
def test_strokes_on_a_black_canvas_are_told_of(
    predictor: Predictor, folders, caplog, unlabelled: int, number: int
):
    images, scribbles, out = folders
    for path in scribbles.iterdir():
        strokes = np.full_like(np.array(Image.open(path)), unlabelled)
        strokes[4:6, 4:20] = 1
        Image.fromarray(strokes).save(path)
    with caplog.at_level("INFO", logger="scribbleseg"):
        predict_folder(predictor, images, scribbles, out)
    said = [each.getMessage() for each in caplog.records]
    assert [f"in {number} file(s)" in line for line in said] == ([True] if number else [])


def test_photographs_that_viewers_turn_are_told_of(predictor: Predictor, folders, caplog):
    images, scribbles, out = folders
    first, *_ = sorted(images.iterdir())
    with Image.open(first) as picture:
        picture.load()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(first, exif=exif)
    with caplog.at_level("INFO", logger="scribbleseg"):
        predict_folder(predictor, images, scribbles, out)
    (said,) = [each.getMessage() for each in caplog.records]
    assert said.startswith(f"warning: {first}: viewers turn") and "1 file(s)" in said


def test_stems_in_another_unicode_spelling(predictor: Predictor, folders):
    images, scribbles, out = folders
    image, drawing = min(images.iterdir()), min(scribbles.iterdir())
    image.rename(image.with_stem("caf\u00e9"))
    drawing.rename(drawing.with_stem("cafe\u0301"))
    with pytest.raises(InputError, match=f"file for.*Unicode.*--nfc {images} {scribbles}`"):
        predict_folder(predictor, images, scribbles, out)


def test_predicting_does_not_wait_for_the_augmentation_library():
    code = "import sys, scribbleseg.predict; print('albumentations' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("edges", [False, True])
def test_scenes_that_share_a_forward_pass_get_their_own_logits(checkpoint: Path, edges: bool):
    predictor = load(checkpoint, device="cpu", flip=True, edges=edges)
    sizes = [(40, 64), (64, 40), (40, 64), (40, 64)]
    scenes = [
        Scene(stem=str(n), image=noise(*size) // (n + 1), scribbles=blank(*size), mask=None)
        for n, size in enumerate(sizes)
    ]
    together = predictor.logits_of(scenes)
    assert [tuple(logits.shape) for logits in together] == sizes
    for scene, logits in zip(scenes, together, strict=True):
        alone = predictor.logits(scene.image, scene.scribbles)
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    assert predictor.logits_of([]) == []
