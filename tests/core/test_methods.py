"""The constructors of the paper's methods: what each has that the one before has not."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import Route
from btnet_core.training import methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.run import prepare

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)


def differ(a: TrainConfig, b: TrainConfig) -> dict:
    """Fields of ``a`` that ``b`` has otherwise, but for the name."""
    mine, other = asdict(a), asdict(b)
    return {key: mine[key] for key in mine if mine[key] != other[key] and key != "name"}


def test_trunks() -> None:
    hr = methods.phi_hr(FACES)
    assert differ(methods.phi_mr(FACES), hr) == {"sizes": (112, 56, 28, 14, 7)}
    assert differ(methods.phi_mm_scaled_up(FACES, 14), hr) == {"sizes": (14,)}
    assert methods.phi_mr(FACES, "v3").sizes == tuple(range(4, 113))


@pytest.mark.parametrize("r", [28, 14, 7])
def test_phi_mm_is_a_network_for_faces_of_r(tmp_path: Path, r: int) -> None:
    config = methods.phi_mm(FACES, r, backbone=TINY, batch=12)
    assert differ(config, methods.phi_hr(FACES, backbone=TINY, batch=12)) == {
        "resolution": r,
        "fix_trunk": False,
    }
    run = prepare(config, tmp_path, torch.device("cpu"))
    assert isinstance(run.network, Route)
    assert run.network.size == (r, r)
    assert run.kappa.weight.requires_grad  # a classifier of its own
    frozen = [n for n, p in run.network.named_parameters() if not p.requires_grad]
    assert frozen == ["head.features.weight"]  # fixed at 1 by the architecture


def test_branches() -> None:
    bt = methods.phi_bt(FACES, 14, "t", "k")
    assert differ(bt, methods.phi_hr(FACES)) == {
        "resolution": 14, "init": "t", "branch_weight": 0.5, "classifier": "k",
        "fix_classifier": True, "lr": 0.02, "warmup_epochs": 0.0, "epochs": 10,
    }  # fmt: skip
    assert differ(methods.distillation_only(FACES, 14, "t"), bt) == {
        "influence_weight": 0.0,
        "classifier": "class_means",
    }
    assert differ(methods.figure7(FACES, 14, "S4U1", "t", "k"), bt) == {"couple_at": "S4U1"}
    assert differ(methods.full_finetuning(FACES, 14, "t", "k"), bt) == {
        "resolution": 0,
        "sizes": (14,),
        "branch_weight": 0.0,
    }
    assert methods.phi_bt(FACES, 14, "t", epochs=3).epochs == 3


def test_rows_of_table_3_add_one_thing_each() -> None:
    rows = [methods.table3(FACES, row, "t", "k") for row in methods.TABLE3]
    added = [differ(b, a) for a, b in pairwise(rows)]
    assert added == [
        {"init": "t", "classifier": "k"},
        {"fix_classifier": True},
        {"fix_trunk": True},
        {"branch_weight": 0.5},
    ]
    assert differ(rows[-1], methods.phi_bt(FACES, 14, "t", "k")) == {}


def test_the_authors_choices_at_once() -> None:
    for config, expected in (
        (methods.phi_mr(FACES), {"precision": "fp16"}),
        (methods.phi_bt(FACES, 14, "t", "k"),
         {"precision": "fp16", "bn": "authors", "embedding_weight": 1.0}),
        (methods.phi_mm(FACES, 14), {"precision": "fp16", "bn": "authors"}),
        (methods.phi_bt(FACES, 14, "t", "k", embedding="cosine", embedding_weight=60.0),
         {"precision": "fp16", "bn": "authors", "embedding": "mse", "embedding_weight": 1.0}),
    ):  # fmt: skip
        assert differ(methods.authors(config), config) == expected
