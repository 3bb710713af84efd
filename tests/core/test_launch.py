"""Training in processes of its own: what they are told, how many, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from btnet_core.errors import ConfigError, TrainingError
from btnet_core.files import lock
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import checkpoint, launch, methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.progress import read_metrics

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


def test_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 1})
    metrics = train_in_subprocess(config, tmp_path, device="cpu")
    assert metrics["steps"] == 3
    assert "parameters learn" in capsys.readouterr().out

    # again: finished, so that no process is started and the log stays; --fresh and a change start one
    log = (tmp_path / "train.log").read_text()
    assert log
    with monkeypatch.context() as patch:
        patch.setattr(launch, "Training", None)
        assert train_in_subprocess(config, tmp_path, device="cpu", processes=2) == metrics
        for one, options in ((config, {"fresh": True}), (config.replace(seed=1), {})):
            with pytest.raises(TypeError):  # None is called
                train_in_subprocess(one, tmp_path, device="cpu", **options)
    assert (tmp_path / "train.log").read_text() == log
    with pytest.raises(TrainingError, match="nothing_here"):
        train_in_subprocess(config.replace(data="nothing_here"), tmp_path / "bad", device="cpu")


def test_the_entry_reads_a_page_and_names_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "c.yaml"
    page.write_text(
        "data: {kind: synthetic, identities: 6, images: 6, seed: 0}\n"
        "backbone: {name: iresnet18, width: 0.125, embedding: 16}\n"
        "epochs: 1\nwarmup_epochs: 0\nbatch: 12\n"
    )
    arguments = ["--config", str(page), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert launch.main(arguments) == 0
    assert (tmp_path / "out" / "trunk.safetensors").is_file()
    page.write_text("data: nowhere\n")
    assert launch.main(arguments) == 1
    assert "DataError" in (told := capsys.readouterr().err)
    assert "nowhere" in told


def test_a_kind_of_faces_that_this_process_registered_is_known_to_the_other(tmp_path: Path) -> None:
    (tmp_path / "my_faces.py").write_text(
        "from btnet_paper.synthetic_faces import SyntheticFaces\n"
        "def few(seed: int = 0):\n    return SyntheticFaces(identities=6, images=6, seed=seed)\n"
    )
    launch.register("few", "my_faces:few")
    try:
        config = methods.phi_hr({"kind": "few"}, backbone=TINY, **{**QUICK, "epochs": 1})
        old = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{old}"
        try:
            metrics = train_in_subprocess(config, tmp_path / "out", device="cpu")
        finally:
            os.environ["PYTHONPATH"] = old
    finally:
        from btnet_core.data import sources

        del sources.FACES["few"]
    assert metrics["steps"] == 3


def test_two_processes_by_one_call(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """torchrun starts them; Ctrl-C reaches them, and a checkpoint is saved."""
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 3000})
    out = tmp_path / "out"

    def interrupt() -> None:
        while len(read_metrics(out)) < 3:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train_in_subprocess(config, out, device="cpu", processes=2)
    step = checkpoint.load_state(out)["step"]
    assert step >= 3
    said = capsys.readouterr().out
    assert said.count("parameters learn") == 1
    assert f"stopped at step {step}, checkpoint saved" in said
    with lock(out):
        pass  # nobody holds it any more


def test_an_error_of_several_processes_is_the_one_that_they_named(tmp_path: Path) -> None:
    config = methods.phi_hr("nowhere", backbone=TINY, **QUICK)
    with pytest.raises(TrainingError, match=r"status \d+:\nDataError: .*nowhere[^\n]*$"):
        train_in_subprocess(config, tmp_path, device="cpu", processes=2)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.count("auto", "cpu") == 1
    assert launch.count(3, "cpu") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.count("auto", "auto") == 4
    assert launch.count(2, "cuda") == 2
    for wrong in (5, 0, "all"):
        with pytest.raises(ConfigError, match="processes"):
            launch.count(wrong, "cuda")
    assert launch.command(1)[1:] == ["-m", "btnet_core.training.launch"]
    assert "--nproc-per-node=4" in launch.command(4)


# A training's process in their place: it begins, waits for a file `go` beside it, and ends.
STAND_IN = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "began").write_text(str(time.time()))
try:
    while not (out.parent / "go").exists():
        if (out / "fail").exists() and (out.parent / "b/began").exists():
            sys.exit("DataError: a face is missing")
        time.sleep(0.02)
except KeyboardInterrupt:
    time.sleep(0.3)
    (out / "saved").touch()
    sys.exit(130)
(out / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "command", lambda _: [sys.executable, "-c", STAND_IN])
    monkeypatch.setattr(launch, "cores", lambda: {0, 1, 2})
    monkeypatch.setattr(launch, "idle_cores", lambda least: 1)


def three(root: Path, **changes) -> dict[Path | str, TrainConfig]:
    """Two runs of their own, and one that starts from the second of them."""
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "threads": 1, **changes})
    last = config.replace(backbone=None, init=str(root / "b" / "trunk.safetensors"))
    return {root / "a": config, root / "c": last, root / "b": config}


def when(path: Path) -> float:
    while not (path.exists() and path.read_text()):
        time.sleep(0.02)
    return float(path.read_text())


def go_once(root: Path, *names: str) -> threading.Thread:
    def wait() -> None:
        for name in names:
            when(root / name / "began")
        (root / "go").touch()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_side_by_side_but_for_what_starts_from_another(tmp_path: Path, stand_in: None) -> None:
    go_once(tmp_path, "a", "b")
    assert launch.train_all(three(tmp_path), device="cpu") == [{}, {}, {}]
    assert when(tmp_path / "b/began") < when(tmp_path / "a/began")  # the first that is waited for
    assert when(tmp_path / "a/began") < when(tmp_path / "b/ended")
    assert when(tmp_path / "b/ended") < when(tmp_path / "c/began")


@pytest.mark.parametrize(("threads", "idle", "number"), [(0, 1, 3), (1, 0, 3), (1, 1, 1)])
def test_one_after_another_without_threads_or_an_idle_core(
    threads: int, idle: int, number: int, tmp_path: Path, stand_in: None, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "cores", lambda: set(range(number)))
    monkeypatch.setattr(launch, "idle_cores", lambda least: idle)
    go_once(tmp_path, "b")
    launch.train_all(three(tmp_path, threads=threads), device="cpu")
    assert when(tmp_path / "b/ended") < when(tmp_path / "a/began")
    assert when(tmp_path / "a/ended") < when(tmp_path / "c/began")


def test_a_failure_is_named_and_stops_the_others(tmp_path: Path, stand_in: None) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/fail").touch()
    with pytest.raises(TrainingError, match=r"in .*/a ended with status 1:\nDataError: a face"):
        launch.train_all(three(tmp_path), device="cpu")
    assert (tmp_path / "b/saved").exists()
    assert not (tmp_path / "c").exists()


def test_ctrl_c_stops_all_and_waits_for_them(tmp_path: Path, stand_in: None) -> None:
    def interrupt() -> None:
        for name in ("a", "b"):
            when(tmp_path / name / "began")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch.train_all(three(tmp_path), device="cpu")
    assert (tmp_path / "a/saved").exists()
    assert (tmp_path / "b/saved").exists()
