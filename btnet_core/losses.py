"""Losses: margins over cosines, metric losses, and the distillation at the coupling layer (Section 3.3).

A margin turns cosines into logits and leaves the softmax to the caller, so that a classifier cut over several
processes needs one exchange only: each process holds the cosines ``(B, C_shard)`` of its own classes, ``column``
``(B,)`` says where in the shard the true class is (-1: on another process), ``target`` ``(B,)`` is the cosine of the
true class wherever it lives. Nothing else depends on the number of processes (paper-and-code: CurricularFace over processes).

Half-precision cosines are computed in float32. Near |cos| = 1 the angle has no finite derivative; there the
margin continues with slope 1 (``_extended``), so the value is right to 1e-6 and the gradient neither NaN nor zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.errors import ConfigError

EDGE = 1e-6  # cosines beyond 1 - EDGE are continued linearly


def _extended(function: Callable[[Tensor], Tensor], cosine: Tensor) -> Tensor:
    inner = cosine.clamp(-1 + EDGE, 1 - EDGE)
    return function(inner) + (cosine - inner)


def _add_angle(cosine: Tensor, angle: float | Tensor) -> Tensor:
    """cos(theta + angle), written without acos."""
    if not isinstance(angle, Tensor):
        angle = cosine.new_tensor(angle)
    sine = (1 - cosine * cosine).sqrt()
    return cosine * angle.cos() - sine * angle.sin()


def _add_angle_monotone(cosine: Tensor, angle: float | Tensor) -> Tensor:
    """cos(theta + m) up to theta = pi - m, then cos(theta) - m sin(m): keeps falling where cos(theta + m) would rise."""
    if not isinstance(angle, Tensor):
        angle = cosine.new_tensor(angle)
    return torch.where(
        cosine > -angle.cos(), _add_angle(cosine, angle), cosine - angle * angle.sin()
    )


class Margin(nn.Module):
    """NormFace (Wang et al. 2017), the base of the others: ``s cos(theta_j)``, no margin.

    Args:
        margin: m; the unit depends on the loss (radians, cosine or factor).
        scale: s, the length that normalised embeddings are given.
    """

    default_margin, default_scale, identity_margin = 0.0, 64.0, 0.0

    def __init__(self, *, margin: float | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.margin = self.default_margin if margin is None else float(margin)
        self.scale = self.default_scale if scale is None else float(scale)
        if not (
            math.isfinite(self.margin)
            and self.margin >= 0
            and math.isfinite(self.scale)
            and self.scale > 0
        ):
            raise ConfigError(
                f"{type(self).__name__}: got margin {margin}, scale {scale}; expected m >= 0, s > 0"
            )

    def forward(
        self,
        cosine: Tensor,
        column: Tensor,
        target: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, C_shard)`` in float32 (float64 if given so).

        Args:
            cosine: ``(B, C_shard)`` in [-1, 1].
            column: ``(B,)`` int64, the true class within the shard, -1 if it is elsewhere.
            target: ``(B,)`` cosine of the true class, without gradient; taken from ``cosine`` if there is one shard.
            norms: ``(B,)`` lengths of the embeddings (AdaFace, MagFace).
        """
        if cosine.dtype in (torch.float16, torch.bfloat16):
            cosine = cosine.float()
        if self.needs_norms and norms is None:
            raise ConfigError(f"{type(self).__name__} needs the norms of the embeddings")
        rows = torch.nonzero(column >= 0).squeeze(1)
        own = cosine[rows, column[rows]]
        if target is None:
            if rows.numel() != column.numel():
                raise ConfigError("target: needed where some labels are on another shard")
            target = own
        target = target.detach().to(cosine.dtype)
        if self.training:
            self.observe(target, norms)
        positive = _extended(
            lambda c: self.positive(c, None if norms is None else norms[rows].to(c.dtype)), own
        )
        logits = self.negatives(cosine, target).index_put((rows, column[rows]), positive)
        return logits * self.scale

    needs_norms = False

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        """T(cos theta_y) ``(P,)``."""
        return cosine

    def negatives(self, cosine: Tensor, target: Tensor) -> Tensor:
        """N(cos theta_j) ``(B, C_shard)``; the true class's entry is replaced afterwards."""
        return cosine

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        """Update running statistics from the whole batch (same on every process)."""

    def penalty(self, norms: Tensor) -> Tensor | None:
        """A term of each sample ``(B,)`` beside the softmax; None where the loss has none."""
        return None


class SphereFace(Margin):
    """``psi(theta_y) = (-1)^k cos(m theta_y) - 2k``, k = floor(m theta_y / pi) (Liu et al. 2017, A-Softmax); identity at m = 1.

    Deviation: embeddings are normalised and scaled (s = 30, m = 1.5 of SphereFace Revived, Liu et al. 2022) instead of
    m = 4 on unnormalised ones with annealing, so that it is a function of cosines like the rest.
    """

    default_margin, default_scale, identity_margin = 1.5, 30.0, 1.0

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        angle = cosine.acos() * self.margin
        k = (angle.detach() / math.pi).floor()
        return (1 - 2 * k.remainder(2)) * angle.cos() - 2 * k


class CosFace(Margin):
    """``cos(theta_y) - m`` (Wang et al. 2018); m = 0.35 is the paper's, in units of cosine."""

    default_margin = 0.35

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        return cosine - self.margin


class ArcFace(Margin):
    """``cos(theta_y + m)``, m = 0.5 rad (Deng et al. 2019); beyond theta_y = pi - m: ``cos(theta_y) - m sin m``."""

    default_margin = 0.5

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        return _add_angle_monotone(cosine, self.margin)


class CurricularFace(ArcFace):
    """Eq. 1's loss (Huang et al. 2020): ArcFace's positive, and negatives reweighted by the curriculum t.

    ``N(t, cos theta_j) = cos theta_j`` if ``cos(theta_y + m) >= cos theta_j``, else ``cos theta_j (t + cos theta_j)``;
    ``t <- alpha mean_batch(cos theta_y) + (1 - alpha) t`` before each use, alpha = 0.99, t0 = 0. ``t`` is saved state.
    Identity at m = 0 where no negative is harder than the true class (the reweighting does not depend on m otherwise).
    The released code of CurricularFace has 0.01 where the equation has alpha = 0.99; ``alpha=0.01`` gives it.
    """

    t: Tensor

    def __init__(
        self, *, margin: float | None = None, scale: float | None = None, alpha: float = 0.99
    ) -> None:
        super().__init__(margin=margin, scale=scale)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha: got {alpha}, expected 0..1")
        self.alpha = alpha
        self.register_buffer("t", torch.zeros(()))

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        self.t.lerp_(target.mean().to(self.t.dtype), self.alpha)

    def negatives(self, cosine: Tensor, target: Tensor) -> Tensor:
        threshold = _extended(lambda c: _add_angle(c, self.margin), target)[:, None]
        return torch.where(
            cosine > threshold, cosine * (self.t.to(cosine.dtype, copy=True) + cosine), cosine
        )


class AdaFace(Margin):
    """``cos(theta_y - m q) - (m + m q)``, q = clip(h (||z|| - mu) / sigma, -1, 1) (Kim et al. 2022).

    mu, sigma: running mean and deviation of the embedding norms (weight 0.01 for each batch, start 20 and 100);
    m = 0.4, h = 0.333, s = 64. q carries no gradient.
    """

    default_margin, needs_norms = 0.4, True
    mean: Tensor
    std: Tensor

    def __init__(
        self, *, margin: float | None = None, scale: float | None = None, h: float = 0.333
    ) -> None:
        super().__init__(margin=margin, scale=scale)
        self.h = h
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def observe(self, target: Tensor, norms: Tensor | None) -> None:
        if norms is not None and norms.numel() > 1:
            safe = norms.detach().float().clamp(1e-3, 100)
            self.mean.lerp_(safe.mean(), 0.01)
            self.std.lerp_(safe.std(), 0.01)

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        if norms is None:
            raise ConfigError("AdaFace needs the norms of the embeddings")
        quality = (norms.detach().clamp(1e-3, 100) - self.mean) / (self.std + 1e-3)
        quality = (self.h * quality).clamp(-1, 1)
        angle = (
            (cosine.acos() - self.margin * quality).clamp(1e-3, math.pi - 1e-3)
            if self.margin
            else cosine.acos()
        )
        return angle.cos() - self.margin * (1 + quality)


class MagFace(Margin):
    """``cos(theta_y + m(a))``, a = ||z|| in [10, 110], m(a) from 0.45 to 0.8 rad (Meng et al. 2021), plus
    ``lambda_g g(a)``, g(a) = 1/a + a / 110^2, lambda_g = 35. The gradient runs through a.

    ``margin`` is m(110); m(10) keeps the published ratio 0.45 / 0.8. Margin 0 also switches the penalty's reason off;
    set ``lambda_g=0`` with it.
    """

    default_margin, needs_norms = 0.8, True
    low, high = 10.0, 110.0

    def __init__(
        self, *, margin: float | None = None, scale: float | None = None, lambda_g: float = 35.0
    ) -> None:
        super().__init__(margin=margin, scale=scale)
        self.lambda_g = lambda_g

    def positive(self, cosine: Tensor, norms: Tensor | None) -> Tensor:
        if norms is None:
            raise ConfigError("MagFace needs the norms of the embeddings")
        share = (norms.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return _add_angle_monotone(cosine, self.margin * (0.5625 + 0.4375 * share))

    def penalty(self, norms: Tensor) -> Tensor:
        a = norms.clamp(self.low, self.high)
        return self.lambda_g * (1 / a + a / self.high**2)


class Triplet(nn.Module):
    """Batch-hard triplets: ``mean_i max(0, max_p d(i,p) - min_n d(i,n) + m)``, d = squared distance of unit vectors.

    m = 0.2 (Schroff et al. 2015), hardest pairs of the batch (Hermans et al. 2017). Anchors without a positive or a
    negative in the batch are left out; z ``(B, D)``, labels ``(B,)``.
    """

    def __init__(self, *, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        distance = 2 - 2 * _similarities(z)
        positive, negative = _pairs(labels)
        hardest = distance.masked_fill(~positive, -math.inf).amax(1)
        nearest = distance.masked_fill(~negative, math.inf).amin(1)
        anchors = positive.any(1) & negative.any(1)
        return (hardest - nearest + self.margin)[anchors].clamp_min(
            0
        ).sum() / anchors.sum().clamp_min(1)


class Center(nn.Module):
    """``1/2 mean_i ||z_i - c_{y_i}||^2`` (Wen et al. 2016), joined to a softmax with weight 0.003 by the training loop.

    In training the centres move by ``alpha sum_{y_i = j} (z_i - c_j) / (1 + n_j)``, alpha = 0.5, after the loss.
    """

    centres: Tensor

    def __init__(self, num_classes: int, dim: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("centres", torch.zeros(num_classes, dim))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        z = z.double() if z.dtype == torch.float64 else z.float()
        difference = z - self.centres.to(z.dtype, copy=True)[labels]
        if self.training:
            ones = torch.ones_like(labels, dtype=self.centres.dtype)
            count = torch.ones(len(self.centres), dtype=ones.dtype, device=ones.device).index_add_(
                0, labels, ones
            )
            step = difference.detach().to(self.centres.dtype) / count[labels, None]
            self.centres.index_add_(0, labels, step, alpha=self.alpha)
        return difference.square().sum(1).mean() / 2


class Circle(nn.Module):
    """``mean_i log(1 + sum_n e^{gamma a_n (s_n - m)} sum_p e^{-gamma a_p (s_p - 1 + m)})`` over the pairs of anchor i
    (Sun et al. 2020), a_n = [s_n + m]_+, a_p = [1 + m - s_p]_+ without gradient; m = 0.25, gamma = 256 (face recognition).
    """

    def __init__(self, *, margin: float = 0.25, gamma: float = 256.0) -> None:
        super().__init__()
        self.margin, self.gamma = margin, gamma

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        s, m = _similarities(z), self.margin
        positive, negative = _pairs(labels)
        push = self.gamma * (s.detach() + m).clamp_min(0) * (s - m)
        pull = -self.gamma * (1 + m - s.detach()).clamp_min(0) * (s - 1 + m)
        anchors = positive.any(1) & negative.any(1)
        push = push.masked_fill(~negative, -math.inf)[anchors].logsumexp(1)
        pull = pull.masked_fill(~positive, -math.inf)[anchors].logsumexp(1)
        return F.softplus(push + pull).sum() / anchors.sum().clamp_min(1)


def _similarities(z: Tensor) -> Tensor:
    """Cosines of all pairs ``(B, B)``, float32 at least."""
    unit = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
    return unit @ unit.T


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Masks ``(B, B)`` of the positive pairs (not with oneself) and the negative pairs."""
    same = labels[:, None] == labels[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def branch_loss(z_r: Tensor, z_s: Tensor, kind: str = "mean", *, channels: int = 1) -> Tensor:
    """Eq. 2, the distillation of ``z_r`` to the trunk's ``z_s``, both ``(B, C_r, r, r)``; no gradient into ``z_s``.

    ``mean``: squared difference over all elements (paper-and-code: mean in Eq. 2); ``batch_sum``: divided by the batch size V
    alone, as Eq. 2 is written (C_r r r times as large); ``cosine``: 1 - cosine over channels, mean over positions.
    ``channels``: their axis; the gradient lies in memory as the axes are given.
    """
    if z_r.shape != z_s.shape:
        raise ConfigError(
            f"branch_loss: got z_r {tuple(z_r.shape)} and z_s {tuple(z_s.shape)}, expected one shape"
        )
    if z_r.dtype != torch.float64:
        z_r, z_s = z_r.float(), z_s.float()
    z_s = z_s.detach()
    if kind == "cosine":
        return 1 - F.cosine_similarity(z_r, z_s, dim=channels, eps=1e-6).mean()
    if kind not in ("mean", "batch_sum"):
        raise ConfigError(f"distillation: got {kind!r}, expected mean, batch_sum or cosine")
    return (
        F.mse_loss(z_r, z_s) if kind == "mean" else F.mse_loss(z_r, z_s, reduction="sum") / len(z_r)
    )


def embedding_loss(z: Tensor, z_teacher: Tensor, kind: str = "mse") -> Tensor:
    """Distance of the embeddings ``(B, D)``; no gradient into the teacher's.

    ``mse``: mean squared difference of the un-normalised ones (paper-and-code: embedding MSE, the authors' extra); ``cosine``:
    1 - cosine, the distance by which faces are compared.
    """
    z, z_teacher = z.float(), z_teacher.detach().float()
    return (
        F.mse_loss(z, z_teacher) if kind == "mse" else 1 - F.cosine_similarity(z, z_teacher).mean()
    )


MARGINS: dict[str, type[Margin]] = {
    "normface": Margin, "sphereface": SphereFace, "cosface": CosFace, "arcface": ArcFace,
    "curricularface": CurricularFace, "adaface": AdaFace, "magface": MagFace,
}  # fmt: skip
METRICS = ("triplet", "center", "circle")


def build_margin(
    name: str, *, margin: float | None = None, scale: float | None = None, **options: float
) -> Margin:
    """A margin by its name in ``MARGINS``, with the published m and s where they are None."""
    if name not in MARGINS:
        raise ConfigError(f"loss: got {name!r}, expected one of {', '.join([*MARGINS, *METRICS])}")
    return MARGINS[name](margin=margin, scale=scale, **options)
