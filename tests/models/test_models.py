"""The contract that every network keeps, and what is particular to one of them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from scribbleseg.config import LossConfig, ModelConfig
from scribbleseg.losses.segmentation import segmentation_loss
from scribbleseg.models import build_model, set_recompute
from scribbleseg.models.blocks import AttentionGate, ConvBlock, ResidualBlock, UpBlock
from scribbleseg.models.encoder import Encoder, StrokePath, level_channels

# Behind the colon stands the transformer's patch size, a pretrained encoder's name, or "matching".
ARCHITECTURES = [
    "unet", "resunet", "attention_resunet", "vit_unet:16", "vit_unet:8", "unet:lite0",
    "resunet:timm:resnet18", "unet:matching", "unet:lite0:matching",
]  # fmt: skip
every_model = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_norm = pytest.mark.parametrize("norm", ["batch", "group"])


def make(architecture, norm="batch", depth=4, seed=0):
    torch.manual_seed(seed)
    name, _, detail = architecture.removesuffix(":matching").partition(":")
    config = ModelConfig(architecture=name, width=8, depth=depth, norm=norm)
    if architecture.endswith(":matching"):
        config = replace(config, matching=True, depth=max(depth, 5))
    if detail.isdigit():
        config = replace(config, patch_size=int(detail))
    elif detail:
        config = replace(config, encoder=detail, depth=6)
    return build_model(config)


def inputs(height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, height, width, generator=generator)
    strokes = (torch.rand(batch, 2, height, width, generator=generator) > 0.9).float()
    return image, strokes


@every_model
@every_norm
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 95), (37, 32)])
@pytest.mark.parametrize("depth", [2, 6])
def test_logits_have_the_size_of_the_input(architecture, norm, size, depth):
    model = make(architecture, norm, depth).eval()
    with torch.inference_mode():
        output = model(*inputs(*size))
    assert output.logits.shape == (2, 1, *size)
    assert output.side_logits == ()
    assert output.logits.isfinite().all()


@every_model
def test_fresh_logits_are_centred_and_as_large_as_one(architecture):
    for seed in range(3):
        model = make(architecture, depth=6, seed=seed).train()
        with torch.no_grad():
            output = model(*inputs(64, 64))
        for logits in (output.logits, *output.side_logits[:2]):
            assert logits.mean().abs() < 0.4
            assert 0.7 < logits.std() < 2.5


@every_model
@every_norm
def test_every_parameter_has_a_gradient_after_two_optimiser_steps(architecture, norm):
    model = make(architecture, norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image, strokes = inputs(40, 48)
    target = (image[:, 0] > 0).to(torch.uint8)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(image, strokes)
        segmentation_loss(output.logits, output.side_logits, target, LossConfig()).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@every_model
def test_evaluation_is_deterministic_and_independent_of_the_batch(architecture):
    model = make(architecture).eval()
    image, strokes = inputs(48, 40, batch=3)
    with torch.inference_mode():
        together = model(image, strokes).logits
        again = model(image, strokes).logits
        alone = model(image[1:2], strokes[1:2]).logits
    assert torch.equal(together, again)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-5)


@every_model
def test_weights_saved_and_loaded_give_the_same_logits(architecture):
    model, other = make(architecture, seed=0).eval(), make(architecture, seed=1).eval()
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(*inputs(32, 40)).logits, other(*inputs(32, 40)).logits)


@pytest.mark.parametrize(
    "architecture", ["unet:matching", "resunet", "attention_resunet", "vit_unet:8"]
)
def test_activations_made_again_change_no_weight_and_no_statistic(architecture):
    image, strokes = inputs(48, 40)
    target = (image[:, 0] > 0).to(torch.uint8)
    found = []
    for recompute in (False, True):
        model = make(architecture).train()
        set_recompute(model, recompute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        held = 0

        def count(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        for _ in range(2):
            optimizer.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                output = model(image, strokes)
                loss = segmentation_loss(output.logits, output.side_logits, target, LossConfig())
            loss.backward()
            optimizer.step()
        found.append((model.state_dict(), held))
    (kept, kept_size), (again, again_size) = found
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), name
    # A transformer keeps its own; what lies around it is a small part.
    assert again_size < (1.0 if architecture.startswith("vit") else 0.5) * kept_size


@every_model
def test_strokes_change_nothing_at_first_and_something_later(architecture):
    model = make(architecture).eval()
    image, strokes = inputs(40, 40)
    with torch.inference_mode():
        assert torch.equal(model(image, strokes).logits, model(image, 0 * strokes).logits)
        torch.nn.init.ones_(model.strokes.project[0].weight)
        assert not torch.equal(model(image, strokes).logits, model(image, 0 * strokes).logits)


@pytest.mark.parametrize("block", [ConvBlock, ResidualBlock])
def test_the_encoder_on_rgb_alone_equals_the_one_with_fresh_strokes(block):
    config = ModelConfig(width=8, depth=5)
    encoder = Encoder(config, block).eval()
    image, strokes = inputs(45, 64)
    with torch.inference_mode():
        alone = encoder(image)
        guided = encoder(image, StrokePath(level_channels(config)).sides(strokes))
    assert all(torch.equal(a, b) for a, b in zip(alone, guided, strict=True))
    assert [tuple(f.shape[1:]) for f in alone] == [
        (8, 45, 64), (16, 23, 32), (32, 12, 16), (64, 6, 8), (128, 3, 4)
    ]  # fmt: skip


def test_residual_block_equals_its_equation():
    torch.manual_seed(0)
    block = ResidualBlock(8, 16, "batch", stride=2).eval()
    x = torch.randn(2, 8, 12, 12)
    _, convolution, norm = block.shortcut
    y = F.relu(block.norm1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    y = block.norm2(F.conv2d(y, block.conv2.weight, padding=1))
    expected = F.relu(y + norm(F.conv2d(F.avg_pool2d(x, 2), convolution.weight)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("block", [ConvBlock, ResidualBlock])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_decoder_level_equals_a_concatenation_with_its_gradients(norm, block, layout):
    torch.manual_seed(0)
    level = UpBlock(16, 8, norm, block).to(torch.float64, memory_format=layout).train()
    # Not twice as large: skips keep their true size.
    coarse = torch.randn(2, 16, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    skip = torch.randn(2, 8, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
    kept = (coarse.requires_grad_(), skip.requires_grad_(), *level.parameters())
    resized = F.interpolate(level.reduce(coarse), size=(9, 11), mode="bilinear")
    expected = level.block(torch.cat([resized, skip], dim=1))
    found = level(coarse, skip)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(level(coarse, skip), expected)
    weight = torch.randn(found.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), kept)
    given = torch.autograd.grad((found * weight).sum(), kept)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [ConvBlock, ResidualBlock])
def test_a_block_takes_its_input_in_parts(block, stride):
    torch.manual_seed(0)
    made = block(9, 12, "group", stride).double().eval()
    parts = [torch.randn(2, channels, 7, 10, dtype=torch.float64) for channels in (2, 6, 1)]
    found = made.second(*made.first(*parts))
    torch.testing.assert_close(found, made(torch.cat(parts, dim=1)))


def test_attention_gate_equals_its_equation_pixel_by_pixel():
    torch.manual_seed(0)
    gate = AttentionGate(8, 16, "group").eval()
    skip, gating = torch.randn(1, 8, 4, 4), torch.randn(1, 16, 4, 4)
    alpha = gate(skip, gating)
    theta, phi = gate.theta.weight[:, :, 0, 0], gate.phi.weight[:, :, 0, 0]
    hidden = torch.einsum("oc,bchw->bohw", theta, skip) + torch.einsum("oc,bchw->bohw", phi, gating)
    hidden = gate.norm(hidden + gate.phi.bias.view(1, -1, 1, 1)).clamp(min=0)
    psi = gate.psi.weight[:, :, 0, 0]
    expected = torch.sigmoid(torch.einsum("oc,bchw->bohw", psi, hidden) + gate.psi.bias)
    torch.testing.assert_close(alpha, expected)


def test_the_guided_decoder_has_a_side_output_per_level_in_training_only():
    model = make("attention_resunet", depth=5)
    image, strokes = inputs(64, 48)
    sizes = [tuple(side.shape[-2:]) for side in model.train()(image, strokes).side_logits]
    assert sizes == [(32, 24), (16, 12), (8, 6)]
    maps = model.eval().attention_maps(image, strokes)
    assert [tuple(m.shape) for m in maps] == [
        (2, 1, 64, 48), (2, 1, 32, 24), (2, 1, 16, 12), (2, 1, 8, 6)
    ]  # fmt: skip
    assert all(0 <= m.min() and m.max() <= 1 for m in maps)


def test_group_normalisation_fits_every_width():
    for width in (24, 56, 88):
        build_model(ModelConfig(architecture="attention_resunet", norm="group", width=width))
