"""The paper's methods as configurations (Sections 3.4, 4.1, 5). Every one takes ``**changes`` to any field of TrainConfig.

``trunk`` is the file of the pretrained phi_mr, ``kappa`` its classifier file, or "class_means" where it came without.
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
    """Multi-resolution baseline and BTNet's trunk: each face shrunk to a random size; "v1", "v2" or "v3"."""
    name = "phi_mr" if variant == "v1" else f"phi_mr_{variant}"
    return TrainConfig(**{"name": name, "data": data, **MR_VARIANTS[variant], **changes})


def phi_bt(
    data: Spec, r: int, trunk: str, kappa: str = "class_means", **changes: Any
) -> TrainConfig:
    """BTNet's branch r: branch and batch norms learn from Eq. 3 with kappa* fixed and T_r's convolutions fixed."""
    values = {"name": f"phi_bt_{r}", "data": data, "resolution": r, "init": trunk, "classifier": kappa,
              "fix_classifier": True, "branch_weight": 0.5, **BRANCH}  # fmt: skip
    return TrainConfig(**{**values, **changes})


def distillation_only(data: Spec, r: int, trunk: str, **changes: Any) -> TrainConfig:
    """phi_bt without labels: the branch learns from the trunk's features alone."""
    return phi_bt(data, r, trunk, **{"name": f"distilled_{r}", "influence_weight": 0.0, **changes})


def full_finetuning(data: Spec, r: int, trunk: str, kappa: str, **changes: Any) -> TrainConfig:
    """Section 3.4's expensive alternative: all the trunk's weights fine-tuned for r, on faces scaled back up."""
    values = {"name": f"full_{r}", "data": data, "sizes": (r,), "init": trunk, "classifier": kappa,
              "fix_classifier": True, **BRANCH}  # fmt: skip
    return TrainConfig(**{**values, **changes})


def finetuned(data: Spec, trunk: str, **changes: Any) -> TrainConfig:
    """All of a trunk fine-tuned on other faces, with a fresh classifier (SurvFace, Section 4.3.2).

    Its branches are phi_bt on the same faces (paper-and-code: SurvFace fine-tuning, fresh head).
    """
    own = {"name": "finetuned", "data": data, "sizes": PYRAMID, "init": trunk, **BRANCH}
    return TrainConfig(**{**own, **changes})


def table3(
    data: Spec, row: str, trunk: str, kappa: str, r: int = 14, **changes: Any
) -> TrainConfig:
    """A row of Table 3 by its name: each adds one thing to the row before.

    "scratch": the route from random weights; "pretraining": from trunk and classifier; "bct": the classifier fixed;
    "fix_trunk": T_r's convolutions fixed; "distillation": with L_branch, which is phi_bt.
    """
    steps: dict[str, dict[str, Any]] = {
        "scratch": {
            "init": "",
            "classifier": "fresh",
            "fix_classifier": False,
            "fix_trunk": False,
            "branch_weight": 0.0,
        },
        "pretraining": {"fix_classifier": False, "fix_trunk": False, "branch_weight": 0.0},
        "bct": {"fix_trunk": False, "branch_weight": 0.0},
        "fix_trunk": {"branch_weight": 0.0},
        "distillation": {},
    }
    return phi_bt(data, r, trunk, kappa, **{"name": f"table3_{row}", **steps[row], **changes})


def figure7(
    data: Spec, r: int, couple_at: str, trunk: str, kappa: str, **changes: Any
) -> TrainConfig:
    """Figure 7's allocation: phi_bt whose branch ends at the unit ``couple_at``."""
    return phi_bt(
        data,
        r,
        trunk,
        kappa,
        **{"name": f"figure7_{r}_{couple_at}", "couple_at": couple_at, **changes},
    )
