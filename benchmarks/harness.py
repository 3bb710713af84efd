"""What the scripts benchmarks/bench_NAME.py share: their options, their goals, and the table of what they recorded.

    python benchmarks/bench_recordio.py --out figures/results/bench_recordio.json   (--quick: shows that it runs)
    python benchmarks/harness.py [FOLDER]    the table of FOLDER/results/bench_*.json (default: figures)

A script writes, through `write`, its goals and whatever else it measured; table and bench.json are made from those
files alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_paper import results

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
            f"{folder / 'results'} holds no bench_*.json: benchmarks/bench_NAME.py --out makes them"
        )
    rows = []
    for path in paths:
        record = results.load(folder, path.stem)
        try:
            about = {"benchmark": path.stem.removeprefix("bench_"), "machine": describe(record),
                     "quick": record["quick"]}  # fmt: skip
            rows += [row | about | {"reached": reached(row)} for row in record["goals"]]
        except (KeyError, TypeError) as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else "has another form"
            raise DataError(f"{path}: {lacks}, run benchmarks/{path.stem}.py again") from None
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


def main() -> None:
    """Print the table of a folder, and write its bench.json."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else RECORDED
    rows = collect(folder)
    print(table(rows))
    if not any(row["quick"] for row in rows):
        results.record(folder, "bench", {"rows": rows})


if __name__ == "__main__":
    main()
