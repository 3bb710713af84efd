"""The loop: it learns, tells trouble with all one needs, validates, and writes before it can fail."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from btnet_core import device
from btnet_core.errors import CheckpointError, TrainingError
from btnet_core.files import read_safetensors
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BTNet
from btnet_core.models.weights import load_backbone
from btnet_core.training import checkpoint, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import Readings, backward, train
from btnet_core.training.progress import Progress, read_metrics
from btnet_core.training.run import Run, prepare
from btnet_paper import plans

FACES = {"kind": "synthetic", "identities": 6, "images": 3, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 6, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


PAIRS = {
    "kind": "drawn",
    "faces": {"kind": "synthetic", "identities": 20, "images": 4, "seed": 0, "first": 50},
    "count": 100,
    "seed": 0,
}


def branch(trunk: Path, r: int = 14, **changes) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    return methods.phi_bt(FACES, r, *files, **{**QUICK, **changes})


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_safetensors(a)[0], read_safetensors(b)[0]
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_learning_lowers_the_loss(tmp_path: Path) -> None:
    config = methods.phi_hr(
        FACES, backbone=TINY, **{**QUICK, "epochs": 12, "margin": 0.1, "s": 16.0}
    )
    train(config, tmp_path, device="cpu", show="none")
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("row", ["scratch", "pretraining", "bct", "fix_trunk", "distillation"])
def test_rows_of_table_3(trunk: Path, tmp_path: Path, row: str) -> None:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    config = methods.table3(FACES, row, *files, **{**QUICK, "epochs": 1, "backbone": TINY})
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert ("branch" in metrics) == (row == "distillation")
    kept = same_weights(tmp_path / "classifier.safetensors", trunk / "classifier.safetensors")
    assert kept == (row in ("bct", "fix_trunk", "distillation"))
    if row in ("fix_trunk", "distillation"):
        assert BTNet.load(tmp_path / "btnet").resolutions == (14, 112)
    else:
        own = plans.load_route(
            load_backbone(trunk / "trunk.safetensors"), tmp_path / "route.safetensors"
        )
        assert own.route(14).eval()(torch.zeros(1, 3, 14, 14)).shape == (1, 16)


def test_compiled_gives_the_same_losses(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, forward and backward, by torch.compile; without its code generator, which needs minutes (see test_gpu)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rows = {}
    for compiled in (False, True):
        train(
            branch(trunk, epochs=1, compile=compiled),
            tmp_path / str(compiled),
            device="cpu",
            show="none",
        )
        rows[compiled] = [row["loss"] for row in read_metrics(tmp_path / str(compiled))]
    assert rows[True] == pytest.approx(rows[False], rel=1e-3)


def test_full_finetuning_moves_the_trunk(trunk: Path, tmp_path: Path) -> None:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    config = methods.full_finetuning(FACES, 14, *files, **{**QUICK, "epochs": 1})
    train(config, tmp_path, device="cpu", show="none")
    assert not same_weights(tmp_path / "trunk.safetensors", trunk / "trunk.safetensors")
    assert same_weights(tmp_path / "classifier.safetensors", trunk / "classifier.safetensors")


def frozen(run: Run) -> None:
    """Batch norms in evaluation mode: a part of a batch then gives what the whole gives."""
    run.modes(training=True)
    for module in run.network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("kind", ["trunk", "branch"])
def test_parts_of_a_batch_give_the_same_losses_and_gradients(
    trunk: Path, tmp_path: Path, kind: str
) -> None:
    changes = {"loss": "cosface", "batch": 18, "epochs": 1}
    if kind == "trunk":
        config = methods.phi_mr(FACES, backbone=TINY, **{**QUICK, **changes})
    else:
        config = branch(trunk, embedding_weight=1.0, **changes)
    terms, gradients = {}, {}
    for parts in (1, 3):
        run = prepare(config.replace(accumulate=parts), tmp_path, torch.device("cpu"))
        frozen(run)
        batch = run.sampler.batch(0)
        terms[parts] = backward(run, batch, run.pixels.get(batch.records))
        gradients[parts] = {name: p.grad for name, p in run.learns.items()}
    assert terms[3].keys() == terms[1].keys()
    for name, term in terms[1].items():
        torch.testing.assert_close(terms[3][name], term, rtol=1e-5, atol=0)
    whole = torch.cat([g.flatten() for g in gradients[1].values()]).norm()
    for name, gradient in gradients[1].items():
        assert (gradients[3][name] - gradient).norm() < 1e-4 * whole, (
            name
        )  # float32, summed in another order


def test_a_schedule_stopped_early_is_the_same_schedule(tmp_path: Path) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 4})
    stopped = train(config.replace(stop_epoch=1), tmp_path / "a", device="cpu", show="none")
    assert stopped["steps"] == 3
    train(config, tmp_path / "b", device="cpu", show="none")
    keys = ("step", "lr", "loss")
    rows = {n: [[r[k] for k in keys] for r in read_metrics(tmp_path / n)] for n in ("a", "b")}
    assert rows["a"] == rows["b"][:3]


@pytest.mark.parametrize(("matmul", "tf32"), [("high", True), ("highest", False)])
def test_tf32_is_named_for_products_and_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matmul: str, tf32: bool
) -> None:
    monkeypatch.setattr(loop, "_train", lambda *arguments: {})
    train(TrainConfig(data=FACES, matmul=matmul), tmp_path, device="cpu")
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize(("threads", "idle", "expected"), [(3, 1, 3), (0, 1, 1), (0, 9, 4)])
def test_threads_are_as_many_as_cores_are_idle_or_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, idle: int, expected: int
) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        monkeypatch.setattr(device, "idle_cores", lambda: idle)
        monkeypatch.setattr(loop, "_train", lambda *_: seen.append(torch.get_num_threads()))
        train(TrainConfig(data=FACES, threads=threads), tmp_path, device="cpu")
        assert seen == [expected]
        assert torch.get_num_threads() == 4  # the caller's own stay
    finally:
        torch.set_num_threads(before)


# ---- trouble ------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """A loss or gradient that is not finite at one step."""
    losses_of = loop.losses_of

    def poisoned(run, *arguments):
        total, terms = losses_of(run, *arguments)
        if run.step != step:
            return total, terms
        if what == "kappa":  # the square root of 0 has no finite gradient
            return total + (run.kappa.weight.sum() * 0).sqrt(), terms
        harm = run.network.head.fc.weight.sum() * 0
        harm = harm / 0 if what == "loss" else harm.sqrt()
        return total + harm, {name: term + harm.detach() for name, term in terms.items()}

    monkeypatch.setattr(loop, "losses_of", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient", "kappa"])
@pytest.mark.parametrize("every", [1, 2])
def test_not_finite_stops_with_everything_one_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, every: int
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 3})
    create = Readings.__init__

    def as_on_a_gpu(self, *arguments):
        create(self, *arguments)
        self.every = every

    monkeypatch.setattr(Readings, "__init__", as_on_a_gpu)
    poison(monkeypatch, 4, what)
    with pytest.raises(TrainingError) as caught:
        train(config, tmp_path, device="cpu", show="none")
    told = str(caught.value)
    for expected in (
        "step 5",
        "lr ",
        "norm",
        "gradient norms before it",
        "records [",
        "checkpoint",
    ):
        assert expected in told
    assert checkpoint.load_state(tmp_path)["step"] == 3
    monkeypatch.undo()
    assert np.isfinite(train(config, tmp_path, device="cpu", show="none")["loss"])


def test_values_are_read_together_where_a_device_is_not_waited_for(tmp_path: Path) -> None:
    run = prepare(methods.phi_hr(FACES, backbone=TINY, **QUICK), tmp_path, torch.device("cpu"))
    progress = Progress(tmp_path, "phi", 6, 0, 3, show="none")
    readings, batch = Readings(run, progress), run.sampler.batch(0)
    readings.every = 2
    for run.step in range(6):
        loss = torch.tensor(float(run.step))
        readings.add(batch, 0.1, {"influence": loss}, loss + 10, stop=run.step == 2)
        assert readings.waiting == (run.step in (0, 4))  # 2 ends an epoch
        assert readings.stop == (run.step == 2)
    rows = [(row["step"], row["loss"], row["norm"]) for row in read_metrics(tmp_path)]
    assert rows == [(k + 1, float(k), k + 10.0) for k in range(6)]


def test_fp16_overflow_skips_the_step_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradScaler halves its scale, neither weights nor momentum move, and the first step may be it."""
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "precision": "fp16"})
    start, kept = prepare(config, tmp_path, torch.device("cpu")), []
    original, scale = (
        loop.unscale_and_clip,
        functools.partial(torch.amp.GradScaler, init_scale=16.0),
    )

    def overflowing(run, network):
        if run.step in (0, 3):
            network[3].grad[...] = float("inf")
        if run.step in (0, 1, 3, 4):
            kept.append([p.detach().clone() for p in run.learns.values()])
        return original(run, network)

    monkeypatch.setattr(loop, "unscale_and_clip", overflowing)
    monkeypatch.setattr(torch.amp, "GradScaler", scale)
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert metrics["skipped_steps"] == read_metrics(tmp_path)[-1]["skipped_steps"] == 2
    for first, second in ((kept[0], kept[1]), (kept[2], kept[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    fresh = list(start.learns.values())
    assert all(torch.equal(a, b) for a, b in zip(kept[1], fresh, strict=True))
    state = checkpoint.load_state(tmp_path)
    assert state["grad_scaler"]["scale"] == 4.0
    assert state["skipped"] == 2


# ---- the end ------------------------------------------------------------------------------------


def test_validation_during_training_is_recorded(trunk: Path, tmp_path: Path) -> None:
    config = branch(trunk, epochs=2, validation=(PAIRS,), validate_epochs=1)
    metrics = train(config, tmp_path, device="cpu", show="none")
    assert set(metrics["validation"]) == {"112&112", "112&14", "14&14"}
    rows = [row for row in read_metrics(tmp_path) if "validation" in row]
    assert [row["step"] for row in rows] == [3, 6]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["metrics"]["validation"] == metrics["validation"]


def test_validation_while_a_trunk_trains_changes_nothing(tmp_path: Path) -> None:
    config = methods.phi_mr(FACES, backbone=TINY, **QUICK)
    seen = config.replace(validation=(PAIRS,), validate_epochs=1, validation_resolutions=(112, 7))
    train(config, tmp_path / "plain", device="cpu", show="none")
    metrics = train(seen, tmp_path / "seen", device="cpu", show="none")
    assert set(metrics["validation"]) == {"112&112", "112&7", "7&7"}
    rows = [row for row in read_metrics(tmp_path / "seen") if "validation" in row]
    assert [row["step"] for row in rows] == [3, 6]
    files = [tmp_path / name / "trunk.safetensors" for name in ("plain", "seen")]
    assert same_weights(*files)


def test_weights_are_written_before_the_last_validation_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = methods.phi_mr(FACES, backbone=TINY, **{**QUICK, "validation": (PAIRS,)})

    def fails(*arguments, **options):
        raise TrainingError("out of memory, say")

    monkeypatch.setattr(loop, "evaluate_pairs", fails)
    with pytest.raises(TrainingError, match="say"):
        train(config, tmp_path, device="cpu", show="none")
    before = read_safetensors(tmp_path / "trunk.safetensors")[0]
    assert not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    assert train(config, tmp_path, device="cpu", show="none")["validation"]
    after = read_safetensors(tmp_path / "trunk.safetensors")[0]
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_branch_of_another_trunk_does_not_join_a_btnet(trunk: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "phi_bt")
    train(branch(trunk, btnet=folder, epochs=1), tmp_path / "a", device="cpu", show="none")
    train(
        methods.phi_mr(FACES, backbone=TINY, **{**QUICK, "seed": 5}),
        tmp_path / "other",
        device="cpu",
        show="none",
    )
    with pytest.raises(CheckpointError, match="another trunk"):
        train(
            branch(tmp_path / "other", r=7, btnet=folder, epochs=1),
            tmp_path / "b",
            device="cpu",
            show="none",
        )
