"""Training on a CUDA device: the same losses as on the CPU, compiled, in bounded memory, with overlapping copies.

Without a device these are skipped; `pytest -m gpu` without one is an error (conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import methods
from btnet_core.training import step as problem
from btnet_core.training.loop import train
from btnet_core.training.progress import read_metrics
from btnet_core.training.step import Run, prepare

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FACES = {"kind": "synthetic", "identities": 8, "images": 8, "seed": 0}
SMALL = BackboneConfig(name="iresnet18", width=0.25, embedding=64)
QUICK = {"batch": 16, "epochs": 2, "warmup_epochs": 0.0, "lr": 0.1}


def losses(out: Path, device: str, **changes) -> list[float]:
    train(
        methods.phi_mr(FACES, backbone=SMALL, **{**QUICK, **changes}),
        out,
        device=device,
        show="none",
    )
    return [row["loss"] for row in read_metrics(out)]


def test_float32_is_the_cpu_run(tmp_path: Path) -> None:
    cpu, cuda = (
        losses(tmp_path / device, device, precision="fp32", epochs=1) for device in ("cpu", DEVICE)
    )
    assert cuda[0] == pytest.approx(cpu[0], rel=1e-3)
    assert cuda == pytest.approx(cpu, rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_amp_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    create = problem.Scaler.__init__

    def gentle(
        self, enabled
    ):  # the usual 2^16 overflows on so small a network and skips its first steps
        create(self, enabled)
        self.scale = 16.0 if enabled else 1.0

    monkeypatch.setattr(problem.Scaler, "__init__", gentle)
    exact = losses(tmp_path / "fp32", DEVICE, precision="fp32")
    assert losses(tmp_path / precision, DEVICE, precision=precision) == pytest.approx(
        exact, rel=0.05
    )


def test_compiled_gives_the_same_losses(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", DEVICE, precision="fp32")
    assert losses(tmp_path / "compiled", DEVICE, precision="fp32", compile=True) == pytest.approx(
        plain, rel=1e-2
    )


def test_the_cached_teacher_gives_the_same_losses(tmp_path: Path) -> None:
    train(
        methods.phi_mr(FACES, backbone=SMALL, **QUICK),
        tmp_path / "trunk",
        device=DEVICE,
        show="none",
    )
    files = [str(tmp_path / "trunk" / f"{name}.safetensors") for name in ("trunk", "classifier")]
    rows = {}
    for cache in ("off", "memory"):
        config = methods.phi_bt(FACES, 14, *files, **{**QUICK, "precision": "fp32", "cache": cache})
        train(config, tmp_path / cache, device=DEVICE, show="none")
        rows[cache] = [row["loss"] for row in read_metrics(tmp_path / cache)]
    assert rows["memory"] == pytest.approx(rows["off"], rel=1e-2)
    assert rows["memory"][0] == pytest.approx(rows["off"][0], rel=1e-4)


def one_step(run: Run, step: int) -> float:
    batch = run.sampler.batch(step)
    loss = sum(run.losses(batch, *run.inputs(batch, run.pixels.get(batch.records))).values())
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    run.optimiser.step()
    return loss.item()


def test_memory_does_not_grow(tmp_path: Path) -> None:
    run = prepare(methods.phi_hr(FACES, backbone=SMALL, **QUICK), tmp_path, torch.device(DEVICE))
    run.modes(training=True)
    for step in range(3):
        one_step(run, step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for step in range(3, 7):
        one_step(run, step)
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert torch.cuda.max_memory_allocated() < 2 * 2**30


def test_overlapping_copies_carry_the_right_images(tmp_path: Path) -> None:
    run = prepare(
        methods.phi_hr(FACES, backbone=SMALL, flip=False, **QUICK), tmp_path, torch.device(DEVICE)
    )
    busy = torch.randn(4096, 4096, device=DEVICE)
    for step in range(4):
        batch = run.sampler.batch(step)
        pixels = run.pixels.get(batch.records)
        for _ in range(10):  # the copy is queued behind work
            busy = busy @ busy / 64
        x, _ = run.inputs(batch, pixels)
        torch.testing.assert_close(x.cpu(), run.trunk.normalise(pixels))
