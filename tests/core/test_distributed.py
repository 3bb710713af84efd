"""Two gloo processes against one: the same losses, gradients, weights and state.

Batch norms are in evaluation mode here: synchronised ones need GPUs, and the others see each process's
part of a batch alone. The first step is compared in float64, where no rounding hides a fault.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import btnet_paper  # noqa: F401 (in every process: the kind "synthetic")
from btnet_core.files import read_safetensors
from btnet_core.losses import MARGINS
from btnet_core.models.backbone import Backbone, BackboneConfig
from btnet_core.training import checkpoint, distributed, loop, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import backward, train, unscale_and_clip
from btnet_core.training.progress import read_metrics
from btnet_core.training.run import Run, class_means, prepare

FACES = {"kind": "synthetic", "identities": 7, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 0.4, "precision": "fp32"}
NAMES = [*MARGINS, "triplet", "circle", "center", "branch", "triplet branch"]
PAIRS = tuple(
    {"kind": "drawn", "faces": {**FACES, "identities": 20, "first": 50}, "count": 100, "seed": seed}
    for seed in range(3)
)


def configuration(name: str, trunk: Path) -> TrainConfig:
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    if name == "branch":
        changes = {"embedding_weight": 1.0, "epochs": 3}
        return methods.phi_bt(FACES, 14, *files, **{**QUICK, **changes})
    if name == "triplet branch":
        return methods.phi_bt(FACES, 14, *files, **QUICK, loss="triplet", per_identity=2)
    return methods.phi_mr(FACES, backbone=TINY, loss=name, per_identity=2, **QUICK)


def freeze_batch_norms() -> None:
    """Every run's batch norms stay in evaluation mode (in this process)."""
    modes = Run.modes

    def frozen(run: Run, training: bool) -> None:
        modes(run, training)
        for module in run.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()

    Run.modes = frozen  # type: ignore[method-assign]


def normalise_in_float64(self: Backbone, pixels: Tensor) -> Tensor:
    return (pixels.double() - self.config.mean) / self.config.std


def probe(config: TrainConfig, out: Path) -> None:
    """Losses, gradients and weights of the first step, as all processes together have them."""
    run = prepare(config.replace(cache="off"), out, torch.device("cpu"))
    for module in (run.network, run.trunk, run.kappa, run.metric):
        if module is not None:
            module.double()
    if run.kappa is not None and run.kappa.margin.needs_norms:
        run.kappa.margin.float()  # AdaFace's running mean and deviation
    for parameter in run.learns.values():
        run.optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    run.modes(training=True)
    batch = run.sampler.batch(0)
    terms = backward(run, batch, run.pixels.get(batch.records))
    gradients = {name: parameter.grad.clone() for name, parameter in run.trainable.items()}
    if "kappa" in run.learns:
        gradients["kappa"] = run.kappa.whole(run.kappa.weight.grad)
    norm = unscale_and_clip(run, list(run.trainable.values()))
    run.optimiser.step()
    weights = {name: parameter.detach() for name, parameter in run.trainable.items()}
    if run.kappa is not None:
        weights["kappa"] = run.kappa.whole()
    values = {
        name: value if name == "influence" else distributed.all_sum(value)
        for name, value in terms.items()
    }
    found = {"losses": {**values, "norm": norm}, "gradients": gradients, "weights": weights}
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(found, out / "probe.pt")


def probes(out: Path, trunk: Path) -> None:
    normalise = Backbone.normalise
    Backbone.normalise = normalise_in_float64  # type: ignore[method-assign]
    try:
        for name in NAMES:
            probe(configuration(name, trunk), out / name)
    finally:
        Backbone.normalise = normalise  # type: ignore[method-assign]


def pieces(out: Path, trunk: Path) -> None:
    """What the processes do together beside a step."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(1 + distributed.rank())
    distributed.average_statistics(norm)
    run = prepare(configuration("branch", trunk), out, torch.device("cpu"))
    means = class_means(run.trunk, run.pixels, torch.device("cpu"), "fp32")
    if distributed.rank() == 0:
        found = {"world": distributed.world(), "mean": norm.running_mean, "means": means}
        torch.save(found, out / "pieces.pt")


def trainings(out: Path, trunk: Path) -> None:
    whole = configuration("curricularface", trunk)
    for name, config in (("trunk", whole), ("branch", configuration("branch", trunk))):
        train(config.replace(validation=PAIRS), out / name, device="cpu", show="none")


def worker(rank: int, port: int, out: Path, trunk: Path, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    freeze_batch_norms()
    distributed.start("cpu")
    try:
        if steps:
            stop_after(steps, out / "stopped")
        else:
            pieces(out, trunk)
            probes(out, trunk)
            trainings(out, trunk)
    finally:
        distributed.stop()
    # One that is left takes the process along as it ends, now and then: SIGABRT, or it waits for ever.
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names


def stop_after(step: int, out: Path) -> None:
    """Train and stop after ``step`` as Ctrl-C does: a checkpoint is there."""
    add = loop.Readings.add

    def asked(self, batch, lr, terms, norm, stop):
        add(self, batch, lr, terms, norm, self.run.step + 1 == step)

    loop.Readings.add = asked  # type: ignore[method-assign]
    try:
        config = methods.phi_mr(FACES, backbone=TINY, **QUICK)
        train(config, out, device="cpu", show="none")
    except KeyboardInterrupt:
        pass
    finally:
        loop.Readings.add = add  # type: ignore[method-assign]


def spawn(out: Path, trunk: Path, *, steps: int = 0) -> None:
    port = 29500 + os.getpid() % 2000 + steps
    mp.spawn(worker, (port, out, trunk, steps), nprocs=2)


@pytest.fixture(scope="module")
def frozen() -> None:
    modes = Run.modes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels then sum in the same order
    freeze_batch_norms()
    yield
    Run.modes = modes
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(frozen: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same work by one process and by two."""
    start = tmp_path_factory.mktemp("start")
    train(methods.phi_mr(FACES, backbone=TINY, **QUICK), start, device="cpu", show="none")
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for work in (pieces, probes, trainings):
        work(one, start)
    spawn(two, start)
    return {0: start, 1: one, 2: two}


@pytest.mark.parametrize("name", NAMES)
def test_first_step_has_the_same_losses_gradients_and_weights(
    runs: dict[int, Path], name: str
) -> None:
    one, two = (torch.load(runs[n] / name / "probe.pt") for n in (1, 2))
    in_float32 = ("adaface", "triplet", "circle", "center", "branch", "triplet branch")
    exact = 1e-5 if name in in_float32 else 1e-10  # of those losses a part is
    for kind in ("losses", "gradients", "weights"):
        assert one[kind].keys() == two[kind].keys()
        whole = torch.cat([value.flatten() for value in one[kind].values()]).norm()
        for key, value in one[kind].items():
            assert (two[kind][key] - value).norm() <= exact * whole, (kind, key)
    nonzero = [key for key, value in one["gradients"].items() if value.norm() > 0]
    assert len(nonzero) > 0.8 * len(one["gradients"])


def test_two_processes_were_there_and_share_their_work(runs: dict[int, Path]) -> None:
    one, two = (torch.load(runs[n] / "pieces.pt") for n in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    assert two["mean"].tolist() == [1.5, 1.5]  # the average of 1 and 2, no sum
    torch.testing.assert_close(two["means"], one["means"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["trunk", "branch"])
def test_same_losses_weights_and_validation_after_training(
    runs: dict[int, Path], name: str
) -> None:
    rows = {n: read_metrics(runs[n] / name) for n in (1, 2)}
    assert len(rows[1]) == len(rows[2]) > 6
    for one, two in zip(rows[1], rows[2], strict=True):
        for key in one.keys() & {"loss", "influence", "branch", "embedding", "norm"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3), key
        assert one.get("validation", {}).keys() == two.get("validation", {}).keys()
    metrics = {n: checkpoint.read_record(runs[n] / name)["metrics"] for n in (1, 2)}
    assert metrics[2]["validation"] == pytest.approx(metrics[1]["validation"], abs=2.0)
    file = "trunk.safetensors" if name == "trunk" else "btnet/branch_14.safetensors"
    alone, together = (read_safetensors(runs[n] / name / file)[0] for n in (1, 2))
    assert alone.keys() == together.keys()
    whole = torch.cat([value.flatten().float() for value in alone.values()]).norm()
    for key, value in alone.items():
        assert (together[key] - value).float().norm() < 1e-3 * whole, key


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_loads_on_another_number_of_processes(
    tmp_path: Path, first: int, then: int
) -> None:
    out = tmp_path / "stopped"
    for processes, step in ((first, 4), (then, 5)):
        if processes == 2:
            spawn(tmp_path, tmp_path, steps=step)
        else:
            stop_after(step, out)
        assert checkpoint.load_state(out)["step"] == step
    config = methods.phi_mr(FACES, backbone=TINY, **QUICK)
    for place in (out, tmp_path / "whole"):
        train(config, place, device="cpu", show="none")
    for name, key in (("classifier", "weight"), ("trunk", "head.fc.weight")):
        resumed, whole = (
            read_safetensors(place / f"{name}.safetensors")[0][key]
            for place in (out, tmp_path / "whole")
        )
        assert (resumed - whole).norm() / whole.norm() < 1e-4


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two agents that find each other, as on two machines; here both are on this one."""
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 1})
    (tmp_path / "c.json").write_text(config.to_json())
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
           "--rdzv-backend=c10d", "--rdzv-id=test", "--local-addr=127.0.0.1",
           f"--rdzv-endpoint=127.0.0.1:{31500 + os.getpid() % 2000}",
           "-m", "btnet_core.training.launch", "--config", str(tmp_path / "c.json"),
           "--out", str(tmp_path / "out"), "--device", "cpu",
           "--source", "synthetic=btnet_paper.synthetic_faces:SyntheticFaces"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    nodes = [subprocess.Popen(run, **options) for _ in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("parameters learn" in text for text in said) == 1  # the first process alone speaks
    assert (tmp_path / "out" / "trunk.safetensors").is_file()


def test_running_statistics_become_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, the other with 3 where this one has 0 and 1: means, not sums; nothing else moves."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", lambda value: value + 3)
    norm = nn.BatchNorm2d(2)
    distributed.average_statistics(norm)
    assert norm.running_mean.tolist() == [1.5, 1.5]
    assert norm.running_var.tolist() == [2.0, 2.0]
    assert norm.num_batches_tracked.item() == 0
    assert norm.weight.tolist() == [1.0, 1.0]
