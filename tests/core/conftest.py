"""What tests of the core share: a trunk that has been trained for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

import btnet_paper  # noqa: F401 (the kind "synthetic")
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import methods
from btnet_core.training.loop import train


@pytest.fixture(scope="session")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phi_mr of 6 synthetic people: the folder of its trunk and classifier."""
    out = tmp_path_factory.mktemp("phi_mr")
    faces = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
    tiny = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
    quick = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}
    train(methods.phi_mr(faces, backbone=tiny, **quick), out, device="cpu", show="none")
    return out
