"""Losses: margins over cosines (Eq. 1), metric losses, distillation at the coupling layer (Eq. 2).

A margin turns cosines into logits and leaves the softmax to the caller, so that a classifier cut
over several processes needs one exchange only. Each process gives

    cosine  (B, C_shard)  of its own classes,
    column  (B,)          where in the shard the true class is, -1: on another process,
    target  (B,)          the cosine of the true class, wherever it lives.

Nothing else depends on the number of processes (paper-and-code: CurricularFace over processes).
Half-precision inputs are computed in float32; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.errors import ConfigError

EDGE = 1e-6  # near |cos| = 1 the angle has no finite derivative: see _extended


class Margin(nn.Module):
    """NormFace (Wang et al. 2017), the base of the others: ``s cos(theta_j)``, no margin.

    Args:
        margin: m; the unit depends on the loss (radians, cosine or factor).
        s: the length that normalised embeddings are given.

    Raises:
        ConfigError: m < 0, s <= 0, or one of them not finite.
    """

    default_margin, default_s = 0.0, 64.0
    needs_norms = False
    statistics: ClassVar[dict[str, float]] = {}  # saved state and where it starts

    def __init__(self, *, margin: float | None = None, s: float | None = None) -> None:
        super().__init__()
        self.margin = self.default_margin if margin is None else float(margin)
        self.s = self.default_s if s is None else float(s)
        if not (0 <= self.margin < math.inf and 0 < self.s < math.inf):
            name = type(self).__name__
            raise ConfigError(f"{name}: got margin {margin}, s {s}; expected m >= 0, s > 0")
        for statistic, start in self.statistics.items():
            self.register_buffer(statistic, torch.tensor(start))

    def forward(
        self, cosine: Tensor, column: Tensor, target: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns logits ``(B, C_shard)``.

        Args:
            cosine: ``(B, C_shard)`` in [-1, 1].
            column: ``(B,)`` int64, the true class within the shard, -1 if it is elsewhere.
            target: ``(B,)`` cosine of the true class; may be left out where there is one shard.
            norms: ``(B,)`` lengths of the embeddings, for AdaFace.

        Raises:
            ConfigError: target or norms are needed and missing.
        """
        cosine = at_least_float32(cosine)
        if self.needs_norms and norms is None:
            raise ConfigError(f"{type(self).__name__} needs the norms of the embeddings")
        # no lists of indices: a GPU is not waited for
        here = column >= 0
        place = column.clamp_min(0)[:, None]
        own = cosine.gather(1, place).squeeze(1)
        if target is None:
            if not bool(here.all()):
                raise ConfigError("target: needed where some labels are on another shard")
            target = own
        target = target.detach().to(cosine.dtype)
        if self.training:
            self.observe(target, norms)
        norms = None if norms is None else norms.detach().to(cosine.dtype)
        positive = _extended(lambda inner: self.positive(inner, norms), own)
        logits = self.negatives(cosine, target)
        elsewhere = logits.gather(1, place).squeeze(1)
        return logits.scatter(1, place, torch.where(here, positive, elsewhere)[:, None]) * self.s

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        """T(cos theta_y) ``(B,)``; ``norms`` (B,) are constants."""
        return cosine

    def negatives(self, cosine: Tensor, target: Tensor) -> Tensor:
        """N(cos theta_j) ``(B, C_shard)``; the true class's entry is replaced afterwards."""
        return cosine

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        """Update running statistics from the whole batch, the same on every process."""


class SphereFace(Margin):
    """``(-1)^k cos(m theta_y) - 2k``, k = floor(m theta_y / pi) (Liu et al. 2017).

    Without margin at m = 1. Deviation: embeddings are normalised, s = 30 and m = 1.5 (SphereFace
    Revived, Liu et al. 2022), instead of m = 4 on unnormalised ones with annealing.
    """

    default_margin, default_s = 1.5, 30.0

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        angle = cosine.acos() * self.margin
        k = (angle.detach() / math.pi).floor()
        sign = 1 - 2 * k.remainder(2)
        return sign * angle.cos() - 2 * k


class CosFace(Margin):
    """``cos(theta_y) - m`` (Wang et al. 2018); m = 0.35, in units of cosine."""

    default_margin = 0.35

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        return cosine - self.margin


class ArcFace(Margin):
    """``cos(theta_y + m)``, m = 0.5 rad (Deng et al. 2019).

    Beyond theta_y = pi - m, where that would rise again: ``cos(theta_y) - m sin m``.
    """

    default_margin = 0.5

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        m = cosine.new_full((), self.margin)
        return torch.where(cosine > -m.cos(), _add_angle(cosine, m), cosine - m * m.sin())


class CurricularFace(ArcFace):
    """Eq. 1's loss (Huang et al. 2020): ArcFace's positive, negatives weighted by a curriculum t.

    ``N(t, cos theta_j) = cos theta_j``                   if cos theta_j <= cos(theta_y + m),
    ``                   cos theta_j (t + cos theta_j)``  else: a hard negative.

    ``t <- alpha mean_batch(cos theta_y) + (1 - alpha) t`` before each use; alpha = 0.99, t0 = 0.
    t is saved state. The released code of CurricularFace has 0.01 where the equation has alpha.
    """

    alpha = 0.99
    statistics: ClassVar = {"t": 0.0}

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        self.t.lerp_(target.mean().to(self.t.dtype), self.alpha)

    def negatives(self, cosine: Tensor, target: Tensor) -> Tensor:
        m = cosine.new_full((), self.margin)
        threshold = _extended(lambda inner: _add_angle(inner, m), target)[:, None]
        return torch.where(cosine > threshold, cosine * (self.t + cosine), cosine)


class AdaFace(Margin):
    """``cos(theta_y - m q) - (m + m q)``, q the image quality (Kim et al. 2022).

    ``q = clip(h (||z|| - mu) / sigma, -1, 1)``, without gradient. mu and sigma are the running mean
    and deviation of the norms: weight 0.01 for each batch, before its use, from 20 and 100.
    m = 0.4, h = 0.333, s = 64. Norms are cut to [0.001, 100].
    """

    default_margin = 0.4
    needs_norms = True
    h = 0.333
    statistics: ClassVar = {"mean": 20.0, "std": 100.0}

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        if norms is not None and norms.numel() > 1:
            safe = norms.detach().float().clamp(1e-3, 100)
            self.mean.lerp_(safe.mean(), 0.01)
            self.std.lerp_(safe.std(), 0.01)

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        quality = (norms.clamp(1e-3, 100) - self.mean) / (self.std + 1e-3)
        quality = (self.h * quality).clamp(-1, 1)
        angle = cosine.acos() - self.margin * quality
        if self.margin:
            angle = angle.clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - self.margin * (1 + quality)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _extended(function: Callable[[Tensor], Tensor], cosine: Tensor) -> Tensor:
    """``function``, continued with slope 1 beyond |cosine| = 1 - EDGE.

    The value there is right to 1e-6, the gradient neither NaN nor zero.
    """
    inner = cosine.clamp(-1 + EDGE, 1 - EDGE)
    return function(inner) + (cosine - inner)


def _add_angle(cosine: Tensor, angle: Tensor) -> Tensor:
    """cos(theta + angle), written without acos."""
    sine = (1 - cosine * cosine).sqrt()
    return cosine * angle.cos() - sine * angle.sin()


class Triplet(nn.Module):
    """``mean_i max(0, max_p d(i,p) - min_n d(i,n) + m)``, d the squared distance of unit vectors.

    m = 0.2 (Schroff et al. 2015), the hardest pairs of the batch (Hermans et al. 2017). Anchors
    without a positive or a negative in the batch are left out. z ``(B, D)``, labels ``(B,)``.
    """

    margin = 0.2

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        distance = 2 - 2 * _similarities(z)
        positive, negative, anchors = _pairs(labels)
        farthest = distance.masked_fill(~positive, -math.inf).amax(1)
        nearest = distance.masked_fill(~negative, math.inf).amin(1)
        loss = (farthest - nearest + self.margin)[anchors].clamp_min(0)
        return loss.sum() / anchors.sum().clamp_min(1)


class Circle(nn.Module):
    """Circle loss (Sun et al. 2020) over the pairs (i, p) and (i, n) of each anchor i.

    ``mean_i log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - 1 + m)))`` with
    a_n = [s_n + m]_+ and a_p = [1 + m - s_p]_+ without gradient; m = 0.25, gamma = 256.
    """

    margin, gamma = 0.25, 256.0

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        s, m = _similarities(z), self.margin
        positive, negative, anchors = _pairs(labels)
        push = self.gamma * (s.detach() + m).clamp_min(0) * (s - m)
        pull = -self.gamma * (1 + m - s.detach()).clamp_min(0) * (s - 1 + m)
        push = push.masked_fill(~negative, -math.inf)[anchors].logsumexp(1)
        pull = pull.masked_fill(~positive, -math.inf)[anchors].logsumexp(1)
        return F.softplus(push + pull).sum() / anchors.sum().clamp_min(1)


def _similarities(z: Tensor) -> Tensor:
    """Cosines of all pairs ``(B, B)``."""
    unit = F.normalize(at_least_float32(z))
    return unit @ unit.T


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks: positive pairs ``(B, B)`` (not with oneself), negative ones, anchors with both."""
    same = labels[:, None] == labels[None]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return positive, ~same, positive.any(1) & (~same).any(1)


class Center(nn.Module):
    """``1/2 mean_i ||z_i - c_{y_i}||^2`` (Wen et al. 2016); joins a softmax with weight 0.003.

    In training the centres move after the loss: ``c_j <- c_j + alpha sum (z_i - c_j) / (1 + n_j)``
    over the n_j samples of class j; alpha = 0.5. z ``(B, D)``, labels ``(B,)``.
    """

    alpha = 0.5

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(num_classes, dim))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        z = at_least_float32(z)
        difference = z - self.centres[labels]
        if self.training:
            counts = torch.bincount(labels)
            step = difference.detach().to(self.centres.dtype) / (1 + counts)[labels, None]
            self.centres.index_add_(0, labels, step, alpha=self.alpha)
        return difference.square().sum(1).mean() / 2


def branch_loss(z_r: Tensor, z_s: Tensor, kind: str = "mean", *, channels: int = 1) -> Tensor:
    """Eq. 2: the distance of the branch's ``z_r`` to the trunk's ``z_s``, which gets no gradient.

    Args:
        z_r, z_s: ``(B, C_r, r, r)``, or with their channels on another axis, ``channels``.
        kind: "mean" squared difference over all elements (paper-and-code: mean in Eq. 2);
            "batch_sum": its sum over the batch size V, as Eq. 2 is written (C_r r r times as
            large); "cosine": 1 - cosine over channels, mean over positions.

    Raises:
        ConfigError: the shapes differ, or an unknown kind.
    """
    if z_r.shape != z_s.shape:
        shapes = f"got z_r {tuple(z_r.shape)} and z_s {tuple(z_s.shape)}, expected one shape"
        raise ConfigError(f"branch_loss: {shapes}")
    z_r, z_s = at_least_float32(z_r), at_least_float32(z_s).detach()
    if kind == "mean":
        return F.mse_loss(z_r, z_s)
    if kind == "batch_sum":
        return F.mse_loss(z_r, z_s, reduction="sum") / len(z_r)
    if kind == "cosine":
        return 1 - F.cosine_similarity(z_r, z_s, dim=channels, eps=1e-6).mean()
    raise ConfigError(f"distillation: got {kind!r}, expected mean, batch_sum or cosine")


def embedding_loss(z: Tensor, z_teacher: Tensor, kind: str = "mse") -> Tensor:
    """The distance of embeddings ``(B, D)``; no gradient into the teacher's.

    Args:
        kind: "mse", the mean squared difference of the un-normalised ones (paper-and-code:
            embedding MSE); "cosine", 1 - cosine, the distance by which faces are compared.

    Raises:
        ConfigError: an unknown kind.
    """
    z, z_teacher = at_least_float32(z), at_least_float32(z_teacher).detach()
    if kind == "mse":
        return F.mse_loss(z, z_teacher)
    if kind == "cosine":
        return 1 - F.cosine_similarity(z, z_teacher).mean()
    raise ConfigError(f"embedding: got {kind!r}, expected mse or cosine")


MARGINS: dict[str, type[Margin]] = {
    "normface": Margin,
    "sphereface": SphereFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "curricularface": CurricularFace,
    "adaface": AdaFace,
}
METRICS = ("triplet", "center", "circle")


def build_margin(name: str, *, margin: float | None = None, s: float | None = None) -> Margin:
    """A margin by its name in ``MARGINS``, with the published m and s where they are None."""
    if name not in MARGINS:
        raise ConfigError(f"loss: got {name!r}, expected one of {', '.join([*MARGINS, *METRICS])}")
    return MARGINS[name](margin=margin, s=s)
