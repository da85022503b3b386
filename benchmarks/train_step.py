"""A training step: ours, a plain PyTorch loop of the same network, and a package's UNet.

All take the same uint8 batch to new weights. The plain loop is what a tutorial writes: NCHW and
float32, AdamW and autograd as they come, Dice and BCE by hand, the loss read every step; ours also
clips gradients and averages weights. The package is segmentation-models-pytorch, in the plain loop,
on as much of ResNet-18 as gives it about as many parameters:

    python -m benchmarks.train_step                      # ours as users run it
    python -m benchmarks.train_step --precision fp32     # the same arithmetic for all
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import (
    Measured,
    OnDevice,
    in_new_process,
    in_turn,
    peak_mb,
    process_mb,
    tell,
    to_markdown,
)
from scribbleseg.cli import exit_status
from scribbleseg.config import (
    Architecture,
    FinetuneConfig,
    ModelConfig,
    Precision,
    TrainConfig,
    parse_arguments,
    require,
)
from scribbleseg.device import autocast_dtype
from scribbleseg.loops.batches import Batch
from scribbleseg.loops.segment import train_step
from scribbleseg.loops.state import init_state
from scribbleseg.models import build_model, set_recompute

OURS, RECOMPUTED, PACKAGE, PLAIN = "ours", "ours, train.recompute", "smp.Unet", "plain loop"
KINDS = (OURS, RECOMPUTED, PACKAGE, PLAIN)
# What a process takes differs from one to the next.
NUM_PROCESSES = 3


@dataclass(frozen=True, kw_only=True)
class StepBench(OnDevice):
    """What is measured."""

    architecture: Architecture = "unet"
    """Network."""
    width: int = 16
    """Its width; 16 gives UNet about as many parameters as the package's has."""
    batch_size: int = 8
    """Images per step."""
    side: int = 224
    """Side of an image, in pixels."""
    precision: Precision = "auto"
    """Of our step; the others compute in float32."""
    rounds: int = 8
    """Steps of each kind that count; two more come first."""
    memory_of: str = ""
    """Print by how much a process grows for steps of this kind alone, and nothing else."""
    out: Path | None = None
    """File without suffix for the table, .md and .json; None: print only."""

    def __post_init__(self) -> None:
        """Check what the kinds of steps cannot."""
        known = self.memory_of in ("", *KINDS)
        require(known, "memory_of", self.memory_of, f"one of {', '.join(map(repr, KINDS))}")
        fits = self.side > 0 and self.side % 32 == 0
        require(fits, "side", self.side, "a multiple of 32, the coarsest stride")

    @property
    def config(self) -> FinetuneConfig:
        """Settings of our step."""
        return FinetuneConfig(
            model=ModelConfig(architecture=self.architecture, width=self.width),
            train=TrainConfig(batch_size=self.batch_size, precision=self.precision),
        )

    def batch(self) -> Batch:
        """Return a batch as the loader gives it."""
        generator = torch.Generator().manual_seed(0)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator, dtype=torch.uint8)

        size = (self.side, self.side)
        return {
            "image": draw(256, self.batch_size, 3, *size),
            "strokes": 255 * (draw(64, self.batch_size, 2, *size) == 0).to(torch.uint8),
            "mask": draw(2, self.batch_size, *size),
            "stem": [""] * self.batch_size,
        }


def our_stepper(bench: StepBench, device: torch.device, *, recompute: bool) -> Callable[[], object]:
    """Return a function that takes one of our steps."""
    config = bench.config
    precision = autocast_dtype(config.train.precision, device)
    state = init_state(config, device, precision)
    state.model.train()
    set_recompute(state.model, recompute)
    batch = bench.batch()

    def step() -> None:
        train_step(
            state,
            state.model,
            batch,
            config,
            device=device,
            precision=precision,
            num_steps=1000,
        )

    return step


def plain_stepper(
    network: Callable[[Tensor, Tensor], Tensor],
    parameters: list[nn.Parameter],
    bench: StepBench,
    device: torch.device,
) -> Callable[[], object]:
    """Return a function that takes one step of the loop that tutorials write."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)
    batch = bench.batch()

    def step() -> float:
        image = (batch["image"].to(device).float() / 255 - mean) / deviation
        strokes = batch["strokes"].to(device).float() / 255
        target = batch["mask"].to(device)[:, None].float()
        optimizer.zero_grad()
        logits = network(image, strokes)
        probability = torch.sigmoid(logits)
        overlap = (probability * target).sum()
        dice = 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)
        loss = dice + F.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def stepper(kind: str, bench: StepBench, device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a function that takes a step of a kind, and its network's number of parameters."""
    torch.manual_seed(0)
    if kind == PACKAGE:
        import segmentation_models_pytorch

        package = segmentation_models_pytorch.Unet(
            "resnet18",
            encoder_depth=4,
            encoder_weights=None,
            decoder_channels=(256, 128, 64, 32),
            in_channels=5,
            classes=1,
        ).to(device)
        # At a depth of 4 the encoder's last stage is there, and never used.
        parameters = [p for name, p in package.named_parameters() if "layer4" not in name]

        def network(image: Tensor, strokes: Tensor) -> Tensor:
            return package(torch.cat([image, strokes], dim=1))

        step = plain_stepper(network, parameters, bench, device)
    else:
        model = build_model(bench.config.model).to(device).train()
        parameters = list(model.parameters())
        if kind == PLAIN:
            step = plain_stepper(lambda i, s: model(i, s).logits, parameters, bench, device)
        else:
            step = our_stepper(bench, device, recompute=kind == RECOMPUTED)
    return step, sum(parameter.numel() for parameter in parameters)


def process_note(kind: str, device: torch.device) -> dict[str, str]:
    """Return by how much processes of their own grow for steps of a kind; nothing on a GPU."""
    if device.type == "cuda":
        return {}
    words = ("benchmarks.train_step", *sys.argv[1:], "--memory-of", kind)
    grown = sorted(in_new_process(*words) for _ in range(NUM_PROCESSES))
    median = grown[len(grown) // 2]
    return {"process MB": f"{median:.0f} ({grown[0]:.0f} to {grown[-1]:.0f})"}


def main() -> None:
    """Measure and print."""
    bench: StepBench = parse_arguments(
        StepBench, sys.argv[1:], prog="python -m benchmarks.train_step"
    )
    device = bench.prepare()
    if bench.memory_of:
        step, _ = stepper(bench.memory_of, bench, device)
        sys.stdout.write(json.dumps(process_mb(step)) + "\n")
        return
    works = {kind: stepper(kind, bench, device) for kind in KINDS}
    peaks = {kind: peak_mb(step, device) for kind, (step, _) in works.items()}
    times = in_turn({kind: step for kind, (step, _) in works.items()}, bench.rounds)
    lines = [
        Measured(
            name=kind,
            seconds=times[kind],
            items=bench.batch_size,
            peak_mb=peaks[kind],
            notes=process_note(kind, device) | {"M parameters": f"{works[kind][1] / 1e6:.1f}"},
        )
        for kind in KINDS
    ]
    title = f"{bench.architecture} {bench.width}, {bench.side} px, {bench.precision}, {device.type}"
    tell(to_markdown(title, lines, "images"), lines, bench.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
