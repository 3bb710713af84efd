"""A run that is cut off goes on bit for bit; another recipe, full disks and damage are told."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from btnet_core import device
from btnet_core.errors import CheckpointError, ConfigError, TrainingError, WriteError
from btnet_core.files import read_safetensors
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import checkpoint, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import prepare

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


def branch(trunk: Path, r: int = 14, **changes) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    return methods.phi_bt(FACES, r, *files, **{**QUICK, **changes})


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_safetensors(a)[0], read_safetensors(b)[0]
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def command(config: TrainConfig, out: Path) -> list[str]:
    file = out.parent / f"{out.name}.json"
    file.write_text(config.to_json())
    start = [sys.executable, "-m", "btnet_core.training.launch", "--config", str(file)]
    source = "synthetic=btnet_paper.synthetic_faces:SyntheticFaces"
    return [*start, "--out", str(out), "--device", "cpu", "--source", source]


@pytest.mark.parametrize("kind", ["trunk", "branch", "adamw"])
def test_kill_9_in_mid_epoch_and_resume_bit_for_bit(trunk: Path, tmp_path: Path, kind: str) -> None:
    options = {**QUICK, "epochs": 12, "checkpoint_seconds": 0.05, "precision": "auto"}
    adam = {"optimiser": "adamw", "lr": 0.02} if kind == "adamw" else {}
    config = (
        methods.phi_mr(FACES, backbone=TINY, **options)
        if kind == "trunk"
        else branch(trunk, **{**options, **adam})
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
    with pytest.raises(ConfigError, match=r"lr 2\.0 -> 1\.0.*--fresh"):
        train(config.replace(lr=1.0), tmp_path / "out", device="cpu", show="none")


@pytest.mark.parametrize("kind", ["trunk", "branch", "adamw"])
def test_a_state_holds_all_that_changes(trunk: Path, tmp_path: Path, kind: str) -> None:
    """Restored into a fresh run, every part is as it was; nothing of it is the fresh run's own."""
    config = branch(trunk, loss="center", classifier="class_means", fix_classifier=False)
    if kind != "branch":
        optimiser = "adamw" if kind == "adamw" else "sgd"
        config = methods.phi_mr(FACES, backbone=TINY, **QUICK, optimiser=optimiser)
    run, other = (prepare(config.replace(seed=s), tmp_path, torch.device("cpu")) for s in (0, 1))
    run.identity = {"config": config.to_dict(), "inputs": {}}
    for number, (name, parameter) in enumerate(run.learns.items()):
        for place, buffer in enumerate(checkpoint.buffers_of(run)):
            run.optimiser.state[parameter][buffer].fill_(number + 0.5 + 0.2 * place)
        with torch.no_grad():
            parameter.add_(0.1)
        assert name in other.learns
    for name, buffer in run.network.named_buffers():
        buffer.fill_(3 if "num_batches" in name else 0.3)
    for module in (run.kappa.margin, run.metric):
        for buffer in module.buffers() if module is not None else ():
            buffer.fill_(0.7)
    run.step, run.skipped = 5, 2
    run.validation = [{"step": 3, "accuracy": {}}]
    torch.manual_seed(77)
    saved = copy.deepcopy(checkpoint.state_of(run))
    torch.manual_seed(78)
    checkpoint.restore(other, saved)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(77))
    assert torch.equal(torch.rand(3), expected)  # the random state, too
    again = checkpoint.state_of(other)
    assert again.keys() == saved.keys() == {
        "identity", "versions", "step", "seconds", "network", "momentum", "kappa", "margin",
        "metric", "grad_scaler", "skipped", "rng", "cuda_rng", "threads", "validation",
    }  # fmt: skip
    for part in ("network", "margin", "metric"):
        assert again[part].keys() == saved[part].keys()
        assert all(torch.equal(again[part][k], saved[part][k]) for k in saved[part])
    assert again["momentum"].keys() == saved["momentum"].keys() == run.learns.keys()
    for name, buffers in saved["momentum"].items():
        assert buffers.keys() == again["momentum"][name].keys() == set(checkpoint.buffers_of(run))
        assert all(torch.equal(again["momentum"][name][k], buffers[k]) for k in buffers)
    if kind == "adamw":  # its count of steps, from which the first means are corrected
        assert {float(state["step"]) for state in other.optimiser.state.values()} == {3.0}
    assert torch.equal(again["kappa"], saved["kappa"])
    for part in ("step", "skipped", "validation", "grad_scaler"):
        assert again[part] == saved[part]
    assert again["seconds"] == pytest.approx(saved["seconds"], abs=1)


def test_a_resumed_run_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    config = methods.phi_hr(FACES, backbone=TINY, **QUICK)
    identity = checkpoint.identity_of(
        config, prepare(config, tmp_path, torch.device("cpu")).pixels.faces.checksum
    )
    checkpoint.save_state(tmp_path, {"identity": json.dumps(identity), "threads": 3})
    monkeypatch.setattr(loop, "_train", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(device, "idle_cores", lambda: 1)
    try:
        train(config, tmp_path, device="cpu")
        train(config.replace(threads=2), tmp_path, device="cpu")
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 2]


# ---- finished, or of another recipe -------------------------------------------------------------


def test_a_finished_run_is_recognised_and_another_recipe_is_refused(
    trunk: Path, tmp_path: Path
) -> None:
    config = branch(trunk)
    first = train(config, tmp_path, device="cpu", show="none")
    weights = tmp_path / "btnet" / "branch_14.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert train(config.replace(workers=1), tmp_path, device="cpu", show="none") == first
    for changes, told in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"data": {**FACES, "seed": 1}}, "content of data"),
        ({"classifier": "class_means"}, "classifier"),
    ):
        with pytest.raises(ConfigError, match=f"another recipe.*{told}.*--fresh"):
            train(config.replace(**changes), tmp_path, device="cpu", show="none")
    assert weights.stat().st_mtime_ns == stamp
    train(config.replace(seed=1), tmp_path, device="cpu", show="none", fresh=True)
    assert weights.stat().st_mtime_ns > stamp


def test_another_content_under_the_same_name_is_refused(trunk: Path, tmp_path: Path) -> None:
    for name in ("trunk", "classifier"):
        (tmp_path / f"{name}.safetensors").write_bytes((trunk / f"{name}.safetensors").read_bytes())
    config = branch(tmp_path, epochs=1)
    train(config, tmp_path / "out", device="cpu", show="none")
    other = methods.phi_mr(FACES, backbone=TINY, **{**QUICK, "seed": 5, "epochs": 1})
    train(other, tmp_path, device="cpu", show="none")  # overwrites them
    with pytest.raises(ConfigError, match=r"content of .*trunk.safetensors"):
        train(config, tmp_path / "out", device="cpu", show="none")


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


# ---- trouble ------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_state(tmp_path, {"step": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match="disk is full") as refused:
        checkpoint.save_state(tmp_path, {"step": 2})
    told = str(checkpoint.unwritten(tmp_path, refused.value))
    assert told == f"{refused.value}; the last good one is kept in {tmp_path / checkpoint.STATE}"
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
    config, losses_of = methods.phi_hr(FACES, backbone=TINY, **QUICK), loop.losses_of
    ballast = small_disk / "ballast"

    def filling(run, *arguments):
        if run.step == 4:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return losses_of(run, *arguments)

    monkeypatch.setattr(loop, "losses_of", filling)
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
