"""Losses against formulae written here in plain Python, and their gradients against differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
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
    Margin,
    SphereFace,
    Triplet,
    branch_loss,
    build_margin,
    embedding_loss,
)

B, C = 8, 11
# m of each loss: the published one, and one that reaches its other cases
CASES = [("normface", 0.0), ("sphereface", 1.5), ("sphereface", 4.0), ("cosface", 0.35), ("arcface", 0.5),
         ("arcface", 1.2), ("curricularface", 0.5), ("adaface", 0.4), ("adaface", 0.7)]  # fmt: skip


def cosines(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines ``(B, C)``, labels, and norms on both sides of AdaFace's mean; all angles occur."""
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(B, C, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    labels = torch.randint(0, C, (B,), generator=generator)
    angles = torch.linspace(0.1, math.pi - 0.1, B, dtype=torch.float64)
    cosine[torch.arange(B), labels] = angles.cos()
    norms = torch.tensor([500.0, 5.0, 19.0, 21.0, 40.0, 80.0, 99.0, 1e-4], dtype=torch.float64)
    return cosine.to(dtype), labels, norms.to(dtype)


# ---- the margins as their papers write them, on floats ----


def true_class(name: str, m: float, cosine: float, norm: float, mean: float, std: float) -> float:
    """T(cos theta_y)."""
    theta = math.acos(cosine)
    if name == "sphereface":
        k = math.floor(m * theta / math.pi)
        return (-1) ** k * math.cos(m * theta) - 2 * k
    if name == "cosface":
        return cosine - m
    if name in ("arcface", "curricularface"):
        return math.cos(theta + m) if theta + m <= math.pi else cosine - m * math.sin(m)
    if name == "adaface":
        norm = min(max(norm, 1e-3), 100.0)
        q = min(max(0.333 * (norm - mean) / (std + 1e-3), -1.0), 1.0)
        return math.cos(min(max(theta - m * q, 1e-3), math.pi - 1e-3)) - m * (1 + q)
    return cosine


def other_class(name: str, m: float, cosine: float, target: float, t: float) -> float:
    """N(cos theta_j)."""
    hard = name == "curricularface" and cosine > math.cos(math.acos(target) + m)
    return cosine * (t + cosine) if hard else cosine


def logits_of(name: str, m: float, s: float, cosine: list[list[float]], labels: list[int], norms: list[float],
              targets: list[float], *, t: float = 0.0, mean: float = 20.0, std: float = 100.0) -> list[list[float]]:  # fmt: skip
    """All logits; ``targets``, ``t``, ``mean`` and ``std`` are constants of the step."""
    return [
        [
            s * true_class(name, m, value, norms[i], mean, std)
            if j == labels[i]
            else s * other_class(name, m, value, targets[i], t)
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(cosine)
    ]


def cross_entropy(logits: list[list[float]], labels: list[int]) -> float:
    rows = zip(logits, labels, strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in rows) / len(labels)


def differences(function: Callable[[list[list[float]]], float], at: Tensor) -> Tensor:
    """The gradient of ``function`` of a matrix of floats, by central differences."""
    gradient, step = torch.zeros_like(at), 1e-6
    for i in range(at.shape[0]):
        for j in range(at.shape[1]):
            moved = at.clone()
            moved[i, j] += step
            above = function(moved.tolist())
            moved[i, j] -= 2 * step
            gradient[i, j] = (above - function(moved.tolist())) / (2 * step)
    return gradient


@pytest.mark.parametrize(("name", "m"), CASES)
def test_margin_values_and_gradients(name: str, m: float) -> None:
    cosine, labels, norms = cosines()
    margin = build_margin(name, margin=m, s=4.0).eval()
    state = {"t": 0.3} if name == "curricularface" else {}
    if name == "curricularface":
        margin.t.fill_(0.3)
    if name == "adaface":
        margin.mean.fill_(30.0), margin.std.fill_(8.0)
        state = {"mean": 30.0, "std": 8.0}
    targets = cosine[torch.arange(B), labels].tolist()

    def by_hand(values: list[list[float]]) -> list[list[float]]:
        given = (labels.tolist(), norms.tolist(), targets)
        return logits_of(name, m, 4.0, values, *given, **state)

    cosine.requires_grad_()
    logits = margin(cosine, labels, norms=norms)
    expected = torch.tensor(by_hand(cosine.tolist()), dtype=torch.float64)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    F.cross_entropy(logits, labels).backward()
    gradient = differences(lambda v: cross_entropy(by_hand(v), labels.tolist()), cosine.detach())
    torch.testing.assert_close(cosine.grad, gradient, atol=1e-6, rtol=1e-6)


def test_the_cases_reach_every_part_of_the_equations() -> None:
    """Else a wrong part would pass: k of SphereFace, the end of ArcFace, hard negatives, AdaFace's clip."""
    cosine, labels, norms = cosines()
    target = cosine[torch.arange(B), labels]
    assert {math.floor(4 * theta / math.pi) for theta in target.acos().tolist()} == {0, 1, 2, 3}
    assert ((target.acos() + 0.5) > math.pi).any()
    hard = cosine > (target.acos() + 0.5).cos()[:, None]
    hard[torch.arange(B), labels] = False
    assert hard.any()
    assert not hard.all()
    q = 0.333 * (norms.clamp(1e-3, 100) - 30) / 8.001
    assert (q < -1).any()
    assert (q > 1).any()
    assert ((q > 0) & (q < 1)).any()
    angle = target.acos() - 0.4 * q.clamp(-1, 1)
    assert (angle < 0).any()
    assert (angle > math.pi).any()


@pytest.mark.parametrize("name", list(MARGINS))
def test_gradcheck(name: str) -> None:
    """Autograd of float64 against its own differences; target and norms are constants of the step."""
    cosine, labels, norms = cosines(1)
    margin = build_margin(name, s=4.0).eval()
    target = cosine[torch.arange(B), labels].clone()
    cosine.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: F.cross_entropy(margin(c, labels, target, norms), labels), (cosine,)
    )


@pytest.mark.parametrize("name", list(MARGINS))
def test_without_a_margin_it_is_the_scaled_softmax(name: str) -> None:
    cosine, labels, norms = cosines()
    if name == "curricularface":  # where no negative is harder
        cosine[torch.arange(B), labels] = 0.95
    margin = build_margin(name, margin=1.0 if name == "sphereface" else 0.0, s=16.0).eval()
    torch.testing.assert_close(margin(cosine, labels, norms=norms), 16 * cosine)


@pytest.mark.parametrize("name", list(MARGINS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_the_edges(name: str, dtype: torch.dtype) -> None:
    edges = [[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [0.0, 1.0, 1.0]]
    cosine = torch.tensor(edges, dtype=dtype, requires_grad=True)
    labels, norms = torch.tensor([0, 0, 2]), torch.tensor([1e-3, 20.0, 500.0])
    logits = build_margin(name)(cosine, labels, norms=norms)
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cosine.grad).all()
    assert cosine.grad[1].abs().sum() > 0


def test_published_defaults() -> None:
    published = {Margin: (0.0, 64), SphereFace: (1.5, 30), CosFace: (0.35, 64), ArcFace: (0.5, 64),
                 CurricularFace: (0.5, 64), AdaFace: (0.4, 64)}  # fmt: skip
    assert {kind: (kind().margin, kind().s) for kind in MARGINS.values()} == published
    curricular, ada = CurricularFace(), AdaFace()
    assert (curricular.alpha, curricular.t.item()) == (0.99, 0.0)
    assert (ada.h, ada.mean.item(), ada.std.item()) == (0.333, 20.0, 100.0)


def test_curricular_t_moves_before_it_is_used_and_in_training_only() -> None:
    cosine, labels, norms = cosines()
    margin, t = CurricularFace(s=1.0), 0.0
    for step in range(3):
        values = cosine * (0.9 - 0.1 * step)
        targets = values[torch.arange(B), labels].tolist()
        t = 0.99 * sum(targets) / B + 0.01 * t
        given = (values.tolist(), labels.tolist(), norms.tolist(), targets)
        expected = logits_of("curricularface", 0.5, 1.0, *given, t=t)
        got = margin(values, labels)
        torch.testing.assert_close(got, torch.tensor(expected).to(got), atol=1e-6, rtol=0)
        assert margin.t.item() == pytest.approx(t, abs=1e-6)
    margin.eval()(cosine, labels)
    assert margin.t.item() == pytest.approx(t, abs=1e-6)
    assert "t" in margin.state_dict()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_curricular_alpha_weighs_the_batch(alpha: float) -> None:
    cosine, labels, _ = cosines()
    margin = CurricularFace()
    margin.alpha = alpha
    margin.t.fill_(0.2)
    margin(cosine, labels)
    mean = cosine[torch.arange(B), labels].mean().item()
    assert margin.t.item() == pytest.approx(mean if alpha else 0.2)


def test_curricular_target_is_a_constant() -> None:
    """No gradient through the threshold's and t's cosine of the true class (the values are above)."""
    cosine, labels, _ = cosines()
    target = cosine[torch.arange(B), labels].clone().requires_grad_()
    cosine.requires_grad_()
    margin = CurricularFace()
    margin(cosine, labels, target).sum().backward()
    assert target.grad is None
    assert not margin.t.requires_grad


def test_adaface_statistics_move_before_they_are_used_and_in_training_only() -> None:
    cosine, labels, norms = cosines()
    margin, mean, std = AdaFace(s=1.0), 20.0, 100.0
    for step in range(3):
        lengths = [min(max(n, 1e-3), 100.0) for n in (norms / (1 + step)).tolist()]
        average = sum(lengths) / B
        deviation = math.sqrt(sum((n - average) ** 2 for n in lengths) / (B - 1))
        mean, std = 0.99 * mean + 0.01 * average, 0.99 * std + 0.01 * deviation
        targets = cosine[torch.arange(B), labels].tolist()
        given = (cosine.tolist(), labels.tolist(), lengths, targets)
        expected = logits_of("adaface", 0.4, 1.0, *given, mean=mean, std=std)
        got = margin(cosine, labels, norms=norms / (1 + step))
        torch.testing.assert_close(got, torch.tensor(expected).to(got), atol=1e-6, rtol=0)
        assert (margin.mean.item(), margin.std.item()) == pytest.approx((mean, std), rel=1e-6)
    margin.eval()(cosine, labels, norms=norms)
    assert margin.mean.item() == pytest.approx(mean, rel=1e-6)
    assert {"mean", "std"} <= margin.state_dict().keys()


def test_adaface_statistics_of_few_and_of_tiny_norms() -> None:
    """One face has no deviation and moves nothing; norms are cut to 0.001 at least."""
    for norms in ([7.0], [7.0, 9.0], [0.0, 0.0]):
        margin, several = AdaFace(), len(norms) > 1
        margin.mean.fill_(0.0), margin.std.fill_(0.0)
        cosine, column = torch.zeros(len(norms), 2), torch.zeros(len(norms), dtype=torch.int64)
        margin(cosine, column, norms=torch.tensor(norms))
        mean = max(1e-3, sum(norms) / len(norms)) if several else 0.0
        assert margin.mean.item() == pytest.approx(0.01 * mean)
        deviation = math.sqrt(2) if norms == [7.0, 9.0] else 0.0
        assert margin.std.item() == pytest.approx(0.01 * deviation)


def test_adaface_quality_is_a_constant() -> None:
    cosine, labels, norms = cosines()
    norms.requires_grad_()
    cosine.requires_grad_()
    margin = AdaFace()
    margin(cosine, labels, norms=norms).sum().backward()
    assert norms.grad is None
    assert not margin.mean.requires_grad
    with pytest.raises(ConfigError, match="AdaFace needs the norms"):
        margin(cosine, labels)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(MARGINS))
def test_shards_equal_the_whole(name: str, training: bool) -> None:
    cosine, labels, norms = cosines(2, torch.float32)
    target = cosine[torch.arange(B), labels]
    whole = build_margin(name).train(training)(cosine, labels, norms=norms)
    parts = []
    for first, last in ((0, 4), (4, C)):
        column = torch.where((labels >= first) & (labels < last), labels - first, -1)
        margin = build_margin(name).train(training)
        parts.append(margin(cosine[:, first:last], column, target, norms))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)


def test_a_shard_needs_the_targets_of_the_others() -> None:
    cosine, labels, _ = cosines()
    with pytest.raises(ConfigError, match=r"^target: needed"):
        ArcFace()(cosine[:, :3], torch.where(labels < 3, labels, -1))


@pytest.mark.parametrize(("make", "told"), [
    (lambda: ArcFace(margin=-1), "ArcFace: got margin -1, s None; expected m >= 0, s > 0"),
    (lambda: ArcFace(margin=math.nan), "ArcFace: got margin nan"),
    (lambda: ArcFace(margin=math.inf), "ArcFace: got margin inf"),
    (lambda: CosFace(s=0), "CosFace: got margin None, s 0"),
    (lambda: CosFace(s=math.inf), "CosFace: got margin None, s inf"),
    (lambda: build_margin("nosuchface"), "got 'nosuchface', expected one of normface, sphereface,"),
])  # fmt: skip
def test_bad_arguments(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


# ---- metric losses ----

LABELS = [0, 0, 1, 1, 2, 2, 2, 0, 3]  # 3 has no positive: no anchor


def embeddings() -> tuple[Tensor, Tensor]:
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return z, torch.tensor(LABELS)


def cosines_between(z: list[list[float]]) -> list[list[float]]:
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in z]
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in unit] for x in unit]


def partners(i: int) -> tuple[list[int], list[int]]:
    others = [j for j in range(len(LABELS)) if j != i]
    same = [j for j in others if LABELS[j] == LABELS[i]]
    return same, [j for j in others if LABELS[j] != LABELS[i]]


def triplet_by_hand(z: list[list[float]]) -> float:
    s, terms = cosines_between(z), []
    for i in range(len(z) - 1):
        same, other = partners(i)
        farthest = max(2 - 2 * s[i][j] for j in same)
        terms.append(max(0.0, farthest - min(2 - 2 * s[i][j] for j in other) + 0.2))
    return sum(terms) / len(terms)


def circle_by_hand(z: list[list[float]], weights: list[list[float]], m: float, g: float) -> float:
    """``weights`` are the cosines in a_p and a_n, which carry no gradient."""
    s, terms = cosines_between(z), []
    for i in range(len(z) - 1):
        same, other = partners(i)
        p = [-g * max(0.0, 1 + m - weights[i][j]) * (s[i][j] - (1 - m)) for j in same]
        n = [g * max(0.0, weights[i][j] + m) * (s[i][j] - m) for j in other]
        terms.append(math.log1p(sum(map(math.exp, n)) * sum(map(math.exp, p))))
    return sum(terms) / len(terms)


def test_triplet_values_and_gradients() -> None:
    z, labels = embeddings()
    z.requires_grad_()
    loss = Triplet()(z, labels)
    assert loss.item() == pytest.approx(triplet_by_hand(z.tolist()), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(z.grad, differences(triplet_by_hand, z.detach()), atol=1e-8, rtol=0)


def test_circle_values_and_gradients() -> None:
    z, labels = embeddings()
    weights = cosines_between(z.tolist())
    z.requires_grad_()
    circle = Circle()
    circle.gamma = 8.0
    loss = circle(z, labels)
    assert loss.item() == pytest.approx(circle_by_hand(z.tolist(), weights, 0.25, 8.0), rel=1e-9)
    loss.backward()
    gradient = differences(lambda v: circle_by_hand(v, weights, 0.25, 8.0), z.detach())
    torch.testing.assert_close(z.grad, gradient, atol=1e-7, rtol=0)


def test_circle_defaults_and_large_gamma() -> None:
    z, labels = embeddings()
    circle = Circle()
    assert (circle.margin, circle.gamma) == (0.25, 256.0)
    z.requires_grad_()
    circle(z, labels).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", [Triplet(), Circle()])
@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0]])
def test_a_batch_without_anchors_costs_nothing(loss: Callable, labels: list[int]) -> None:
    z = torch.randn(3, 4, requires_grad=True)
    value = loss(z, torch.tensor(labels))
    value.backward()
    assert value.item() == 0
    assert z.grad.abs().sum() == 0


def test_center_values_gradients_and_how_centres_move() -> None:
    """c_j moves by alpha sum (z_i - c_j) / (1 + n_j), after the loss, in training only."""
    z, labels = embeddings()
    center = Center(5, 4).double()
    centres = [[0.1 * (j + k) for k in range(4)] for j in range(5)]
    center.centres.copy_(torch.tensor(centres, dtype=torch.float64))
    z.requires_grad_()
    loss = center(z, labels)
    difference = [
        [a - c for a, c in zip(row, centres[y], strict=True)]
        for row, y in zip(z.tolist(), LABELS, strict=True)
    ]
    expected = sum(sum(d * d for d in row) for row in difference) / (2 * len(LABELS))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    gradient = torch.tensor(difference, dtype=torch.float64) / len(LABELS)
    torch.testing.assert_close(z.grad, gradient, rtol=1e-12, atol=0)
    for j in range(5):
        rows = [row for row, y in zip(difference, LABELS, strict=True) if y == j]
        moved = [
            c + 0.5 * sum(r[k] for r in rows) / (1 + len(rows)) for k, c in enumerate(centres[j])
        ]
        assert center.centres[j].tolist() == pytest.approx(moved, rel=1e-12)
    before = center.centres.clone()
    center.eval()(z, labels)
    assert torch.equal(center.centres, before)
    assert "centres" in center.state_dict()


def test_centres_of_float32_take_embeddings_of_float64() -> None:
    z, labels = embeddings()
    single, double = Center(5, 4), Center(5, 4).double()
    assert single(z, labels).item() == pytest.approx(double(z, labels).item(), rel=1e-12)
    torch.testing.assert_close(single.centres, double.centres.float())


# ---- distillation ----


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 3, 5, 2, 2, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def cosine_of(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def branch_by_hand(a: list, b: list, kind: str) -> float:
    flat = [torch.tensor(x, dtype=torch.float64).view(3, 5, 4) for x in (a, b)]
    if kind == "cosine":
        places = [(i, p) for i in range(3) for p in range(4)]
        rows = [[x[i, :, p].tolist() for x in flat] for i, p in places]
        return sum(1 - cosine_of(*row) for row in rows) / len(rows)
    squares = sum(d * d for d in (flat[0] - flat[1]).flatten().tolist())
    return squares / (60 if kind == "mean" else 3)


@pytest.mark.parametrize("kind", ["mean", "batch_sum", "cosine"])
def test_branch_loss_values_and_gradients(kind: str) -> None:
    z_r, z_s = maps()
    loss = branch_loss(z_r, z_s, kind)
    assert kind != "mean" or torch.equal(loss, branch_loss(z_r, z_s)), "the default"
    assert loss.item() == pytest.approx(branch_by_hand(z_r.tolist(), z_s.tolist(), kind), rel=1e-9)
    loss.backward()
    assert z_s.grad is None, "the teacher's map learns"
    matrix = z_r.detach().view(3, -1)
    gradient = differences(lambda v: branch_by_hand(v, z_s.tolist(), kind), matrix)
    torch.testing.assert_close(z_r.grad.view(3, -1), gradient, atol=1e-8, rtol=0)


def test_branch_loss_of_channels_last_maps() -> None:
    z_r, z_s = maps()
    last = (z_r.permute(0, 2, 3, 1), z_s.permute(0, 2, 3, 1))
    assert branch_loss(*last, "cosine", channels=3).item() == pytest.approx(
        branch_loss(z_r, z_s, "cosine").item()
    )


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_embedding_loss_values_and_gradients(kind: str) -> None:
    z, teacher = embeddings()[0].requires_grad_(), (embeddings()[0] + 0.3).requires_grad_()

    def by_hand(values: list[list[float]]) -> float:
        rows = list(zip(values, teacher.tolist(), strict=True))
        if kind == "cosine":
            return sum(1 - cosine_of(*row) for row in rows) / len(rows)
        squares = [(x - y) ** 2 for a, b in rows for x, y in zip(a, b, strict=True)]
        return sum(squares) / len(squares)

    loss = embedding_loss(z, teacher, kind)
    assert loss.item() == pytest.approx(by_hand(z.tolist()), rel=1e-6)
    loss.backward()
    assert teacher.grad is None, "the teacher learns"
    torch.testing.assert_close(z.grad, differences(by_hand, z.detach()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 4, 64, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in ("mean", "batch_sum", "cosine"):
        exact = branch_loss(a.double(), b.double(), kind)
        assert branch_loss(a, b, kind).item() == pytest.approx(exact.item(), rel=1e-5)
    exact = embedding_loss(a.flatten(1).double(), b.flatten(1).double())
    assert embedding_loss(a.flatten(1), b.flatten(1)).item() == pytest.approx(
        exact.item(), rel=1e-5
    )


def test_distillation_errors() -> None:
    a = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"l1.*expected mean, batch_sum or cosine"):
        branch_loss(a, a, "l1")
    with pytest.raises(ConfigError, match=r"\(2, 3, 4, 4\) and z_s \(2, 3, 4, 2\)"):
        branch_loss(a, a[..., :2])
    with pytest.raises(ConfigError, match=r"l1.*expected mse or cosine"):
        embedding_loss(a[:, :, 0, 0], a[:, :, 0, 0], "l1")


def test_near_one_the_margin_goes_on_with_slope_one() -> None:
    """Where acos has no finite derivative: beyond 1 - 1e-6 alone."""
    for cosine, inside in ((0.9995, 0.9995), (0.9999995, 1 - 1e-6), (-1.0, -1 + 1e-6)):
        given = torch.tensor([[cosine, 0.0]], dtype=torch.float64, requires_grad=True)
        logits = AdaFace(s=1.0).eval()(given, torch.tensor([0]), norms=torch.tensor([25.0]))
        value = true_class("adaface", 0.4, inside, 25.0, 20.0, 100.0) + cosine - inside
        assert logits[0, 0].item() == pytest.approx(value, abs=1e-9)
        logits[0, 0].backward()
        assert (given.grad[0, 0].item() == pytest.approx(1.0)) == (inside != cosine)
