"""Notebook 07's runs: what each row changes, and that what it trained is found again as an embedder."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.evaluation.embedders import BranchEmbedder, MultiModelEmbedder
from btnet_core.models.backbone import BackboneConfig, build_backbone, load_backbone, save_backbone
from btnet_core.training.classifier import fresh_weight, save_classifier
from btnet_core.training.loop import train
from btnet_paper import plans, published
from btnet_paper.scales import get_scale, pages

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_backbone(build_backbone(TINY), tmp_path / "phi_mr" / "trunk.safetensors")
    save_classifier(tmp_path / "phi_mr" / "classifier.safetensors", fresh_weight(6, 16, 0))
    return tmp_path


def tiny():
    return replace(get_scale("demo"), faces=FACES, pairs=(), backbone=TINY,
                   ablation={"epochs": 1, "batch": 18, "lr": 0.2})  # fmt: skip


def changed(config, standard) -> set[str]:
    a, b = asdict(config), asdict(standard)
    return {key for key in a if a[key] != b[key]} - {"name"}


def test_rows_are_the_papers_and_each_changes_what_its_name_says(models: Path) -> None:
    plan = plans.ablations(tiny(), models)
    assert list(plan["table3"]) == list(published.table("table3"))
    assert list(plan["table4"]) == list(published.table("table4"))
    rows, standard = list(plan["table3"].values()), plan["table4"]["CurricularFace"]
    steps = [changed(a, b) for a, b in pairwise(rows)]
    assert steps == [
        {"init", "classifier", "backbone"},
        {"fix_classifier"},
        {"fix_trunk"},
        {"branch_weight"},
    ]
    assert rows[-1] is standard
    assert changed(plan["table4"]["ArcFace"], standard) == {"loss"}
    assert {*map(frozenset, (changed(c, standard) for c in plan["figure7"].values()))} == {
        frozenset(),
        frozenset({"couple_at"}),
    }
    assert len({config.name for group in plan.values() for config in group.values()}) == len(
        {config.to_json() for group in plan.values() for config in group.values()}
    )


@pytest.mark.parametrize(("row", "kind"), [
    (("table3", "Scratch"), BranchEmbedder),
    (("table4", "CurricularFace"), BranchEmbedder),
    (("beyond", "all of the trunk fine-tuned (Section 3.4)"), MultiModelEmbedder),
])  # fmt: skip
def test_what_a_run_trained_is_loaded(models: Path, row: tuple[str, str], kind: type) -> None:
    config = plans.ablations(tiny(), models)[row[0]][row[1]]
    train(config, models / "run", device="cpu", show="none")
    embedder = plans.load_run(
        load_backbone(models / "phi_mr" / "trunk.safetensors"), models / "run", device="cpu"
    )
    assert type(embedder) is kind
    if kind is MultiModelEmbedder:  # an unfinished one is named
        (models / "run" / "run.json").unlink()
        with pytest.raises(CheckpointError, match="not been finished"):
            plans.load_run(load_backbone(models / "phi_mr" / "trunk.safetensors"), models / "run")
    assert embedder(torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8), 7).shape == (2, 16)


def test_teacher_features_are_kept_for_other_runs(models: Path) -> None:
    plan = plans.ablations(tiny(), models)["table4"]
    train(plan["CurricularFace"], models / "a", device="cpu", show="none")
    (folder,) = (models / "teacher").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    train(plan["CosFace"], models / "b", device="cpu", show="none")
    assert list((models / "teacher").iterdir()) == [folder]
    assert {
        path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name == "complete"
    } == {"complete": before["complete"]}


def test_the_quick_scale_has_the_headline_rows_alone(tmp_path: Path) -> None:
    quick, full = get_scale("lfw-quick"), get_scale("lfw")
    assert list(plans.plan(quick, tmp_path)) == ["phi_mr", "phi_bt_28", "phi_bt_14", "phi_bt_7"]
    names = list(plans.plan(full, tmp_path))
    assert names[:3] == ["phi_mr", "phi_mr_v2", "phi_mr_v3"]
    assert names[-3:] == ["phi_bt_28", "phi_bt_14", "phi_bt_7"]
    epochs = {name: (plans.plan(quick, tmp_path)[name].epochs, plans.plan(full, tmp_path)[name].epochs)
              for name in ("phi_mr", "phi_bt_14")}  # fmt: skip
    assert all(few < many for few, many in epochs.values())
    from_mr = plans.plan(get_scale("lfw-mr"), tmp_path)
    assert list(from_mr) == ["phi_mr", "phi_bt_56", "phi_bt_28", "phi_bt_14", "phi_bt_7"]
    assert from_mr["phi_bt_14"].init == str(tmp_path / "phi_mr" / "trunk.safetensors")
    assert plans.plan(full, tmp_path)["phi_bt_14"].init == str(
        tmp_path / "phi_hr" / "trunk.safetensors"
    )
    with pytest.raises(ConfigError, match="lfw-quick"):
        get_scale("lfw-fast")
    assert set(pages()) == {"demo", "lfw", "lfw-mr", "lfw-quick", "lfw-scratch", "paper"}


def test_the_scale_from_scratch_trains_its_own_trunk(tmp_path: Path) -> None:
    plan = plans.plan(get_scale("lfw-scratch"), tmp_path)
    assert list(plan) == [
        "phi_hr",
        "phi_mr",
        "phi_mm_28",
        "phi_mm_14",
        "phi_mm_7",
        "phi_bt_28",
        "phi_bt_14",
        "phi_bt_7",
    ]
    assert plan["phi_hr"].init == ""
    assert plan["phi_mr"].init == str(tmp_path / "phi_hr" / "trunk.safetensors")
    assert plan["phi_bt_14"].init == str(tmp_path / "phi_mr" / "trunk.safetensors")
