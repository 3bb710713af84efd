"""The paper's scale from its files to its report, on fake data in the paper's own layouts.

MS1Mv3 as RecordIO with identity records, the six ``.bin`` sets in its folder, QMUL-SurvFace and
IJB-C, a small trunk, two steps a run, two gloo processes. No number means anything: what is tested
is that every table and figure of the paper comes out, so that days of GPUs find nothing missing.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.recordio import write_face_records
from btnet_core.images import encode, resize
from btnet_paper import claims, figures, plans, published, records
from btnet_paper.layouts import write_survface, write_survface_training
from btnet_paper.scales import get_scale
from btnet_paper.standins import ijbc_standin, native_sizes
from btnet_tools.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3000)]
PAGE = """
base: paper
claim: Fake data in the paper's layouts and two steps a run; no number means anything.
backbone: {name: iresnet18, width: 0.125, embedding: 32}
hr: &few {epochs: 1, batch: 36, warmup_epochs: 0, threads: 1}
trunk: *few
specialists: {native: *few}
branch: *few
ablation: *few
survface_trunk: &fewer {epochs: 1, batch: 16, warmup_epochs: 0, threads: 1}
survface_branch: *fewer
"""
# Trunks, specialists and the runs of Section 5, by the same two processes one after the other: to
# start two for each run, as notebook 04 does, takes ten times as long as its two steps.
TRAIN = """
from pathlib import Path
from btnet_core.training import distributed
from btnet_core.training.loop import train
from btnet_paper import plans
from btnet_paper.scales import get_scale

scale, models = get_scale("fake.yaml"), Path("runs/fake/models").resolve()
for run in [*plans.trunks(scale, models, 0), *plans.specialists(scale, models, 0)]:
    train(run, models / run.name, device="cpu", show="lines")
ablated = {run.name: run for rows in plans.ablations(scale, models).values() for run in rows.values()}
for name, run in ablated.items():
    train(run, models / "ablations" / name, device="cpu", show="lines")
distributed.stop()
"""
HANGS = 900  # seconds of one command
TOGETHER = ("03", "04")  # notebooks that are given two processes
APART = ("00", "01", "02", "05", "06", "07", "08", "09", "10", "11", "12")
LITTLE = ("repeats=1", "batch_size=1", "images=16", "count=24", "known=4", "strangers=8")
FACES, SURVFACE = "ms1m-retinaface-t1", "QMUL-SurvFace"  # as configs/paper.yaml has them
SETS = ("lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw")  # in the folder of FACES


def synthetic(identities: int, images: int, first: int) -> FaceSet:
    kind = {"kind": "synthetic", "seed": 0, "first": first}
    return open_faces({**kind, "identities": identities, "images": images})


def encoded(faces: FaceSet) -> list[bytes]:
    return [encode(face, "JPEG") for face in faces.images(range(len(faces)))]


def write_ms1mv3(folder: Path) -> None:
    """RecordIO with identity records, and the six sets of 20 pairs beside it, as InsightFace's.

    The sets have pickle protocol 2 (arrays, as of Python 2) and 4 (bytes) by turns.
    """
    faces = synthetic(12, 6, first=0)
    write_face_records(folder, zip(encoded(faces), faces.labels.tolist(), strict=True), (112, 112))
    people = np.array(encoded(synthetic(10, 4, first=1000)), object).reshape(10, 4)
    for k, name in enumerate(SETS):
        pairs = [(people[p, 0], people[p, 1 + k % 3]) for p in range(10)]
        pairs += [(people[p, 0], people[p - 1, k % 4]) for p in range(10)]
        images = [image for pair in pairs for image in pair]
        same = [True] * 10 + [False] * 10
        if k % 2:
            images = [np.frombuffer(image, np.uint8) for image in images]
        content = pickle.dumps((images, same), protocol=2 if k % 2 else 4)
        (folder / f"{name}.bin").write_bytes(content)


def surveillance(faces: FaceSet, rows: range) -> list[tuple[int, Tensor]]:
    """(identity, image of a native size) of the images at these places."""
    sizes = native_sizes(len(faces), np.random.default_rng(0)).tolist()
    small = [resize(faces.native(i), tuple(sizes[i])).round().to(torch.uint8) for i in rows]
    return [(int(faces.labels[i]), face) for i, face in zip(rows, small, strict=True)]


def write_all(root: Path) -> None:
    """The data of configs/paper.yaml under its names."""
    write_ms1mv3(root / FACES)
    faces = synthetic(10, 4, first=2000)  # six people are known, four are strangers
    parts = (range(0, 24, 2), range(1, 24, 2), range(24, 40))
    write_survface(root / SURVFACE, *(surveillance(faces, part) for part in parts))
    write_survface_training(root / SURVFACE, surveillance(synthetic(8, 4, 3000), range(32)))
    ijbc_standin(synthetic(8, 5, first=4000), root, impostors=200)
    [built] = root.glob("ijb-c-standin-*")
    (built / "STAND-IN.txt").unlink()
    built.rename(root / "IJBC")
    for i, face in enumerate(encoded(synthetic(14, 2, first=5000))):
        path = root / "lfw" / f"person_{i // 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(face)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with the data root and the page in it."""
    folder = tmp_path_factory.mktemp("paper")
    write_all(folder / "data")
    (folder / "fake.yaml").write_text(PAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BTNET_DATA", str(folder / "data"))
        patch.chdir(folder)
        yield folder


def python(*arguments: str) -> str:
    """Run ``python -m``; what it printed. Where it hangs, each process of it says at which line."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        for one in reversed([process, *psutil.Process(process.pid).children(recursive=True)]):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGABRT)
                time.sleep(0.5)  # so that their lines do not mix
        told, _ = process.communicate(timeout=60)
        logs = [path.read_text(errors="replace")[-3000:] for path in Path("runs").rglob("*.log")]
        reached = [line for line in told.splitlines() if line.startswith("[")]
        pytest.fail("\n".join([told[-20000:], *logs, f"{arguments} hangs after:", *reached]))
    assert process.returncode == 0, told[-6000:]
    return told


def reproduce(*arguments: str) -> None:
    python("btnet_tools", "reproduce", "--scale", "fake.yaml", "--device", "cpu", *arguments)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The folder of the run: all thirteen notebooks."""
    (place / "train.py").write_text(TRAIN)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    (place / "trained.log").write_text(python(*torchrun, "train.py"))
    reproduce("--only", ",".join(TOGETHER), "--processes", "2")
    little = [argument for value in LITTLE for argument in ("-p", value)]
    reproduce("--only", ",".join(APART), *little)
    return place / "runs" / "fake"


def test_nothing_lacks(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", "--scale", "fake.yaml", "--check"]) == 0
    told = capsys.readouterr().out
    assert "LACKS" not in told
    assert "72 images of 12 people" in told
    for name in SETS:
        assert f"{FACES}/{name}.bin: 20 pairs" in told


def test_every_notebook_records_its_result(run: Path) -> None:
    found = {path.stem[:2] for path in (run / "results").glob("*.json")}
    assert found == {*TOGETHER, *APART}
    assert {scale for scale, _ in records.collect([run])} == {"fake"}


def test_each_run_had_two_processes_and_was_trained_once(place: Path, run: Path) -> None:
    trained = (place / "trained.log").read_text().splitlines()
    plan = plans.plan(get_scale("fake.yaml"), run / "models")
    assert len(plan) == 10
    rows = plans.ablations(get_scale("fake.yaml"), run / "models").values()
    folders = [*plan, *{f"ablations/{one.name}" for row in rows for one in row.values()}]
    for folder in folders:
        log, name = run / "models" / folder / "train.log", folder.split("/")[-1]
        own = folder in plan and plan[folder].branch_weight > 0  # notebook 04 started them
        assert log.exists() == own, folder  # where a run is finished no process is started
        lines = log.read_text().splitlines() if own else trained
        mine = "\n".join(line for line in lines if line.startswith(f"{name}: "))
        assert ", 2 processes" in mine, folder
        assert "step 2/2" in mine, folder


def test_every_table_and_figure_of_the_paper_comes_out(run: Path) -> None:
    found = records.collect([run])
    covered = claims.coverage(found)["scale fake"]
    for item, told in covered.items():
        assert re.fullmatch(r"seed 0|(\d+) of \1 numbers", str(told)), (item, told)
    long = records.all_numbers(found).query("source == 'scale fake' and table == 'table2'")
    strategies = {row for row in published.table("table2") if row.startswith("BTNet")}
    assert {row + records.FINETUNED for row in strategies} <= set(long["row"])
    for name in figures.FIGURES:
        for kind in ("png", "pdf"):
            assert (run / "figures" / f"{name}.{kind}").stat().st_size > 1000, name


def test_report_check_and_figures(run: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--scale", "fake.yaml"]
    assert main(["report", *given]) == 0
    page = (run / "report.html").read_text()
    assert "NOT FINISHED" not in page
    assert "MISSING" not in page
    for table in published.TABLES:
        assert published.title(table) in page
    assert main(["figures", *given, "--out", "drawn"]) == 0
    assert "figures in drawn" in capsys.readouterr().out
    assert main(["check", *given]) == 1  # against what the repository has recorded
    assert "no committed record of the scale fake" in capsys.readouterr().err
