"""Losses: equation, gradient, identity without margin, behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from btnet_core.errors import ConfigError
from btnet_core.losses import (
    MARGINS,
    AdaFace,
    ArcFace,
    Center,
    Circle,
    CosFace,
    CurricularFace,
    MagFace,
    Margin,
    Triplet,
    branch_loss,
    build_margin,
    embedding_loss,
)

B, C = 6, 11


def cosines(
    seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosine = (torch.rand(B, C, generator=generator, dtype=torch.float64) * 1.8 - 0.9).to(dtype)
    labels = torch.randint(0, C, (B,), generator=generator)
    norms = (torch.rand(B, generator=generator, dtype=torch.float64) * 60 + 20).to(dtype)
    return cosine, labels, norms


def positive(name: str, cosine: float, norm: float = 0.0) -> float:
    """What the papers write, with acos; independent of the implementation."""
    theta = math.acos(cosine)
    if name == "sphereface":
        k = math.floor(1.5 * theta / math.pi)
        return (-1) ** k * math.cos(1.5 * theta) - 2 * k
    if name == "cosface":
        return cosine - 0.35
    if name in ("arcface", "curricularface"):
        return math.cos(theta + 0.5) if theta + 0.5 <= math.pi else cosine - 0.5 * math.sin(0.5)
    return cosine


@pytest.mark.parametrize("name", ["normface", "sphereface", "cosface", "arcface", "curricularface"])
def test_the_equation(name: str) -> None:
    cosine, labels, _ = cosines()
    margin = build_margin(name).eval()
    logits = margin(cosine, labels)
    for row, label in enumerate(labels.tolist()):
        value = positive(name, cosine[row, label].item())
        assert logits[row, label].item() == pytest.approx(margin.scale * value, abs=1e-4)
        for column in set(range(C)) - {label}:
            expected = cosine[row, column].item()
            if name == "curricularface" and expected > math.cos(
                math.acos(cosine[row, label].item()) + 0.5
            ):
                expected *= margin.t.item() + expected
            assert logits[row, column].item() == pytest.approx(margin.scale * expected, abs=1e-4)


@pytest.mark.parametrize("name", list(MARGINS))
def test_identity_without_a_margin(name: str) -> None:
    """At margin 0 every margin loss is the scaled softmax (CurricularFace where no negative is harder)."""
    cosine, labels, norms = cosines()
    margin = build_margin(name, margin=MARGINS[name].identity_margin, scale=16.0).eval()
    if name == "magface":
        margin = MagFace(margin=0.0, scale=16.0).eval()
    if name == "curricularface":
        cosine[torch.arange(B), labels] = 0.95
    loss = F.cross_entropy(margin(cosine, labels, norms=norms), labels)
    torch.testing.assert_close(loss, F.cross_entropy(16 * cosine, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(MARGINS))
def test_true_gradient(name: str) -> None:
    """float64, against finite differences; target and norms are constants of the step, as in the papers."""
    cosine, labels, norms = cosines(1)
    margin = build_margin(name, scale=4.0).eval()
    target = cosine[torch.arange(B), labels].clone()
    cosine.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: F.cross_entropy(margin(c, labels, target, norms), labels), (cosine,)
    )


@pytest.mark.parametrize("name", list(MARGINS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_the_edges(name: str, dtype: torch.dtype) -> None:
    cosine = torch.tensor(
        [[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [0.0, 1.0, 1.0]], dtype=dtype, requires_grad=True
    )
    labels, norms = torch.tensor([0, 0, 2]), torch.tensor([1e-3, 20.0, 500.0])
    logits = build_margin(name)(cosine, labels, norms=norms)
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cosine.grad).all()
    assert cosine.grad[1].abs().sum() > 0


def test_published_defaults() -> None:
    assert [(m.margin, m.scale) for m in (ArcFace(), CosFace(), CurricularFace(), Margin())] == [
        (0.5, 64), (0.35, 64), (0.5, 64), (0.0, 64),
    ]  # fmt: skip
    curricular = CurricularFace()
    assert (curricular.alpha, curricular.t.item()) == (0.99, 0.0)


def test_curricular_t_follows_its_equation_in_training_only() -> None:
    cosine, labels, _ = cosines()
    margin = CurricularFace()
    t = 0.0
    for step in range(3):
        shifted = cosine * (0.9 - 0.1 * step)
        margin(shifted, labels)
        t = 0.99 * shifted[torch.arange(B), labels].mean().item() + 0.01 * t
        assert margin.t.item() == pytest.approx(t, abs=1e-6)
    margin.eval()(cosine, labels)
    assert margin.t.item() == pytest.approx(t, abs=1e-6)
    assert "t" in margin.state_dict()


def test_arcface_keeps_falling_beyond_pi_minus_m() -> None:
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    logits = ArcFace(scale=1.0)(angles.cos()[:, None], torch.zeros(200, dtype=torch.long))[:, 0]
    assert (logits.diff() < 0).all()


def test_adaface_and_magface_depend_on_quality() -> None:
    """AdaFace: angular margin -m q, additive m + m q; MagFace: margin grows with the norm, g(a) falls towards u_a."""
    cosine, labels, _ = torch.full((2, 3), 0.5), torch.tensor([0, 0]), None
    ada = AdaFace().eval()
    low, high = ada(cosine, labels, norms=torch.tensor([1.0, 100.0]))[:, 0].tolist()
    assert low != high
    mag = MagFace().eval()
    easy, hard = mag(cosine, labels, norms=torch.tensor([10.0, 110.0]))[:, 0].tolist()
    assert easy > hard
    penalty = mag.penalty(torch.tensor([20.0, 60.0, 110.0]))
    assert penalty[0] > penalty[1] > penalty[2]
    with pytest.raises(ConfigError, match="norms"):
        ada(cosine, labels)


def test_shards_equal_the_whole() -> None:
    cosine, labels, norms = cosines(2, torch.float32)
    target = cosine[torch.arange(B), labels]
    for name in MARGINS:
        whole = build_margin(name).eval()(cosine, labels, norms=norms)
        parts = []
        for first, last in ((0, 4), (4, C)):
            column = torch.where((labels >= first) & (labels < last), labels - first, -1)
            parts.append(build_margin(name).eval()(cosine[:, first:last], column, target, norms))
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_bad_arguments() -> None:
    for make in (lambda: ArcFace(margin=-1), lambda: CosFace(scale=0), lambda: build_margin("nosuchface"),
                 lambda: CurricularFace(alpha=2)):  # fmt: skip
        with pytest.raises(ConfigError):
            make()


# ---- metric losses ----


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return z, torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])


def test_triplet_is_batch_hard_by_brute_force() -> None:
    z, labels = embeddings()
    unit, hardest = F.normalize(z), []
    for i in range(8):
        distance = [(unit[i] - unit[j]).square().sum().item() for j in range(8)]
        same = [distance[j] for j in range(8) if j != i and labels[j] == labels[i]]
        other = [distance[j] for j in range(8) if labels[j] != labels[i]]
        hardest.append(max(0.0, max(same) - min(other) + 0.2))
    assert Triplet()(z, labels).item() == pytest.approx(sum(hardest) / 8, abs=1e-6)


def test_circle_by_brute_force() -> None:
    z, labels = embeddings()
    unit, m, gamma = F.normalize(z), 0.25, 8.0
    losses = []
    for i in range(8):
        s = [(unit[i] @ unit[j]).item() for j in range(8)]
        p = [
            -gamma * max(0.0, 1 + m - s[j]) * (s[j] - (1 - m))
            for j in range(8)
            if j != i and labels[j] == labels[i]
        ]
        n = [gamma * max(0.0, s[j] + m) * (s[j] - m) for j in range(8) if labels[j] != labels[i]]
        losses.append(math.log1p(sum(map(math.exp, n)) * sum(map(math.exp, p))))
    assert Circle(margin=m, gamma=gamma)(z, labels).item() == pytest.approx(
        sum(losses) / 8, rel=1e-6
    )


@pytest.mark.parametrize("make", [Triplet, lambda: Circle(gamma=4.0)])
def test_metric_losses_have_finite_gradients(make) -> None:
    z, labels = embeddings()
    z.requires_grad_()
    make()(z, labels).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0


def test_center_pulls_towards_centres_that_follow() -> None:
    z, labels = embeddings()
    center = Center(3, 5)
    first = center(z.float(), labels)
    assert first.item() == pytest.approx(0.5 * z.square().sum(1).mean().item(), rel=1e-5)
    for _ in range(60):
        last = center(z.float(), labels)
    assert last < first


def test_branch_loss_variants() -> None:
    a, b = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert branch_loss(a, b).item() == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    assert branch_loss(a, b, "batch_sum").item() == pytest.approx(
        12 * branch_loss(a, b).item(), rel=1e-5
    )
    assert branch_loss(a, 3 * a, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert branch_loss(a, -a, "cosine").item() == pytest.approx(2, abs=1e-5)
    assert embedding_loss(a[:, :, 0, 0], b[:, :, 0, 0]) > 0
    with pytest.raises(ConfigError):
        branch_loss(a, b, "l1")
