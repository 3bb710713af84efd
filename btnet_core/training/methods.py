"""The paper's methods as configurations (Sections 3.4, 4.1, 5); ``changes``: fields of TrainConfig.

``trunk`` is the file of the pretrained phi_mr, ``kappa`` its classifier file, or "class_means"
where it came without.
"""

from __future__ import annotations

from typing import Any

from btnet_core.data.sources import Spec
from btnet_core.training.config import TrainConfig

PYRAMID = (112, 56, 28, 14, 7)  # 112 / 2^i, i = 0..4
MR_VARIANTS: dict[str, dict[str, Any]] = {  # paper-and-code: sizes of phi_mr
    "v1": {"sizes": PYRAMID},
    "v2": {"sizes": PYRAMID, "size_weights": (0.3, 0.25, 0.2, 0.15, 0.1)},
    "v3": {"sizes": tuple(range(4, 113))},
}
BRANCH = {"lr": 0.02, "warmup_epochs": 0.0, "epochs": 10}  # A.2, paper-and-code: branch epochs
TABLE3: dict[str, dict[str, Any]] = {  # what a row of Table 3 lacks of phi_bt
    "scratch": {"init": "", "classifier": "fresh", "fix_classifier": False, "fix_trunk": False,
                "branch_weight": 0.0},
    "pretraining": {"fix_classifier": False, "fix_trunk": False, "branch_weight": 0.0},
    "bct": {"fix_trunk": False, "branch_weight": 0.0},
    "fix_trunk": {"branch_weight": 0.0},
    "distillation": {},
}  # fmt: skip


def phi_hr(data: Spec, **changes: Any) -> TrainConfig:
    """High-resolution baseline: the trunk on faces as they are."""
    return TrainConfig(**{"name": "phi_hr", "data": data, **changes})


def phi_mm(data: Spec, r: int, **changes: Any) -> TrainConfig:
    """One of the independent models: the route of r on faces of r px, from random weights.

    It costs what phi_bt does (4.3.1), and is Table 3's "Scratch" (paper-and-code: phi_mm).
    """
    own = {"name": f"phi_mm_{r}", "data": data, "resolution": r, "fix_trunk": False}
    return TrainConfig(**{**own, **changes})


def phi_mm_scaled_up(data: Spec, r: int, **changes: Any) -> TrainConfig:
    """Another reading of phi_mm: a whole trunk on faces shrunk to r and scaled back up."""
    return TrainConfig(**{"name": f"phi_mm_up_{r}", "data": data, "sizes": (r,), **changes})


def phi_mr(data: Spec, variant: str = "v1", **changes: Any) -> TrainConfig:
    """Multi-resolution baseline and BTNet's trunk: each face shrunk to a random size.

    ``variant``: "v1", "v2" or "v3", see MR_VARIANTS.
    """
    name = "phi_mr" if variant == "v1" else f"phi_mr_{variant}"
    return TrainConfig(**{"name": name, "data": data, **MR_VARIANTS[variant], **changes})


def phi_bt(
    data: Spec, r: int, trunk: str, kappa: str = "class_means", **changes: Any
) -> TrainConfig:
    """BTNet's branch of r: Eq. 3 moves B_r and batch norms; kappa* and T_r's convolutions stay."""
    own = {
        "name": f"phi_bt_{r}", "data": data, "resolution": r, "init": trunk, "branch_weight": 0.5,
    }  # fmt: skip
    bct = {"classifier": kappa, "fix_classifier": True}
    return TrainConfig(**{**own, **bct, **BRANCH, **changes})


def distillation_only(data: Spec, r: int, trunk: str, **changes: Any) -> TrainConfig:
    """phi_bt without labels: the branch learns from the trunk's features alone."""
    return phi_bt(data, r, trunk, **{"name": f"distilled_{r}", "influence_weight": 0.0, **changes})


def full_finetuning(data: Spec, r: int, trunk: str, kappa: str, **changes: Any) -> TrainConfig:
    """Section 3.4's expensive alternative: a whole trunk fine-tuned for r, faces scaled back up."""
    own = {"name": f"full_{r}", "data": data, "sizes": (r,), "init": trunk}
    bct = {"classifier": kappa, "fix_classifier": True}
    return TrainConfig(**{**own, **bct, **BRANCH, **changes})


def finetuned(data: Spec, trunk: str, **changes: Any) -> TrainConfig:
    """All of a trunk fine-tuned on other faces, with a fresh classifier (SurvFace, Section 4.3.2).

    Its branches are phi_bt on the same faces (paper-and-code: SurvFace fine-tuning, fresh head).
    """
    own = {"name": "finetuned", "data": data, "sizes": PYRAMID, "init": trunk, **BRANCH}
    return TrainConfig(**{**own, **changes})


def table3(
    data: Spec, row: str, trunk: str, kappa: str, r: int = 14, **changes: Any
) -> TrainConfig:
    """A row of Table 3 by its name in TABLE3; each adds one thing to the row before.

    "scratch": the route from random weights; "pretraining": from trunk and classifier; "bct": the
    classifier fixed; "fix_trunk": T_r's convolutions fixed; "distillation": with L_branch (phi_bt).
    """
    return phi_bt(data, r, trunk, kappa, **{"name": f"table3_{row}", **TABLE3[row], **changes})


def figure7(
    data: Spec, r: int, couple_at: str, trunk: str, kappa: str, **changes: Any
) -> TrainConfig:
    """Figure 7's allocation: phi_bt whose branch ends at the unit ``couple_at``."""
    own = {"name": f"figure7_{r}_{couple_at}", "couple_at": couple_at}
    return phi_bt(data, r, trunk, kappa, **{**own, **changes})


def authors(config: TrainConfig) -> TrainConfig:
    """The same run with what the authors' code does where it differs from the paper, all at once.

    A third term in Eq. 3 and fewer batch norms that learn, for a branch; fp16 with a scaler
    (paper-and-code: embedding MSE, which batch norms learn, mixed precision). Their optimiser is
    the default. ``resize`` stays: which of their five kernels training has is not settled.
    """
    changes: dict[str, Any] = {"precision": "fp16"}
    if config.branch_weight:
        changes |= {"embedding": "mse", "embedding_weight": 1.0, "embedding_mirrored": False}
    if config.resolution:
        changes |= {"bn": "authors"}
    return config.replace(**changes)
