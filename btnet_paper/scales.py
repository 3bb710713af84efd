"""The three scales at which the same notebooks run: demo, lfw, paper. Every result names the one that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from btnet_core.errors import ConfigError
from btnet_core.models.backbone import BackboneConfig

SIX_SETS = ("lfw.bin", "cfp_ff.bin", "cfp_fp.bin", "agedb_30.bin", "calfw.bin", "cplfw.bin")
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale trains, on what, and how its numbers may be read. Specs are those of datasets.open_faces/pairs."""

    name: str
    claim: str  # one sentence shown beside every number
    faces: str  # training faces
    pairs: tuple[str, ...]  # verification sets; accuracies are their mean
    others: str  # identity-labelled faces of people outside `faces`: stand-ins for galleries and templates
    backbone: BackboneConfig  # of the trunk that is trained here
    pretrained: str = ""  # phi_hr trained by others; "" trains it here
    resolutions: tuple[int, ...] = (28, 14, 7)  # of the branches, rows in pixels
    pictures: bool = False  # whether its faces may be shown in committed figures
    from_hr: bool = (
        False  # Deviation where True: phi_mr and phi_mm start from phi_hr, not from random weights
    )
    hr: Mapping[str, Any] = field(default_factory=lambda: NOTHING)  # TrainConfig fields for phi_hr
    trunk: Mapping[str, Any] = field(default_factory=lambda: NOTHING)  # for phi_mr
    specialists: bool = True  # train phi_mm
    specialist: Mapping[str, Any] = field(default_factory=lambda: NOTHING)  # for each phi_mm
    branch: Mapping[str, Any] = field(default_factory=lambda: NOTHING)  # for each branch of phi_bt
    epochs: Mapping[int, int] = field(
        default_factory=lambda: MappingProxyType({})
    )  # of the branch of r, where it has its own
    teacher: str = "phi_mr"  # the trunk that phi_bt's branches join
    variants: tuple[str, ...] = ("v1",)  # of phi_mr: candidate sizes (methods.MR_VARIANTS)
    ablation: Mapping[str, Any] = field(
        default_factory=lambda: NOTHING
    )  # TrainConfig fields for notebook 07's runs
    ablated: int = 14  # resolution of those runs

    @property
    def shown(self) -> str:
        """Faces for pictures, which may be published: its own, or where those are of real people the demo's."""
        return self.faces if self.pictures else SCALES["demo"].faces

    def run_dir(self, given: str = "") -> Path:
        """The folder of this scale's runs: ``given``, or ``runs/<name>`` of the repository."""
        return Path(given) if given else Path(__file__).resolve().parents[1] / "runs" / self.name


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="demo",
            claim="Synthetic faces and a small trunk trained for minutes on a CPU: shows the method, not its numbers.",
            faces="synthetic:identities=400,images=16,seed=0",
            pairs=(
                "pairs:synthetic:identities=150,images=6,seed=0,first=100000:count=1500,seed=0",
            ),
            others="synthetic:identities=150,images=6,seed=0,first=100000",
            backbone=BackboneConfig(name="iresnet18", width=0.25, embedding=128),
            pictures=True,
            from_hr=True,
            # Deviation: a margin of 0.2 and s = 32; a margin of 0.5 left phi_mr near 70 % after so few steps.
            hr={
                "epochs": 2,
                "batch": 32,
                "lr": 1.6,
                "warmup_epochs": 0.2,
                "margin": 0.2,
                "s": 32.0,
            },
            trunk={
                "epochs": 1,
                "batch": 32,
                "lr": 1.2,
                "warmup_epochs": 0.1,
                "margin": 0.2,
                "s": 32.0,
            },
            specialist={
                "epochs": 1,
                "batch": 32,
                "lr": 1.2,
                "warmup_epochs": 0.1,
                "margin": 0.2,
                "s": 32.0,
            },
            branch={"epochs": 2, "batch": 32, "lr": 1.6, "margin": 0.2, "s": 32.0},
            # Deviation: 7 px and half the faces, so that eighteen runs take minutes.
            ablation={
                "data": "synthetic:identities=400,images=8,seed=0",
                "epochs": 1,
                "batch": 32,
                "lr": 1.6,
                "margin": 0.2,
                "s": 32.0,
            },
            ablated=7,
        ),
        Scale(
            name="lfw",
            claim="LFW and CelebA faces (15,675 images) and a MobileFaceNet that others trained: real, but small.",
            faces="faces_train",
            pairs=("lfw_devtest_6000.bin",),
            others="lfw_devtest",
            backbone=BackboneConfig(name="iresnet18", width=0.25, embedding=128),
            pretrained="mobilefacenet_casia.safetensors",
            from_hr=True,
            teacher="phi_hr",
            variants=("v1", "v2", "v3"),
            # Deviation: margin 0.2, s = 32 against class means; settings chosen on folds 1-5 of the pairs.
            trunk={
                "epochs": 2,
                "batch": 128,
                "lr": 0.1,
                "warmup_epochs": 0.2,
                "margin": 0.2,
                "s": 32.0,
            },
            specialist={
                "epochs": 1,
                "batch": 128,
                "lr": 0.1,
                "warmup_epochs": 0.2,
                "margin": 0.2,
                "s": 32.0,
            },
            # Deviation: the embeddings are distilled, too, from moved faces; notebook 07 has Eq. 3 alone beside it.
            branch={
                "batch": 128,
                "lr": 0.5,
                "margin": 0.2,
                "s": 32.0,
                "embedding": "cosine",
                "embedding_weight": 60.0,
                "embedding_mirrored": True,
                "shift": 4.0,
                "validation": (),
            },
            # 30 epochs at 7 px lost 0.9 and 1.1 points (112&7, 7&7, folds 1-5): 15,675 faces are learned by heart.
            epochs={56: 1, 28: 6, 14: 20, 7: 12},
            # Deviation: 7 px, where twenty runs take less than an hour.
            ablation={"epochs": 2, "batch": 128, "lr": 0.5, "margin": 0.2, "s": 32.0},
            ablated=7,
        ),
        Scale(
            name="paper",
            claim="MS1Mv3 and the hyper-parameters of Appendix A.2, as the paper.",
            faces="ms1m-retinaface-t1",
            pairs=SIX_SETS,
            others="lfw",
            backbone=BackboneConfig(name="iresnet50"),
        ),
    )
}


def _scratch(scale: Scale) -> Scale:
    """The same comparison where nothing was trained by others: a small IResNet from random weights."""
    return replace(
        scale, name=f"{scale.name}-scratch", pretrained="", teacher="phi_mr", variants=("v1",),
        claim="LFW and CelebA faces (15,675 images) and a small IResNet trained on them from scratch: real, but small.",
        hr={"epochs": 8, "batch": 64, "lr": 0.8, "warmup_epochs": 0.2, "margin": 0.2, "s": 32.0},
        trunk={**scale.trunk, "batch": 64, "lr": 0.4}, specialist={**scale.specialist, "batch": 64, "lr": 0.4},
        epochs={28: 2, 14: 6, 7: 6},
    )  # fmt: skip


def _quick(scale: Scale) -> Scale:
    """The headline rows alone (hr, mr, bt at 28, 14, 7), with a sixth of the epochs."""
    return replace(
        scale, name=f"{scale.name}-quick", claim=f"{scale.claim} Quick: fewer epochs, headline rows alone.",
        epochs={r: max(1, epochs // 6) for r, epochs in scale.epochs.items()},
        variants=("v1",), specialists=False,
        trunk={**scale.trunk, "epochs": 1}, ablation={**scale.ablation, "epochs": 1},
    )  # fmt: skip


def _from_mr(scale: Scale) -> Scale:
    """The paper's trunk, phi_mr, under the branches, and one more of 56 px; half the epochs at 14 and 7 px."""
    return replace(scale, name=f"{scale.name}-mr", teacher="phi_mr", variants=("v1",), specialists=False,
                   resolutions=(56, *scale.resolutions), epochs={56: 1, 28: 6, 14: 10, 7: 6})  # fmt: skip


SCALES |= {
    "lfw-mr": _from_mr(SCALES["lfw"]),
    "lfw-quick": _quick(SCALES["lfw"]),
    "lfw-scratch": _scratch(SCALES["lfw"]),
}


def get_scale(name: str) -> Scale:
    """The scale of that name; ConfigError lists the known ones."""
    if name not in SCALES:
        raise ConfigError(f"scale: got {name!r}, expected one of {', '.join(SCALES)}")
    return SCALES[name]
