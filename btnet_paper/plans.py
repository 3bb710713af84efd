"""The runs of Table 1 and of Section 5 at a scale, and how what they learned is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from btnet_core.errors import CheckpointError
from btnet_core.evaluation.embedders import BranchEmbedder, Embedder, MultiModelEmbedder
from btnet_core.files import read_safetensors
from btnet_core.images import Resize
from btnet_core.models.backbone import Backbone, load_backbone, load_strictly
from btnet_core.models.btnet import BTNet, Route, coupling_layer
from btnet_core.training import checkpoint
from btnet_core.training.config import TrainConfig
from btnet_core.training.methods import (
    figure7,
    full_finetuning,
    phi_bt,
    phi_hr,
    phi_mm,
    phi_mr,
    table3,
)
from btnet_paper.scales import Scale

EMBEDDING_WEIGHT = (
    60.0  # of 1 - cosine to the teacher's embedding, times lambda_branch; chosen at the scale lfw
)


def load_route(trunk: Backbone, path: Path | str) -> BTNet:
    """A BTNet of ``trunk`` with a route that has all weights of its own (``route.safetensors``, Table 3's upper rows).

    Raises:
        CheckpointError: the file holds no route, or one that does not fit.
    """
    state, facts = read_safetensors(path)
    if "couple_at" not in facts:
        raise CheckpointError(f"{path}: holds no route")
    btnet, r = BTNet(trunk, ()), int(facts["r"])
    btnet.routes[str(r)] = Route(copy.deepcopy(trunk), r, couple_at=facts["couple_at"])
    load_strictly(btnet.route(r), state, str(path))
    return btnet


def load_run(trunk: Backbone, folder: Path, **options: Any) -> Embedder:
    """What a run of ``ablations`` has learned, as an embedder of its resolution; ``options`` are those of Embedder.

    Raises:
        CheckpointError: missing, damaged or unfinished.
    """
    if (folder / "route.safetensors").is_file():
        return BranchEmbedder(load_route(trunk, folder / "route.safetensors"), **options)
    if (
        folder / "trunk.safetensors"
    ).is_file():  # fine-tuned for r; larger faces keep the trunk it came from
        record = checkpoint.read_record(folder)
        if record is None:
            raise CheckpointError(f"{folder}: its training has not been finished")
        own = load_backbone(folder / "trunk.safetensors")
        return MultiModelEmbedder(
            {trunk.config.size[0]: trunk, record["config"]["sizes"][0]: own}, **options
        )
    return BranchEmbedder(BTNet.load(folder / "btnet"), **options)


def plan(scale: Scale, models: Path, *, seed: int = 0) -> dict[str, TrainConfig]:
    """Every run of Table 1 at a scale, in order, by the folder under ``models`` that it is trained in.

    With ``scale.from_hr`` phi_mr and phi_mm start from phi_hr; where others trained that (``scale.pretrained``, then
    in ``models/phi_hr``), their classifier starts from class means.
    """
    fresh: dict[str, Any] = {"backbone": scale.backbone, "seed": seed}
    start = fresh
    if scale.from_hr:
        trunk, kappa = (
            str(models / "phi_hr" / f"{part}.safetensors") for part in ("trunk", "classifier")
        )
        start = {
            "backbone": None,
            "init": trunk,
            "classifier": "class_means" if scale.pretrained else kappa,
            "cache_dir": str(models / "teacher") if scale.pretrained else "",
            "seed": seed,
        }
    runs = [] if scale.pretrained else [phi_hr(scale.faces, **fresh, **scale.hr)]
    runs += [phi_mr(scale.faces, variant, **start, **scale.trunk) for variant in scale.variants]
    if scale.specialists:
        runs += [
            phi_mm(scale.faces, r, **start, **scale.specialist) for r in scale.resolutions if r < 56
        ]
    trunk, kappa = kept(scale, models, scale.teacher)
    for r in scale.resolutions:
        changes: dict[str, Any] = {
            "btnet": str(models / "phi_bt"),
            "seed": seed,
            "validation": scale.pairs,
        }
        changes |= scale.branch
        if scale.pretrained and r < 56:  # gigabytes at 56
            changes["cache_dir"] = str(models / "teacher")
        if r in scale.epochs:
            changes["epochs"] = scale.epochs[r]
        runs.append(phi_bt(scale.faces, r, trunk, kappa, **changes))
    return {run.name: run for run in runs}


def kept(scale: Scale, models: Path, name: str) -> tuple[str, str]:
    """Files of a trained trunk and its classifier; "class_means" for a phi_hr that others trained."""
    trunk, kappa = (str(models / name / f"{part}.safetensors") for part in ("trunk", "classifier"))
    return trunk, "class_means" if scale.pretrained and name == "phi_hr" else kappa


def ablations(scale: Scale, models: Path, *, seed: int = 0) -> dict[str, dict[str, TrainConfig]]:
    """The runs of Section 5 at resolution ``scale.ablated``, by table and row; the paper's names for its rows.

    "table3", "table4", "figure7" (rows are units) and "beyond": what the paper leaves open, each one switch away from
    phi_bt. Rows of the same configuration share a run (its ``name``). All start from phi_bt's trunk, which must be
    there, and share the teacher's features.
    """
    trunk, kappa = kept(scale, models, scale.teacher)
    network, r = load_backbone(trunk), scale.ablated
    changes: dict[str, Any] = {"seed": seed, "cache_dir": str(models / "teacher"), **scale.ablation}
    data = changes.pop("data", scale.faces)

    def bt(name: str, **switch: Any) -> TrainConfig:
        return phi_bt(data, r, trunk, kappa, **{"name": name, **changes, **switch})

    cosine = {"embedding": "cosine", "embedding_weight": EMBEDDING_WEIGHT}
    both = {**cosine, "embedding_mirrored": True}
    names = [name for name, _ in network.units()]
    ends = names.index(coupling_layer(network, r))
    allocations = dict.fromkeys(
        names[i] for i in (0, ends // 2, ends, (ends + len(names)) // 2, len(names) - 1)
    )
    steps = {"Scratch": "scratch", "Pretraining": "pretraining", "Pretraining + BCT": "bct",
             "Pretraining + BCT + Fix Trunk": "fix_trunk",
             "Pretraining + BCT + Fix Trunk + Branch Distillation": "distillation"}  # fmt: skip
    standard = table3(data, "distillation", trunk, kappa, r, **{**changes, "name": "phi_bt"})
    return {
        "table3": {
            row: table3(data, step, trunk, kappa, r, **changes, **({"backbone": network.config} if step == "scratch" else {}))
            for row, step in steps.items()
            if step != "distillation"
        }
        | {list(steps)[-1]: standard},
        "table4": {"CosFace": bt("cosface", loss="cosface"), "ArcFace": bt("arcface", loss="arcface"),
                   "CurricularFace": standard},
        "figure7": {
            unit: standard if unit == names[ends] else figure7(data, r, unit, trunk, kappa, **changes)
            for unit in allocations
        },
        "beyond": {
            "Eq. 3 alone": standard,
            "+ embedding MSE (the authors' code)": bt("embedding_mse", embedding_weight=1.0),
            "+ embedding cosine": bt("embedding_cosine", **cosine),
            "+ embedding cosine, both mirror images": bt("embedding_both", **both),
            "+ embedding cosine, both, moved faces": bt("embedding_moved", shift=4.0, **both),
            "cosine for the feature maps": bt("cosine_maps", distillation="cosine"),
            "no labels (distillation alone)": bt("no_labels", influence_weight=0.0),
            "no labels, + embedding cosine": bt("no_labels_cosine", influence_weight=0.0, **cosine),
            "no antialiasing": bt("no_antialias", resize=Resize(antialias=False)),
            "batch norms of T_r fixed": bt("frozen_bn", bn="frozen_bn"),
            "all of the trunk fine-tuned (Section 3.4)": full_finetuning(data, r, trunk, kappa, **changes),
        },
    }  # fmt: skip
