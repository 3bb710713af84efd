"""The loop: every method runs, only what is listed learns, a killed run resumes bit for bit, trouble is named."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from btnet_core.errors import CheckpointError, ConfigError, DataError, TrainingError
from btnet_core.files import read_safetensors
from btnet_core.images import resize
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BTNet, weights_digest
from btnet_core.models.weights import load_backbone
from btnet_core.training import checkpoint, loop, methods
from btnet_core.training import step as problem
from btnet_core.training.batches import Sampler, branch_input, mirrored, moved
from btnet_core.training.classifier import class_means, load_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.loop import train
from btnet_core.training.progress import read_metrics
from btnet_core.training.step import prepare
from btnet_paper import plans
from btnet_paper.plans import load_methods
from btnet_paper.scales import get_scale

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phi_mr trained for a moment: the folder of its trunk and classifier."""
    out = tmp_path_factory.mktemp("phi_mr")
    train(methods.phi_mr(FACES, backbone=TINY, **QUICK), out, device="cpu", show="none")
    return out


def branch(trunk: Path, r: int = 14, **changes) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    return methods.phi_bt(FACES, r, *files, **{**QUICK, **changes})


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_safetensors(a)[0], read_safetensors(b)[0]
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_every_run_of_table_1_at_a_tiny_scale(tmp_path: Path) -> None:
    demo = get_scale("demo")
    quick = {**QUICK, "epochs": 1}
    tiny = type(demo)(**{**vars(demo), "faces": FACES, "pairs": (), "backbone": TINY, "hr": quick, "trunk": quick,
                         "specialists": {"native": quick}, "branch": quick})  # fmt: skip
    for name, config in plans.plan(tiny, tmp_path).items():
        metrics = train(config, tmp_path / name, device="cpu", show="none")
        assert np.isfinite(metrics["loss"]), name
    found = load_methods(tmp_path, device="cpu")
    assert list(found) == ["phi_hr", "phi_mm", "phi_mr", "phi_bt"]
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for embedder in found.values():
        assert embedder(pixels, 14).shape == (2, 16)
    assert BTNet.load(tmp_path / "phi_bt").resolutions == (7, 14, 28, 112)
    assert weights_digest(BTNet.load(tmp_path / "phi_bt").trunk) == weights_digest(
        load_backbone(tmp_path / "phi_mr" / "trunk.safetensors")
    )


def test_learning_lowers_the_loss(tmp_path: Path) -> None:
    config = methods.phi_hr(
        FACES, backbone=TINY, **{**QUICK, "epochs": 12, "margin": 0.1, "s": 16.0}
    )
    train(config, tmp_path, device="cpu", show="none")
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_a_finished_run_is_recognised_and_another_configuration_starts_over(tmp_path: Path) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **QUICK)
    first = train(config, tmp_path, device="cpu", show="none")
    stamp = (tmp_path / "trunk.safetensors").stat().st_mtime_ns
    assert train(config, tmp_path, device="cpu", show="none") == first
    assert (tmp_path / "trunk.safetensors").stat().st_mtime_ns == stamp
    train(config.replace(seed=1), tmp_path, device="cpu", show="none")
    assert (tmp_path / "trunk.safetensors").stat().st_mtime_ns > stamp


# ---- what learns ----


@pytest.mark.parametrize("bn", ["all", "authors", "frozen_bn"])
def test_only_the_listed_parameters_change(trunk: Path, tmp_path: Path, bn: str) -> None:
    run = prepare(branch(trunk, bn=bn), tmp_path, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    statistics = {
        name: b.clone() for name, b in run.network.named_buffers() if "running_mean" in name
    }
    kappa = run.kappa.weight.detach().clone()
    metrics = train(branch(trunk, bn=bn), tmp_path, device="cpu", show="none")
    after = BTNet.load(tmp_path / "btnet").route(14)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(run.trainable)
    assert len(changed) > 0.9 * len(run.trainable)
    assert metrics["parameters"] == sum(p.numel() for p in run.trainable.values())
    moved = {
        name
        for name, b in after.named_buffers()
        if "running_mean" in name and not torch.equal(b, statistics[name])
    }
    assert any(name.startswith("branch") for name in moved)
    assert any(name.startswith("shared") for name in moved) == (bn != "frozen_bn")
    assert torch.equal(load_classifier(tmp_path / "classifier.safetensors", 6, 16), kappa)  # BCT


def test_the_cached_teacher_gives_the_same_losses(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for place in ("off", "memory", "memmap"):
        train(
            branch(trunk, cache=place, embedding_weight=1.0),
            tmp_path / place,
            device="cpu",
            show="lines",
        )
        said = capsys.readouterr().out
        announced = re.search(r"teacher features of both mirror images: \d+\.\d MB", said)
        assert bool(announced) == (place != "off")
    rows = {place: read_metrics(tmp_path / place) for place in ("off", "memory", "memmap")}
    for key in ("influence", "branch", "embedding"):
        off = [row[key] for row in rows["off"]]
        assert [row[key] for row in rows["memory"]] == pytest.approx(off, rel=2e-3)
        assert [row[key] for row in rows["memmap"]] == pytest.approx(off, rel=2e-3)
    assert not (tmp_path / "memmap" / "cache").exists()


def test_shifted_faces_and_the_teacher_of_both_mirror_images(trunk: Path, tmp_path: Path) -> None:
    """Cached or not: a moved face at the branch, the face where it was at the teacher, whose two embeddings are added."""
    config = branch(
        trunk, shift=3.0, embedding="cosine", embedding_weight=1.0, embedding_mirrored=True
    )
    run = prepare(config, tmp_path, torch.device("cpu"))
    batch = run.sampler.batch(1)
    pixels = run.pixels.get(batch.records)
    x, (z_s, z) = run.inputs(batch, pixels)
    faces = mirrored(pixels, batch.flip)
    plain, expected_s, one = run.branch_rows(faces)
    other = run.branch_rows(faces.flip(-1))[2]
    torch.testing.assert_close(z, one + other)
    torch.testing.assert_close(z_s, expected_s)
    assert batch.shift.shape == (12, 2)
    assert 1 < batch.shift.abs().max() <= 3
    assert not torch.allclose(x, plain, atol=0.02)
    torch.testing.assert_close(
        x, branch_input(run.trunk, moved(faces, batch.shift), 14, config.resize)
    )
    for place in ("off", "memory"):
        train(config.replace(cache=place), tmp_path / place, device="cpu", show="none")
    rows = [[row["loss"] for row in read_metrics(tmp_path / place)] for place in ("off", "memory")]
    assert rows[0] == pytest.approx(rows[1], rel=2e-3)


def test_moved_by_whole_pixels_repeats_the_edge() -> None:
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    right, up = moved(pixels, torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    torch.testing.assert_close(right, pixels[0, :, :, [0, 0, 1, 2, 3]].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(up, pixels[1, :, [2, 3, 3, 3]].float(), atol=1e-3, rtol=0)


def test_the_teacher_is_the_trunk_at_canonical_size(trunk: Path, tmp_path: Path) -> None:
    run = prepare(branch(trunk), tmp_path, torch.device("cpu"))
    faces = run.pixels.get(torch.arange(3))
    x, z_s = run.branch_rows(faces)
    torch.testing.assert_close(x, run.trunk.normalise(resize(faces, 14)))
    expected = dict(run.trunk.features(run.trunk.preprocess(faces), "S3U1"))["S3U1"]
    torch.testing.assert_close(z_s, expected)


@pytest.mark.parametrize("row", ["scratch", "pretraining", "bct", "fix_trunk", "distillation"])
def test_rows_of_table_3(trunk: Path, tmp_path: Path, row: str) -> None:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    config = methods.table3(FACES, row, *files, **{**QUICK, "epochs": 1, "backbone": TINY})
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert ("branch" in metrics) == (row == "distillation")
    kept = same_weights(tmp_path / "classifier.safetensors", trunk / "classifier.safetensors")
    assert kept == (row in ("bct", "fix_trunk", "distillation"))
    if row in ("fix_trunk", "distillation"):
        assert BTNet.load(tmp_path / "btnet").resolutions == (14, 112)
    else:
        own = plans.load_route(
            load_backbone(trunk / "trunk.safetensors"), tmp_path / "route.safetensors"
        )
        assert own.route(14).eval()(torch.zeros(1, 3, 14, 14)).shape == (1, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "cosface"}, {"loss": "arcface"}, {"loss": "adaface"}, {"loss": "sphereface"},
        {"loss": "normface"}, {"loss": "triplet", "per_identity": 2}, {"loss": "center"},
        {"loss": "circle", "per_identity": 2}, {"distillation": "cosine"}, {"distillation": "batch_sum", "lr": 0.01},
        {"couple_at": "S4U1"}, {"couple_at": "S2U1"}, {"classifier": "class_means"}, {"influence_weight": 0.0},
        {"sample_rate": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_switch_runs(trunk: Path, tmp_path: Path, change: dict) -> None:
    metrics = train(branch(trunk, **{"epochs": 1, **change}), tmp_path, device="cpu", show="none")
    assert np.isfinite(metrics["loss"])
    assert BTNet.load(tmp_path / "btnet").resolutions == (14, 112)


def test_full_finetuning_and_mr_variants(trunk: Path, tmp_path: Path) -> None:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    train(methods.full_finetuning(FACES, 14, *files, **{**QUICK, "epochs": 1, "backbone": None}), tmp_path / "full",
          device="cpu", show="none")  # fmt: skip
    assert not same_weights(tmp_path / "full" / "trunk.safetensors", trunk / "trunk.safetensors")
    sizes = {name: methods.phi_mr(FACES, name, backbone=TINY, batch=36, epochs=200, warmup_epochs=0) for name in
             ("v1", "v2", "v3")}  # fmt: skip
    labels = torch.arange(36)
    for name, shares in {"v1": [0.2] * 5, "v2": [0.3, 0.25, 0.2, 0.15, 0.1]}.items():
        sampler = Sampler(labels, sizes[name])
        drawn = torch.cat([sampler.batch(step).size for step in range(200)])
        assert [(drawn == r).float().mean().item() for r in (112, 56, 28, 14, 7)] == pytest.approx(
            shares, abs=0.03
        )
    drawn = torch.cat([Sampler(labels, sizes["v3"]).batch(step).size for step in range(200)])
    assert (drawn.min().item(), drawn.max().item()) == (4, 112)


def test_class_means() -> None:
    z = torch.tensor([[2.0, 0], [0, 5], [3, 0]])
    torch.testing.assert_close(
        class_means(z, torch.tensor([0, 0, 2]), 3), torch.tensor([[0.5**0.5] * 2, [0, 0], [1, 0]])
    )


def test_what_is_kept_in_cache_dir_is_used_again(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = branch(trunk, epochs=1, classifier="class_means")
    first = train(config, tmp_path / "alone", device="cpu", show="none")
    config = config.replace(cache_dir=str(tmp_path / "kept"))
    assert (
        train(config, tmp_path / "alone", device="cpu", show="none") == first
    )  # a setting of the machine: not again
    assert train(config, tmp_path / "first", device="cpu", show="none")["loss"] == pytest.approx(
        first["loss"], rel=1e-2
    )
    monkeypatch.setattr(problem, "embed_all", None)  # class means are read
    again = train(config.replace(epochs=2), tmp_path / "second", device="cpu", show="none")
    assert again["parameters"] == first["parameters"]
    assert same_weights(
        tmp_path / "second" / "classifier.safetensors",
        tmp_path / "alone" / "classifier.safetensors",
    )


# ---- schedule and configuration ----


def test_schedule_of_a2() -> None:
    config = TrainConfig(data=FACES)
    assert (
        config.lr,
        config.epochs,
        config.warmup_epochs,
        config.momentum,
        config.weight_decay,
    ) == (
        0.2,
        25,
        2,
        0.9,
        5e-4,
    )
    rates = [config.lr_at(step, 10) for step in range(250)]
    assert rates[:20] == sorted(rates[:20])
    assert max(rates) == pytest.approx(0.2, rel=0.06)
    assert rates[20] == pytest.approx(0.2)
    assert rates[135] == pytest.approx(0.2 * 0.5**2)
    assert config.replace(batch=128).peak_lr == pytest.approx(0.05)
    bt = methods.phi_bt(FACES, 14, "t", "k")
    assert (bt.lr, bt.epochs, bt.warmup_epochs, bt.branch_weight, bt.fix_classifier) == (
        0.02,
        10,
        0.0,
        0.5,
        True,
    )


@pytest.mark.parametrize(("matmul", "tf32"), [("high", True), ("highest", False)])
def test_tf32_is_named_for_products_and_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matmul: str, tf32: bool
) -> None:
    monkeypatch.setattr(loop, "_train", lambda *arguments: {})
    train(TrainConfig(data=FACES, matmul=matmul), tmp_path, device="cpu")
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_a_record_from_before_a_field_existed_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **QUICK)
    metrics = train(config.replace(epochs=1), tmp_path, device="cpu", show="none")
    record = checkpoint.read_record(tmp_path)
    del record["config"]["compile"], record["config"]["workers"]
    checkpoint.write_record(tmp_path, record)
    monkeypatch.setattr(loop, "_train", lambda *arguments: pytest.fail("it trained again"))
    assert train(config.replace(epochs=1), tmp_path, device="cpu", show="none") == metrics


def test_compiled_gives_the_same_losses(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, forward and backward, by torch.compile; without its code generator, which needs minutes (see test_gpu)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rows = {}
    for compiled in (False, True):
        train(
            branch(trunk, epochs=1, compile=compiled),
            tmp_path / str(compiled),
            device="cpu",
            show="none",
        )
        rows[compiled] = [row["loss"] for row in read_metrics(tmp_path / str(compiled))]
    assert rows[True] == pytest.approx(rows[False], rel=1e-3)


def test_configuration_round_trip_and_errors() -> None:
    config = methods.phi_bt(FACES, 14, "trunk", couple_at="S4U1")
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig.from_json('{"data": "x", "learning_rate": 1}')
    for wrong in (
        {"loss": "l2"},
        {"epochs": 0},
        {"branch_weight": 1.0},
        {"size_weights": (1.0, 1.0)},
    ):
        with pytest.raises(ConfigError):
            TrainConfig(data=FACES, **wrong)


# ---- trouble ----


def command(config: TrainConfig, out: Path) -> list[str]:
    file = out.parent / f"{out.name}.json"
    file.write_text(config.to_json())
    return [
        sys.executable,
        "-m",
        "btnet_tools",
        "train",
        "--config",
        str(file),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize("kind", ["trunk", "branch"])
def test_kill_9_in_mid_epoch_and_resume_bit_for_bit(trunk: Path, tmp_path: Path, kind: str) -> None:
    options = {**QUICK, "epochs": 12, "checkpoint_seconds": 0.05, "precision": "auto"}
    config = (
        methods.phi_mr(FACES, backbone=TINY, **options)
        if kind == "trunk"
        else branch(trunk, **options)
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(
        command(config, whole),
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(command(config, cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        state, began = cut / checkpoint.STATE, time.monotonic()
        old = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and time.monotonic() - began < 60:
            if state.exists() and state.stat().st_mtime_ns > old:
                time.sleep(0.11)
                break
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills, "the run ended before it could be killed"
    subprocess.run(
        command(config, cut),
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    name = "trunk.safetensors" if kind == "trunk" else "btnet/branch_14.safetensors"
    assert same_weights(whole / name, cut / name)
    assert same_weights(whole / "classifier.safetensors", cut / "classifier.safetensors")
    steps = [row["step"] for row in read_metrics(cut) if "loss" in row]
    assert steps == sorted(set(steps))


def test_ctrl_c_saves_a_checkpoint(tmp_path: Path) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 3000})
    process = subprocess.Popen(
        command(config, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert checkpoint.load_state(tmp_path / "out")["step"] > 0
    with pytest.raises(ConfigError, match=r"lr 2\.0 -> 1\.0"):
        train(config.replace(lr=1.0), tmp_path / "out", device="cpu", show="none")


def test_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 1})
    metrics = train_in_subprocess(config, tmp_path, device="cpu")
    assert metrics["steps"] == 3
    assert "parameters learn" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="nothing_here"):
        train_in_subprocess(config.replace(data="nothing_here"), tmp_path / "bad", device="cpu")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_with_everything_one_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 3})
    losses = loop.Run.losses

    def poisoned(run, *arguments):
        parts = losses(run, *arguments)
        if run.step != 4:
            return parts
        harm = run.network.head.fc.weight.sum() * 0  # the square root of 0 has no finite gradient
        return {
            name: value + (harm / 0 if what == "loss" else harm.sqrt())
            for name, value in parts.items()
        }

    monkeypatch.setattr(loop.Run, "losses", poisoned)
    with pytest.raises(TrainingError) as caught:
        train(config, tmp_path, device="cpu", show="none")
    for expected in (
        "step 5",
        "lr ",
        "norm",
        "gradient norms before it",
        "records [",
        "checkpoint",
    ):
        assert expected in str(caught.value)
    assert checkpoint.load_state(tmp_path)["step"] == 3
    monkeypatch.undo()
    assert np.isfinite(train(config, tmp_path, device="cpu", show="none")["loss"])


def test_fp16_overflow_skips_the_step_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clip, kept = (
        methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "precision": "fp16"}),
        loop._clip,
        [],
    )

    def overflowing(network, limit, run):
        norm = clip(network, limit, run)
        if run.step in (2, 3):
            kept.append(network[0].detach().clone())
        return norm * float("inf") if run.step == 2 else norm

    create = problem.Scaler.__init__

    def gentle(
        self, enabled
    ):  # the usual 2^16 overflows by itself on so small a network's first steps
        create(self, enabled)
        self.scale = 16.0

    monkeypatch.setattr(problem.Scaler, "__init__", gentle)
    monkeypatch.setattr(loop, "_clip", overflowing)
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert metrics["skipped_steps"] == read_metrics(tmp_path)[-1]["skipped_steps"] == 1
    assert torch.equal(*kept)
    assert checkpoint.load_state(tmp_path)["scaler"][0] == 8.0


def test_a_wrong_label_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btnet_paper.synthetic_faces import SyntheticFaces

    original = SyntheticFaces.__init__

    @functools.wraps(original)
    def spoiled(self, *arguments, **options):
        original(self, *arguments, **options)
        self.labels[4] = 99

    monkeypatch.setattr(SyntheticFaces, "__init__", spoiled)
    other = {**FACES, "seed": 9}  # not one that is open already
    with pytest.raises((ConfigError, DataError), match=r"99.*record 4"):
        train(methods.phi_hr(other, backbone=TINY, **QUICK), tmp_path, device="cpu", show="none")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_state(tmp_path, {"step": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"disk is full.*last good one is kept"):
        checkpoint.save_state(tmp_path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load_state(tmp_path)["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["state.pt"]


def test_no_room_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **QUICK)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="free"):
        train(config, tmp_path / "full", device="cpu", show="none")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(config, tmp_path / "file", device="cpu", show="none")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a disk of its own of as many MB as asked for."""
    out = tmp_path / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(out)]
    if (
        not hasattr(os, "geteuid")
        or os.geteuid()
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs a Linux root")
    yield out
    subprocess.run(["umount", "-l", str(out)], check=True)


@pytest.mark.parametrize("small_disk", [3], indirect=True)
def test_a_disk_too_small_is_found_before_the_first_step(small_disk: Path) -> None:
    with pytest.raises(TrainingError, match=r"disk: \d+ MB free, checkpoints need \d+ MB"):
        train(methods.phi_hr(FACES, backbone=TINY, **QUICK), small_disk, device="cpu", show="none")
    assert not (small_disk / "metrics.jsonl").exists()


@pytest.mark.parametrize("small_disk", [8], indirect=True)
def test_a_disk_that_fills_stops_the_run_and_the_last_checkpoint_survives(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, losses, ballast = (
        methods.phi_hr(FACES, backbone=TINY, **QUICK),
        loop.Run.losses,
        small_disk / "ballast",
    )

    def filling(run, *arguments):
        if run.step == 4:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return losses(run, *arguments)

    monkeypatch.setattr(loop.Run, "losses", filling)
    with pytest.raises(TrainingError, match=r"disk is full.*last good one is kept"):
        train(config, small_disk, device="cpu", show="none")
    monkeypatch.undo()
    ballast.unlink()
    assert checkpoint.load_state(small_disk)["step"] == 3
    assert train(config, small_disk, device="cpu", show="none")["steps"] == 6


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / checkpoint.STATE).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="state"):
        train(methods.phi_hr(FACES, backbone=TINY, **QUICK), tmp_path, device="cpu", show="none")
    torch.save({"format": 99}, tmp_path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="99"):
        checkpoint.load_state(tmp_path)


def test_a_branch_of_another_trunk_does_not_join_a_btnet(trunk: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "phi_bt")
    train(branch(trunk, btnet=folder, epochs=1), tmp_path / "a", device="cpu", show="none")
    train(
        methods.phi_mr(FACES, backbone=TINY, **{**QUICK, "seed": 5}),
        tmp_path / "other",
        device="cpu",
        show="none",
    )
    with pytest.raises(CheckpointError, match="another trunk"):
        train(
            branch(tmp_path / "other", r=7, btnet=folder, epochs=1),
            tmp_path / "b",
            device="cpu",
            show="none",
        )


def test_validation_during_training_is_recorded(trunk: Path, tmp_path: Path) -> None:
    pairs = {
        "kind": "drawn",
        "faces": {"kind": "synthetic", "identities": 20, "images": 4, "seed": 0, "first": 50},
        "count": 100,
        "seed": 0,
    }
    config = branch(trunk, epochs=2, validation=(pairs,), validate_epochs=1)
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert set(metrics["validation"]) == {"112&112", "112&14", "14&14"}
    whole = methods.phi_mr(FACES, backbone=TINY, **{**QUICK, "epochs": 1, "validation": (pairs,)})
    whole = train(
        whole.replace(validation_resolutions=(112, 7)),
        tmp_path / "trunk",
        device="cpu",
        show="none",
    )
    assert set(whole["validation"]) == {"112&112", "112&7", "7&7"}
    rows = [row for row in read_metrics(tmp_path) if "validation" in row]
    assert [row["step"] for row in rows] == [3, 6] or len(rows) == 2
    assert (
        json.loads((tmp_path / "run.json").read_text())["metrics"]["validation"]
        == metrics["validation"]
    )
