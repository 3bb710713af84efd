"""What takes part in a run: only what is listed learns; what lacks is found before the first step."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BTNet
from btnet_core.models.weights import load_backbone
from btnet_core.training import methods, run
from btnet_core.training.batches import open_pixels
from btnet_core.training.classifier import load_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train
from btnet_core.training.run import class_means, prepare
from btnet_paper.synthetic_faces import SyntheticFaces

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


@pytest.fixture
def trunk(untrained: Path) -> Path:
    return untrained


def branch(trunk: Path, r: int = 14, **changes) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    return methods.phi_bt(FACES, r, *files, **{**QUICK, **changes})


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


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "cosface"}, {"loss": "arcface"}, {"loss": "adaface"}, {"loss": "sphereface"},
        {"loss": "normface"}, {"loss": "triplet", "per_identity": 2}, {"loss": "center"},
        {"loss": "circle", "per_identity": 2}, {"distillation": "cosine"}, {"distillation": "batch_sum", "lr": 0.01},
        {"couple_at": "S4U1"}, {"couple_at": "S2U1"}, {"classifier": "class_means"}, {"influence_weight": 0.0},
        {"sample_rate": 0.5}, {"accumulate": 3},
    ],
    ids=str,
)  # fmt: skip
def test_every_switch_runs(trunk: Path, tmp_path: Path, change: dict) -> None:
    metrics = train(branch(trunk, **{"epochs": 1, **change}), tmp_path, device="cpu", show="none")
    assert np.isfinite(metrics["loss"])
    assert BTNet.load(tmp_path / "btnet").resolutions == (14, 112)


def test_a_wrong_label_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_class_means_are_of_the_trunks_unit_embeddings(trunk: Path) -> None:
    backbone, pixels = load_backbone(trunk / "trunk.safetensors"), open_pixels(FACES, 1)
    found = class_means(backbone.train(), pixels, torch.device("cpu"), "fp32")
    assert backbone.training
    with torch.no_grad():
        z = backbone.eval()(backbone.preprocess(pixels.get(torch.arange(36))))
    unit = z / z.norm(dim=1, keepdim=True)
    for label in range(6):
        mean = unit[pixels.faces.labels == label].mean(0)
        torch.testing.assert_close(found[label], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_identities_without_images_are_told(trunk: Path, tmp_path: Path) -> None:
    run = prepare(branch(trunk), tmp_path, torch.device("cpu"))
    faces, labels = run.pixels.faces, run.pixels.faces.labels
    assert "no image" not in run.describe()
    try:
        faces.labels = torch.where(labels == 5, 0, labels)
        assert "(1 identities have no image)" in run.describe()
    finally:
        faces.labels = labels  # they stay open for the next test


@pytest.mark.parametrize(("changes", "error", "told"), [
    ({"validation": ("nowhere.bin",)}, (DataError, ConfigError), "nowhere.bin"),
    ({"data": "nowhere"}, DataError, "nowhere"),
    ({"init": "nowhere.safetensors"}, CheckpointError, "nowhere"),
    ({"classifier": "nowhere.safetensors"}, CheckpointError, "nowhere"),
    ({"sync_bn": True}, ConfigError, "sync_bn.*GPUs"),
    ({"backbone": BackboneConfig()}, ConfigError, "backbone: got"),
])  # fmt: skip
def test_what_lacks_is_found_before_the_first_step(
    trunk: Path, tmp_path: Path, changes: dict, error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        train(branch(trunk).replace(**changes), tmp_path, device="cpu", show="none")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("same", "told"),
    [
        ([], "0 pairs of one person and 0 of two"),
        ([True] * 8 + [False], "8 pairs of one person and 1 of two; .* 10 pairs or more"),
        ([True] * 20, "20 pairs of one person and 0 of two"),
        ([False] * 20, "0 pairs of one person and 20 of two"),
    ],
)
def test_a_comparison_without_an_answer_is_found_before_the_first_step(
    same: list[bool], told: str, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = SimpleNamespace(name="nobody.bin", same=torch.tensor(same))
    monkeypatch.setattr(run, "open_pairs", lambda spec: pairs)
    with pytest.raises(DataError, match=rf"nobody\.bin: {told}"):
        prepare(branch(trunk, validation=("x",)), tmp_path, torch.device("cpu"))
