"""Training on a CUDA device: the CPU's losses, mixed precision, memory, copies, resuming, several GPUs.

Without a device these are skipped; `pytest -m gpu` without one is an error (conftest.py).
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from btnet_core.evaluation.embedders import UpsamplingEmbedder
from btnet_core.files import read_safetensors
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.weights import load_backbone
from btnet_core.training import checkpoint, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.loop import backward, train
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FACES = {"kind": "synthetic", "identities": 8, "images": 8, "seed": 0}
PAIRS = {"kind": "drawn", "faces": {**FACES, "first": 50}, "count": 40, "seed": 0}
SMALL = BackboneConfig(name="iresnet18", width=0.25, embedding=64)
QUICK = {"batch": 16, "epochs": 2, "warmup_epochs": 0.0, "lr": 0.1}


def whole(**changes) -> TrainConfig:
    return methods.phi_mr(FACES, backbone=SMALL, **{**QUICK, **changes})


def losses(out: Path, device: str, **changes) -> list[float]:
    train(whole(**changes), out, device=device, show="none")
    return [row["loss"] for row in read_metrics(out)]


def test_float32_is_the_cpu_run(tmp_path: Path) -> None:
    cpu, cuda = (
        losses(tmp_path / device, device, precision="fp32", epochs=1) for device in ("cpu", DEVICE)
    )
    assert cuda[0] == pytest.approx(cpu[0], rel=1e-3)
    assert cuda == pytest.approx(cpu, rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_amp_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    gentle = functools.partial(torch.amp.GradScaler, init_scale=16.0)  # 2^16 skips first steps here
    monkeypatch.setattr(torch.amp, "GradScaler", gentle)
    exact = losses(tmp_path / "fp32", DEVICE, precision="fp32")
    mixed = losses(tmp_path / precision, DEVICE, precision=precision)
    assert mixed == pytest.approx(exact, rel=0.05)


def test_fp16_overflow_is_skipped_counted_and_recovered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, kept = loop.unscale_and_clip, []

    def overflowing(run: Run, network: list) -> torch.Tensor:
        if run.step in (0, 3):
            network[3].grad[...] = float("inf")
        kept.append([p.detach().clone() for p in run.learns.values()])
        return original(run, network)

    gentle = functools.partial(torch.amp.GradScaler, init_scale=16.0)
    monkeypatch.setattr(torch.amp, "GradScaler", gentle)
    monkeypatch.setattr(loop, "unscale_and_clip", overflowing)
    metrics = train(whole(precision="fp16"), tmp_path, device=DEVICE, show="none")
    assert metrics["skipped_steps"] == 2
    for step in (0, 3):
        pairs = zip(kept[step], kept[step + 1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(kept[1][0], kept[2][0])
    assert checkpoint.load_state(tmp_path)["grad_scaler"]["scale"] == 4.0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_names_the_step_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    losses_of = loop.losses_of

    def poisoned(run: Run, *arguments):
        total, terms = losses_of(run, *arguments)
        if run.step != 5:
            return total, terms
        harm = run.network.head.fc.weight.sum() * 0
        return total + (harm / 0 if what == "loss" else harm.sqrt()), terms

    monkeypatch.setattr(loop, "losses_of", poisoned)
    with pytest.raises(loop.TrainingError, match="not finite at step 6 "):
        train(whole(precision="fp32"), tmp_path, device=DEVICE, show="none")
    assert checkpoint.load_state(tmp_path)["step"] == 4


def test_compiled_gives_the_same_losses(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", DEVICE, precision="fp32")
    compiled = losses(tmp_path / "compiled", DEVICE, precision="fp32", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-2)


def test_the_cached_teacher_gives_the_same_losses(tmp_path: Path) -> None:
    train(whole(), tmp_path / "trunk", device=DEVICE, show="none")
    files = [str(tmp_path / "trunk" / f"{name}.safetensors") for name in ("trunk", "classifier")]
    rows = {}
    for cache in ("", str(tmp_path / "kept")):
        changes = {**QUICK, "precision": "fp32", "cache_dir": cache}
        config = methods.phi_bt(FACES, 14, *files, **changes)
        out = tmp_path / ("cached" if cache else "computed")
        train(config, out, device=DEVICE, show="none")
        rows[bool(cache)] = [row["loss"] for row in read_metrics(out)]
    assert rows[True] == pytest.approx(rows[False], rel=1e-2)
    assert rows[True][0] == pytest.approx(rows[False][0], rel=1e-4)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = whole(precision="fp32", epochs=3)
    train(config, tmp_path / "whole", device=DEVICE, show="none")
    add = loop.Readings.add

    def asked(self, batch, lr, terms, norm, stop):
        add(self, batch, lr, terms, norm, self.run.step + 1 == 8)

    monkeypatch.setattr(loop.Readings, "add", asked)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", device=DEVICE, show="none")
    monkeypatch.undo()
    train(config, tmp_path / "cut", device=DEVICE, show="none")
    resumed, straight = (
        read_safetensors(tmp_path / name / "trunk.safetensors")[0] for name in ("cut", "whole")
    )
    for name, tensor in straight.items():  # kernels of a GPU need not sum in one order
        torch.testing.assert_close(resumed[name], tensor, rtol=2e-2, atol=2e-3)


def test_validation_and_embedding_on_the_device(tmp_path: Path) -> None:
    config = whole(validation=(PAIRS,), validation_resolutions=(112, 14), validate_epochs=1)
    metrics = train(config, tmp_path, device=DEVICE, show="none")
    assert set(metrics["validation"]) == {"112&112", "112&14", "14&14"}
    trunk = load_backbone(tmp_path / "trunk.safetensors")
    pixels = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8)
    found = [
        UpsamplingEmbedder(trunk, device=device, precision="fp32")(pixels, 14)
        for device in ("cpu", DEVICE)
    ]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def one_step(run: Run, step: int) -> None:
    batch = run.sampler.batch(step)
    run.optimiser.zero_grad(set_to_none=True)
    backward(run, batch, run.pixels.get(batch.records))
    run.optimiser.step()


def test_memory_does_not_grow(tmp_path: Path) -> None:
    config = methods.phi_hr(FACES, backbone=SMALL, **QUICK)
    run = prepare(config, tmp_path, torch.device(DEVICE))
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
    torch.manual_seed(0)
    train(whole(epochs=1), tmp_path / "trunk", device=DEVICE, show="none")
    trunk = str(tmp_path / "trunk" / "trunk.safetensors")
    config = methods.distillation_only(FACES, 112 // 2, trunk, flip=False, **QUICK)
    run = prepare(config, tmp_path, torch.device(DEVICE))
    busy = torch.randn(4096, 4096, device=DEVICE)
    for step in range(4):
        batch = run.sampler.batch(step)
        pixels = run.pixels.get(batch.records)
        for _ in range(10):  # the copy is queued behind work
            busy = busy @ busy / 64
        x, _ = branch_inputs(run, batch, pixels)
        expected = run.trunk.normalise(torch.nn.functional.avg_pool2d(pixels.float(), 2))
        assert (x.cpu() - expected).abs().mean() < 0.2  # another kernel, the same faces


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_shared_batch_statistics_are_one(tmp_path: Path) -> None:
    config = whole(precision="fp32", sync_bn=True)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        train_in_subprocess(config, out, device=DEVICE, processes=processes)
    one, two = ([row["loss"] for row in read_metrics(tmp_path / n)] for n in ("1", "2"))
    assert two == pytest.approx(one, rel=5e-3)
