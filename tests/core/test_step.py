"""A step against the paper's formulae in float64: Eq. 1 to 3, schedule, clipping, decay, momentum."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.images import resize
from btnet_core.models.backbone import Backbone, BackboneConfig
from btnet_core.models.btnet import Route
from btnet_core.training import checkpoint, methods
from btnet_core.training.batches import Batch, branch_input, mirrored, moved
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import fit
from btnet_core.training.progress import Progress, read_metrics
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs, branch_losses, see

FACES = {"kind": "synthetic", "identities": 6, "images": 3, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.0625, embedding=16)
# Large enough that leaving any of them out shows: clip_norm below the norm of most gradients.
STEP = {
    "batch": 6,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "lr": 2.0,
    "momentum": 0.8,
    "weight_decay": 0.02,
    "clip_norm": 0.3,
    "precision": "fp32",
    "s": 8.0,
}
BRANCH = {**STEP, "influence_weight": 0.6, "branch_weight": 0.3, "embedding_weight": 0.2}


@pytest.fixture
def trunk(untrained: Path) -> Path:
    return untrained


def files(trunk: Path) -> tuple[str, str]:
    return str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")


def case(name: str, trunk: Path) -> TrainConfig:
    if name == "center":  # gradients large enough to see its weight of 0.003
        return methods.phi_hr(FACES, backbone=TINY, **{**STEP, "loss": "center"})
    if name == "trunk":
        return methods.phi_hr(FACES, backbone=TINY, **STEP, influence_weight=0.7)
    changes = {
        "branch": {},
        "both mirror images": {"embedding_mirrored": True},
        "trunk learns": {"fix_trunk": False, "fix_classifier": False},
        "no labels": {"influence_weight": 0.0, "embedding_weight": 0.0},
    }
    return methods.phi_bt(FACES, 14, *files(trunk), **{**BRANCH, **changes[name], "cache": "off"})


def in_float64(run: Run) -> None:
    """The run's numbers in double precision; its momentum starts there, too."""
    for module in (run.network, run.trunk, run.kappa, run.metric):
        if module is not None:
            module.double()
    for parameter in run.learns.values():
        run.optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@pytest.fixture
def float64_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def normalise(self: Backbone, pixels: Tensor) -> Tensor:
        return (pixels.double() - self.config.mean) / self.config.std

    monkeypatch.setattr(Backbone, "normalise", normalise)


class ByHand:
    """The same run from the formulae, with weights, momentum and curriculum of its own."""

    def __init__(self, run: Run) -> None:
        self.config, self.network = run.config, copy.deepcopy(run.network)
        self.teacher, self.steps = copy.deepcopy(run.trunk).eval(), run.sampler.steps
        self.weights = {n: p for n, p in self.network.named_parameters() if n in run.trainable}
        self.kappa = None if run.kappa is None else run.kappa.weight.detach().clone()
        self.velocity: dict[str, Tensor] = {}
        self.t = 0.0
        self.centres = torch.zeros(6, 16, dtype=torch.float64)

    def lr(self, step: int) -> float:
        peak, warm, total = 2.0 * 6 / 512, 0.5 * self.steps, 2 * self.steps
        if step < warm:
            return peak * (step + 1) / (warm + 1)
        return peak * ((total - step) / (total - warm)) ** 2

    def softmax(self, z: Tensor, labels: Tensor) -> Tensor:
        """CurricularFace with m = 0.5, or NormFace beside the centre loss; s = 8."""
        cosine = F.normalize(z) @ F.normalize(self.kappa).T
        mine = F.one_hot(labels, 6).bool()
        if self.config.loss == "curricularface":
            m, own = 0.5, cosine[mine][:, None]
            self.t = 0.99 * own.mean().item() + 0.01 * self.t
            plus = own * math.cos(m) - (1 - own**2).sqrt() * math.sin(m)  # cos(theta + m)
            hard = cosine > plus.detach()
            positive = torch.where(own > math.cos(math.pi - m), plus, own - m * math.sin(m))
            cosine = torch.where(hard, cosine * (self.t + cosine), cosine)
            cosine = torch.where(mine, positive, cosine)
        logits = 8.0 * cosine
        return (logits.exp().sum(1).log() - logits[mine]).mean()

    def influence(self, z: Tensor, labels: Tensor) -> Tensor:
        loss = self.softmax(z, labels)
        if self.config.loss == "center":
            apart = z - self.centres[labels].clone()
            loss = loss + 0.003 * (apart**2).sum() / (2 * len(z))
            for label in range(6):
                own = apart.detach()[labels == label]
                self.centres[label] += 0.5 * own.sum(0) / (1 + len(own))
        return loss

    def loss(self, faces: Tensor, labels: Tensor) -> Tensor:
        config, trunk = self.config, self.teacher
        if not config.resolution:
            return config.influence_weight * self.influence(
                self.network(trunk.normalise(faces)), labels
            )
        z_r = self.network.branch(trunk.normalise(resize(faces, 14)))
        with torch.no_grad():
            whole = trunk.normalise(faces)
            z_s = dict(trunk.features(whole))["S3U1"]
            z_t = trunk(whole)
            if config.embedding_mirrored:
                z_t = z_t + trunk(whole.flip(-1))
        loss = config.branch_weight * ((z_r - z_s) ** 2).sum() / z_r.numel()
        if config.influence_weight:
            z = self.network.head(self.network.shared(z_r))
            apart = ((z - z_t) ** 2).mean()
            loss = loss + config.influence_weight * self.influence(z, labels)
            loss = loss + config.branch_weight * config.embedding_weight * apart
        return loss

    def step(self, number: int, faces: Tensor, labels: Tensor) -> float:
        weights = dict(self.weights)
        if self.kappa is not None and not self.config.fix_classifier:
            weights["kappa"] = self.kappa.requires_grad_(True)
        loss = self.loss(faces, labels)
        gradients = torch.autograd.grad(loss, weights.values(), allow_unused=True)
        own = [g for name, g in zip(weights, gradients, strict=True) if name != "kappa"]
        norm = math.sqrt(sum(float((g**2).sum()) for g in own if g is not None))
        assert norm > 0.3 or number, "the first step is to be clipped"
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is None:  # T_r, where nothing runs through it
                continue
            gradient = gradient * (1 if name == "kappa" else min(1.0, 0.3 / norm))
            pull = gradient + 0.02 * weight.detach()
            self.velocity[name] = 0.8 * self.velocity.get(name, 0.0) + pull
            with torch.no_grad():
                weight -= self.lr(number) * self.velocity[name]
        return loss.item()


@pytest.mark.usefixtures("float64_pixels")
@pytest.mark.parametrize(
    "name", ["trunk", "center", "branch", "both mirror images", "trunk learns", "no labels"]
)
def test_six_steps_are_those_of_the_formulae(trunk: Path, tmp_path: Path, name: str) -> None:
    run = prepare(case(name, trunk), tmp_path, torch.device("cpu"))
    in_float64(run)
    by_hand = ByHand(run)
    before = {key: value.detach().clone() for key, value in run.learns.items()}
    batches = [run.sampler.batch(step) for step in range(6)]
    pixels = [run.pixels.get(batch.records) for batch in batches]
    progress = Progress(tmp_path, name, run.total, 0, run.sampler.steps, show="none")
    fit(run, progress)
    losses = []
    for number, (batch, image) in enumerate(zip(batches, pixels, strict=True)):
        faces = torch.stack(
            [x.flip(-1) if f else x for x, f in zip(image, batch.flip, strict=True)]
        )
        losses.append(by_hand.step(number, faces.float(), batch.labels))
    assert [row["loss"] for row in read_metrics(tmp_path)] == pytest.approx(losses, rel=1e-5)
    expected = by_hand.weights | ({"kappa": by_hand.kappa} if "kappa" in run.learns else {})
    for key, start in before.items():
        moved_by, right = run.learns[key] - start, expected[key] - start
        assert (moved_by - right).norm() <= 1e-5 * right.norm() + 1e-12, key
    moved_at_all = [not torch.equal(run.learns[key], start) for key, start in before.items()]
    assert sum(moved_at_all) > 2


# ---- Eq. 3, term by term ------------------------------------------------------------------------


def test_each_weight_of_eq_3_acts_on_its_own_term(trunk: Path, tmp_path: Path) -> None:
    def terms(**weights: float) -> tuple[float, dict[str, float]]:
        config = case("branch", trunk).replace(**weights)
        run = prepare(config, tmp_path, torch.device("cpu"))
        run.modes(training=False)
        batch = run.sampler.batch(0)
        x, teacher = branch_inputs(run, batch, run.pixels.get(batch.records))
        loss, parts = branch_losses(run, x, teacher, batch.labels)
        return loss.item(), {key: value.item() for key, value in parts.items()}

    loss, one = terms(influence_weight=1.0, branch_weight=1.0, embedding_weight=1.0)
    assert loss == pytest.approx(sum(one.values()))
    loss, weighted = terms(influence_weight=0.25, branch_weight=0.5, embedding_weight=3.0)
    assert weighted == pytest.approx({
        "influence": 0.25 * one["influence"],
        "branch": 0.5 * one["branch"],
        "embedding": 0.5 * 3.0 * one["embedding"],
    })  # fmt: skip
    assert loss == pytest.approx(sum(weighted.values()))
    assert terms(influence_weight=0.0, embedding_weight=0.0)[1].keys() == {"branch"}


# ---- what goes in -------------------------------------------------------------------------------


def test_the_teacher_is_the_trunk_at_canonical_size(trunk: Path, tmp_path: Path) -> None:
    run = prepare(methods.phi_bt(FACES, 14, *files(trunk), **STEP), tmp_path, torch.device("cpu"))
    faces = run.pixels.get(torch.arange(3))
    x, teacher = see(run, faces)
    torch.testing.assert_close(x, run.trunk.normalise(resize(faces, 14)))
    expected = dict(run.trunk.features(run.trunk.preprocess(faces), "S3U1"))["S3U1"]
    torch.testing.assert_close(teacher.z_s, expected)
    assert teacher.z is None


def test_a_trunk_that_learns_is_not_its_own_teacher(trunk: Path, tmp_path: Path) -> None:
    run = prepare(case("trunk learns", trunk), tmp_path, torch.device("cpu"))
    faces = run.pixels.get(torch.arange(2))
    before = see(run, faces)[1]
    fit(run, Progress(tmp_path, "t", run.total, 0, run.sampler.steps, show="none"))
    after = see(run, faces)[1]
    assert torch.equal(before.z_s, after.z_s)
    assert torch.equal(before.z, after.z)
    assert isinstance(run.network, Route)
    assert checkpoint.load_state(tmp_path)["step"] == 6


def test_shifted_faces_and_the_teacher_of_both_mirror_images(trunk: Path, tmp_path: Path) -> None:
    """A moved face at the branch, the face where it was at the teacher, whose embeddings are added."""
    changes = {"shift": 3.0, "embedding_weight": 1.0, "embedding_mirrored": True}
    config = methods.phi_bt(FACES, 14, *files(trunk), **{**STEP, **changes})
    run = prepare(config, tmp_path, torch.device("cpu"))
    batch = run.sampler.batch(1)
    pixels = run.pixels.get(batch.records)
    x, teacher = branch_inputs(run, batch, pixels)
    faces = mirrored(pixels, batch.flip)
    plain, one = see(run, faces)
    other = see(run, faces.flip(-1))[1]
    torch.testing.assert_close(teacher.z, one.z + other.z)
    torch.testing.assert_close(teacher.z_s, one.z_s)
    assert batch.shift.shape == (6, 2)
    assert 1 < batch.shift.abs().max() <= 3
    assert not torch.allclose(x, plain, atol=0.02)
    face = moved(faces, batch.shift)
    torch.testing.assert_close(x, branch_input(run.trunk, face, 14, config.resize))


def test_a_flipped_face_is_mirrored_before_it_shrinks(trunk: Path, tmp_path: Path) -> None:
    run = prepare(methods.phi_bt(FACES, 14, *files(trunk), **STEP), tmp_path, torch.device("cpu"))
    batch = run.sampler.batch(0)
    pixels = run.pixels.get(batch.records)
    plain = Batch(batch.records, batch.labels, batch.flip & False, batch.size, batch.shift)
    flipped = branch_inputs(run, batch, pixels)[0]
    upright = branch_inputs(run, plain, pixels)[0]
    assert 0 < batch.flip.sum() < 6
    torch.testing.assert_close(flipped[~batch.flip], upright[~batch.flip])
    torch.testing.assert_close(flipped[batch.flip], upright[batch.flip].flip(-1), atol=1e-4, rtol=0)
