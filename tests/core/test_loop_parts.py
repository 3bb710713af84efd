"""The parts of the loop, each by itself: what is called with what, said, written and kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btnet_core.errors import CheckpointError, TrainingError
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.files import read_safetensors
from btnet_core.images import Resize
from btnet_core.models.backbone import BackboneConfig
from btnet_core.models.btnet import BTNet, weights_digest
from btnet_core.models.weights import load_backbone
from btnet_core.training import checkpoint, distributed, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import Readings, fit, train
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import to_keep

FACES = {"kind": "synthetic", "identities": 6, "images": 3, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.0625, embedding=16)
QUICK = {"batch": 6, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}
NEAREST = Resize(kernel="nearest")


def branch(untrained: Path, **changes) -> TrainConfig:
    files = str(untrained / "trunk.safetensors"), str(untrained / "classifier.safetensors")
    return methods.phi_bt(FACES, 14, *files, **{**QUICK, **changes})


@pytest.fixture
def run(untrained: Path, tmp_path: Path) -> Run:
    """A branch of 14, before its first step."""
    return prepare(branch(untrained), tmp_path, torch.device("cpu"))


@pytest.fixture
def trunk_run(tmp_path: Path) -> Run:
    return prepare(methods.phi_mr(FACES, backbone=TINY, **QUICK), tmp_path, torch.device("cpu"))


class Told:
    """A Progress that keeps what it is told."""

    def __init__(self, *arguments, **options) -> None:
        self.made, self.said, self.rows, self.steps = (arguments, options), [], [], []
        self.row: dict[str, Any] = {}
        self.extra: dict[str, float] = {}
        self.closed = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def write(self, row: dict) -> None:
        self.rows.append(row)

    def step(self, *arguments) -> None:
        self.steps.append(arguments)

    def close(self) -> None:
        self.closed = True


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)


# ---- fit ----------------------------------------------------------------------------------------


@contextmanager
def interrupted(after: int) -> Iterator[SimpleNamespace]:
    """Ctrl-C in step ``after``."""
    asked = iter(range(1, 100))
    yield SimpleNamespace(is_set=lambda: next(asked) >= after)


@pytest.mark.parametrize(("seconds", "saved"), [(300.0, [3, 6]), (1e-9, [1, 2, 3, 4, 5, 6])])
def test_checkpoints_are_saved_at_the_end_of_an_epoch_and_when_due(
    run: Run, monkeypatch: pytest.MonkeyPatch, seconds: float, saved: list[int]
) -> None:
    found: list[tuple] = []
    monkeypatch.setattr(checkpoint, "save", lambda run: found.append((run.step, "saved")))
    monkeypatch.setattr(loop, "validate", lambda run, told: found.append((run.step, told)))
    run.config = run.config.replace(checkpoint_seconds=seconds, validate_epochs=1)
    told = Told()
    fit(run, told)
    assert [step for step, what in found if what == "saved"] == saved
    assert found.index((3, told)) < found.index((3, "saved"))  # the checkpoint holds its accuracy
    assert [row[0] for row in told.steps] == [1, 2, 3, 4, 5, 6]
    assert [(row[2], row[3]) for row in told.steps] == [
        (run.config.lr_at(step, 3), 6) for step in range(6)
    ]
    assert run.network.training
    assert (6, told) not in found  # train validates at the end


def test_a_stop_ends_the_step_and_is_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_interruptible", lambda: interrupted(2))
    run.step, told = 0, Told()
    with pytest.raises(KeyboardInterrupt):
        fit(run, told)
    assert told.said == [f"{run.config.name}: stopped at step 2, checkpoint saved"]
    assert checkpoint.load_state(run.out)["step"] == run.step == 2


def test_nothing_is_done_between_readings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what was asked for in step 1 happens after step 3, which ends the epoch."""
    monkeypatch.setattr(loop, "READ_EVERY", 10)
    monkeypatch.setattr(loop, "_interruptible", lambda: interrupted(1))
    create = Readings.__init__

    def waiting(self, run, progress) -> None:
        run.device = SimpleNamespace(type="cuda")
        create(self, run, progress)
        run.device = torch.device("cpu")
        assert (self.every, self.waiting, self.stop, self.late) == (10, False, False, False)

    monkeypatch.setattr(Readings, "__init__", waiting)
    with pytest.raises(KeyboardInterrupt):
        fit(run, Told())
    assert checkpoint.load_state(run.out)["step"] == 3


def test_gradients_of_a_step_are_its_own_and_summed_over_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are exchanged in the backward pass of the last part, when they are whole."""
    summed: list[list] = []
    monkeypatch.setattr(
        distributed,
        "summed_gradients",
        lambda these: (summed.append(list(these)), nullcontext())[1],
    )
    run.config = run.config.replace(accumulate=2)
    for parameter in run.learns.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    fit(run, Told())
    learns = list(run.trainable.values())
    assert [len(some) for some in summed] == 6 * [0, len(learns)]
    assert all(a is b for a, b in zip(summed[1], learns, strict=True))
    assert all(parameter.isfinite().all() for parameter in learns)


def twice(number: int) -> Iterator[None]:
    """The signal while a step runs, and again."""
    with loop._interruptible() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(5)
        os.kill(os.getpid(), number)
        time.sleep(5)
        yield


def test_ctrl_c_is_kept_for_the_end_of_a_step_and_a_second_one_stops_at_once() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            next(twice(number))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    seen: list[bool] = []

    def elsewhere() -> None:  # a thread may not handle signals
        with loop._interruptible() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


# ---- readings -----------------------------------------------------------------------------------


def test_values_over_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Influence and norm are whole on each process, other terms are its part; a flag is anybody's."""
    as_process(monkeypatch, 0, 2)
    monkeypatch.setattr(distributed, "all_sum", lambda value: 2 * value)
    told, batch = Told(), run.sampler.batch(0)
    readings = Readings(run, told)
    terms = {"influence": torch.tensor(3.0), "branch": torch.tensor(0.25, dtype=torch.float64)}
    readings.saved = time.monotonic() - 400
    readings.add(batch, 0.5, terms, torch.tensor(7.0), stop=False)
    assert told.steps == [(1, {"loss": 3.5, "influence": 3.0, "branch": 0.5, "norm": 7.0}, 0.5, 6)]
    assert (readings.stop, readings.late, readings.waiting) == (False, True, False)
    readings.saved = time.monotonic()
    readings.add(batch, 0.5, terms, torch.tensor(7.0), stop=True)
    assert (readings.stop, readings.late) == (True, False)
    assert list(readings.norms) == [7, 7]
    assert read_metrics(run.out) == []


def test_the_last_step_is_read(run: Run) -> None:
    told, batch = Told(), run.sampler.batch(0)
    readings = Readings(run, told)
    readings.every = 4
    run.config = run.config.replace(stop_epoch=1)
    run.sampler.steps = 5
    for run.step in range(5):
        readings.add(batch, 0.1, {"influence": torch.tensor(1.0)}, torch.tensor(2.0), stop=False)
    assert [row[0] for row in told.steps] == [1, 2, 3, 4, 5]


def test_what_is_told_where_a_value_is_not_finite(run: Run) -> None:
    readings, batch = Readings(run, Told()), run.sampler.batch(0)
    values = {"influence": torch.tensor(1.5), "branch": torch.tensor(0.25)}
    for run.step, norm in enumerate((1.0, 2.0, 3.0, 4.0, 5.0, 6.123456)):
        readings.add(batch, 0.5, values, torch.tensor(norm), stop=False)
    run.step = 6
    with pytest.raises(TrainingError) as caught:
        readings.add(batch, 0.5, values, torch.tensor(torch.inf), stop=False)
    assert str(caught.value) == (
        f"{run.config.name}: not finite at step 7 (epoch 2.33), lr 0.5: "
        "loss 1.75, influence 1.5, branch 0.25, norm inf; gradient norms before it "
        f"2, 3, 4, 5, 6.123; records {batch.records.tolist()}. "
        f"The last checkpoint is kept in {run.out / checkpoint.STATE}"
    )


@pytest.mark.parametrize(
    ("enabled", "scale", "norm", "loss", "skipped"),
    [(True, 2.0, torch.inf, 1.0, 1), (True, 2.0, 1.0, 1.0, 0), (True, 1.0, torch.inf, 1.0, None),
     (True, 2.0, torch.inf, torch.nan, None), (False, 2.0, torch.inf, 1.0, None)],
)  # fmt: skip
def test_which_overflow_is_skipped(
    run: Run, enabled: bool, scale: float, norm: float, loss: float, skipped: int | None
) -> None:
    """fp16 gradients too large, as long as the scaler can still halve its scale."""
    told = Told()
    readings, batch = Readings(run, told), run.sampler.batch(0)
    run.grad_scaler = SimpleNamespace(is_enabled=lambda: enabled, get_scale=lambda: scale)
    values = {"influence": torch.tensor(loss)}
    expected = pytest.raises(TrainingError) if skipped is None else nullcontext()
    with expected:
        readings.add(batch, 0.5, values, torch.tensor(norm), stop=False)
    if skipped is not None:
        assert run.skipped == skipped
        assert told.extra == {"grad_scale": 2.0, "skipped_steps": skipped}
        assert list(readings.norms) == [norm]


# ---- train --------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What ``train`` does around ``_train``, in order."""
    calls: list[tuple] = []

    def trace(place: object, name: str, result: object = None) -> None:
        def call(*arguments):
            calls.append((name, *arguments))
            return result

        monkeypatch.setattr(place, name, call)

    trace(checkpoint, "check_room")
    trace(checkpoint, "forget")
    trace(distributed, "wait")
    trace(loop, "lock", nullcontext())
    trace(loop, "_train", {"loss": 1.0})
    return calls


def test_what_train_does_before_it_trains(tmp_path: Path, traced: list[tuple]) -> None:
    config, out = methods.phi_hr(FACES, backbone=TINY, **QUICK), tmp_path / "out"
    assert train(config, str(out), device="cpu", show="bar", fresh=True) == {"loss": 1.0}
    names = [call[0] for call in traced]
    assert names == ["check_room", "lock", "wait", "forget", "_train"]
    assert traced[0][1:] == (out, 0)
    assert traced[1][1:] == traced[3][1:] == (out,)
    identity = traced[4][4]
    assert traced[4][1:] == (config, out, torch.device("cpu"), identity, None, "bar")
    assert identity["config"] == config.to_dict()
    assert identity["inputs"].keys() == {"data"}
    traced.clear()
    train(config, out, device="cpu")
    assert [call[0] for call in traced] == ["check_room", "lock", "wait", "_train"]
    assert traced[3][4:] == (identity, None, "auto")


def test_another_process_waits_for_the_first_ones_lock(
    tmp_path: Path, traced: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    train(methods.phi_hr(FACES, backbone=TINY, **QUICK), tmp_path, device="cpu")
    assert [call[0] for call in traced] == ["check_room", "wait", "_train"]


def test_what_cannot_be_written_is_told_and_the_device_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    config = methods.phi_hr(FACES, backbone=TINY, **QUICK)
    monkeypatch.setattr(loop, "_train", fails)
    with pytest.raises(TrainingError, match=f"^{tmp_path}: cannot be written"):
        train(config, tmp_path, device="cpu")
    asked: list[str] = []
    monkeypatch.setattr(distributed, "start", lambda device: (asked.append(device), 1 / 0))
    for options in ({}, {"device": "cuda:3"}):
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path, **options)
    assert asked == ["auto", "cuda:3"]


def test_torch_is_set_up_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(loop, "threads", lambda *arguments: asked.append(arguments) or "them")
    monkeypatch.setattr(distributed, "neighbours", lambda: 5)
    cpu, gpu = torch.device("cpu"), SimpleNamespace(type="cuda")
    config = TrainConfig(data=FACES, matmul="highest")
    before = torch.backends.cudnn.benchmark
    try:
        for wanted, state in ((0, None), (0, {"threads": 3}), (2, {"threads": 3})):
            assert loop._machine(config.replace(threads=wanted), cpu, state) == "them"
            assert torch.backends.cudnn.benchmark is False
        assert asked == [(0, 5), (3, 5), (2, 5)]
        with loop._machine(config, gpu, None) as nothing:
            assert nothing is None
        assert torch.backends.cudnn.benchmark is True
        assert len(asked) == 3
    finally:
        torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(("rank", "state"), [(0, None), (1, {"step": 4})])
def test_the_order_of_a_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int, state: dict | None
) -> None:
    calls: list[tuple] = []
    for name in ("fill_cache", "fit", "write_weights", "validate", "_finish"):
        monkeypatch.setattr(loop, name, lambda *a, name=name: calls.append((name, *a)) or name)
    made: list[Told] = []
    monkeypatch.setattr(loop, "Progress", lambda *a, **k: made.append(Told(*a, **k)) or made[-1])
    monkeypatch.setattr(loop, "prepare", lambda *arguments: calls.append(arguments) or run)
    monkeypatch.setattr(checkpoint, "check_room", lambda *a: calls.append(("room", *a)))
    restored: list[tuple] = []
    monkeypatch.setattr(
        checkpoint, "restore", lambda *a: (restored.append(a), setattr(run, "step", 4))
    )
    as_process(monkeypatch, rank, 2)
    out, device = run.out, run.device
    found = loop._train(run.config, out, device, {"it": 1}, state, "lines")
    (told,) = made
    numbers = sum(tensor.numel() for tensor in run.network.state_dict().values()) + 6 * 16
    assert found == "_finish"
    assert calls == [
        (run.config, out, device), ("room", out, 8 * numbers), ("fill_cache", run, told),
        ("fit", run, told), ("write_weights", run, out / "btnet"), ("validate", run, told),
        ("_finish", run, told),
    ]  # fmt: skip
    assert run.identity == {"it": 1}
    assert restored == ([(run, state)] if state else [])
    show = {"show": "none" if rank else "lines", "speak": not rank}
    assert told.made == ((out, run.config.name, 6, 4 if state else 0, 3), show)
    assert told.said == [run.describe()]
    assert told.closed
    monkeypatch.setattr(loop, "fit", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop._train(run.config, out, device, {}, None, "none")
    assert made[1].closed


# ---- what is kept of the teacher ----------------------------------------------------------------


def test_what_is_kept_and_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    made: list[tuple] = []
    answer = [True]

    def pays(size: int, epochs: int, folder: Path, *, shared: bool) -> tuple[bool, str]:
        asked.append((size, epochs, folder, shared))
        return answer[0], "a sentence"

    monkeypatch.setattr(loop, "pays_and_fits", pays)
    monkeypatch.setattr(loop, "TeacherCache", lambda *a: made.append(a) or "kept")
    told = Told()
    loop.fill_cache(run, told)
    face = run.pixels.get(torch.arange(1))
    row = to_keep(run, face)
    size = 2 * 18 * sum(part.numel() * part.element_size() for part in row.values())
    folder = asked[0][2]
    assert asked == [(size, 2, folder, False)]
    assert (folder.parent, len(folder.name)) == (run.out / "cache", 16)
    assert told.said == [f"{run.config.name}: a sentence"]
    pixels, compute, place, device = made[0]
    assert (run.cache, pixels, place, device) == ("kept", run.pixels, folder, run.device)
    assert all(torch.equal(compute(face)[name], part) for name, part in row.items())

    config, answer[0], run.cache = run.config, False, None
    elsewhere = str(run.out / "shared")
    for changes in ({"cache_dir": elsewhere}, {"resize": NEAREST}, {"embedding_weight": 1.0}):
        run.config = config.replace(**changes)
        loop.fill_cache(run, told)
    run.config, run.precision = config, "bf16"
    loop.fill_cache(run, told)
    run.precision, run.network.couple_at = "fp32", "S2U1"
    loop.fill_cache(run, told)
    run.network.couple_at = "S3U1"
    loop.fill_cache(run, told)
    with torch.no_grad():
        next(run.trunk.parameters()).add_(1)
    loop.fill_cache(run, told)
    names = [where.name for _, _, where, _ in asked]
    assert names[0] == names[1] == names[6]
    assert len({names[0], *names[2:6], names[7]}) == 6  # other answers, another folder
    assert asked[1][2].parent == Path(elsewhere)
    assert [shared for *_, shared in asked] == [False, True] + 6 * [False]
    assert run.cache is None
    asked.clear()
    for changes in ({"cache": "off"}, {"resolution": 0}):
        run.config = config.replace(branch_weight=0.0, **changes)
        loop.fill_cache(run, told)
    assert asked == []


# ---- the end ------------------------------------------------------------------------------------


def test_the_folder_of_the_btnet(run: Run, trunk_run: Run, tmp_path: Path) -> None:
    assert loop.btnet_folder(run) == run.out / "btnet"
    assert loop.btnet_folder(trunk_run) is None
    other = tmp_path / "there"
    BTNet(trunk_run.trunk, ()).save(other)
    run.config = run.config.replace(btnet=str(other))
    told = f"^{other}: holds a BTNet with another trunk than {run.config.init}$"
    with pytest.raises(CheckpointError, match=told):
        loop.btnet_folder(run)
    run.config = run.config.replace(init="", branch_weight=0.0)
    with pytest.raises(CheckpointError, match=r"another trunk than this one$"):
        loop.btnet_folder(run)
    BTNet(run.trunk, ()).save(tmp_path / "same")
    run.config = run.config.replace(btnet=str(tmp_path / "same"))
    assert loop.btnet_folder(run) == tmp_path / "same"
    run.config = run.config.replace(fix_trunk=False)
    assert loop.btnet_folder(run) is None


@pytest.mark.parametrize(("every", "step", "due"), [
    (0, 3, False), (1, 3, True), (2, 3, False), (2, 6, True), (1, 9, False), (3, 9, False),
])  # fmt: skip
def test_when_validation_is_due(run: Run, every: int, step: int, due: bool) -> None:
    run.config, run.step = run.config.replace(validate_epochs=every, epochs=3), step
    assert loop._validation_due(run) is due


def test_validation_is_shared_by_the_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    averaged: list[object] = []
    monkeypatch.setattr(distributed, "average_statistics", averaged.append)

    def evaluate(embedder, pairs, settings, *, how) -> dict:
        asked.append((embedder.network(14), pairs.name, settings, how))
        run.network.eval()
        return {"112&14": {"accuracy": 70.0, "std": 0}, "14&14": {"accuracy": 60.125, "std": 0}}

    monkeypatch.setattr(loop, "evaluate_pairs", evaluate)
    told = Told()
    loop.validate(run, told)
    assert (asked, averaged, run.validation) == ([], [], [])  # nothing to validate on
    as_process(monkeypatch, 1, 2)
    others = {name: {"112&14": 80.0, "14&14": 90.0} for name in ("a", "c")}
    monkeypatch.setattr(distributed, "all_objects", lambda mine: [others, mine])
    run.pairs = [SimpleNamespace(name=name) for name in "abc"]
    run.config, run.step = run.config.replace(resize=NEAREST), 4
    loop.validate(run, told)
    settings = [(112, 112), (112, 14), (14, 14)]
    assert asked == [(run.network, "b", settings, NEAREST)]
    accuracy = {"a": others["a"], "b": {"112&14": 70.0, "14&14": 60.125}, "c": others["c"]}
    assert run.validation == [{"step": 4, "epoch": 4 / 3, "accuracy": accuracy}]
    assert list(run.validation[0]["accuracy"]) == ["a", "b", "c"]
    assert told.rows == [{"step": 4, "validation": accuracy}]
    means = "112&14 76.67, 14&14 80.04"
    assert told.said == [f"{run.config.name}: epoch 1.333 accuracy {means}"]
    assert averaged == [run.network]
    assert run.network.training
    assert loop.mean_accuracy({"a": {"x": 1.0}, "b": {"x": 2.0}}) == {"x": 1.5}


def test_a_trunk_is_validated_at_its_own_resolutions(
    trunk_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list] = []
    monkeypatch.setattr(
        loop, "evaluate_pairs", lambda e, p, settings, how: asked.append(settings) or {}
    )
    trunk_run.pairs = [SimpleNamespace(name="a")]
    trunk_run.config = trunk_run.config.replace(validation_resolutions=(28, 112))
    loop.validate(trunk_run, Told())
    assert asked == [[(112, 28), (112, 112), (28, 28)]]


def test_what_is_validated(run: Run, trunk_run: Run) -> None:
    for one, kind in ((run, BranchEmbedder), (trunk_run, UpsamplingEmbedder)):
        one.config, one.precision = one.config.replace(resize=NEAREST), "bf16"
        one.device = torch.device("meta")
        embedder = loop._embedder(one)
        assert type(embedder) is kind
        assert (embedder.how, embedder.precision) == (NEAREST, "bf16")
        assert embedder.device == torch.device("meta")
        assert embedder.network(14) is one.network


def test_what_is_written(run: Run, trunk_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[object] = []
    monkeypatch.setattr(distributed, "average_statistics", averaged.append)
    folder = run.out / "net"
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    loop.write_weights(run, folder)
    assert averaged == [run.network]
    assert not folder.exists()
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    loop.write_weights(run, folder)
    names = {"trunk.safetensors", "branch_14.safetensors"}
    assert names <= {path.name for path in folder.iterdir()}
    kappa = read_safetensors(run.out / "classifier.safetensors")[0]["weight"]
    assert torch.equal(kappa, run.kappa.weight)
    (folder / "branch_14.safetensors").unlink()
    stamp = (folder / "trunk.safetensors").stat().st_mtime_ns
    loop.write_weights(run, folder)
    assert names <= {path.name for path in folder.iterdir()}
    assert (folder / "trunk.safetensors").stat().st_mtime_ns == stamp  # not written again
    loop.write_weights(run, None)
    state, facts = read_safetensors(run.out / "route.safetensors")
    assert state.keys() == run.network.state_dict().keys()
    assert (facts["r"], facts["couple_at"]) == ("14", "S3U1")
    (run.out / "classifier.safetensors").unlink()
    trunk_run.kappa = None
    loop.write_weights(trunk_run, None)
    written = load_backbone(trunk_run.out / "trunk.safetensors")
    assert weights_digest(written) == weights_digest(trunk_run.network)
    assert not (trunk_run.out / "classifier.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_record_of_a_finished_run(run: Run, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    as_process(monkeypatch, rank, 2)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 110.0)
    folder, kept = run.out / "net", run.out / "cache" / "x"
    for place in (folder, kept):
        place.mkdir(parents=True)
    (folder / "branch_14.safetensors").write_bytes(b"weights")
    run.config = run.config.replace(btnet=str(folder))
    run.began, run.skipped, told = 100.0, 3, Told()
    run.identity = {"config": run.config.to_dict(), "inputs": {"data": "x"}}
    told.row = {"step": 6, "epoch": 2.0, "seconds": 9.0, "loss": 1.5, "lr": 0.1}
    run.validation = [{"accuracy": {}}, {"accuracy": {"a": {"14&14": 50.0}, "b": {"14&14": 60.0}}}]
    metrics = loop._finish(run, told)
    assert metrics == {
        "loss": 1.5, "lr": 0.1, "steps": 6, "seconds": 10.0, "images_per_second": 3.6,
        "parameters": sum(p.numel() for p in run.trainable.values()), "skipped_steps": 3,
        "precision": "fp32", "validation": {"14&14": 55.0},
    }  # fmt: skip
    assert kept.exists() == (rank == 1)
    record = checkpoint.read_record(run.out)
    if rank:
        assert record is None
        return
    versions = checkpoint.versions()
    assert record.pop("branch") == checkpoint.fingerprint(folder / "branch_14.safetensors")
    assert record == {**run.identity, "versions": versions, "metrics": metrics}
    run.validation, run.config = [], run.config.replace(btnet="")
    assert loop._finish(run, told)["validation"] == {}
    assert "branch" not in checkpoint.read_record(run.out)
