"""The demo's time by notebook, as its last recorded run took, or of runs now.

    python benchmarks/bench_demo.py [--out figures/results/bench_demo.json] [--results runs/demo/results]
    python benchmarks/bench_demo.py --run [--out FILE]      # the whole demo twice, into folders of its own

A notebook's seconds include what it waits for (training), not the start of its kernel. Notebooks run side by side: only
--run knows how long all took; a recorded run has their sum, which is more. The second run of --run has half of the
cores, at least one, kept busy by processes that do nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness as bench

from btnet_core.device import cores

KEYS = ("versions", "commit", "cpu", "gpu", "threads", "date")


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The results of the demo's notebooks."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
    return [record for record in records if record["scale"] == "demo"]


def demo() -> tuple[float, list[dict[str, Any]]]:
    """Run it; the seconds of all and what its notebooks recorded."""
    with tempfile.TemporaryDirectory() as runs:
        start = time.monotonic()
        command = [sys.executable, "-m", "btnet_tools", "reproduce", "--runs", runs]
        subprocess.run(command, check=True)
        return time.monotonic() - start, recorded(Path(runs) / "demo" / "results")


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep that many cores busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        for process, core in zip(spinning, sorted(cores(), reverse=True), strict=False):
            if hasattr(os, "sched_setaffinity"):  # Linux: the same cores throughout
                os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        for process in spinning:
            process.kill()


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument("--results", type=Path, default=bench.RECORDED / "results", metavar="DIR")
    parser.add_argument("--run", action="store_true", help="run the demo, idle and busy")
    options = parser.parse_args()
    whole, rows = demo() if options.run else (0.0, recorded(options.results))
    if not rows:
        parser.error(f"{options.results}: holds no results of the demo; --run makes them")
    took = {row["name"]: row["seconds"] for row in rows}
    for name, seconds in took.items():
        print(f"{name:<32}{seconds:8.1f} s")
    what = "the demo" if options.run else "the demo, notebook after notebook"
    minutes = (whole or sum(took.values())) / 60
    goals = [bench.goal(f"{what}, minutes", minutes, 10, at_least=False)]
    values: dict[str, Any] = {"seconds": took, "cores": len(cores()), "run now": options.run}
    if options.run:
        with busy(number := max(1, len(cores()) // 2)):
            seconds, again = demo()
        what = f"with {number} of {len(cores())} cores kept busy, times that"
        goals.append(bench.goal(f"the demo {what}", seconds / whole, 2, at_least=False))
        values |= {"busy": number, "busy seconds": {row["name"]: row["seconds"] for row in again}}
    machine = {key: rows[-1][key] for key in KEYS}
    bench.write(options, goals, values, began, machine)


if __name__ == "__main__":
    main()
