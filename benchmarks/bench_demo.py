"""The demo's time by notebook, as its last recorded run took, or of a run now.

    python benchmarks/bench_demo.py [--out figures/results/bench_demo.json] [--results runs/demo/results]
    python benchmarks/bench_demo.py --run [--out FILE]      # the whole demo first, into a folder of its own

A notebook's seconds include what it waits for (training), not the start of its kernel. Notebooks run side by side: only
--run knows how long all took; a recorded run has their sum, which is more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness as bench

KEYS = ("versions", "commit", "cpu", "gpu", "threads", "date")


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The results of the demo's notebooks."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
    return [record for record in records if record["scale"] == "demo"]


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument("--results", type=Path, default=bench.RECORDED / "results", metavar="DIR")
    parser.add_argument("--run", action="store_true", help="run the demo first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        start = time.monotonic()
        if options.run:
            subprocess.run(
                [sys.executable, "-m", "btnet_tools", "reproduce", "--runs", runs], check=True
            )
        whole = time.monotonic() - start
        rows = recorded(Path(runs) / "demo" / "results" if options.run else options.results)
    if not rows:
        parser.error(f"{options.results}: holds no results of the demo; --run makes them")
    took = {row["name"]: row["seconds"] for row in rows}
    for name, seconds in took.items():
        print(f"{name:<32}{seconds:8.1f} s")
    what, seconds = (
        ("", whole) if options.run else (", notebook after notebook", sum(took.values()))
    )
    goals = [bench.goal(f"the demo{what}, minutes", seconds / 60, 10, at_least=False)]
    machine = {key: rows[-1][key] for key in KEYS}
    bench.write(options, goals, {"seconds": took, "run now": options.run}, began, machine)


if __name__ == "__main__":
    main()
