"""A GPU in one call: do the tests marked gpu pass, how fast is each part, and how far is it from what the card could do?

    python benchmarks/gpu.py [--quick] [--out runs/gpu/gpu.json]       about ten minutes on one H100 (three)
    python benchmarks/gpu.py --device cpu --tiny                      the same code in a minute: shows that it runs

From the source tree, without installation and without a network. Needs torch and numpy; with pillow, safetensors, filelock
and tqdm it measures btnet_core (without them the card's rates alone), with pytest it runs the tests, with matplotlib it draws
the figure beside the record. The record is written after every cell: a run that is killed keeps what it has. A cell that
runs out of memory, or fails, says so in the record and the next one follows; a failure makes the exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not installed

import torch  # noqa: E402

NEEDED = {"numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "filelock": "filelock", "tqdm": "tqdm"}  # fmt: skip
WANTED = {"pytest": "pytest", "matplotlib": "matplotlib"}
LACKS = {name for name in NEEDED | WANTED if find_spec(name) is None}
if not LACKS & NEEDED.keys():
    import gpu_cells as measured

    from btnet_paper.results import environment, plain
if "matplotlib" not in LACKS:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}  # fmt: skip


class Record:
    """What is known so far, in a file after each addition."""

    def __init__(self, path: Path, **about: Any) -> None:
        self.path, self.values = path, {**about, "complete": False, "tests": {}, "cells": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        values = plain(self.values, self.path.stem) if not LACKS & NEEDED.keys() else self.values
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(beside, self.path)


def lacking() -> str:
    """One line on what is not installed and what that costs; empty where nothing is."""
    parts = []
    if needed := [package for name, package in NEEDED.items() if name in LACKS]:
        parts.append(f"{', '.join(needed)}: the card's rates alone are measured")
    if "pytest" in LACKS:
        parts.append("pytest: the tests are not run")
    if "matplotlib" in LACKS:
        parts.append("matplotlib: no figure")
    return f"not installed: {'; '.join(parts)}" if parts else ""


# ---- what the device can do at most --------------------------------------------------------------


def rates(device: torch.device, tiny: bool) -> tuple[dict[str, float], float]:
    """Operations a second of large matrix products by precision; bytes a second of a copy (read and written)."""
    side, numbers = (128, 2**16) if tiny else (8192, 2**28)
    found = {}
    for precision, dtype in DTYPES.items():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[precision] = 2 * side**3 / _seconds(device, lambda x=x, y=y: torch.matmul(x, y))
    source, target = (torch.zeros(numbers, device=device) for _ in range(2))
    return found, 8 * numbers / _seconds(device, lambda: target.copy_(source))


def _seconds(device: torch.device, task: Any, times: int = 10) -> float:
    """The mean of ``times`` runs after three that are not counted."""
    for count in (3, times):
        began = time.perf_counter()
        for _ in range(count):
            task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


# ---- tests ---------------------------------------------------------------------------------------


def run_tests(device: torch.device, log: Path, quick: bool, limit: float) -> dict[str, Any]:
    """The tests marked gpu in a process of their own; what they print is in ``log``."""
    if device.type != "cuda" or "pytest" in LACKS or LACKS & NEEDED.keys():
        why = "no CUDA device" if device.type != "cuda" else lacking()
        return {"ran": False, "why": why}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider",
               "tests/core/test_gpu.py", *(["-k", "not compiled"] if quick else [])]  # fmt: skip
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as sink:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdout=sink,
                stderr=subprocess.STDOUT, timeout=limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
    return told_by(log.read_text(errors="replace"), status)


def told_by(text: str, status: int | None) -> dict[str, Any]:
    """Counts of a pytest -v log, the names of what failed, and its status (None: out of time)."""
    lines = [line.split() for line in text.splitlines() if line.startswith("tests/")]
    outcome = {line[0]: line[1] for line in lines if len(line) > 1}
    counts = {kind.lower(): [*outcome.values()].count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}  # fmt: skip
    failed = [name for name, kind in outcome.items() if kind in ("FAILED", "ERROR")]
    return {"ran": True, "status": status, **counts, "names": failed}


# ---- cells ---------------------------------------------------------------------------------------


def run_cell(cell: Any, place: Any) -> dict[str, Any]:
    """What the cell measured, or why it could not be; the device's memory is free again afterwards."""
    began = time.monotonic()
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        found = cell(place)
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        found = {"error": f"{type(error).__name__}: {told}", "failed": True}
    torch._dynamo.reset()
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def run_cells(
    record: Record, device: torch.device, options: argparse.Namespace, end: float
) -> None:
    """Every cell that there is time for, recorded one after the other."""
    sizes = measured.TINY if options.tiny else measured.Sizes()
    with tempfile.TemporaryDirectory() as folder:
        place = measured.Place(
            device=device, folder=Path(folder), sizes=sizes,
            matrix=record.values["matrix_per_second"], copy=record.values["copied_per_second"],
        )  # fmt: skip
        for name, cell in measured.cells(sizes, options.quick).items():
            late = time.monotonic() > end
            found = {"error": "no time left"} if late else run_cell(cell, place)
            record.values["cells"][name] = found
            record.save()
            print(line(name, found), flush=True)
    if device.type == "cuda":
        record.values["aims"] = measured.aims(record.values["cells"])


def line(name: str, cell: dict[str, Any]) -> str:
    """A cell in one line."""
    if "error" in cell:
        return f"{name:<36}{cell['error']}"
    roofs = ", ".join(f"{kind} {value:,.0f}" for kind, value in cell["roofs"].items())
    return (
        f"{name:<36}{cell['value']:>12,.0f} {cell['unit']:<9} {100 * cell['share']:5.1f} % of the lower roof "
        f"({roofs}), {cell['memory_gb']:.1f} GB"
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Every cell as a bar: its part of the lower roof."""
    rows = [(name, cell) for name, cell in record["cells"].items() if "value" in cell][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    bars = axes.barh([name for name, _ in rows], [100 * cell["share"] for _, cell in rows])
    axes.bar_label(bars, [f"{cell['value']:,.0f} {cell['unit']}" for _, cell in rows], padding=3)
    axes.set(
        xlabel="% of the lower roof", title=f"{record['card']}: what is reached", xlim=(0, 115)
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--quick", action="store_true", help="a part, in about three minutes")
    parser.add_argument("--tiny", action="store_true", help="shows that it runs, measures nothing")
    parser.add_argument(
        "--minutes", type=float, help="no cell begins later (default 8; quick: 2.7)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu" / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny shows that this runs")
    if options.tiny:
        torch.compiler.set_stance("force_eager")  # compiling takes minutes, whatever the size
    limit = 60 * (options.minutes or (2.7 if options.quick else 8))
    end, device = time.monotonic() + limit, torch.device(options.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {platform.machine()}"
    known = (
        environment() if not LACKS & NEEDED.keys() else {"versions": {"torch": torch.__version__}}
    )
    record = Record(options.out, name=options.out.stem, card=card, quick=options.quick, tiny=options.tiny, lacks=lacking(), **known)  # fmt: skip
    print(f"{card}, torch {torch.__version__}. {lacking()}", flush=True)
    matrix, copied = rates(device, options.tiny)
    record.values |= {"matrix_per_second": matrix, "copied_per_second": copied}
    record.save()
    print(", ".join(f"{name} {rate / 1e12:,.1f} T operations/s" for name, rate in matrix.items())
          + f", copies {copied / 1e9:,.0f} GB/s", flush=True)  # fmt: skip
    tests = run_tests(device, options.out.with_suffix(".log"), options.quick, limit / 2)
    record.values["tests"] = tests
    record.save()
    print(f"tests marked gpu: {tests}", flush=True)
    if not LACKS & NEEDED.keys():
        run_cells(record, device, options, end)
    record.values["complete"] = True
    record.save()
    if "matplotlib" not in LACKS and record.values["cells"]:
        draw(record.values, options.out.with_suffix(".png"))
    failed = [name for name, cell in record.values["cells"].items() if cell.get("failed")]
    return int(bool(failed) or tests.get("status", 0) != 0)


if __name__ == "__main__":
    sys.exit(main())
