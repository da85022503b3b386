"""A DINO step: ours, lightly's modules, and a straightforward loop in the authors' style.

All take the same uint8 views (2 global and 8 local by default) through the same backbone and head
sizes, with AdamW. The plain loop is what a reader of the paper writes: NCHW and float32, one
forward per resolution, a loop over pairs of crops for the loss, weight normalisation as a
parametrisation, gradients clipped and weights averaged tensor by tensor, figures read every step.
lightly's loop is built from its head, loss and average as its documentation does: one forward per
view, nothing clipped. Steps are measured in turn (A B C A B C):

    python -m benchmarks.dino_step                      # ours as users run it
    python -m benchmarks.dino_step --precision fp32     # the same arithmetic for all
"""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.measure import Measured, OnDevice, in_turn, tell, to_markdown
from scribbleseg.cli import exit_status
from scribbleseg.config import (
    Architecture,
    CropsConfig,
    DinoConfig,
    ModelConfig,
    Precision,
    PretrainConfig,
    TrainConfig,
    parse_arguments,
)
from scribbleseg.datasets.transforms import normalise
from scribbleseg.device import autocast_dtype
from scribbleseg.loops.pretrain import Schedule, init_state, pretrain_step, resolve
from scribbleseg.models import build_model
from scribbleseg.models.dino import make_backbone


@dataclass(frozen=True, kw_only=True)
class StepBench(OnDevice):
    """What is measured."""

    architecture: Architecture = "resunet"
    """Network whose encoder is pretrained."""
    width: int = 16
    """Its width."""
    batch_size: int = 16
    """Images per step."""
    num_local: int = 8
    """Local crops per image."""
    out_dim: int = 4096
    """Prototypes."""
    precision: Precision = "auto"
    """Of our step; the others compute in float32."""
    rounds: int = 8
    """Steps of each kind that count; two more come first."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""


class PlainHead(nn.Module):
    """The projection head as in the paper's appendix."""

    def __init__(self, in_dim: int, config: DinoConfig, out_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.bottleneck_dim),
        )
        self.last: Any = weight_norm(nn.Linear(config.bottleneck_dim, out_dim, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(F.normalize(self.mlp(x), dim=-1))


Stepper = Callable[[Tensor, Tensor], None]


def crops_of(views: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the views, crop by crop, as the network of a tutorial takes them."""
    crops = [v[:, number] for v in views for number in range(v.shape[1])]
    return [normalise(crop.to(device)) for crop in crops]


def plain_stepper(config: PretrainConfig, device: torch.device) -> Stepper:
    """Return a function that takes one step of the plain loop on (global, local) uint8 views."""
    out_dim = config.dino.out_dim
    assert out_dim is not None

    def network() -> nn.Module:
        backbone = make_backbone(build_model(config.model).encoder)
        return nn.Sequential(backbone, PlainHead(backbone.dim, config.dino, out_dim)).to(device)

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.optim.learning_rate)
    centre = torch.zeros(1, out_dim, device=device)

    def outputs(model: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
        """One forward of the backbone per resolution, one of the head."""
        backbone, head = model.children()
        sizes = [crop.shape[-1] for crop in crops]
        features: list[Tensor] = []
        for size in dict.fromkeys(sizes):
            features.append(backbone(torch.cat([c for c in crops if c.shape[-1] == size])))
        return list(head(torch.cat(features)).chunk(len(crops)))

    def step(global_views: Tensor, local_views: Tensor) -> None:
        crops = crops_of((global_views, local_views), device)
        with torch.no_grad():
            seen = outputs(teacher, crops[:2])
        logits = outputs(student, crops)
        total, num_terms = torch.zeros((), device=device), 0
        for i, target in enumerate(seen):
            probability = F.softmax((target - centre) / 0.04, dim=-1)
            for j, logit in enumerate(logits):
                if i != j:
                    total = (
                        total - (probability * F.log_softmax(logit / 0.1, dim=-1)).sum(-1).mean()
                    )
                    num_terms += 1
        loss = total / num_terms
        if not math.isfinite(loss.item()):
            raise RuntimeError("the plain loop diverged")
        optimizer.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm()
                if norm > config.optim.clip_norm:
                    parameter.grad.mul_(config.optim.clip_norm / (norm + 1e-6))
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.mul_(0.99).add_(0.01 * new)
            centre.mul_(0.9).add_(0.1 * torch.cat(seen).mean(dim=0, keepdim=True))

    return step


def lightly_stepper(config: PretrainConfig, device: torch.device) -> Stepper:
    """Return a function that takes one step of a loop built from lightly's modules."""
    with warnings.catch_warnings():
        # Its head uses a weight normalisation that PyTorch will remove one day.
        warnings.simplefilter("ignore", FutureWarning)
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import (
            deactivate_requires_grad,
            update_momentum,
        )

        backbone = make_backbone(build_model(config.model).encoder).to(device)
        sizes = (backbone.dim, config.dino.hidden_dim, config.dino.bottleneck_dim)
        out_dim = config.dino.out_dim
        assert out_dim is not None
        heads = [DINOProjectionHead(*sizes, out_dim).to(device) for _ in range(2)]
    student: list[nn.Module] = [backbone, heads[0]]
    teacher: list[nn.Module] = [copy.deepcopy(backbone), heads[1]]
    for module in teacher:
        deactivate_requires_grad(module)
    criterion = DINOLoss(output_dim=out_dim).to(device)
    parameters = [parameter for module in student for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.optim.learning_rate)

    def outputs(model: Sequence[nn.Module], crops: Sequence[Tensor]) -> list[Tensor]:
        body, head = model
        return [head(body(crop)) for crop in crops]

    def step(global_views: Tensor, local_views: Tensor) -> None:
        for old, new in zip(teacher, student, strict=True):
            update_momentum(new, old, m=0.99)
        crops = crops_of((global_views, local_views), device)
        with torch.no_grad():
            seen = outputs(teacher, crops[:2])
        loss = criterion(seen, outputs(student, crops), epoch=50)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_stepper(config: PretrainConfig, device: torch.device) -> Stepper:
    """Return a function that takes one of our steps."""
    precision = autocast_dtype(config.train.precision, device)
    state = init_state(config, device, precision)
    state.student.train()
    stems = [""] * config.train.batch_size

    def step(global_views: Tensor, local_views: Tensor) -> None:
        pretrain_step(
            state,
            state.student,
            {"global": global_views, "local": local_views, "stem": stems},
            config,
            Schedule.at(500, 1000, config),
            device=device,
            precision=precision,
            hold_prototypes=False,
        )

    return step


def main() -> None:
    """Measure and print."""
    bench: StepBench = parse_arguments(
        StepBench, sys.argv[1:], prog="python -m benchmarks.dino_step"
    )
    config = PretrainConfig(
        crops=CropsConfig(num_local=bench.num_local),
        model=ModelConfig(architecture=bench.architecture, width=bench.width),
        dino=DinoConfig(out_dim=bench.out_dim),
        train=TrainConfig(batch_size=bench.batch_size, precision=bench.precision),
    )
    config = resolve(config, 500)
    device = bench.prepare()
    torch.manual_seed(0)
    views = [
        torch.randint(256, (bench.batch_size, number, 3, size, size), dtype=torch.uint8)
        for number, size in (
            (2, config.crops.global_size),
            (bench.num_local, config.crops.local_size),
        )
    ]
    steppers: dict[str, Stepper] = {
        "ours": our_stepper(config, device),
        "lightly's modules": lightly_stepper(config, device),
        "plain loop": plain_stepper(config, device),
    }
    works = {kind: partial(step, *views) for kind, step in steppers.items()}
    times = in_turn(works, bench.rounds)
    lines = [Measured(name=kind, seconds=times[kind], items=bench.batch_size) for kind in steppers]
    title = (
        f"DINO step, {bench.architecture} {bench.width}, batch {bench.batch_size}, 2 + "
        f"{bench.num_local} crops, {bench.out_dim} prototypes, {bench.precision}, {device.type}"
    )
    tell(to_markdown(title, lines, "images"), lines, bench.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
