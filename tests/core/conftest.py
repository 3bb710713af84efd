"""What tests of the core share: a trunk that has been trained for a moment, and one that has not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import btnet_paper  # noqa: F401 (the kind "synthetic")
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.weights import save_backbone
from btnet_core.training import methods
from btnet_core.training.classifier import fresh_weight, save_classifier
from btnet_core.training.loop import train


@pytest.fixture(scope="session")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phi_mr of 6 synthetic people: the folder of its trunk and classifier."""
    out = tmp_path_factory.mktemp("phi_mr")
    faces = {"kind": "synthetic", "identities": 6, "images": 3, "seed": 0}
    tiny = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
    quick = {"batch": 6, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}
    train(methods.phi_mr(faces, backbone=tiny, **quick), out, device="cpu", show="none")
    return out


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files with random weights, for what no training can change: ready at once."""
    out = tmp_path_factory.mktemp("untrained")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
        save_backbone(build_backbone(tiny), out / "trunk.safetensors")
    save_classifier(out / "classifier.safetensors", fresh_weight(6, 16, seed=0))
    return out
