"""A step against the paper's formulae in float64: Eq. 1 to 3, schedule, clipping, decay, momentum."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.images import Resize, resize
from btnet_core.losses import branch_loss, embedding_loss
from btnet_core.models.backbone import Backbone, BackboneConfig
from btnet_core.models.btnet import Route
from btnet_core.training import checkpoint, distributed, methods, step
from btnet_core.training.batches import Batch, branch_input, mirrored, moved
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import fit
from btnet_core.training.progress import Progress, read_metrics
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs, branch_losses, see
from btnet_core.training.teacher import Teacher

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
                z_t = (z_t + trunk(whole.flip(-1))) / 2
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
    run.modes(training=True)
    assert not any(module.training for module in run.trunk.modules())
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
    torch.testing.assert_close(teacher.z, (one.z + other.z) / 2)
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


# ---- over processes, and with kept answers --------------------------------------------------------


def test_each_process_adds_its_part_of_the_loss(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distances are means of a process's faces: of two processes each brings half of it."""
    run = prepare(case("branch", trunk), tmp_path, torch.device("cpu"))
    run.network.eval()
    maps = torch.rand(3, 4, 2, 2), torch.rand(3, 4, 2, 2)
    z, z_t = torch.rand(3, 4), torch.rand(3, 4)
    teacher = Teacher(maps[1], z_t)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for kind in ("mean", "batch_sum", "cosine"):
        run.config = run.config.replace(distillation=kind)
        for cache in (None, object()):  # channels lie first or last
            run.cache = cache
            found = step.distillation(run, maps[0], teacher)
            torch.testing.assert_close(found, branch_loss(*maps, kind) / 2)
    for kind in ("mse", "cosine"):
        run.config = run.config.replace(embedding=kind)
        expected = embedding_loss(z, z_t, kind) / 2
        torch.testing.assert_close(step.embedding_distillation(run, z, teacher), expected)
    assert step.distillation(run, maps[0], Teacher(None, z_t)) == 0
    assert step.embedding_distillation(run, z, Teacher(maps[1], None)) == 0


def test_the_length_of_embeddings_follows_the_teachers(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To least squares over all processes, a tenth of the way a step; not where MSE sees lengths."""
    run = prepare(case("branch", trunk), tmp_path, torch.device("cpu"))
    route, z, other = run.network.train(), torch.rand(5, 4) + 1, torch.rand(5, 4) + 1
    monkeypatch.setattr(distributed, "all_sum", lambda mine: mine + theirs)
    for _ in range(200):
        now, teacher = z * route.length, torch.stack([other, 2 * other])
        theirs = torch.stack(((now * teacher[1]).sum(), now.square().sum()))
        run.config = run.config.replace(embedding="cosine")
        step.embedding_distillation(run, now, Teacher(None, teacher[0]))
    fitted = torch.linalg.lstsq(torch.cat([z, z]).reshape(-1, 1), teacher.reshape(-1, 1)).solution
    torch.testing.assert_close(route.length, fitted.squeeze())
    run.config = run.config.replace(embedding="mse")
    step.embedding_distillation(run, z, Teacher(None, other))
    torch.testing.assert_close(route.length, fitted.squeeze())
    x = torch.rand(2, 3, *route.size)
    monkeypatch.undo()
    run.config = case("branch", trunk).replace(embedding="cosine", embedding_weight=1.0)
    batch = run.sampler.batch(0)
    step.losses_of(run, batch, run.pixels.get(batch.records))[0].backward()  # it moved since z
    assert 0 < route.length != fitted
    route.length.copy_(fitted.squeeze())
    longer = route.eval()(x)
    route.length.fill_(1.0)
    torch.testing.assert_close(longer, fitted.squeeze() * route(x))


@pytest.mark.parametrize(("loss", "weight"), [("center", 0.003), ("triplet", 1.0)])
def test_a_metric_loss_sees_the_faces_of_all_processes(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, weight: float
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **STEP, loss=loss, per_identity=2)
    run = prepare(config, tmp_path, torch.device("cpu"))
    gathered: list[bool] = []

    def everyone(z: Tensor, *, total: bool) -> Tensor:
        gathered.append(total)
        return torch.cat([z, 2 * z])

    monkeypatch.setattr(distributed, "gather", everyone)
    monkeypatch.setattr(distributed, "all_gather", lambda labels: torch.cat([labels, labels + 3]))
    seen: list[tuple] = []
    run.metric = lambda z, labels: seen.append((z, labels)) or torch.tensor(5.0)
    if loss == "center":
        run.kappa = type("Kappa", (), {"__call__": lambda self, *a: (seen.append(a), 7.0)[1]})()
    run.step, z, labels = 4, torch.rand(2, 3).bfloat16(), torch.tensor([1, 0])
    found = step.influence(run, z, labels)
    assert found.item() == pytest.approx(weight * 5 + (7 if run.kappa else 0))
    assert gathered == [False]
    assert seen[-1][0].dtype == torch.float32
    assert torch.equal(seen[-1][0], torch.cat([z, 2 * z]).float())
    assert seen[-1][1].tolist() == [1, 0, 4, 3]
    if run.kappa is not None:
        assert run.kappa.step == 4
        assert seen[0][0] is z
        assert torch.equal(seen[0][1], labels)


def test_terms_of_weight_0_are_not_computed(trunk: Path, tmp_path: Path) -> None:
    run = prepare(case("no labels", trunk), tmp_path, torch.device("cpu"))
    run.finish = lambda z: pytest.fail("T_r runs")
    x = torch.rand(2, 3, 14, 14)
    z_s = torch.zeros_like(run.encode(x))
    L, terms = branch_losses(run, x, Teacher(z_s), torch.tensor([0, 1]))
    assert terms.keys() == {"branch"}
    assert terms["branch"] is not L
    assert terms["branch"].item() == L.item() > 0


def test_what_is_kept_of_a_face(trunk: Path, tmp_path: Path) -> None:
    run = prepare(case("branch", trunk), tmp_path, torch.device("cpu"))
    faces = run.pixels.get(torch.arange(2))
    x, teacher = see(run, faces)
    kept = step.to_keep(run, faces)
    assert kept.keys() == {"x", "z_s", "z"}
    for name, value in {"x": x, "z_s": teacher.z_s, "z": teacher.z}.items():
        assert torch.equal(kept[name], value)
    run.config = run.config.replace(embedding_weight=0.0)
    assert step.to_keep(run, faces).keys() == {"x", "z_s"}


def test_a_filled_cache_needs_no_pixels(trunk: Path, tmp_path: Path) -> None:
    """Its rows by record and mirror image; a face that is moved is shrunk anew."""
    config = case("both mirror images", trunk).replace(shift=2.0)
    run = prepare(config, tmp_path, torch.device("cpu"))
    batch, asked = run.sampler.batch(0), []
    values = {"x": torch.rand(6, 3, 14, 14), "z_s": torch.rand(6, 2, 2, 2), "z": torch.rand(6, 4)}

    def get(name: str, records: Tensor, flip: Tensor) -> Tensor:
        asked.append((name, records.tolist(), flip.tolist()))
        return values[name] * (1 + (len(asked) > 3))

    run.cache = SimpleNamespace(get=get)
    pixels = run.pixels.get(batch.records)
    x, teacher = branch_inputs(run, batch, pixels)
    records, flip = batch.records.tolist(), batch.flip.tolist()
    assert asked == [(name, records, flip) for name in ("x", "z_s", "z")] + [
        ("z", records, [not one for one in flip])
    ]
    torch.testing.assert_close(teacher.z, 1.5 * values["z"])
    assert torch.equal(teacher.z_s, values["z_s"])
    face = moved(mirrored(pixels, batch.flip), batch.shift)
    torch.testing.assert_close(x, branch_input(run.trunk, face, 14, config.resize))
    run.config = config.replace(shift=0.0, embedding_mirrored=False)
    asked.clear()
    x, teacher = branch_inputs(run, batch, None)
    assert torch.equal(x, values["x"])
    assert torch.equal(teacher.z, values["z"])


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_faces_are_shrunk_by_the_kernel_of_the_run(
    trunk: Path, tmp_path: Path, shift: float
) -> None:
    """X_r and what a trunk sees of a face of r, moved or not; nearest is unlike the default."""
    nearest = {**STEP, "resize": Resize(kernel="nearest")}
    config = methods.phi_bt(FACES, 14, *files(trunk), **nearest, cache="off", shift=shift)
    run = prepare(config, tmp_path / "branch", torch.device("cpu"))
    batch = run.sampler.batch(1)
    faces = mirrored(run.pixels.get(batch.records), batch.flip)
    face = moved(faces, batch.shift) if shift else faces
    expected = branch_input(run.trunk, face, 14, Resize(kernel="nearest"))
    assert torch.equal(branch_inputs(run, batch, run.pixels.get(batch.records))[0], expected)
    assert not torch.equal(expected, branch_input(run.trunk, face, 14, None))


def test_a_trunk_sees_faces_shrunk_by_the_kernel_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(step, "trunk_input", lambda *given: seen.extend(given[2:]))
    monkeypatch.setattr(step, "trunk_losses", lambda *_: None)
    config = methods.phi_mr(FACES, backbone=TINY, **STEP, resize=Resize(kernel="nearest"))
    run = prepare(config, tmp_path, torch.device("cpu"))
    batch = run.sampler.batch(1)
    step.losses_of(run, batch, run.pixels.get(batch.records))
    assert seen == [batch.size, Resize(kernel="nearest")]
