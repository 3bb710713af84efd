"""Notebook 07's runs: what each row changes, and that what it trained is found again as an embedder."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.evaluation.embedders import (
    BranchEmbedder,
    MultiModelEmbedder,
    UpsamplingEmbedder,
)
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, weights_digest
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.classifier import fresh_weight, save_classifier
from btnet_core.training.loop import train
from btnet_paper import plans, published
from btnet_paper.scales import get_scale

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
        {"init", "classifier", "backbone", "seed"},
        {"fix_classifier"},
        {"fix_trunk"},
        {"branch_weight"},
    ]
    assert rows[-1] is standard
    for row in ("CosFace", "ArcFace"):
        assert changed(plan["table4"][row], standard) == {"loss"}
        assert plan["table4"][row].loss == row.lower()
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


def test_another_trunk_has_the_headline_rows_alone(tmp_path: Path) -> None:
    other, full = get_scale("lfw-ms1m"), get_scale("lfw")
    assert list(plans.plan(other, tmp_path)) == ["phi_mr", "phi_bt_28", "phi_bt_14", "phi_bt_7"]
    names = list(plans.plan(full, tmp_path))
    assert names[:3] == ["phi_mr", "phi_mr_v2", "phi_mr_v3"]
    assert names[3:9] == [f"phi_mm_{kind}{r}" for kind in ("", "hr_") for r in (28, 14, 7)]
    assert names[-3:] == ["phi_bt_28", "phi_bt_14", "phi_bt_7"]
    from_mr = plans.plan(get_scale("lfw-mr"), tmp_path)
    assert list(from_mr) == ["phi_mr", "phi_bt_56", "phi_bt_28", "phi_bt_14", "phi_bt_7"]
    assert from_mr["phi_bt_14"].init == str(tmp_path / "phi_mr" / "trunk.safetensors")
    assert plans.plan(full, tmp_path)["phi_bt_14"].init == str(
        tmp_path / "phi_hr" / "trunk.safetensors"
    )
    with pytest.raises(ConfigError, match="lfw-ms1m"):
        get_scale("lfw-fast")


def test_the_scale_from_scratch_trains_its_own_trunk(tmp_path: Path) -> None:
    plan = plans.plan(get_scale("lfw-scratch"), tmp_path)
    assert list(plan) == [
        "phi_hr",
        "phi_mr",
        "phi_mm_28",
        "phi_mm_14",
        "phi_mm_7",
        "phi_mm_hr_28",
        "phi_mm_hr_14",
        "phi_mm_hr_7",
        "phi_bt_28",
        "phi_bt_14",
        "phi_bt_7",
    ]
    assert plan["phi_hr"].init == ""
    assert plan["phi_mr"].init == str(tmp_path / "phi_hr" / "trunk.safetensors")
    assert plan["phi_bt_14"].init == str(tmp_path / "phi_mr" / "trunk.safetensors")


def test_each_run_is_trained_on_what_its_name_says(tmp_path: Path) -> None:
    for name in ("demo", "lfw", "lfw-mr", "lfw-scratch", "paper"):
        scale = get_scale(name)
        runs = plans.plan(scale, tmp_path, seed=5)
        # phi_mm is independent: neither weights nor classifier start as another network's
        assert {n: run.seed - 5 for n, run in runs.items() if run.seed != 5} == {
            n: run.resolution or run.sizes[0]
            for n, run in runs.items()
            if n.startswith("phi_mm") and not run.init
        }
        own = {kind: page["data"] for kind, page in scale.specialists.items() if "data" in page}
        assert list(own) == (["from_hr"] if name == "demo" else [])  # of half the faces there
        for run in runs.values():
            half = run.name.startswith("phi_mm_hr") and "from_hr" in own
            assert run.data == (own["from_hr"] if half else scale.faces)
        for r in scale.resolutions:
            branch = runs[f"phi_bt_{r}"]
            assert (branch.resolution, branch.fix_classifier, branch.branch_weight) == (
                r,
                True,
                0.5,
            )
            assert branch.epochs == scale.epochs.get(r, scale.branch.get("epochs", 10))
            assert branch.init == str(tmp_path / scale.teacher / "trunk.safetensors")
            kappa = str(tmp_path / scale.teacher / "classifier.safetensors")
            others = scale.pretrained and scale.teacher == "phi_hr"  # came without a classifier
            assert branch.classifier == ("class_means" if others else kappa)
        assert runs["phi_mr"].sizes == (112, 56, 28, 14, 7)
        assert runs["phi_mr"].size_weights == ()


def test_phi_mm_is_the_route_of_r_from_random_weights(tmp_path: Path) -> None:
    for name in ("demo", "lfw", "lfw-scratch", "paper"):
        runs = plans.plan(get_scale(name), tmp_path)
        for r in (28, 14, 7):
            own = runs[f"phi_mm_{r}"]
            assert (own.resolution, own.init, own.classifier) == (r, "", "fresh")
            assert not own.fix_trunk
            assert not own.fix_classifier
            assert own.branch_weight == 0
            assert own.backbone == get_scale(name).backbone
    up = replace(get_scale("paper"), specialists={"scaled_up": {}, "from_hr": {}})
    runs = plans.plan(up, tmp_path)
    for r in (28, 14, 7):
        assert (runs[f"phi_mm_up_{r}"].sizes, runs[f"phi_mm_up_{r}"].resolution) == ((r,), 0)
        assert runs[f"phi_mm_up_{r}"].init == ""
        assert runs[f"phi_mm_hr_{r}"].sizes == (r,)
        assert runs[f"phi_mm_hr_{r}"].init == str(tmp_path / "phi_hr" / "trunk.safetensors")


def test_variants_of_phi_mr(tmp_path: Path) -> None:
    runs = plans.plan(get_scale("paper"), tmp_path)
    assert runs["phi_mr_v2"].sizes == (112, 56, 28, 14, 7)
    assert runs["phi_mr_v2"].size_weights == (0.3, 0.25, 0.2, 0.15, 0.1)
    assert runs["phi_mr_v3"].sizes == tuple(range(4, 113))


def test_each_row_beyond_the_paper_is_one_switch_away(models: Path) -> None:
    rows = plans.ablations(tiny(), models)["beyond"]
    standard = rows.pop("Eq. 3 alone")
    cosine = {"embedding", "embedding_weight"}
    assert {row: changed(config, standard) for row, config in rows.items()} == {
        "+ embedding MSE (the authors' code)": {"embedding_weight"},
        "+ embedding cosine": cosine,
        "+ embedding cosine, both mirror images": cosine | {"embedding_mirrored"},
        "+ embedding cosine, both, moved faces": cosine | {"embedding_mirrored", "shift"},
        "cosine for the feature maps": {"distillation"},
        "no labels (distillation alone)": {"influence_weight"},
        "no labels, + embedding cosine": cosine | {"influence_weight"},
        "no antialiasing": {"resize"},
        "batch norms of T_r fixed": {"bn"},
        "all of the trunk fine-tuned (Section 3.4)": {"resolution", "sizes", "branch_weight"},
    }


def test_every_reading_of_phi_mm_is_loaded(models: Path) -> None:
    quick = {"epochs": 1, "batch": 18, "lr": 0.2, "warmup_epochs": 0.0}
    scale = replace(tiny(), resolutions=(7,), specialists={"native": quick, "from_hr": quick})
    for part in ("trunk", "classifier"):
        given = models / "phi_mr" / f"{part}.safetensors"
        (models / "phi_hr").mkdir(exist_ok=True)
        (models / "phi_hr" / given.name).write_bytes(given.read_bytes())
    for config in plans.specialists(scale, models, seed=0):
        train(config, models / config.name, device="cpu", show="none")
    found = plans.load_methods(models, device="cpu")
    assert list(found) == ["phi_hr", "phi_mm", "phi_mm, from phi_hr", "phi_mr"]
    own, up = found["phi_mm"].single[7], found["phi_mm, from phi_hr"].single[7]
    assert type(own) is BranchEmbedder
    assert type(up) is UpsamplingEmbedder
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    assert torch.equal(found["phi_mm"](pixels, 112), found["phi_hr"](pixels, 112))
    assert torch.equal(found["phi_mm"](pixels, 7), own(pixels, 7))
    assert found["phi_mm"].fingerprint(7) != found["phi_mm, from phi_hr"].fingerprint(7)
    assert found["phi_mm"].covered([(112, 14), (112, 7)]) == [(112, 7)]
    (models / "phi_mm_7" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"phi_mm_7.*not been finished"):
        plans.load_methods(models)


def test_every_run_of_table_1_at_a_tiny_scale(tmp_path: Path) -> None:
    demo = get_scale("demo")
    quick = {"batch": 12, "epochs": 1, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}
    tiny = type(demo)(**{**vars(demo), "faces": FACES, "pairs": (), "backbone": TINY, "hr": quick, "trunk": quick,
                         "specialists": {"native": quick}, "branch": quick})  # fmt: skip
    for name, config in plans.plan(tiny, tmp_path).items():
        metrics = train(config, tmp_path / name, device="cpu", show="none")
        assert 0 < metrics["loss"] < 1e3, name
    found = plans.load_methods(tmp_path, device="cpu")
    assert list(found) == ["phi_hr", "phi_mm", "phi_mr", "phi_bt"]
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for embedder in found.values():
        assert embedder(pixels, 14).shape == (2, 16)
    assert BTNet.load(tmp_path / "phi_bt").resolutions == (7, 14, 28, 112)
    assert weights_digest(BTNet.load(tmp_path / "phi_bt").trunk) == weights_digest(
        load_backbone(tmp_path / "phi_mr" / "trunk.safetensors")
    )


def test_finetuning_on_survface_trains_the_trunk_then_branches_of_it(tmp_path: Path) -> None:
    for name, teacher in (("demo", "phi_mr"), ("lfw", "phi_hr"), ("paper", "phi_mr")):
        scale = get_scale(name)
        runs = list(plans.finetuning(scale, tmp_path, "training", seed=4).values())
        trunk, *branches = runs
        assert [run.name for run in runs] == [teacher, "phi_bt_28", "phi_bt_14", "phi_bt_7"]
        assert {(run.data, run.seed) for run in runs} == {("training", 4)}
        assert trunk.init == str(tmp_path / teacher / "trunk.safetensors")
        assert (trunk.classifier, trunk.fix_classifier, trunk.resolution) == ("fresh", False, 0)
        for branch in branches:
            assert branch.init == str(tmp_path / "survface" / teacher / "trunk.safetensors")
            kappa = tmp_path / "survface" / teacher / "classifier.safetensors"
            assert (branch.classifier, branch.fix_classifier) == (str(kappa), True)
            assert branch.btnet == str(tmp_path / "survface" / "phi_bt")
    theirs = plans.finetuning(get_scale("paper-authors"), tmp_path, "training")
    assert [run.epochs for run in theirs.values()] == [10, 10, 10, 25]
    assert theirs["phi_bt_7"].embedding_weight == 1.0


def test_finetuned_networks_are_trained_and_loaded(models: Path) -> None:
    quick = {"epochs": 1, "batch": 18, "lr": 0.2}
    scale = replace(tiny(), resolutions=(7,), survface_trunk=quick, survface_branch=quick)
    faces = {"kind": "synthetic", "identities": 9, "images": 4, "seed": 0}  # other people
    for config in plans.finetuning(scale, models, faces).values():
        train(config, models / "survface" / config.name, device="cpu", show="none")
    found = plans.load_methods(models / "survface", device="cpu")
    assert list(found) == ["phi_mr", "phi_bt"]
    before = UpsamplingEmbedder(load_backbone(models / "phi_mr" / "trunk.safetensors"))
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    assert not torch.allclose(found["phi_mr"](pixels, 112), before(pixels, 112), atol=1e-3)
    assert torch.allclose(found["phi_mr"](pixels, 112), found["phi_bt"](pixels, 112), atol=1e-3)


def test_the_tables_of_section_5_are_cut_from_what_was_measured() -> None:
    faces = {"kind": "synthetic"}
    one, two = (plans.phi_hr(faces, name=name) for name in ("phi_bt", "other"))
    plan = {"table3": {"a": one}, "table4": {"b": two}, "figure7": {"S1U1": two, "S4U1": one}}
    accuracy = {
        "phi_bt": {"7&7": {"accuracy": 70.0, "std": 3.0}},
        "other": {"7&7": {"accuracy": 60.0, "std": 6.0}},
    }
    trained = {"phi_bt": {"parameters": 2_000_000}, "other": {"parameters": 1_000_000}}
    found = plans.measured(plan, accuracy, trained)
    assert found["table3"] == {"a": {"7&7": 70.0, "params": 2.0}}
    assert found["table4"] == {"b": {"7&7": 60.0}}
    first, second = found["figure7"]
    assert first == {
        "couple_at": "S1U1", "stored": 1_000_000, "standard": False,
        "setting": "7&7", "accuracy": 60.0, "spread": 2.0,
    }  # fmt: skip
    assert (second["couple_at"], second["standard"], second["spread"]) == ("S4U1", True, 1.0)


def test_the_authors_choices_reach_every_run(tmp_path: Path) -> None:
    ours, theirs = (get_scale(name) for name in ("paper", "paper-authors"))
    runs = plans.plan(theirs, tmp_path)
    assert set(runs) == set(plans.plan(ours, tmp_path)) - {"phi_mr_v2", "phi_mr_v3"}
    assert {run.precision for run in runs.values()} == {"fp16"}
    assert (runs["phi_bt_14"].embedding_weight, runs["phi_bt_14"].bn) == (1.0, "authors")
    assert plans.plan(ours, tmp_path)["phi_bt_14"].embedding_weight == 0


def test_trunks_of_the_paper_are_validated_while_they_train(models: Path) -> None:
    runs = plans.plan(get_scale("paper"), models)
    for name in ("phi_hr", "phi_mr", "phi_mr_v2", "phi_mr_v3"):
        assert (runs[name].validation, runs[name].validate_epochs) == (("lfw.bin",), 5)
    demo = plans.plan(get_scale("demo"), models)
    assert demo["phi_hr"].validation == demo["phi_mr"].validation == ()
