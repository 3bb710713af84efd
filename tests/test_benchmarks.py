"""benchmarks/gpu.py on a CPU: the same code as on a GPU, on a machine that lacks things, stopped, and out of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = (
    "papermill",
    "IPython",
    "jupyterlab",
    "pandas",
    "seaborn",
    "scipy",
    "torchvision",
    "yaml",
    "click",
    "jinja2",
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu as module

    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def call(gpu: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    """``main`` with those arguments on the CPU; torch's settings are as before afterwards."""
    line = ["gpu.py", "--device", "cpu", "--tiny", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", line)
    before = torch.get_float32_matmul_precision()
    try:
        return gpu.main()
    finally:
        torch.compiler.set_stance("default")
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_every_cell_is_measured_beside_its_roofs(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(gpu, monkeypatch, tmp_path / "gpu.json") == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["complete"]
    assert record["tests"] == {"ran": False, "why": "no CUDA device"}
    assert [*record["cells"]] == [*gpu.measured.cells(gpu.measured.TINY, quick=False)]
    for name, cell in record["cells"].items():
        assert cell["value"] > 0, (name, cell)
        roofs = cell["roofs"]
        assert cell["share"] == pytest.approx(cell["value"] / min(roofs.values())), name
    cells, lowest = record["cells"], record["matrix_per_second"]["fp32"]
    cached, uncached = (
        cells[f"branch 14 {kind}"]["roofs"]["operations"] for kind in ("cached", "uncached")
    )
    assert cached > uncached  # the teacher's pass is spared
    assert cells["1:N, 64 entries"]["roofs"]["operations"] == pytest.approx(lowest / (2 * 64 * 16))
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_cell_out_of_memory_or_in_error_is_recorded_and_the_next_follows(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(place: Any) -> None:
        raise ValueError("first line\nsecond line")

    good = {"value": 1.0, "unit": "x/s", "roofs": {"bytes": 2.0}, "share": 0.5, "memory_gb": 0.0}
    chosen = {"full": full, "broken": broken, "good": lambda place: good}
    monkeypatch.setattr(gpu.measured, "cells", lambda sizes, quick: chosen)
    assert call(gpu, monkeypatch, tmp_path / "gpu.json") == 1
    cells = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert cells["full"]["error"] == "out of memory"
    assert cells["broken"]["error"] == "ValueError: first line"
    assert cells["good"]["share"] == 0.5
    del chosen["broken"]
    assert call(gpu, monkeypatch, tmp_path / "gpu.json") == 0  # memory alone is no failure
    assert call(gpu, monkeypatch, tmp_path / "late.json", "--minutes", "1e-6") == 0
    late = json.loads((tmp_path / "late.json").read_text())["cells"]
    assert {cell["error"] for cell in late.values()} == {"no time left"}


def test_a_run_that_is_stopped_keeps_what_it_has(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(place: Any) -> None:
        raise KeyboardInterrupt

    good = {"value": 1.0, "unit": "x/s", "roofs": {"bytes": 2.0}, "share": 0.5, "memory_gb": 0.0}
    chosen = {"good": lambda place: good, "stopped": stopped}
    monkeypatch.setattr(gpu.measured, "cells", lambda sizes, quick: chosen)
    with pytest.raises(KeyboardInterrupt):
        call(gpu, monkeypatch, tmp_path / "gpu.json")
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["complete"]
    assert [*record["cells"]] == ["good"]
    assert record["matrix_per_second"]["fp32"] > 0


def run_code(code: str, folder: Path) -> str:
    """What it prints in a process of its own, which has to end well."""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_not_installed_is_told_in_a_line(tmp_path: Path) -> None:
    """Without tqdm btnet_core cannot be imported: the rates are measured all the same."""
    missing = dict.fromkeys((*FOREIGN, "tqdm", "pytest", "matplotlib"))
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")]
    code = (
        f"import sys, runpy; sys.modules.update({missing}); sys.argv = {arguments}; "
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')"
    )
    said = run_code(code, tmp_path)
    first = said.splitlines()[0]
    assert "not installed: tqdm: the card's rates alone are measured; pytest: the tests" in first
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["complete"]
    assert record["copied_per_second"] > 0
    assert not record["cells"]


def test_the_cells_need_no_notebook_and_no_installation(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules.update({dict.fromkeys(FOREIGN)}); "
        f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; import gpu; print(gpu.measured.__file__)"
    )
    run_code(code, tmp_path)


def test_the_log_of_the_tests_is_read(gpu: Any) -> None:
    text = (
        "collected 4 items\n\n"
        "tests/core/test_gpu.py::test_a PASSED   [ 25%]\n"
        "tests/core/test_gpu.py::test_b[fp16] FAILED   [ 50%]\n"
        "tests/core/test_gpu.py::test_c SKIPPED (needs two GPUs)   [ 75%]\n"
        "tests/core/test_gpu.py::test_d "
    )
    told = gpu.told_by(text, None)
    assert told == {
        "ran": True, "status": None, "passed": 1, "failed": 1, "error": 0, "skipped": 1,
        "names": ["tests/core/test_gpu.py::test_b[fp16]"],
    }  # fmt: skip
