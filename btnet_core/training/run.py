"""What takes part in a run: the network that learns, its teacher, the classifier, the optimiser."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btnet_core import losses
from btnet_core.data.pairs import PairSet, open_pairs
from btnet_core.device import autocast, resolve_precision
from btnet_core.errors import ConfigError
from btnet_core.evaluation.verification import check_pairs
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.btnet import Route, weights_digest
from btnet_core.models.weights import load_backbone
from btnet_core.training import classifier, distributed
from btnet_core.training.batches import Batch, Pixels, Sampler, open_pixels
from btnet_core.training.config import TrainConfig
from btnet_core.training.teacher import TeacherCache

OPTIMISERS = {  # by name in a configuration: class, and what it keeps of each parameter
    "sgd": (torch.optim.SGD, ("momentum_buffer",)),
    "adamw": (torch.optim.AdamW, ("exp_avg", "exp_avg_sq")),
}


@dataclass
class Run:
    """Everything that takes part in one run. ``step`` counts from 0."""

    config: TrainConfig
    out: Path
    device: torch.device
    precision: str  # as resolved
    pixels: Pixels
    trunk: Backbone  # of a branch: the teacher
    network: nn.Module  # what learns: the trunk, or a Route
    trainable: dict[str, nn.Parameter]
    kappa: classifier.Classifier | None
    metric: nn.Module | None
    sampler: Sampler
    pairs: list[PairSet]  # to validate on
    identity: dict[str, Any] = field(default_factory=dict)  # see checkpoint.identity_of
    cache: TeacherCache | None = None
    step: int = 0
    skipped: int = 0  # steps whose fp16 gradients overflowed
    began: float = field(default_factory=time.monotonic)  # moved back by earlier sessions
    validation: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.learns = dict(self.trainable)
        if self.kappa is not None and self.kappa.weight.requires_grad:
            self.learns["kappa"] = self.kappa.weight
        kind, buffers = OPTIMISERS[config.optimiser]
        own = {"momentum": config.momentum} if config.optimiser == "sgd" else {}
        settings = {"lr": config.peak_lr, "weight_decay": config.weight_decay, "fused": True}
        self.optimiser = kind(self.learns.values(), **settings, **own)
        for parameter in self.learns.values():  # at 0, so that a first step may be skipped
            state = {name: torch.zeros_like(parameter) for name in buffers}
            if config.optimiser == "adamw":
                state["step"] = torch.zeros((), device=parameter.device)
            self.optimiser.state[parameter] = state
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        is_route = isinstance(self.network, Route)
        self.encode = self.network.encode if is_route else nn.Identity()
        self.finish = self.network.finish if is_route else self.network.forward
        if config.compile:
            self.encode = torch.compile(self.encode) if is_route else self.encode
            self.finish = torch.compile(self.finish)

    @property
    def total(self) -> int:
        """The number of steps."""
        return self.config.last_epoch * self.sampler.steps

    def batches(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """The remaining batches with their pixels; None where a cache holds all that is needed."""
        batches = (self.sampler.batch(step) for step in range(self.step, self.total))
        if self.cache is not None and not self.config.varies_input:
            return ((batch, None) for batch in batches)
        return self.pixels.stream(batches)

    def modes(self, training: bool) -> None:
        """Training or evaluation mode; frozen batch norms stay in evaluation mode."""
        for module in (self.network, self.kappa, self.metric):
            if module is not None:
                module.train(training)
        config = self.config
        if isinstance(self.network, Route) and config.fix_trunk and config.bn == "frozen_bn":
            for _, norm in self.network.shared_norms():
                norm.eval()

    def describe(self) -> str:
        """How many parameters learn; on what, where, and in which precision."""
        learn = sum(p.numel() for p in self.trainable.values())
        whole = sum(p.numel() for p in self.network.parameters())
        text = f"{self.config.name}: {learn:,} of {whole:,} parameters learn"
        if self.kappa is not None:
            learns = "learns" if self.kappa.weight.requires_grad else "fixed"
            text += f"; kappa {self.kappa.num_classes} x {self.trunk.config.embedding} {learns}"
            empty = self.kappa.num_classes - len(self.pixels.faces.labels.unique())
            text += f" ({empty} identities have no image)" if empty else ""
        text += f"; {self.total} steps of {self.config.batch} images, {self.precision}"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        together = distributed.world()
        return f"{text}, {self.device}{threads}" + f", {together} processes" * (together > 1)


def prepare(config: TrainConfig, out: Path, device: torch.device) -> Run:
    """Open all that the run will need; build network, classifier and optimiser for step 0.

    Raises:
        ConfigError, CheckpointError, DataError: whatever cannot work is found here.
    """
    torch.manual_seed(config.seed)
    if config.sync_bn and device.type != "cuda":
        raise ConfigError("sync_bn: batch statistics are shared by GPUs alone, set it to false")
    pixels = open_pixels(config.data, config.workers)
    sampler = Sampler(pixels.faces.labels, config)
    pairs = [open_pairs(spec) for spec in config.validation]
    for one in pairs:
        check_pairs(one)
    precision = resolve_precision(config.precision, device)
    trunk = load_trunk(config)
    network = _network(config, trunk)
    trainable = _what_learns(config, network)
    for module in (trunk, network):
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if trunk is not network:
        trunk.eval()
    kappa = metric = None
    if config.influence_weight:
        classifier.check_labels(pixels.faces.labels, pixels.faces.num_identities)
        kappa = _classifier(config, pixels, trunk, device, precision)
        metric = _metric(config, pixels.faces.num_identities, trunk.config.embedding, device)
    if config.sync_bn and distributed.world() > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return Run(
        config=config, out=out, device=device, precision=precision, pixels=pixels, trunk=trunk,
        network=network, trainable=trainable, kappa=kappa, metric=metric, sampler=sampler,
        pairs=pairs,
    )  # fmt: skip


def load_trunk(config: TrainConfig) -> Backbone:
    """The trunk a run starts from: read from ``init``, or with fresh weights."""
    if not config.init:
        return build_backbone(config.backbone or BackboneConfig())
    trunk = load_backbone(config.init)
    if config.backbone not in (None, trunk.config):
        raise ConfigError(f"backbone: got {config.backbone}, {config.init} holds {trunk.config}")
    return trunk


def _network(config: TrainConfig, trunk: Backbone) -> nn.Module:
    if not config.resolution:
        return trunk
    own = trunk if config.fix_trunk else copy.deepcopy(trunk)  # what learns is not its own teacher
    return Route(own, config.resolution, couple_at=config.couple_at or None)


def _what_learns(config: TrainConfig, network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; all others are frozen."""
    if isinstance(network, Route):
        chosen = network.trainable(bn=config.bn, fix_trunk=config.fix_trunk)
    else:
        chosen = dict(network.named_parameters())
    learns = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in learns.values():
        parameter.requires_grad_(True)
    return learns


def _metric(config: TrainConfig, classes: int, dim: int, device: torch.device) -> nn.Module | None:
    """The loss over pairs or to centres, where the configuration has one."""
    if config.loss == "center":
        return losses.Center(classes, dim).to(device)
    kinds = {"triplet": losses.Triplet, "circle": losses.Circle}
    return kinds[config.loss]().to(device) if config.loss in kinds else None


def _classifier(
    config: TrainConfig, pixels: Pixels, trunk: Backbone, device: torch.device, precision: str
) -> classifier.Classifier | None:
    """kappa with its margin, where classes are told apart."""
    if not config.uses_classes:
        return None
    classes, dim = pixels.faces.num_identities, trunk.config.embedding
    if config.classifier == "fresh":
        weight = classifier.fresh_weight(classes, dim, config.seed)
    elif config.classifier == "class_means":
        weight = _kept_class_means(config, trunk, pixels, device, precision)
    else:
        weight = classifier.load_classifier(config.classifier, classes, dim)
    name = "normface" if config.loss == "center" else config.loss  # the centres join a softmax
    margin = losses.build_margin(name, margin=config.margin, s=config.s)
    kappa = classifier.Classifier(
        weight, margin, sample_rate=config.sample_rate, seed=config.seed
    ).to(device)
    kappa.weight.requires_grad_(not config.fix_classifier)
    return kappa


def _kept_class_means(
    config: TrainConfig, trunk: Backbone, pixels: Pixels, device: torch.device, precision: str
) -> Tensor:
    """``class_means (C, D)``, kept in ``cache_dir`` for runs of the same trunk and data."""
    faces, place = pixels.faces, None
    if config.cache_dir:
        facts = " ".join((weights_digest(trunk), faces.checksum, precision, device.type))
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        place = Path(config.cache_dir) / f"kappa_{digest}.safetensors"
        if place.is_file():
            dim = trunk.config.embedding
            return classifier.load_classifier(place, faces.num_identities, dim)
    weight = class_means(trunk, pixels, device, precision)
    if place and distributed.rank() == 0:
        classifier.save_classifier(place, weight)
    return weight


@torch.no_grad()
def class_means(trunk: Backbone, pixels: Pixels, device: torch.device, precision: str) -> Tensor:
    """kappa* ``(C, D)`` from the trunk's embeddings of every face at full size, on the CPU."""
    training, labels = trunk.training, pixels.faces.labels
    trunk.eval()

    def embedded() -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.arange(len(labels)).split(128)[distributed.rank() :: distributed.world()]
        for records in mine:
            x = trunk.preprocess(pixels.get(records).to(device))
            with autocast(device, precision):
                z = trunk(x.contiguous(memory_format=torch.channels_last))
            yield z.float(), labels[records]

    means = classifier.class_means(embedded(), pixels.faces.num_identities, trunk.config.embedding)
    trunk.train(training)
    return means.cpu()
