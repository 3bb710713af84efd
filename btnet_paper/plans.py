"""The runs of Table 1 and of Section 5 at a scale, and how what they learned is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btnet_core.data.sources import Spec
from btnet_core.errors import CheckpointError
from btnet_core.evaluation.embedders import (
    BranchEmbedder,
    Embedder,
    MultiModelEmbedder,
    UpsamplingEmbedder,
)
from btnet_core.files import read_safetensors
from btnet_core.images import Resize
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, Route, coupling_layer
from btnet_core.models.weights import load_backbone, load_strictly
from btnet_core.training import checkpoint
from btnet_core.training.config import TrainConfig
from btnet_core.training.methods import (
    authors,
    figure7,
    finetuned,
    full_finetuning,
    phi_bt,
    phi_hr,
    phi_mm,
    phi_mm_scaled_up,
    phi_mr,
    table3,
)
from btnet_paper.scales import SPECIALISTS, Scale

SPECIALIST_BELOW = 56  # rows in pixels: the paper's phi_mm has models for 28, 14 and 7
CACHED_BELOW = 56  # rows in pixels: the teacher's maps of larger branches are gigabytes
# of 1 - cosine to the teacher's embedding, times lambda_branch; chosen at the scale lfw
EMBEDDING_WEIGHT = 60.0
COSINE = {"embedding": "cosine", "embedding_weight": EMBEDDING_WEIGHT}
SWITCHES: dict[str, dict[str, Any]] = {  # one each away from phi_bt
    "+ embedding MSE (the authors' code)": {"name": "embedding_mse", "embedding_weight": 1.0},
    "+ embedding cosine": {"name": "embedding_cosine", **COSINE},
    "+ embedding cosine, both mirror images": {
        "name": "embedding_both",
        "embedding_mirrored": True,
        **COSINE,
    },
    "+ embedding cosine, both, moved faces": {
        "name": "embedding_moved",
        "embedding_mirrored": True,
        "shift": 4.0,  # px of 112
        **COSINE,
    },
    "cosine for the feature maps": {"name": "cosine_maps", "distillation": "cosine"},
    "no labels (distillation alone)": {"name": "no_labels", "influence_weight": 0.0},
    "no labels, + embedding cosine": {
        "name": "no_labels_cosine",
        "influence_weight": 0.0,
        **COSINE,
    },
    "no antialiasing": {"name": "no_antialias", "resize": Resize(antialias=False)},
    "batch norms of T_r fixed": {"name": "frozen_bn", "bn": "frozen_bn"},
}
STEPS = {  # Table 3's rows but the last, which is phi_bt
    "Scratch": "scratch",
    "Pretraining": "pretraining",
    "Pretraining + BCT": "bct",
    "Pretraining + BCT + Fix Trunk": "fix_trunk",
}
Runs = dict[str, TrainConfig]  # by name, which is the folder that a run is trained in


# ---- Table 1 ----


def plan(scale: Scale, models: Path, *, seed: int = 0) -> Runs:
    """Returns every run of Table 1 at a scale, in the order in which they need each other.

    The folders are under ``models``. phi_hr is not among them where others trained it
    (``scale.pretrained``): it is expected in ``models/phi_hr``.
    """
    runs = [*trunks(scale, models, seed), *specialists(scale, models, seed)]
    runs += branches(scale, models, seed)
    return _named(runs, scale)


def _named(runs: list[TrainConfig], scale: Scale) -> Runs:
    """Returns runs by name, with the authors' choices where the page asks for them."""
    return {run.name: authors(run) if scale.authors else run for run in runs}


def trunks(scale: Scale, models: Path, seed: int) -> list[TrainConfig]:
    """Returns phi_hr, unless others trained it, and the variants of phi_mr; each is validated on
    the first pair set where a page says how often (``validate_epochs``)."""
    random = {"backbone": scale.backbone, "seed": seed}
    start = _from_hr(scale, models, seed) if scale.from_hr else random
    runs = [] if scale.pretrained else [phi_hr(scale.faces, **random, **scale.hr)]
    runs += [phi_mr(scale.faces, v, **start, **scale.trunk) for v in scale.variants]
    return [r.replace(validation=scale.pairs[:1]) if r.validate_epochs else r for r in runs]


def specialists(scale: Scale, models: Path, seed: int) -> list[TrainConfig]:
    """Returns phi_mm, a network for each resolution, in the readings that the scale lists.

    Independent means weights and classifier drawn anew: with phi_hr's seed they would start from
    the same ones, and embeddings of two such networks agree far above chance (67.5 % instead of
    54.5 % at 112&28, scale demo).
    """
    runs = []
    for kind, changes in scale.specialists.items():
        method = phi_mm if kind == "native" else phi_mm_scaled_up
        for r in [r for r in scale.resolutions if r < SPECIALIST_BELOW]:
            start = {"backbone": scale.backbone, "seed": seed + r}
            if kind == "from_hr":
                start = _from_hr(scale, models, seed)
            own = {"data": scale.faces, **start, **changes, "name": f"{SPECIALISTS[kind][1]}{r}"}
            runs.append(method(own.pop("data"), r, **own))
    return runs


def branches(scale: Scale, models: Path, seed: int) -> list[TrainConfig]:
    """Returns phi_bt: a branch for each resolution, all of one BTNet."""
    trunk, kappa = kept(scale, models, scale.teacher)
    common = {"btnet": str(models / "phi_bt"), "seed": seed, "validation": scale.pairs}
    runs = []
    for r in scale.resolutions:
        changes = {**common, **scale.branch}
        if scale.pretrained and r < CACHED_BELOW:
            changes["cache_dir"] = str(models / "teacher")
        if r in scale.epochs:
            changes["epochs"] = scale.epochs[r]
        runs.append(phi_bt(scale.faces, r, trunk, kappa, **changes))
    return runs


def kept(scale: Scale, models: Path, name: str) -> tuple[str, str]:
    """Returns the files of a trained trunk and of its classifier.

    A phi_hr that others trained came without: its classifier is "class_means".
    """
    trunk, kappa = (str(models / name / f"{part}.safetensors") for part in ("trunk", "classifier"))
    return trunk, "class_means" if scale.pretrained and name == "phi_hr" else kappa


def _from_hr(scale: Scale, models: Path, seed: int) -> dict[str, Any]:
    """Returns the fields of a run that starts from phi_hr and its classifier."""
    trunk, kappa = kept(scale, models, "phi_hr")
    cache = str(models / "teacher") if scale.pretrained else ""
    return {"init": trunk, "classifier": kappa, "cache_dir": cache, "seed": seed}


def finetuning(scale: Scale, models: Path, data: Spec, *, seed: int = 0) -> Runs:
    """Returns the runs of Table 2 with fine-tuning on SurvFace's training part ``data``.

    First the trunk under the branches, with a fresh classifier, then a branch for each resolution;
    the folders are under ``models/survface``, where `load_methods` finds them.
    """
    folder = models / "survface"
    start, _ = kept(scale, models, scale.teacher)
    trunk, kappa = (
        str(folder / scale.teacher / f"{part}.safetensors") for part in ("trunk", "classifier")
    )
    own = {"name": scale.teacher, "seed": seed, **scale.survface_trunk}
    runs = [finetuned(data, start, **own)]
    for r in scale.resolutions:
        changes = {"btnet": str(folder / "phi_bt"), "seed": seed, **scale.survface_branch}
        if r in scale.survface_epochs:
            changes["epochs"] = scale.survface_epochs[r]
        runs.append(phi_bt(data, r, trunk, kappa, **changes))
    return _named(runs, scale)


# ---- Section 5 ----


def ablations(
    scale: Scale, models: Path, *, seed: int = 0, network: Backbone | None = None
) -> dict[str, Runs]:
    """Returns the runs of Section 5 at ``scale.ablated`` px, by table and row.

    "beyond" is what the paper leaves open; rows of "figure7" are units. Equal configurations share
    a run (its ``name``), all the teacher's features. ``network`` is phi_bt's trunk, else loaded.
    """
    trunk, kappa = kept(scale, models, scale.teacher)
    network, r = network or load_backbone(trunk), scale.ablated
    changes = {"seed": seed, "cache_dir": str(models / "teacher"), **scale.ablation}
    data = changes.pop("data", scale.faces)

    def bt(**switch: Any) -> TrainConfig:
        return phi_bt(data, r, trunk, kappa, **{**changes, **switch})

    own = {"scratch": {"backbone": network.config, "seed": seed + r}}
    steps = {
        row: table3(data, name, trunk, kappa, r, **{**changes, **own.get(name, {})})
        for row, name in STEPS.items()
    }
    standard = bt(name="phi_bt")
    whole = full_finetuning(data, r, trunk, kappa, **changes)
    return {
        "table3": {**steps, "Pretraining + BCT + Fix Trunk + Branch Distillation": standard},
        "table4": {
            "CosFace": bt(name="cosface", loss="cosface"),
            "ArcFace": bt(name="arcface", loss="arcface"),
            "CurricularFace": standard,
        },
        "figure7": {
            unit: standard if usual else figure7(data, r, unit, trunk, kappa, **changes)
            for unit, usual in allocations(network, r).items()
        },
        "beyond": {
            "Eq. 3 alone": standard,
            **{row: bt(**switch) for row, switch in SWITCHES.items()},
            "all of the trunk fine-tuned (Section 3.4)": whole,
        },
    }


def allocations(network: Backbone, r: int) -> dict[str, bool]:
    """Returns Figure 7's units at which a branch of r ends, and which of them is BTNet's own."""
    names = [name for name, _ in network.units()]
    end = names.index(coupling_layer(network, r))
    places = (0, end // 2, end, (end + len(names)) // 2, len(names) - 1)
    return {names[i]: i == end for i in places}


def measured(
    plan: dict[str, Runs], accuracy: Mapping[str, Any], trained: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns Tables 3 and 4 and the points of Figure 7, as notebook 07 records them.

    ``accuracy`` (``verification.summarise``) and ``trained`` (metrics) are by name of a run.
    """
    found: dict[str, Any] = {"table3": {}, "table4": {}, "figure7": []}
    for table in ("table3", "table4"):
        for row, config in plan[table].items():
            cells = accuracy[config.name].items()
            found[table][row] = {setting: cell["accuracy"] for setting, cell in cells}
    for row, config in plan["table3"].items():
        found["table3"][row]["params"] = trained[config.name]["parameters"] / 1e6
    for unit, config in plan["figure7"].items():
        facts = {"couple_at": unit, "stored": trained[config.name]["parameters"]}
        facts["standard"] = config.name == "phi_bt"
        for setting, cell in accuracy[config.name].items():
            point = {"setting": setting, "accuracy": cell["accuracy"], "spread": cell["std"] / 3}
            found["figure7"].append({**facts, **point})  # spread: standard error of ten folds
    return found


# ---- what was trained ----


def load_methods(models: Path | str, **options: Any) -> dict[str, Embedder]:
    """Returns the trained methods found under ``models``, by row of Table 1.

    phi_mm's network for 112 px is phi_hr, as in the paper. ``options`` are those of Embedder.
    """
    models = Path(models)
    trunks = {path.parent.name: path for path in sorted(models.glob("phi_*/trunk.safetensors"))}
    found: dict[str, Embedder] = {}
    if "phi_hr" in trunks:
        hr = load_backbone(trunks["phi_hr"])
        found["phi_hr"] = UpsamplingEmbedder(hr, **options)
        for row, prefix in SPECIALISTS.values():
            if single := _load_specialists(models, prefix, **options):
                found[row] = MultiModelEmbedder({hr.config.size[0]: found["phi_hr"], **single})
    for name in ("phi_mr", "phi_mr_v2", "phi_mr_v3"):
        if name in trunks:
            found[name] = UpsamplingEmbedder(load_backbone(trunks[name]), **options)
    for name in sorted(name for name in trunks if name.startswith("phi_bt")):
        found[name] = BranchEmbedder(BTNet.load(models / name), **options)
    return found


def _load_specialists(models: Path, prefix: str, **options: Any) -> dict[int, Embedder]:
    """Returns one reading of phi_mm, by resolution: routes of their own, or whole trunks."""
    single: dict[int, Embedder] = {}
    for folder in sorted(models.glob(f"{prefix}*")):
        r = folder.name.removeprefix(prefix)
        if not r.isdecimal():
            continue
        if (folder / "route.safetensors").is_file():
            single[int(r)] = BranchEmbedder(load_own_route(folder), **options)
        elif (folder / "trunk.safetensors").is_file():
            backbone = load_backbone(folder / "trunk.safetensors")
            single[int(r)] = UpsamplingEmbedder(backbone, **options)
    return single


def load_own_route(folder: Path) -> BTNet:
    """Returns the route that a run trained from random weights, in a BTNet of nothing else.

    Raises:
        CheckpointError: missing, damaged or unfinished.
    """
    record = checkpoint.read_record(folder)
    if record is None:
        raise CheckpointError(f"{folder}: its training has not been finished")
    config = BackboneConfig(**record["config"]["backbone"])
    return load_route(build_backbone(config), folder / "route.safetensors")


def load_route(trunk: Backbone, path: Path | str) -> BTNet:
    """Returns a BTNet of ``trunk`` with a route that has all weights of its own.

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
    """Returns what a run of ``ablations`` has learned, as an embedder of its resolution.

    Raises:
        CheckpointError: missing, damaged or unfinished.
    """
    if (folder / "route.safetensors").is_file():
        return BranchEmbedder(load_route(trunk, folder / "route.safetensors"), **options)
    if not (folder / "trunk.safetensors").is_file():
        return BranchEmbedder(BTNet.load(folder / "btnet"), **options)
    record = checkpoint.read_record(folder)
    if record is None:
        raise CheckpointError(f"{folder}: its training has not been finished")
    own = load_backbone(folder / "trunk.safetensors")
    return MultiModelEmbedder(
        {
            trunk.config.size[0]: UpsamplingEmbedder(trunk, **options),
            record["config"]["sizes"][0]: UpsamplingEmbedder(own, **options),
        }
    )
