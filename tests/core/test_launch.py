"""Training in processes of its own: what they are told, how many, how they end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from btnet_core.errors import ConfigError, TrainingError
from btnet_core.files import holder
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import checkpoint, launch, methods
from btnet_core.training.launch import train_in_subprocess
from btnet_core.training.progress import read_metrics

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {"batch": 12, "epochs": 2, "warmup_epochs": 0.0, "lr": 2.0, "precision": "fp32"}


def test_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = methods.phi_hr(FACES, backbone=TINY, **{**QUICK, "epochs": 1})
    metrics = train_in_subprocess(config, tmp_path, device="cpu")
    assert metrics["steps"] == 3
    assert "parameters learn" in capsys.readouterr().out
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
    assert holder(out) == 0


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
