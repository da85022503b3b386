"""The vision transformer: timm's own results are the oracle for what is written out here."""

import subprocess
import sys

import pytest
import torch

from scribbleseg.config import ModelConfig
from scribbleseg.models import build_model
from scribbleseg.models.vit import DEPTHS, VitBackbone, VitEncoder

every_patch_size = pytest.mark.parametrize("patch_size", [8, 16])
SIZES = [(64, 64), (96, 96), (128, 128), (100, 130), (224, 224)]


def make(patch_size=16, **settings):
    torch.manual_seed(0)
    return VitEncoder(
        ModelConfig(architecture="vit_unet", patch_size=patch_size, **settings)
    ).eval()


def photograph(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def padded(image, multiple):
    height, width = image.shape[-2:]
    rows = torch.arange(-(-height // multiple) * multiple).clamp(max=height - 1)
    columns = torch.arange(-(-width // multiple) * multiple).clamp(max=width - 1)
    return image[:, :, rows][..., columns]


@every_patch_size
@pytest.mark.parametrize("size", SIZES)
def test_features_and_embedding_equal_those_of_timm(patch_size, size):
    encoder, image = make(patch_size), photograph(*size)
    seen = padded(image, patch_size)
    with torch.inference_mode():
        maps, embedding = encoder(image), encoder.embed(image)
        indices = [depth - 1 for depth in DEPTHS]
        final, expected = encoder.vit.forward_intermediates(seen, indices=indices, norm=True)
    grid = (seen.shape[2] // patch_size, seen.shape[3] // patch_size)
    assert [tuple(m.shape) for m in maps] == [(2, 192, *grid)] * 4
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding, final[:, 0], rtol=1e-4, atol=1e-5)


def test_the_small_transformer_has_384_channels():
    backbone = VitBackbone(make(vit="small"))
    assert backbone.dim == 384
    with torch.inference_mode():
        assert backbone(photograph(32, 32)).shape == (2, 384)


def test_dino_reaches_every_parameter_of_the_backbone():
    backbone = VitBackbone(make())
    backbone(photograph(64, 64)).square().mul(torch.arange(192)).sum().backward()
    still = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@every_patch_size
def test_the_network_starts_from_the_features_of_rgb_alone(patch_size):
    torch.manual_seed(0)
    model = build_model(ModelConfig(architecture="vit_unet", patch_size=patch_size, width=8)).eval()
    image, strokes = photograph(64, 48), torch.ones(2, 2, 64, 48)
    seen = []
    with torch.inference_mode():
        alone = model.encoder(image)
        model.encoder.register_forward_hook(lambda _module, _inputs, maps: seen.append(maps))
        model(image, strokes)
        torch.nn.init.ones_(model.strokes.project[-1].weight)
        model(image, strokes)
    at_first, later = seen
    assert all(torch.equal(a, b) for a, b in zip(alone, at_first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone, later, strict=True))


def test_a_pretrained_encoder_is_all_that_is_handed_over():
    model = build_model(ModelConfig(architecture="vit_unet", width=8))
    assert {name for name, _ in model.named_children()} == {
        "encoder", "strokes", "pyramid", "decoder", "head"
    }  # fmt: skip
    model.encoder.load_state_dict(VitBackbone(make()).encoder.state_dict())


@pytest.mark.parametrize("size", [(64, 64), (100, 130)])
def test_attention_of_the_cls_token_is_what_the_last_block_computes(size):
    encoder, image = make(), photograph(*size)
    kept = []
    attention = encoder.vit.blocks[-1].attn
    attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.inference_mode():
        maps = encoder.attention_of_cls(image)
        attention.fused_attn = False
        encoder.embed(image)
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    assert maps.shape == (2, 3, *grid)
    assert (maps >= 0).all()
    assert (maps.sum(dim=(2, 3)) <= 1).all()
    torch.testing.assert_close(maps.flatten(2), kept[0][:, :, 0, 1:])


def test_the_other_networks_do_without_timm():
    code = "import sys, scribbleseg.models; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
