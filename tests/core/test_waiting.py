"""What a GPU would be waited for: on a CPU, by what a step asks torch for. See test_gpu.py for CUDA's own word."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from btnet_core.evaluation.verification import embed_images
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import distributed, loop, methods
from btnet_core.training.batches import trunk_input
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import backward, torch_settings, unscale_and_clip
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs, branch_losses, losses_of, trunk_losses

FACES = {"kind": "synthetic", "identities": 40, "images": 1, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 4, "epochs": 1, "warmup_epochs": 0.0, "precision": "fp32", "cache": "off"}
ASKED = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount", "lift_fresh")


class Asked(TorchDispatchMode):
    """Names of the operations inside for whose result, or whose argument, a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        if name in ASKED or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def configuration(what: str, untrained: Path) -> TrainConfig:
    if what == "branch":
        trunk = str(untrained / "trunk.safetensors")
        return methods.phi_bt(FACES, 14, trunk, **{**QUICK, "shift": 2.0})
    changes = {"PartialFC": {"sample_rate": 0.5}, "fp16": {"precision": "fp16"}}.get(what, {})
    loss = {"loss": what} if what in ("adaface", "arcface") else {}
    return methods.phi_hr(FACES, backbone=TINY, **{**QUICK, **changes, **loss})


@pytest.fixture
def run(request: pytest.FixtureRequest, untrained: Path, tmp_path: Path) -> Run:
    run = prepare(configuration(request.param, untrained), tmp_path, torch.device("cpu"))
    run.modes(training=True)
    return run


STEPS = ["trunk", "arcface", "adaface", "PartialFC", "fp16", "branch"]


@pytest.mark.parametrize("run", STEPS, indirect=True)
def test_an_ordinary_step_asks_for_no_value(run: Run) -> None:
    batch = run.sampler.batch(0)
    pixels = run.pixels.get(batch.records)
    x = None
    if not run.config.resolution:  # the sizes of the faces are asked of the CPU
        x = trunk_input(run.trunk, pixels, batch.size, run.config.resize)
    with Asked() as asked:
        if x is None:
            L, terms = branch_losses(run, *branch_inputs(run, batch, pixels), batch.labels)
        else:
            L, terms = trunk_losses(run, x, batch.labels)
        run.grad_scaler.scale(L).backward()
        unscale_and_clip(run, list(run.trainable.values()))
        terms["norm"] = torch.zeros(())
        run.optimiser.step()
    ours = [name for name in asked.found if name != "lift_fresh" or not run.config.shift]
    assert ours == []


@pytest.mark.parametrize("run", ["trunk", "PartialFC", "branch"], indirect=True)
def test_what_a_step_takes_to_the_device_is_not_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy to the run's device is made by `transfer`, from pinned memory."""
    to, callers = Tensor.to, []

    def watched(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if any(isinstance(one, torch.device) for one in (*arguments, *options.values())):
            callers.append(inspect.stack()[1].function)
        return to(self, *arguments, **options)

    batch = run.sampler.batch(0)
    monkeypatch.setattr(Tensor, "to", watched)
    losses_of(run, batch, run.pixels.get(batch.records))
    assert callers
    assert set(callers) == {"transfer"}


def test_values_of_a_gpu_are_read_every_ten_steps() -> None:
    assert loop.READ_EVERY == 10


def test_a_gpu_tries_its_kernels(untrained: Path) -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        for device in ("cuda", "cpu"):
            torch_settings(configuration("trunk", untrained), torch.device(device))
            assert torch.backends.cudnn.benchmark == (device == "cuda")
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def test_gradients_are_exchanged_while_the_backward_pass_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last layer's gradient is on its way before the first layer has one; all are there at the end."""
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3)
    net(x).square().sum().backward()
    alone = [p.grad.clone() for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    early: list[bool] = []

    class Work:
        def __init__(self, flat: Tensor) -> None:
            self.flat = flat

        def wait(self) -> None:
            self.flat *= 2  # the other process has the same

    def all_reduce(flat: Tensor, async_op: bool) -> Work:
        early.append(net[0].weight.grad is None)
        return Work(flat)

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "BUCKET", 10)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    with distributed.summed_gradients(net.parameters()):
        net(x).square().sum().backward()
    assert early == [True, False]  # 12 numbers of the last layer, then 12 of the first
    for parameter, gradient in zip(net.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    net(x).sum().backward()  # no longer watched
    assert len(early) == 2


@pytest.mark.parametrize("run", ["trunk"], indirect=True)
def test_gradients_are_exchanged_with_the_last_part_of_a_batch(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    summed = distributed.summed_gradients

    def watched(parameters: Any) -> Any:
        parameters = list(parameters)
        given.append(len(parameters))
        return summed(parameters)

    monkeypatch.setattr(distributed, "summed_gradients", watched)
    run.config = run.config.replace(accumulate=2)
    batch = run.sampler.batch(0)
    backward(run, batch, run.pixels.get(batch.records))
    assert given == [0, len(run.trainable)]


def test_faces_of_full_size_are_embedded_from_8_bits() -> None:
    seen: list[torch.dtype] = []

    def embedder(pixels: Tensor, r: int) -> Tensor:
        seen.append(pixels.dtype)
        return pixels.float().mean((2, 3))

    for side in (112, 50):
        faces = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        embed_images(embedder, lambda indices, faces=faces: faces[indices], 2, 14, mirror=14)
    assert seen == [torch.uint8] * 2 + [torch.float32] * 2
