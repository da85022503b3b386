"""DINO's networks: what the head computes, one forward for all crops, and the teacher."""

import copy

import pytest
import torch
from torch.nn import functional as F

from scribbleseg.config import DinoConfig, ModelConfig
from scribbleseg.losses.dino import dino_loss, teacher_probabilities
from scribbleseg.models import build_model
from scribbleseg.models.dino import (
    Centre,
    ConvBackbone,
    DinoHead,
    DinoNetwork,
    hold_last_layer,
    make_teacher,
    standardise,
    update_teacher,
)

CONFIG = DinoConfig(hidden_dim=16, bottleneck_dim=8)
every_norm = pytest.mark.parametrize("norm", ["batch", "group"])


def make_backbone(architecture="resunet", norm="batch", depth=3):
    config = ModelConfig(architecture=architecture, width=8, depth=depth, norm=norm)
    return ConvBackbone(build_model(config).encoder)


def make_student(norm="batch", num_prototypes=12, seed=0):
    torch.manual_seed(seed)
    backbone = make_backbone(norm=norm)
    return DinoNetwork(backbone, DinoHead(backbone.dim, CONFIG, num_prototypes))


def make_crops(seed=1, num_images=4, num_local=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2 * num_images, 3, 48, 48, generator=generator),
        torch.randn(num_local * num_images, 3, 32, 32, generator=generator),
    ]


def take_step(student, teacher, crops, optimizer):
    """One step as in the paper's algorithm 1, without the centre."""
    num_global = len(crops[0]) // 4
    target, _ = teacher(crops[:1])
    logits, _ = student(crops)
    probabilities = teacher_probabilities(
        target.unflatten(0, (num_global, 4)), torch.zeros(target.shape[1]), 0.04
    )
    optimizer.zero_grad()
    dino_loss(logits.unflatten(0, (-1, 4)), probabilities, 0.1).backward()
    optimizer.step()
    update_teacher(teacher, student, 0.9)


@pytest.mark.parametrize("architecture", ["unet", "resunet", "attention_resunet"])
@every_norm
@pytest.mark.parametrize(("depth", "dim"), [(3, 32), (6, 128)])
def test_backbone_pools_the_coarsest_features_of_any_size(architecture, norm, depth, dim):
    backbone = make_backbone(architecture, norm, depth).eval()
    image = torch.randn(2, 3, 64, 47, generator=torch.Generator().manual_seed(0))
    features = backbone(image)
    assert backbone.dim == dim
    assert features.shape == (2, dim)
    coarsest = backbone.encoder(image)[-1]
    torch.testing.assert_close(
        features[1, 5], sum(coarsest[1, 5].flatten()) / coarsest[1, 5].numel()
    )


def test_logits_are_cosines_between_bottleneck_and_prototypes():
    torch.manual_seed(0)
    head = DinoHead(6, CONFIG, 5)
    features = torch.randn(4, 6)
    logits = head(features)
    standard = (features - features.mean(0)) / features.var(0, correction=0).add(1e-5).sqrt()
    for row, bottleneck in zip(logits, head.mlp(standard), strict=True):
        for logit, prototype in zip(row, head.prototypes.weight, strict=True):
            torch.testing.assert_close(logit, F.cosine_similarity(bottleneck, prototype, dim=0))


def test_the_length_of_a_prototype_means_nothing():
    head = make_student().head
    features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = head(features)
    before.square().sum().backward()
    # A gradient along a row would change its length alone.
    along = (head.prototypes.weight.grad * head.prototypes.weight).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(12), atol=1e-6, rtol=0)
    with torch.no_grad():
        head.prototypes.weight *= torch.linspace(0.5, 20, 12)[:, None]
    torch.testing.assert_close(head(features), before)


def test_a_head_is_initialised_as_in_the_authors_code():
    torch.manual_seed(0)
    head = DinoHead(256, DinoConfig(hidden_dim=256), 512)
    for layer in head.mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()
    assert head.prototypes.bias is None


def test_a_head_is_saved_as_plain_weights_and_loads_what_it_saved():
    head = make_student().head
    saved = head.state_dict()
    layers = [f"mlp.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(saved) == [*layers, "prototypes.weight"]
    other = make_student(seed=5).head
    other.load_state_dict(saved)
    features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(features), head(features))
    assert torch.equal(copy.deepcopy(head)(features), head(features))


def test_logits_are_fp32_under_autocast():
    student = make_student("group")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, features = student(make_crops())
    assert features.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_crops_of_all_sizes_come_out_in_the_given_order():
    student = make_student("group")
    crops = make_crops()
    logits, features = student(crops)
    assert logits.shape == (20, 12)
    assert features.shape == (20, 32)
    alone = torch.cat([student.backbone(crop[None]) for same_size in crops for crop in same_size])
    torch.testing.assert_close(features, alone)
    torch.testing.assert_close(logits, student.head(alone))


def test_features_are_standardised_and_what_all_images_share_is_gone():
    features = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
    standard = standardise(features)
    torch.testing.assert_close(standard.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.var(0, correction=0), torch.ones(5))
    expected = torch.nn.BatchNorm1d(5, affine=False)(features)
    torch.testing.assert_close(standard, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(standardise(torch.full((4, 5), 7.0)), torch.zeros(4, 5))


def test_the_backbone_runs_once_per_size_and_the_head_once():
    student = make_student()
    seen = []
    student.backbone.register_forward_hook(lambda *_: seen.append("backbone"))
    student.head.register_forward_hook(lambda *_: seen.append("head"))
    student(make_crops())
    assert seen == ["backbone", "backbone", "head"]


@every_norm
def test_the_gradient_reaches_every_weight_of_the_student_and_none_of_the_teacher(norm):
    student = make_student(norm)
    teacher = make_teacher(student)
    take_step(student, teacher, make_crops(), torch.optim.SGD(student.parameters(), lr=0.1))
    for name, parameter in student.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher(make_crops())[0].requires_grad


@every_norm
def test_teacher_starts_equal_and_shares_no_storage_with_the_student(norm):
    student = make_student(norm)
    teacher = make_teacher(student)
    crops = make_crops()
    assert torch.equal(teacher(crops)[0], student(crops)[0])

    def storages(module):
        return {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}

    assert not storages(student) & storages(teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)


@every_norm
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.996, 1.0])
def test_an_update_equals_a_slow_loop_over_weights(norm, momentum):
    student = make_student(norm)
    teacher = make_teacher(make_student(norm, seed=1))
    expected = {
        name: [
            momentum * a + (1 - momentum) * b
            for a, b in zip(t.flatten().tolist(), s.flatten().tolist(), strict=True)
        ]
        for (name, t), s in zip(teacher.named_parameters(), student.parameters(), strict=True)
    }
    before = copy.deepcopy(student.state_dict())
    update_teacher(teacher, student, momentum)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.flatten(), torch.tensor(expected[name]))
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in before)


@torch.no_grad()
def test_the_teachers_normalisation_statistics_keep_up_with_its_weights():
    torch.manual_seed(0)
    student = make_backbone("unet", depth=2)
    teacher = make_teacher(student)
    for parameter in student.parameters():
        parameter *= 3
    image = torch.randn(2, 3, 32, 32)
    for _ in range(60):
        teacher(image)
        update_teacher(teacher, student, 0.5)
    by_batch, by_running = teacher(image), teacher.eval()(image)
    torch.testing.assert_close(by_running, by_batch, atol=0.02, rtol=0.02)


def test_a_held_last_layer_stays_while_the_rest_moves():
    student = make_student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1)
    before = copy.deepcopy(student.state_dict())
    student(make_crops())[0].square().sum().backward()
    hold_last_layer(student.head)
    optimizer.step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in student.named_parameters()} - {"head.prototypes.weight"}


def test_the_centre_is_saved_and_is_no_parameter():
    centre = Centre(12)
    assert list(centre.parameters()) == []
    centre.value.copy_(torch.arange(12.0))
    other = Centre(12)
    assert (other.value == 0).all()
    other.load_state_dict(centre.state_dict())
    assert torch.equal(other.value, torch.arange(12.0))
