"""What keeps a GPU busy, checked with none too: nothing in a step asks the device for a value.

The check list: no host copy in the step; batches pinned and copied without blocking where there is
a GPU, and only there; networks that compile as one graph.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from scribbleseg.config import FinetuneConfig, PretrainConfig, override
from scribbleseg.loops import pretrain
from scribbleseg.loops.batches import make_loader, make_plan
from scribbleseg.loops.segment import train_step
from scribbleseg.loops.state import init_state
from scribbleseg.models import set_recompute

CPU = torch.device("cpu")
# What waits for a GPU: reading a value, shapes that depend on values, and `torch.tensor` of numbers
# of Python, which are copied there from memory that is not pinned.
READS = {
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
}


class NoReads(TorchDispatchMode):
    """Fails where an operation would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


def batch(side: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(256, (4, 3, side, side), generator=generator, dtype=torch.uint8),
        "strokes": torch.zeros(4, 2, side, side, dtype=torch.uint8),
        "mask": torch.randint(2, (4, side, side), generator=generator, dtype=torch.uint8),
        "stem": ["a", "b", "c", "d"],
    }


def test_the_check_sees_a_read() -> None:
    with NoReads(), pytest.raises(AssertionError, match="reads from the device"):
        torch.ones(()).item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.architecture": "attention_resunet", "train.accumulate": 2},
        {"model.matching": True, "train.recompute": True},
        {"loss.focal": 1.0, "loss.boundary": 1.0, "loss.lovasz": 1.0},
        {"model.encoder": "timm:resnet18"},
        {"model.architecture": "vit_unet"},
        {"strokes.correct_probability": 1.0},
    ],
    ids=str,
)
def test_no_step_of_fine_tuning_waits_for_the_device(changes, monkeypatch) -> None:
    from scribbleseg.models.pretrained import PretrainedEncoder

    monkeypatch.setattr(PretrainedEncoder, "load_imagenet", lambda self: None)
    config = override(FinetuneConfig(), {"model.width": 8, "train.batch_size": 4} | changes)
    state = init_state(config, CPU, None)
    set_recompute(state.model, config.train.recompute)
    state.model.train()

    def step() -> None:
        train_step(state, state.model, batch(), config, device=CPU, precision=None, num_steps=10)

    # The optimiser makes its state in the first step.
    step()
    with NoReads():
        step()


def test_no_step_of_pretraining_waits_for_the_device() -> None:
    config = override(
        PretrainConfig(),
        {
            "model.width": 8,
            "train.batch_size": 4,
            "dino.out_dim": 32,
            "dino.hidden_dim": 16,
            "dino.bottleneck_dim": 8,
        },
    )
    config = pretrain.resolve(config, 100)
    state = pretrain.init_state(config, CPU, None)
    state.student.train()
    views = torch.randint(256, (4, 4, 3, 64, 64), dtype=torch.uint8)
    crops = {"global": views[:, :2], "local": views[:, 2:, :, :32, :32], "stem": [""] * 4}

    def step() -> None:
        pretrain.pretrain_step(
            state,
            state.student,
            crops,
            config,
            pretrain.Schedule.at(5, 10, config),
            device=CPU,
            precision=None,
            hold_prototypes=True,
        )

    step()
    with NoReads():
        step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "changes", [{}, {"model.matching": True}, {"model.architecture": "vit_unet"}]
)
def test_on_a_gpu_a_step_waits_for_nothing_and_agrees_with_the_cpu(changes) -> None:
    config = override(FinetuneConfig(), {"model.width": 8, "train.batch_size": 4} | changes)
    losses: dict[str, float] = {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        state = init_state(config, device, None)
        arguments = {"device": device, "precision": None, "num_steps": 10}
        losses[name] = train_step(state, state.model, batch(), config, **arguments).item()
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=1e-3)
    pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
    train_step(state, state.model, pinned, config, **arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, state.model, pinned, config, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoSamples(Dataset[dict[str, Any]]):
    """Nothing is taken from it."""


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_are_pinned_for_a_gpu_alone(device, pinned) -> None:
    config = FinetuneConfig()
    plan = make_plan(8, config.train, 0)
    loader = make_loader(NoSamples(), plan, 0, torch.device(device))
    assert loader.pin_memory is pinned


COMPILE = """
import torch
from scribbleseg.config import ModelConfig
from scribbleseg.models import build_model

for settings in (
    {},
    {"matching": True},
    {"architecture": "resunet"},
    {"architecture": "attention_resunet"},
    {"architecture": "vit_unet"},
    {"encoder": "timm:tf_efficientnet_lite0", "matching": True},
):
    network = build_model(ModelConfig(width=8, **settings))
    image, strokes = torch.randn(2, 3, 64, 64), torch.rand(2, 2, 64, 64)
    # Traced, and run as it is: what is made of the graph is PyTorch's own.
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert compiled(image, strokes).logits.shape == (2, 1, 64, 64)
    network.eval()
    torch.testing.assert_close(compiled(image, strokes).logits, network(image, strokes).logits)
    print("one graph:", settings)
"""


@pytest.mark.slow
def test_every_network_is_one_graph() -> None:
    """In a process of its own: checks of types and shapes, on in tests, cannot be traced."""
    found = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("one graph:") == 6
