"""What takes part in a run: the network that learns, its teacher, the classifier, the optimiser; one step; its state."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core import losses
from btnet_core.device import autocast, resolve_precision
from btnet_core.errors import ConfigError
from btnet_core.models.backbone import (
    Backbone,
    BackboneConfig,
    build_backbone,
    embed_features,
    load_backbone,
)
from btnet_core.models.btnet import Route, weights_digest
from btnet_core.training import checkpoint, classifier, distributed
from btnet_core.training.batches import (
    Batch,
    Pixels,
    Sampler,
    TeacherCache,
    branch_input,
    mirrored,
    moved,
    open_pixels,
    transfer,
    trunk_input,
)
from btnet_core.training.config import TrainConfig

CENTER_WEIGHT = 0.003  # of the centre loss beside the softmax (Wen et al. 2016)


class Scaler:
    """Loss scale for fp16: halved when a gradient overflows (the step is skipped), doubled after 2000 good steps."""

    def __init__(self, enabled: bool) -> None:
        self.scale, self.good, self.skipped, self.enabled = (
            (2.0**16 if enabled else 1.0),
            0,
            0,
            enabled,
        )

    def passes(self, finite: bool) -> bool:
        """Adapt the scale; False if this step must be skipped."""
        if not self.enabled:
            return True
        self.good = self.good + 1 if finite else 0
        self.skipped += not finite
        self.scale = (
            max(1.0, self.scale / 2)
            if not finite
            else self.scale * 2
            if self.good % 2000 == 0
            else self.scale
        )
        return finite


@dataclass
class Run:
    """Everything that takes part in one run. ``network`` is a Backbone or a Route; ``step`` counts from 0."""

    config: TrainConfig
    out: Path
    device: torch.device
    pixels: Pixels
    trunk: Backbone
    network: nn.Module
    trainable: dict[str, nn.Parameter]
    kappa: classifier.Classifier | None
    metric: nn.Module | None
    sampler: Sampler
    precision: str
    optimiser: torch.optim.Optimizer = field(init=False)
    scaler: Scaler = field(init=False)
    cache: TeacherCache | None = None
    step: int = 0
    began: float = field(
        default_factory=time.monotonic
    )  # moved back by the time that earlier sessions took
    validation: list[dict[str, Any]] = field(default_factory=list)
    norms: deque[float] = field(
        default_factory=lambda: deque(maxlen=5)
    )  # of the last steps' gradients

    def __post_init__(self) -> None:
        config, learns = self.config, dict(self.trainable)
        if self.kappa is not None and self.kappa.weight.requires_grad:
            learns["kappa"] = self.kappa.weight
        self.learns = learns
        self.optimiser = torch.optim.SGD(
            learns.values(),
            lr=config.peak_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = Scaler(self.precision == "fp16")
        self.encode = getattr(self.network, "encode", None)
        self.finish = (
            self.network.finish if isinstance(self.network, Route) else self.network.forward
        )
        if config.compile:
            self.encode, self.finish = (
                self.encode and torch.compile(self.encode),
                torch.compile(self.finish),
            )

    @property
    def total(self) -> int:
        return self.config.epochs * self.sampler.steps

    # ---- one step -----------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, pixels: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Network input, and the teacher's [z_s, embedding if needed] for the same faces."""
        config = self.config
        both = config.embedding_weight > 0 and config.embedding_mirrored
        if pixels is not None:  # only a filled cache does without
            faces = mirrored(transfer(pixels, self.device), batch.flip)
        if not config.resolution:
            return trunk_input(self.trunk, faces, batch.size, config.resize), []
        if self.cache is not None:
            x, *teacher = self.cache.rows(batch.records, batch.flip, self.device)
            other = (
                self.cache.rows(batch.records, ~batch.flip, self.device, first=2) if both else []
            )
        else:
            x, *teacher = self.branch_rows(faces)
            other = self.branch_rows(faces.flip(-1))[2:] if both else []
        if config.shift:
            x = branch_input(
                self.trunk, moved(faces, batch.shift), config.resolution, config.resize
            )
        return x, [
            *teacher[:1],
            *(z.float() + w.float() for z, w in zip(teacher[1:], other, strict=True)),
        ] if both else teacher

    @torch.no_grad()
    def branch_rows(self, faces: Tensor) -> list[Tensor]:
        """Branch input ``(B, 3, r, r')``, and where distillation needs them z_s ``(B, C_r, r, r')`` and z ``(B, D)``.

        The teacher is the trunk in evaluation mode on the faces at full size, run up to the coupling layer and no
        further unless its embedding is asked for (paper-and-code: teacher).
        """
        config, x = (
            self.config,
            branch_input(self.trunk, faces, self.config.resolution, self.config.resize),
        )
        if not config.branch_weight:
            return [x]
        whole = self.trunk.preprocess(faces).contiguous(memory_format=torch.channels_last)
        couple_at, rows = self.network.couple_at, [x]
        with autocast(self.device, self.precision):
            for name, z in self.trunk.features(
                whole, None if config.embedding_weight else couple_at
            ):
                if (
                    name == couple_at
                ):  # a branch that ends before the layer of r meets a larger map (Figure 7)
                    rows.append(
                        z
                        if len(z[0, 0]) <= len(x[0, 0])
                        else F.adaptive_avg_pool2d(z, x.shape[-2:])
                    )
            if config.embedding_weight:
                rows.append(embed_features(self.trunk.head, z))
        return rows

    def losses(self, batch: Batch, x: Tensor, teacher: list[Tensor]) -> dict[str, Tensor]:
        """Eq. 3's terms with their weights; "influence" has the value of the whole batch, the rest this process's share."""
        config, parts = self.config, {}
        with autocast(self.device, self.precision):
            z_r = self.encode(x) if self.encode is not None else x
            z = self.finish(z_r) if config.influence_weight or config.embedding_weight else None
        if config.influence_weight:
            labels = batch.labels.to(self.device)
            parts["influence"] = config.influence_weight * self.influence(z, labels)
        if config.branch_weight:
            share = config.branch_weight / distributed.world()
            axis = (
                1 if self.cache is None else -1
            )  # cached: the gradient in channels_last too, which BN takes faster
            z_r, z_s = z_r.movedim(1, axis), teacher[0].movedim(1, axis)
            parts["branch"] = share * losses.branch_loss(
                z_r, z_s, config.distillation, channels=axis
            )
            if config.embedding_weight:
                parts["embedding"] = (
                    share
                    * config.embedding_weight
                    * losses.embedding_loss(z, teacher[1], config.embedding)
                )
        return parts

    def influence(self, z: Tensor, labels: Tensor) -> Tensor:
        """L_influence of the whole batch (Eq. 1)."""
        loss = z.new_zeros(())
        if self.kappa is not None:
            self.kappa.step = self.step
            loss = loss + self.kappa(z, labels)
        if self.metric is not None:
            everyone = distributed.gather(z.float(), total=False)
            weight = CENTER_WEIGHT if self.config.loss == "center" else 1.0
            loss = loss + weight * self.metric(everyone, distributed.all_gather(labels))
        return loss

    def modes(self, training: bool) -> None:
        """Training or evaluation mode; batch norms that the configuration freezes stay in evaluation mode."""
        self.network.train(training)
        for module in (self.kappa, self.metric):
            if module is not None:
                module.train(training)
        if (
            isinstance(self.network, Route)
            and self.config.fix_trunk
            and self.config.bn == "frozen_bn"
        ):
            for _, norm in self.network.shared_norms():
                norm.eval()

    # ---- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a later process, or another number of them, needs to go on (collective: all must call it)."""
        distributed.average_statistics(self.network)
        momentum = {}
        for name, parameter in self.learns.items():
            buffer = self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                momentum[name] = (
                    self.kappa.whole(buffer) if name == "kappa" and self.kappa else buffer
                )
        return {
            "config": self.config.to_json(), "versions": checkpoint.versions(), "step": self.step, "seconds": time.monotonic() - self.began,
            "network": self.network.state_dict(), "momentum": momentum,
            "kappa": self.kappa.whole() if self.kappa is not None else None,
            "margin": self.kappa.margin.state_dict() if self.kappa is not None else {},
            "metric": self.metric.state_dict() if self.metric is not None else {},
            "scaler": [self.scaler.scale, self.scaler.good, self.scaler.skipped],
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "validation": json.dumps(self.validation),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        self.network.load_state_dict(state["network"])
        for name, buffer in state["momentum"].items():
            parameter = self.learns[name]
            buffer = self.kappa.part(buffer) if name == "kappa" and self.kappa else buffer
            self.optimiser.state[parameter]["momentum_buffer"] = buffer.to(parameter, copy=True)
        if self.kappa is not None:
            with torch.no_grad():
                self.kappa.weight.copy_(self.kappa.part(state["kappa"]))
            self.kappa.margin.load_state_dict(state["margin"])
        if self.metric is not None:
            self.metric.load_state_dict(state["metric"])
        self.scaler.scale, self.scaler.good, self.scaler.skipped = state["scaler"]
        self.step, self.validation = state["step"], json.loads(state["validation"])
        self.began = time.monotonic() - state["seconds"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])

    def save(self) -> None:
        """Write a checkpoint."""
        state = self.state()
        if distributed.rank() == 0:
            checkpoint.save_state(self.out, state)


# ---- from a configuration -----------------------------------------------------------------------------------------


def prepare(config: TrainConfig, out: Path, device: torch.device) -> Run:
    """Open the data, build network, teacher, classifier and optimiser for step 0.

    Raises:
        ConfigError, CheckpointError, DataError: whatever cannot work is found here.
    """
    torch.manual_seed(config.seed)
    pixels = open_pixels(config.data, config.workers)
    precision = resolve_precision(config.precision, device)
    trunk = load_trunk(config)
    network = _network(config, trunk)
    trainable = network.trainable(bn=config.bn, fix_trunk=config.fix_trunk) if isinstance(network, Route) else \
        dict(network.named_parameters())  # fmt: skip
    trainable = {
        name: parameter for name, parameter in trainable.items() if parameter.requires_grad
    }
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    for module in (trunk, network):
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if trunk is not network:
        trunk.eval()
    if config.sync_bn:
        distributed.synchronise_batch_norms(network)
    kappa, metric = _criteria(config, pixels, trunk, device, precision)
    return Run(config=config, out=out, device=device, pixels=pixels, trunk=trunk, network=network, trainable=trainable,
               kappa=kappa, metric=metric, sampler=Sampler(pixels.faces.labels, config), precision=precision)  # fmt: skip


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
    own = (
        trunk if config.fix_trunk else copy.deepcopy(trunk)
    )  # a trunk that learns cannot be its own teacher
    return Route(own, config.resolution, couple_at=config.couple_at or None)


def _criteria(
    config: TrainConfig, pixels: Pixels, trunk: Backbone, device: torch.device, precision: str
) -> tuple[classifier.Classifier | None, nn.Module | None]:
    """kappa with its margin where classes are told apart; the metric loss where pairs are."""
    if not config.influence_weight:
        return None, None
    faces, dim = pixels.faces, trunk.config.embedding
    classifier.check_labels(faces.labels, faces.num_identities)
    metrics = {
        "triplet": losses.Triplet,
        "circle": losses.Circle,
        "center": lambda: losses.Center(faces.num_identities, dim),
    }
    metric = metrics[config.loss]().to(device) if config.loss in metrics else None
    if not config.uses_classes:
        return None, metric
    if config.classifier == "fresh":
        weight = classifier.fresh_weight(faces.num_identities, dim, config.seed)
    elif config.classifier == "class_means":
        weight = _class_means(config, trunk, pixels, device, precision)
    else:
        weight = classifier.load_classifier(config.classifier, faces.num_identities, dim)
    name = "normface" if config.loss == "center" else config.loss
    margin = losses.build_margin(name, margin=config.margin, s=config.s)
    kappa = classifier.Classifier(
        weight, margin, sample_rate=config.sample_rate, seed=config.seed
    ).to(device)
    kappa.weight.requires_grad_(not config.fix_classifier)
    return kappa, metric


def _class_means(
    config: TrainConfig, trunk: Backbone, pixels: Pixels, device: torch.device, precision: str
) -> Tensor:
    """kappa from class means ``(classes, D)``; with ``cache_dir`` kept there for other runs of the same trunk and data."""
    faces, place = pixels.faces, None
    if config.cache_dir:
        facts = " ".join((weights_digest(trunk), faces.checksum, precision, device.type))
        place = (
            Path(config.cache_dir)
            / f"kappa_{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
        )
        if place.is_file():
            return classifier.load_classifier(
                str(place), faces.num_identities, trunk.config.embedding
            )
    weight = classifier.class_means(
        embed_all(trunk, pixels, device, precision), faces.labels, faces.num_identities
    )
    if place and distributed.rank() == 0:
        classifier.save_classifier(place, weight)
    return weight


@torch.no_grad()
def embed_all(trunk: Backbone, pixels: Pixels, device: torch.device, precision: str) -> Tensor:
    """Embeddings ``(N, D)`` of every face at full size, for class means."""
    training, parts = trunk.training, []
    trunk.eval()
    for records in torch.arange(len(pixels.faces.labels)).split(128):
        with autocast(device, precision):
            x = trunk.preprocess(pixels.get(records).to(device)).contiguous(
                memory_format=torch.channels_last
            )
            parts.append(trunk(x).float().cpu())
    trunk.train(training)
    return torch.cat(parts)


def describe(run: Run) -> str:
    """Which parameters learn, listed by unit and counted."""
    groups: dict[str, int] = {}
    for name, parameter in run.trainable.items():
        group = ".".join(name.split(".")[:2])
        groups[group] = groups.get(group, 0) + parameter.numel()
    whole = sum(p.numel() for p in run.network.parameters())
    text = f"{run.config.name}: {sum(groups.values()):,} of {whole:,} parameters learn: "
    text += ", ".join(f"{name} {count:,}" for name, count in groups.items())
    if run.kappa is not None:
        learns = "learns" if run.kappa.weight.requires_grad else "fixed"
        text += f"; kappa {run.kappa.num_classes} x {run.trunk.config.embedding} {learns}"
    return f"{text}; {run.total} steps of {run.config.batch} images, {run.precision}, {run.device}"
