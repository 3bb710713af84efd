"""The teacher's answers, kept or computed: the same losses; what does not fit is computed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from btnet_core.files import read_safetensors
from btnet_core.training import methods, teacher
from btnet_core.training import run as run_module
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.loop import train
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import prepare
from btnet_core.training.step import branch_inputs, to_keep
from btnet_core.training.teacher import TeacherCache, pays_and_fits

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


@pytest.fixture
def trunk(untrained: Path) -> Path:
    return untrained


def branch(trunk: Path, r: int = 14, **changes) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    return methods.phi_bt(FACES, r, *files, **{**QUICK, **changes})


def test_kept_answers_are_the_teachers(trunk: Path, tmp_path: Path) -> None:
    config = branch(trunk, embedding_weight=1.0, embedding_mirrored=True)
    run = prepare(config, tmp_path, torch.device("cpu"))
    batch = run.sampler.batch(1)
    x, computed = branch_inputs(run, batch, run.pixels.get(batch.records))
    for _ in range(2):  # the second finds the files
        run.cache = TeacherCache(
            run.pixels, lambda faces: to_keep(run, faces), tmp_path / "kept", torch.device("cpu")
        )
        kept_x, kept = branch_inputs(run, batch, None)
        torch.testing.assert_close(kept_x, x)
        torch.testing.assert_close(kept.z_s, computed.z_s, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept.z, computed.z, rtol=1e-4, atol=1e-4)


def test_the_cached_teacher_gives_the_same_losses(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for cache in ("off", "auto"):
        changes = {"cache": cache, "embedding_weight": 1.0, "shift": 2.0, "lr": 0.1, "epochs": 3}
        train(branch(trunk, **changes), tmp_path / cache, device="cpu", show="lines")
        said = capsys.readouterr().out
        announced = re.search(r"teacher features of both mirror images: \d+\.\d MB, kept", said)
        assert bool(announced) == (cache == "auto")
    rows = {cache: read_metrics(tmp_path / cache) for cache in ("off", "auto")}
    for key in ("influence", "branch", "embedding"):
        off = [row[key] for row in rows["off"]]
        assert [row[key] for row in rows["auto"]] == pytest.approx(off, rel=1e-4)
    assert not (tmp_path / "auto" / "cache").exists()


def test_what_is_kept_in_cache_dir_is_used_again(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = branch(trunk, epochs=1, classifier="class_means")
    first = train(config, tmp_path / "alone", device="cpu", show="none")
    config = config.replace(cache_dir=str(tmp_path / "kept"))
    again = train(config, tmp_path / "alone", device="cpu", show="none")
    assert again == first  # a setting of the machine: not again
    kept = train(config, tmp_path / "first", device="cpu", show="none")
    assert kept["loss"] == pytest.approx(first["loss"], rel=1e-2)
    monkeypatch.setattr(run_module, "class_means", None)  # they are read
    train(config.replace(epochs=2), tmp_path / "second", device="cpu", show="none")
    files = [tmp_path / run / "classifier.safetensors" for run in ("second", "alone")]
    assert torch.equal(*(read_safetensors(file)[0]["weight"] for file in files))


# ---- where they go ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "epochs", "shared", "kept"), [
    (1, 2, False, False), (1, 3, False, True), (1, 1, True, True), (9e10, 9, False, False),
    (1.06e12, 10, True, False),
])  # fmt: skip
def test_what_is_kept_pays_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, epochs: int, shared: bool,
    kept: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher, "free_disk", lambda folder: 1e11)
    found, text = pays_and_fits(int(size), epochs, tmp_path, shared)
    assert found == kept
    assert f"{int(size) / 1e6:.1f} MB" in text
    assert ("computed at every step" in text) == (not kept)
    (tmp_path / "complete").touch()  # complete ones take no more room
    assert pays_and_fits(int(size), 9, tmp_path, shared)[0]


@pytest.fixture
def two_megabytes(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own of 2 MB."""
    out = tmp_path / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(out)]
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not root or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs a Linux root")
    yield out
    subprocess.run(["umount", "-l", str(out)], check=True)


def test_features_that_do_not_fit_on_the_disk_are_computed(
    trunk: Path, tmp_path: Path, two_megabytes: Path
) -> None:
    """In processes of their own: a map of a file that the disk cannot hold ends its process."""
    config = branch(trunk, r=28, epochs=1, cache_dir=str(two_megabytes))
    metrics = train_in_subprocess(config, tmp_path / "run", device="cpu")
    said = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"[\d.]+ MB, .*disk.* has room for 1\.0 MB: computed at every step", said)
    off = config.replace(cache_dir="", cache="off")
    plain = train_in_subprocess(off, tmp_path / "off", device="cpu")
    assert metrics["loss"] == plain["loss"]
    assert not list(two_megabytes.rglob("*.bin"))
