"""One training run as data: what is trained on what, and every hyper-parameter with its source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from btnet_core.data.sources import Spec
from btnet_core.errors import ConfigError, check_types, from_fields
from btnet_core.files import reason
from btnet_core.images import Resize
from btnet_core.kinds import what_is
from btnet_core.losses import MARGINS, METRICS
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BN_MODES

try:
    import yaml
except ImportError:  # configurations are then JSON pages alone
    yaml = None  # type: ignore[assignment]

REFERENCE_BATCH = 512  # images for which `lr` is stated (A.2, paper-and-code: batch size)
CHOICES = {
    "bn": BN_MODES,
    "loss": (*MARGINS, *METRICS),
    "distillation": ("mean", "batch_sum", "cosine"),
    "embedding": ("mse", "cosine"),
    "optimiser": ("sgd", "adamw"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "cache": ("auto", "off"),
    "matmul": ("highest", "high"),
}
POSITIVE = (
    "epochs", "batch", "accumulate", "per_identity", "lr", "clip_norm", "sample_rate",
    "checkpoint_seconds",
)  # fmt: skip
AT_LEAST_0 = (
    "resolution", "stop_epoch", "warmup_epochs", "momentum", "weight_decay", "influence_weight",
    "branch_weight", "embedding_weight", "shift", "threads", "workers", "validate_epochs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults are the paper's trunk (A.2); methods.py has a constructor for each method.

    ``resolution`` says what learns: 0 trains a trunk (phi_hr, phi_mr), r the route of r (phi_bt).
    """

    name: str = "phi_hr"  # shown and recorded
    data: Spec  # faces to learn from
    seed: int = 0

    # model
    backbone: BackboneConfig | None = None  # None: the one inside `init`, else IResNet-50 (4.1)
    init: str = ""  # file of the pretrained trunk; "": random weights
    resolution: int = 0  # r in rows of pixels; 0: the trunk itself
    couple_at: str = ""  # unit where the branch ends; "": the layer of r (3.2; Figure 7 moves it)
    fix_trunk: bool = True  # T_r's convolutions stay (Section 5); False: the whole route learns
    bn: str = "all"  # which of T_r's learn (3.4, paper-and-code: which batch norms learn)
    btnet: str = ""  # folder of the BTNet that receives the branch; "": <out>/btnet

    # inputs
    sizes: tuple[int, ...] = (112,)  # rows; a face is shrunk to one first, then scaled (4.1)
    size_weights: tuple[float, ...] = ()  # their probabilities; (): equal
    resize: Resize = field(default_factory=Resize)  # paper-and-code: resize kernel
    flip: bool = True  # horizontal, probability 1/2, before down-sampling (A.2)
    shift: float = 0.0  # pixels of 112 that a branch's face is moved, at most; not the teacher's

    # L = influence_weight L_influence + branch_weight (L_branch + embedding_weight L_embedding)
    loss: str = "curricularface"  # L_influence (3.3; Table 4 has others)
    margin: float | None = None  # m; None: the loss's published value (A.2: 0.5 rad)
    s: float | None = None  # length of normalised embeddings; None: as published (A.2: 64)
    influence_weight: float = 1.0  # 0: distillation alone, no labels needed
    branch_weight: float = 0.0  # lambda_branch of Eq. 3, 0.5 for phi_bt (3.3)
    distillation: str = "mean"  # kind of losses.branch_loss (paper-and-code: mean in Eq. 2)
    embedding_weight: float = 0.0  # 1 in the authors' code (paper-and-code: embedding MSE)
    embedding: str = "mse"  # kind of losses.embedding_loss
    embedding_mirrored: bool = False  # the teacher's: mean of face and mirror image (as 1:1 adds)
    classifier: str = "fresh"  # kappa starts "fresh", as "class_means", or from this file
    fix_classifier: bool = False  # BCT: kappa* does not learn (3.3)
    sample_rate: float = 1.0  # fraction of the negative classes in a step (PartialFC); 1: all

    # optimiser
    epochs: int = 25  # of the schedule (A.2; 10 for branches)
    stop_epoch: int = 0  # end of the training, the schedule unchanged; 0: at `epochs`
    batch: int = 512  # images of all processes together (paper-and-code: batch size)
    accumulate: int = 1  # parts of a batch that are computed one after the other, to save memory
    per_identity: int = 1  # images of one identity in a row (triplet, circle need 2 or more)
    lr: float = 0.2  # at REFERENCE_BATCH images, linear in `batch` (A.2; 0.02 for branches)
    warmup_epochs: float = 2.0  # linear from 0 (A.2; 0 for branches)
    optimiser: str = "sgd"  # "adamw" for a trunk with layer norms (docs/own-recogniser.md)
    momentum: float = 0.9  # of sgd; paper-and-code: optimiser
    weight_decay: float = 5e-4  # paper-and-code: optimiser
    clip_norm: float = 5.0  # of the network's gradient (paper-and-code: optimiser)

    # machine
    precision: str = "auto"  # of the forward pass; auto: see device.resolve_precision
    matmul: str = "highest"  # float32 products: "highest" exact, "high" TF32 (PyTorch's names)
    compile: bool = False  # torch.compile the network
    sync_bn: bool = False  # batch statistics over all GPUs (paper-and-code: running statistics)
    threads: int = 0  # of the CPU; 0: as many as cores are idle when the run starts
    cache: str = "auto"  # the teacher's answers: in files where that pays; "off": at every step
    cache_dir: str = ""  # folder that keeps features and class means for other runs; "": none
    workers: int = 2  # decoding threads, when the data do not fit in memory
    checkpoint_seconds: float = 300.0  # between checkpoints; one at each epoch's end too
    validation: tuple[Spec, ...] = ()  # pair sets, see data.pairs.open_pairs
    validation_resolutions: tuple[int, ...] = (112, 28, 14, 7)  # pixels; of a trunk
    validate_epochs: int = 0  # between validations; 0: at the end alone

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("sizes", "size_weights", "validation", "validation_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_values()
        self._check_sizes()
        self._check_together()

    def _check_values(self) -> None:
        """Each field by itself."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ConfigError(f"{name}: got {got!r}, expected one of {', '.join(allowed)}")
        for name in (*POSITIVE, *AT_LEAST_0):
            value, low = getattr(self, name), "> 0" if name in POSITIVE else ">= 0"
            if not (value > 0 if name in POSITIVE else value >= 0):
                raise ConfigError(f"{name}: got {value}, expected {low}")
        if self.sample_rate > 1 or self.momentum >= 1 or self.warmup_epochs >= self.epochs:
            raise ConfigError("expected sample_rate <= 1, momentum < 1 and warmup_epochs < epochs")
        if self.stop_epoch > self.epochs:
            raise ConfigError(f"stop_epoch: got {self.stop_epoch}, expected at most {self.epochs}")

    def _check_sizes(self) -> None:
        weights = self.size_weights
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"sizes: got {self.sizes}, expected one or more, each >= 1")
        if weights and (len(weights) != len(self.sizes) or min(weights) < 0 or sum(weights) <= 0):
            expected = f"{len(self.sizes)} numbers >= 0, not all 0"
            raise ConfigError(f"size_weights: got {weights}, expected {expected}")

    def _check_together(self) -> None:
        """Fields that make no sense beside each other."""
        distils = self.branch_weight > 0
        if distils and not self.init:
            raise ConfigError("branch_weight > 0: distillation needs a pretrained trunk in `init`")
        if distils and not self.resolution:
            raise ConfigError("branch_weight > 0: set `resolution`, only a branch is distilled to")
        if not distils and not self.influence_weight:
            raise ConfigError("influence_weight and branch_weight are both 0: nothing to learn")
        if self.influence_weight and self.fix_classifier and self.classifier == "fresh":
            raise ConfigError("fix_classifier: a fresh classifier is nothing to be compatible with")
        if not self.resolution and (self.couple_at or self.shift):
            raise ConfigError("couple_at, shift: of a branch alone, set `resolution`")
        if self.accumulate > 1 and self.loss in METRICS:
            raise ConfigError(f"accumulate: {self.loss} needs the pairs of the whole batch at once")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `lr` times batch / 512."""
        return self.lr * self.batch / REFERENCE_BATCH

    @property
    def last_epoch(self) -> int:
        """The epoch at which training ends."""
        return self.stop_epoch or self.epochs

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then quadratic decay to 0 over the remaining steps (A.2)."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.peak_lr * (step + 1) / (warmup + 1)
        return self.peak_lr * (1 - (step - warmup) / (total - warmup)) ** 2

    @property
    def varies_input(self) -> bool:
        """True where a branch's face is not the same in each epoch, but for its mirror image."""
        return self.shift > 0 or self.sizes != (112,)

    @property
    def uses_classes(self) -> bool:
        """True where a classifier takes part (a softmax, not pairs alone)."""
        return self.influence_weight > 0 and self.loss not in ("triplet", "circle")

    def replace(self, **changes) -> TrainConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: lists, dictionaries, numbers, texts."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_dict(cls, values: Any) -> TrainConfig:
        """Inverse of ``to_dict``; missing fields take their defaults.

        Raises:
            ConfigError: no mapping, an unknown field, or a value that cannot work.
        """
        if isinstance(values, dict):
            for name, kind in (("backbone", BackboneConfig), ("resize", Resize)):
                if values.get(name) is not None:
                    values = values | {name: from_fields(kind, values[name], name)}
        return from_fields(cls, values, "training configuration")

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of ``to_json``; raises as ``from_dict``."""
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"training configuration: {reason(error)}") from error

    @classmethod
    def read(cls, path: Path | str) -> TrainConfig:
        """The configuration in a .json, .yaml or .yml page; ConfigError names the page."""
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else what_is(path)
            raise ConfigError(f"{path}: cannot be read as a page ({why})") from error
        if path.suffix not in (".yaml", ".yml"):
            return cls.from_json(text)
        if yaml is None:
            raise ConfigError(f"{path}: pages in YAML need the package pyyaml")
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"line {mark.line + 1}" if mark else "a sign it does not admit"
            raise ConfigError(f"{path}: no YAML ({place})") from error
