"""One training run as data: what is trained on what, and every hyper-parameter with its source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field, fields

from btnet_core.data.sources import Spec
from btnet_core.errors import ConfigError
from btnet_core.images import Resize
from btnet_core.losses import MARGINS, METRICS
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BN_MODES

REFERENCE_BATCH = 512  # images for which `lr` is stated (128 on each of four GPUs, A.2, paper-and-code: batch size)
CHOICES = {
    "bn": BN_MODES,
    "loss": (*MARGINS, *METRICS),
    "distillation": ("mean", "batch_sum", "cosine"),
    "embedding": ("mse", "cosine"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "cache": ("auto", "memory", "memmap", "off"),
    "matmul": ("highest", "high"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are the paper's trunk (A.2); methods.py has a constructor for each method.

    ``resolution`` decides what learns: 0 trains a trunk (phi_hr, phi_mm, phi_mr), r trains the route of r (phi_bt).
    """

    name: str = "phi_hr"  # shown and recorded
    data: Spec  # faces to learn from, a spec of datasets.open_faces
    seed: int = 0

    # model
    backbone: BackboneConfig | None = None  # None: the one inside `init`, else IResNet-50 (4.1)
    init: str = ""  # file of the pretrained trunk; "": random weights
    resolution: int = 0  # r in rows of pixels; 0: the trunk itself
    couple_at: str = (
        ""  # unit where the branch ends; "": the layer of resolution r (3.2; Figure 7 moves it)
    )
    fix_trunk: bool = True  # T_r's convolutions stay (Section 5); False: the whole route learns
    bn: str = (
        "all"  # what of T_r's batch norms moves (3.4, paper-and-code: which batch norms learn)
    )
    btnet: str = ""  # folder of the BTNet that receives the branch; "": <out>/btnet

    # inputs
    sizes: tuple[int, ...] = (
        112,
    )  # rows in pixels to which a trunk's inputs are shrunk and scaled back (4.1)
    size_weights: tuple[float, ...] = ()  # their probabilities; (): equal
    resize: Resize = field(default_factory=Resize)  # paper-and-code: resize kernel
    flip: bool = True  # horizontal, probability 1/2, before down-sampling (A.2)
    shift: float = 0.0  # a branch's face is moved by up to so many of its 112 pixels, each way; the teacher's is not

    # L = influence_weight L_influence + branch_weight (L_branch + embedding_weight L_embedding), Eq. 3
    loss: str = "curricularface"  # L_influence (3.3; Table 4 has others)
    margin: float | None = None  # m; None: the loss's published value (A.2: 0.5)
    s: float | None = None  # length of normalised embeddings; None: the published value (A.2: 64)
    influence_weight: float = 1.0  # 0: distillation alone, no labels needed
    branch_weight: float = 0.0  # lambda_branch, 0.5 for phi_bt (3.3)
    distillation: str = "mean"  # of Eq. 2, see losses.branch_loss (paper-and-code: mean in Eq. 2)
    embedding_weight: float = 0.0  # 1 in the authors' code (paper-and-code: embedding MSE)
    embedding: str = "mse"  # how it is measured, see losses.embedding_loss
    embedding_mirrored: bool = (
        False  # the teacher's embedding is that of the face plus its mirror image's, as in 1:1
    )
    classifier: str = (
        "fresh"  # kappa starts "fresh", as "class_means" of the embeddings, or from this file
    )
    fix_classifier: bool = False  # BCT: kappa* does not learn (3.3)
    sample_rate: float = 1.0  # share of the negative classes used each step (PartialFC); 1: all

    # optimiser
    epochs: int = 25  # A.2; 10 for branches
    batch: int = 512  # images of all processes together (paper-and-code: batch size)
    per_identity: int = (
        1  # images of one identity that follow each other (triplet, circle need 2 or more)
    )
    lr: float = (
        0.2  # at REFERENCE_BATCH images, scaled linearly with `batch` (A.2; 0.02 for branches)
    )
    warmup_epochs: float = 2.0  # linear from 0 (A.2; 0 for branches)
    momentum: float = 0.9  # paper-and-code: optimiser
    weight_decay: float = 5e-4  # paper-and-code: optimiser
    clip_norm: float = 5.0  # of the network's gradient (paper-and-code: optimiser)

    # machine
    precision: str = "auto"  # of the network's forward pass; auto: bf16 where the processor has it
    matmul: str = "highest"  # float32 products: "highest" exact, "high" TF32 (PyTorch's names)
    compile: bool = False  # torch.compile the network
    sync_bn: bool = (
        False  # batch statistics over all processes (paper-and-code: running statistics)
    )
    cache: str = "auto"  # the teacher's features: in memory, in a file, or computed at every step
    cache_dir: str = ""  # where features and class means are kept for other runs of the same teacher; "": nowhere
    workers: int = 2  # decoding threads, when the data do not fit in memory
    checkpoint_seconds: float = 300.0  # between checkpoints; one at each epoch's end too
    validation: tuple[Spec, ...] = ()  # pair sets, specs of datasets.open_pairs
    validation_resolutions: tuple[int, ...] = (112, 28, 14, 7)  # rows in pixels
    validate_epochs: int = 0  # between validations; 0: at the end alone

    def __post_init__(self) -> None:
        for name in ("sizes", "size_weights", "validation", "validation_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        positive = (
            "epochs",
            "batch",
            "per_identity",
            "lr",
            "clip_norm",
            "sample_rate",
            "checkpoint_seconds",
        )
        at_least_0 = ("resolution", "warmup_epochs", "momentum", "weight_decay", "influence_weight", "branch_weight",
                      "embedding_weight", "shift", "workers", "validate_epochs")  # fmt: skip
        for name in (*positive, *at_least_0):
            value = getattr(self, name)
            if not (value > 0 if name in positive else value >= 0):
                raise ConfigError(
                    f"{name}: got {value}, expected {'> 0' if name in positive else '>= 0'}"
                )
        if self.sample_rate > 1 or self.momentum >= 1 or self.warmup_epochs >= self.epochs:
            raise ConfigError("expected sample_rate <= 1, momentum < 1 and warmup_epochs < epochs")
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"sizes: got {self.sizes}, expected one or more, each >= 1")
        weights = self.size_weights
        if weights and (len(weights) != len(self.sizes) or min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(
                f"size_weights: got {weights}, expected {len(self.sizes)} numbers >= 0, not all 0"
            )
        distils = self.branch_weight > 0
        if distils and not self.init:
            raise ConfigError("branch_weight > 0: distillation needs a pretrained trunk in `init`")
        if distils and not self.resolution:
            raise ConfigError(
                "branch_weight > 0: distillation belongs to a branch, set `resolution`"
            )
        if not distils and not self.influence_weight:
            raise ConfigError(
                "influence_weight and branch_weight are both 0: nothing to learn from"
            )
        if self.influence_weight and self.fix_classifier and self.classifier == "fresh":
            raise ConfigError(
                "fix_classifier: a fresh classifier holds nothing to be compatible with"
            )
        if not self.resolution and (self.couple_at or self.shift):
            raise ConfigError("couple_at, shift: of a branch alone, set `resolution`")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `lr` times batch / 512."""
        return self.lr * self.batch / REFERENCE_BATCH

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then quadratic decay to 0 over the remaining steps (A.2)."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.peak_lr * (step + 1) / (warmup + 1)
        return self.peak_lr * (1 - (step - warmup) / (total - warmup)) ** 2

    @property
    def uses_classes(self) -> bool:
        """True where a classifier takes part (a softmax, not pairs alone)."""
        return self.influence_weight > 0 and self.loss not in ("triplet", "circle")

    def replace(self, **changes) -> TrainConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of ``to_json``; missing fields take their defaults.

        Raises:
            ConfigError: no JSON object, an unknown field, or a value that cannot work.
        """
        try:
            values = json.loads(text)
            unknown = values.keys() - {f.name for f in fields(cls)}
            if unknown:
                raise ConfigError(
                    f"unknown fields {sorted(unknown)}; known: {[f.name for f in fields(cls)]}"
                )
            if values.get("backbone") is not None:
                values["backbone"] = BackboneConfig(**values["backbone"])
            if "resize" in values:
                values["resize"] = Resize(**values["resize"])
            return cls(**values)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ConfigError(f"training configuration: {error}") from error
