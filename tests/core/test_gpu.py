"""Training on a CUDA device: the CPU's losses, mixed precision, memory, copies, resuming, several GPUs.

Without a device these are skipped; `pytest -m gpu` without one is an error (conftest.py). BTNET_GPU_TESTS=cpu runs the same
functions on the CPU, but for those that ask CUDA itself: it shows that the tests are right, where there is no GPU.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from btnet_core.data.pairs import open_pairs
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.identification import identify, search
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.files import read_safetensors
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.weights import load_backbone
from btnet_core.training import checkpoint, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.loop import backward, fill_cache, train, unscale_and_clip
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs

DEVICE = os.environ.get("BTNET_GPU_TESTS", "cuda")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
cuda_alone = pytest.mark.skipif(DEVICE != "cuda", reason="asks CUDA itself")
FACES = {"kind": "synthetic", "identities": 8, "images": 8, "seed": 0}
PAIRS = {"kind": "drawn", "faces": {**FACES, "first": 50}, "count": 40, "seed": 0}
WIDTH = 0.25 if DEVICE == "cuda" else 0.125
SMALL = BackboneConfig(name="iresnet18", width=WIDTH, embedding=64)
QUICK = {"batch": 16, "epochs": 2, "warmup_epochs": 0.0, "lr": 0.1}
GENTLE = functools.partial(torch.amp.GradScaler, init_scale=16.0)  # 2^16 skips first steps here


def whole(**changes) -> TrainConfig:
    return methods.phi_mr(FACES, backbone=SMALL, **{**QUICK, **changes})


def branch(folder: Path, **changes) -> TrainConfig:
    """phi_bt of 14 px from a trunk that is trained in ``folder`` first."""
    if not (folder / "trunk" / "trunk.safetensors").is_file():
        train(whole(), folder / "trunk", device=DEVICE, show="none")
    files = [str(folder / "trunk" / f"{name}.safetensors") for name in ("trunk", "classifier")]
    return methods.phi_bt(FACES, 14, *files, **{**QUICK, "precision": "fp32", **changes})


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
    monkeypatch.setattr(torch.amp, "GradScaler", GENTLE)
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

    monkeypatch.setattr(torch.amp, "GradScaler", GENTLE)
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


@cuda_alone
def test_compiled_gives_the_same_losses(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", DEVICE, precision="fp32")
    compiled = losses(tmp_path / "compiled", DEVICE, precision="fp32", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-2)


def test_the_cached_teacher_gives_the_same_losses(tmp_path: Path) -> None:
    rows = {}
    for cache in ("", str(tmp_path / "kept")):
        config = branch(tmp_path, cache_dir=cache)
        out = tmp_path / ("cached" if cache else "computed")
        train(config, out, device=DEVICE, show="none")
        rows[bool(cache)] = [row["loss"] for row in read_metrics(out)]
    assert rows[True] == pytest.approx(rows[False], rel=1e-2)
    assert rows[True][0] == pytest.approx(rows[False][0], rel=1e-4)


def stopped_after(step: int, config: TrainConfig, out: Path) -> None:
    """Train and stop there, as by Ctrl-C: a checkpoint is saved."""
    add = loop.Readings.add

    def asked(self, batch, lr, terms, norm, stop):
        add(self, batch, lr, terms, norm, self.run.step + 1 == step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Readings, "add", asked)
        with pytest.raises(KeyboardInterrupt):
            train(config, out, device=DEVICE, show="none")


def alike(first: Path, second: Path) -> None:
    """The weights of two files agree; kernels of a GPU need not sum in one order."""
    resumed, straight = (read_safetensors(path)[0] for path in (first, second))
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on(tmp_path: Path, precision: str) -> None:
    config = whole(precision=precision, epochs=3)
    train(config, tmp_path / "whole", device=DEVICE, show="none")
    stopped_after(8, config, tmp_path / "cut")
    assert checkpoint.load_state(tmp_path / "cut")["step"] == 8
    train(config, tmp_path / "cut", device=DEVICE, show="none")
    for name in ("trunk.safetensors", "classifier.safetensors"):
        alike(tmp_path / "cut" / name, tmp_path / "whole" / name)


def test_a_branch_with_kept_answers_goes_on_from_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first session asks the teacher of every face twice, the later ones of one, for its shapes."""
    asked, keep = [], loop.to_keep

    def counted(run: Run, faces: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.append(len(faces))
        return keep(run, faces)

    monkeypatch.setattr(loop, "to_keep", counted)
    config = branch(tmp_path, cache_dir=str(tmp_path / "kept"), epochs=3)
    train(config, tmp_path / "whole", device=DEVICE, show="none")
    assert sum(asked) == 2 * 64 + 2
    names = {path.name for path in (tmp_path / "kept").rglob("*")}
    assert names >= {"x.bin", "z_s.bin", "complete"}
    asked.clear()
    stopped_after(8, config, tmp_path / "cut")
    train(config, tmp_path / "cut", device=DEVICE, show="none")
    assert asked == [1, 1, 1, 1]
    alike(*(tmp_path / name / "btnet" / "branch_14.safetensors" for name in ("cut", "whole")))


def test_the_gradient_scalers_state_is_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that overflows halves the scale; a stop later, another process goes on with that scale and count."""
    original = loop.unscale_and_clip

    def overflowing(run: Run, network: list) -> torch.Tensor:
        if run.step == 1:
            network[3].grad[...] = float("inf")
        return original(run, network)

    monkeypatch.setattr(torch.amp, "GradScaler", GENTLE)
    monkeypatch.setattr(loop, "unscale_and_clip", overflowing)
    config = whole(precision="fp16", epochs=3)
    stopped_after(8, config, tmp_path)
    state = checkpoint.load_state(tmp_path)
    assert (state["grad_scaler"]["scale"], state["grad_scaler"]["_growth_tracker"]) == (8.0, 6)
    run = prepare(config, tmp_path, torch.device(DEVICE))
    checkpoint.restore(run, state)
    assert (run.grad_scaler.get_scale(), run.skipped) == (8.0, 1)
    metrics = train(config, tmp_path, device=DEVICE, show="none")
    assert metrics["skipped_steps"] == 1
    assert metrics["grad_scale"] == 8.0


def test_overflows_of_its_own_are_recovered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale that no fp16 gradient bears the run comes down by itself, and learns."""
    high = functools.partial(torch.amp.GradScaler, init_scale=2.0**36)
    monkeypatch.setattr(torch.amp, "GradScaler", high)
    config = whole(precision="fp16", epochs=10)
    metrics = train(config, tmp_path, device=DEVICE, show="none")
    assert 0 < metrics["skipped_steps"] < 35  # of 40
    assert metrics["grad_scale"] == 2.0 ** (36 - metrics["skipped_steps"])
    weights = read_safetensors(tmp_path / "trunk.safetensors")[0]
    assert all(tensor.isfinite().all() for tensor in weights.values())


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


def test_pair_accuracy_on_the_device_is_the_cpus() -> None:
    torch.manual_seed(0)
    net, pairs = BTNet(build_backbone(SMALL), (14,)), open_pairs(PAIRS)
    cpu, device = (
        evaluate_pairs(BranchEmbedder(net, device=where, precision="fp32"), pairs, [(112, 14), (14, 14)])
        for where in ("cpu", DEVICE)
    )  # fmt: skip
    for setting in ("112&14", "14&14"):
        assert device[setting]["auc"] == pytest.approx(cpu[setting]["auc"], abs=1.0)
        assert device[setting]["accuracy"] == pytest.approx(cpu[setting]["accuracy"], abs=5.1)


def test_identification_on_the_device_is_the_cpus() -> None:
    """1:N in blocks: ranks, scores and rates, with mates far down among the entries, and none at all."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(300, 64, generator=generator)
    mates = np.where(np.arange(200) % 3 == 0, -1, np.arange(200))
    noise = torch.randn(200, 64, generator=generator)
    probes = noise + torch.where(torch.from_numpy(mates >= 0)[:, None], 0.2 * gallery[:200], 0)
    cpu, device = (
        search(probes, gallery, mates, lowest_rank=20, device=where, chunk=7000) for where in ("cpu", DEVICE)
    )  # fmt: skip
    assert len(np.unique(cpu.rank)) > 10
    assert np.mean(device.rank != cpu.rank) <= 0.02  # scores that are equal but for rounding
    np.testing.assert_allclose(device.mate, cpu.mate, atol=1e-4)
    np.testing.assert_allclose(device.unmated, cpu.unmated, atol=1e-4)
    assert device.lowest == pytest.approx(cpu.lowest, abs=1e-4)
    labels = np.arange(300), np.where(mates < 0, -1, mates)
    one, two = (
        identify(gallery, labels[0], probes, labels[1], device=where) for where in ("cpu", DEVICE)
    )
    assert two["tpir"] == pytest.approx(one["tpir"], abs=2.0)


def one_step(run: Run, step: int) -> None:
    batch = run.sampler.batch(step)
    run.optimiser.zero_grad(set_to_none=True)
    pixels = None if run.cache is not None else run.pixels.get(batch.records)
    backward(run, batch, pixels)
    unscale_and_clip(run, list(run.trainable.values()))
    run.grad_scaler.step(run.optimiser)
    run.grad_scaler.update()


@cuda_alone
@pytest.mark.parametrize("what", ["trunk", "PartialFC", "fp16", "branch", "cached branch"])
def test_an_ordinary_step_does_not_wait_for_the_device(tmp_path: Path, what: str) -> None:
    """CUDA itself raises where the host would wait: for a value, a list of indices or a copy."""
    changes = {"PartialFC": {"sample_rate": 0.5, "batch": 2}, "fp16": {"precision": "fp16"}}
    faces = {**FACES, "identities": 16} if what == "PartialFC" else FACES
    config = whole(data=faces, **changes.get(what, {}))
    if "branch" in what:
        config = branch(tmp_path, cache_dir=str(tmp_path / "kept") if "cached" in what else "")
    run = prepare(config, tmp_path, torch.device(DEVICE))
    if "cached" in what:
        fill_cache(run, loop.Progress(tmp_path, "", 1, 0, 1, show="none", speak=False))
    run.modes(training=True)
    one_step(run, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(run, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_alone
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


# ---- two GPUs; on the CPU two processes, whose batch norms see their own halves ------------------

two_devices = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
SHARED = {"precision": "fp32", "sync_bn": DEVICE == "cuda"}
ROUNDING = 5e-3 if DEVICE == "cuda" else 0.3


def on(processes: int, config: TrainConfig, out: Path) -> list[float]:
    """Losses of the training in that many processes."""
    train_in_subprocess(config, out, device=DEVICE, processes=processes)
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


@two_devices
@pytest.mark.parametrize("loss", ["curricularface", "arcface"])
def test_two_gpus_with_shared_batch_statistics_are_one(tmp_path: Path, loss: str) -> None:
    """Gradients, the classifier's shards and its softmax over both: the losses of one device."""
    config = whole(loss=loss, **SHARED)
    one, two = (on(n, config, tmp_path / str(n)) for n in (1, 2))
    assert two == pytest.approx(one, rel=ROUNDING)
    assert two[0] == pytest.approx(one[0], rel=ROUNDING / 5)


@two_devices
def test_two_gpus_share_class_means_kept_answers_and_validation(tmp_path: Path) -> None:
    pairs = ({**PAIRS, "seed": 0}, {**PAIRS, "seed": 1})
    config = branch(
        tmp_path,
        validation=pairs,
        epochs=3,
        classifier="class_means",
        cache="auto",
        **{"bn": "frozen_bn"},
    )
    one, two = (on(n, config, tmp_path / str(n)) for n in (1, 2))
    assert two == pytest.approx(one, rel=5e-2)
    records = [checkpoint.read_record(tmp_path / n)["metrics"]["validation"] for n in ("1", "2")]
    assert records[1].keys() == records[0].keys()
    assert records[1] == pytest.approx(records[0], abs=10.0)


@two_devices
def test_a_checkpoint_of_one_gpu_goes_on_on_two(tmp_path: Path) -> None:
    """Part of the negative classes, momentum and all: cut over two devices where one had them whole."""
    config = whole(sample_rate=0.5, epochs=3, **SHARED)
    stopped_after(8, config, tmp_path / "cut")
    rows = on(2, config, tmp_path / "cut")
    assert len(rows) == len(on(1, config, tmp_path / "whole"))
    assert np.isfinite(rows).all()
    weight = read_safetensors(tmp_path / "cut" / "classifier.safetensors")[0]["weight"]
    assert weight.shape == (8, 64)
    assert (weight.norm(dim=1) > 0).all()
