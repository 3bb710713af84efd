"""`btnet bench`: run the scripts of the repository's folder benchmarks/ and hold what they measured to their goals.

A script benchmarks/bench_NAME.py takes `--out FILE --quick` and writes, through `write`, its goals and whatever else it
measured. The table, bench.json and the figure are made from those files alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import ConfigError, DataError, ReproduceError
from btnet_core.files import write_atomically
from btnet_paper import results

FOLDER = results.ROOT / "benchmarks"
RECORDED = results.ROOT / "figures"


def options(document: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark: `document` is its description, `--out` and `--quick` its switches."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was measured as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, measures nothing"
    )
    return parser


def goal(what: str, value: float, limit: float, *, at_least: bool) -> dict[str, Any]:
    """What was measured, a ratio or another number, and the limit that it must reach or must not exceed."""
    return {"what": what, "value": float(value), "goal": float(limit), "at_least": at_least}


def reached(row: dict[str, Any]) -> bool:
    """Whether the goal of a row is met."""
    return row["value"] >= row["goal"] if row["at_least"] else row["value"] <= row["goal"]


def write(
    given: argparse.Namespace, goals: Sequence[dict[str, Any]], values: dict[str, Any], began: float,
    machine: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the goals and write them with `values`, the machine (this one) and the seconds since `began` to `--out`."""
    machine = machine or results.environment()
    rows = [row | {"machine": describe(machine)} for row in goals]
    print(table(rows), flush=True)
    if given.out:
        body = {"name": given.out.stem, "scale": "", "seed": None, "quick": given.quick, "goals": goals,
                "values": values, "seconds": round(time.monotonic() - began, 1), **machine}  # fmt: skip
        text = json.dumps(results.plain(body, given.out.stem), indent=1, allow_nan=False)
        write_atomically(given.out, text.encode() + b"\n")


def describe(machine: dict[str, Any]) -> str:
    """Processor or GPU, and threads, of a recorded environment."""
    return f"{machine['gpu'] or machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def names() -> list[str]:
    """The benchmarks that there are. Raises ConfigError where their folder is missing."""
    found = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if not found:
        raise ConfigError(
            f"{FOLDER} holds no benchmarks: they are part of the repository, not of an installed package; "
            "clone it and `pip install -e .` there"
        )
    return found


def measure(wanted: Sequence[str], out: Path, *, quick: bool = False) -> None:
    """Run the benchmarks one after the other, each in a process of its own, into ``out/results/bench_*.json``.

    Raises:
        ConfigError: a name that no benchmark has.
        ReproduceError: one failed; the others have been run.
    """
    known, failed = names(), []
    if unknown := sorted(set(wanted) - set(known)):
        raise ConfigError(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    for name in wanted or known:
        script, target = FOLDER / f"bench_{name}.py", out / "results" / f"bench_{name}.json"
        print(f"--- {script.name}{' --quick' * quick}", flush=True)
        command = [sys.executable, script, "--out", target.absolute(), *["--quick"] * quick]
        if subprocess.run(list(map(str, command)), check=False).returncode:
            failed.append(name)
    if failed:
        raise ReproduceError(f"failed: {', '.join(failed)}; what went wrong is printed above")


def collect(folder: Path, wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The goals recorded in ``folder/results/bench_*.json``, with benchmark and machine of each.

    Raises:
        DataError: there are none, or a file is not what ``write`` writes.
    """
    paths = [folder / "results" / f"bench_{name}.json" for name in wanted] or sorted(
        (folder / "results").glob("bench_*.json")
    )
    if not paths:
        raise DataError(
            f"{folder / 'results'} holds no bench_*.json: btnet bench --out {folder} makes them"
        )
    rows = []
    for path in paths:
        record = results.load(folder, path.stem)
        try:
            about = {"benchmark": path.stem.removeprefix("bench_"), "machine": describe(record),
                     "quick": record["quick"]}  # fmt: skip
            rows += [row | about | {"reached": reached(row)} for row in record["goals"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: lacks {error}, run `btnet bench {path.stem[6:]}` again"
            ) from None
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each goal: measured, goal, reached or not; the machine where it changes."""
    lines, machine = [], ""
    for row in rows:
        if row["machine"] != machine:
            machine = row["machine"]
            lines.append(
                f"{machine + ' (--quick: not a measurement)' * row.get('quick', False):<76}measured       goal"
            )
        sign = "≥" if row["at_least"] else "≤"
        verdict = "reached" if reached(row) else "NOT reached"
        lines.append(
            f"  {row['what']:<72}{row['value']:>10.4g}  {sign} {row['goal']:<8.4g} {verdict}"
        )
    return "\n".join(lines)


def report(folder: Path, wanted: Sequence[str] = ()) -> str:
    """The table of ``folder``; without ``wanted`` also bench.json of all of it, and the figures made from there."""
    from btnet_paper.figures import remake

    rows = collect(folder, wanted)
    if not wanted and not any(row["quick"] for row in rows):
        results.record(folder, "bench", {"rows": rows})
        for source in ("bench", "bench_growth", "bench_inference"):
            if (folder / "results" / f"{source}.json").is_file():
                remake(folder, source, out=folder)
    return table(rows)
