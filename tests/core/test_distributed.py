"""Two gloo processes against one: the same losses, weights and state, for every margin loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import btnet_paper  # noqa: F401 (in every process: the kind "synthetic")
from btnet_core.files import read_safetensors
from btnet_core.losses import MARGINS
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import checkpoint, distributed, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train
from btnet_core.training.progress import read_metrics
from btnet_core.training.step import prepare

FACES = {"kind": "synthetic", "identities": 7, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {
    "batch": 12,
    "epochs": 2,
    "warmup_epochs": 0.0,
    "lr": 0.02,
    "precision": "fp32",
    "sync_bn": True,
}  # a small lr: larger steps are chaotic and amplify rounding


def configurations(trunk: Path) -> dict[str, TrainConfig]:
    found = {name: methods.phi_mr(FACES, backbone=TINY, loss=name, **QUICK) for name in MARGINS}
    files = str(trunk / "trunk.safetensors"), str(trunk / "classifier.safetensors")
    found["branch"] = methods.phi_bt(
        FACES, 14, *files, **{**QUICK, "embedding_weight": 1.0, "cache": "memmap"}
    )
    found["triplet"] = methods.phi_bt(
        FACES, 14, *files, **{**QUICK, "loss": "triplet", "per_identity": 2}
    )
    return found


def probes(trunk: Path) -> dict[str, TrainConfig]:
    """What the first step is compared for: each of the above, and the other losses over pairs and classes."""
    found, some = configurations(trunk), {"per_identity": 2, "backbone": TINY, **QUICK}
    return found | {name: methods.phi_mr(FACES, loss=name, **some) for name in ("center", "circle")}


def probe(config: TrainConfig, out: Path) -> None:
    """Losses, gradients and weights of the first step, as all processes together have them."""
    run = prepare(config, out, torch.device("cpu"))
    run.modes(training=True)
    batch = run.sampler.batch(0)
    parts = run.losses(batch, *run.inputs(batch, run.pixels.get(batch.records)))
    sum(parts.values()).backward()
    distributed.sum_gradients(run.trainable.values())
    gradients = {name: parameter.grad.clone() for name, parameter in run.trainable.items()}
    if run.kappa is not None and run.kappa.weight.requires_grad:
        gradients["kappa"] = run.kappa.whole(run.kappa.weight.grad)
    for group in run.optimiser.param_groups:
        group["lr"] = 1.0  # the step shows in every weight
    run.optimiser.step()
    weights = {name: parameter.detach() for name, parameter in run.trainable.items()}
    if run.kappa is not None:
        weights["kappa"] = run.kappa.whole()
    values = {
        name: value.detach() if name == "influence" else distributed.all_sum(value)
        for name, value in parts.items()
    }
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save({"losses": values, "gradients": gradients, "weights": weights}, out / "probe.pt")


def worker(rank: int, port: int, out: Path, trunk: Path, interrupt: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        if interrupt:
            stop_after(4, out / "stopped", 2)
        else:
            for name, config in probes(trunk).items():
                probe(config, out / name)
            for name, config in configurations(trunk).items():
                train(config, out / name, device="cpu", show="none")
    finally:
        distributed.stop()


def stop_after(step: int, out: Path, processes: int) -> None:
    """Train and stop after ``step`` as Ctrl-C does: a checkpoint is there."""
    from btnet_core.training import loop

    original = loop._values

    def values(parts, norm, stop):
        stop.count = getattr(stop, "count", 0) + 1
        if stop.count == step:
            stop.set()
        return original(parts, norm, stop)

    loop._values = values
    try:
        train(methods.phi_mr(FACES, backbone=TINY, **QUICK), out, device="cpu", show="none")
    except KeyboardInterrupt:
        assert processes == distributed.world()
    finally:
        loop._values = original


def spawn(out: Path, trunk: Path, *, interrupt: bool) -> None:
    port = 29500 + os.getpid() % 2000 + interrupt
    mp.spawn(worker, (port, out, trunk, interrupt), nprocs=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Every configuration, trained by one process and by two, all of one thread: kernels then sum in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trunk = tmp_path_factory.mktemp("trunk")
    train(methods.phi_mr(FACES, backbone=TINY, **QUICK), trunk, device="cpu", show="none")
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name, config in probes(trunk).items():
        probe(config, one / name)
    for name, config in configurations(trunk).items():
        train(config, one / name, device="cpu", show="none")
    spawn(two, trunk, interrupt=False)
    torch.set_num_threads(threads)
    return {0: trunk, 1: one, 2: two}


@pytest.mark.parametrize("name", [*MARGINS, "branch", "triplet", "center", "circle"])
def test_first_step_has_the_same_losses_gradients_and_weights(
    runs: dict[int, Path], name: str
) -> None:
    one, two = (torch.load(runs[n] / name / "probe.pt") for n in (1, 2))
    assert one["losses"].keys() == two["losses"].keys()
    for key, value in one["losses"].items():
        torch.testing.assert_close(two["losses"][key], value, rtol=1e-5, atol=1e-6)
    for kind in ("gradients", "weights"):
        assert one[kind].keys() == two[kind].keys()
        whole = torch.cat([value.flatten() for value in one[kind].values()]).norm()
        for key, value in one[kind].items():  # of float32, summed in another order
            assert (two[kind][key] - value).norm() <= 1e-4 * value.norm() + 1e-6 * whole, (
                kind,
                key,
            )
    moved = [key for key, value in one["gradients"].items() if value.norm() > 0]
    assert len(moved) > 0.9 * len(one["gradients"])


@pytest.mark.parametrize("name", [*MARGINS, "branch", "triplet"])
def test_same_losses_and_weights_after_training(runs: dict[int, Path], name: str) -> None:
    rows = {
        n: [row for row in read_metrics(out / name) if "loss" in row]
        for n, out in runs.items()
        if n
    }
    assert len(rows[1]) == len(rows[2]) > 0
    for key in rows[1][0].keys() & {"loss", "influence", "branch", "embedding", "norm"}:
        # float32 sums in another order
        assert [row[key] for row in rows[2]] == pytest.approx(
            [row[key] for row in rows[1]], rel=2e-2 if key == "norm" else 5e-3
        ), key
    config = configurations(runs[0])[name]
    run = prepare(config, runs[0], torch.device("cpu"))
    before = run.network.state_dict()
    file = "trunk.safetensors" if name in MARGINS else "btnet/branch_14.safetensors"
    alone, together = (read_safetensors(runs[n] / name / file)[0] for n in (1, 2))
    moved = {
        key: (alone[key] - before[key], together[key] - before[key])
        for key in alone.keys() & run.trainable.keys()
    }
    first, second = (torch.cat([pair[k].flatten() for pair in moved.values()]) for k in (0, 1))
    assert first.norm() > 0
    assert (first - second).norm() < 0.02 * first.norm()
    if config.classifier == "fresh":
        start = run.kappa.weight.detach()
        first, second = (
            read_safetensors(runs[n] / name / "classifier.safetensors")[0]["weight"] - start
            for n in (1, 2)
        )
        assert (first - second).norm() < 0.02 * first.norm()
        assert first.norm() > 0


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_loads_on_another_number_of_processes(
    tmp_path: Path, first: int, then: int
) -> None:
    out = tmp_path / "stopped"
    for processes in (first, then):
        if processes == 2:
            spawn(tmp_path, tmp_path, interrupt=True)
        else:
            stop_after(4 if processes == first else 99, out, 1)
        if processes == first:
            assert checkpoint.load_state(out)["step"] == 4
    if then == 2:  # its own stop came four steps later: the run has six
        assert checkpoint.load_state(out)["step"] == 6
    train(
        methods.phi_mr(FACES, backbone=TINY, **QUICK), tmp_path / "whole", device="cpu", show="none"
    )
    train(methods.phi_mr(FACES, backbone=TINY, **QUICK), out, device="cpu", show="none")
    resumed, whole = (
        read_safetensors(path / "classifier.safetensors")[0]["weight"]
        for path in (out, tmp_path / "whole")
    )
    assert (resumed - whole).norm() / whole.norm() < 2e-2


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two agents that find each other, as on two machines; here both are on this one."""
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 1})
    (tmp_path / "c.json").write_text(config.to_json())
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    run += [
        "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{31500 + os.getpid() % 2000}",
        "--local-addr=127.0.0.1",
    ]
    run += [
        "-m",
        "btnet_tools",
        "train",
        "--config",
        str(tmp_path / "c.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    nodes = [subprocess.Popen([*run, "--device", "cpu"], **options) for _ in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("parameters learn" in text for text in said) == 1  # the first process alone speaks
    assert (tmp_path / "out" / "trunk.safetensors").is_file()
    train(config, tmp_path / "alone", device="cpu", show="none")
    alone, both = (read_metrics(tmp_path / name)[0]["loss"] for name in ("alone", "out"))
    assert both == pytest.approx(alone, rel=1e-5)
