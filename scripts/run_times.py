"""docs/run-times.md from the recorded results: what each scale and notebook took, and on what.

python scripts/run_times.py            # write it
python scripts/run_times.py --check    # fail where it says other than figures/results
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from btnet_paper import records, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "run-times.md"
INTRODUCTION = """# Run time and hardware

Written by `python scripts/run_times.py` from `figures/results/*.json`. Minutes as recorded: of the
notebook, and of the trainings that it shows. A notebook that finds its trainings finished does not
train again, so that its own minutes may be fewer. Durations were taken beside other work unless a
text says otherwise; they are an order of magnitude, not a benchmark. Memory: the most that one
training held, in GB."""
COLUMNS = ("minutes", "trainings", "memory", "processor", "GPU", "threads", "date")


def line(record: dict[str, Any]) -> dict[str, Any]:
    """COLUMNS of one record."""
    trained = record["values"].get("trained")
    runs = list(trained.values()) if isinstance(trained, dict) else []
    training = sum(run.get("seconds") or 0 for run in runs)
    values = (
        (record.get("seconds") or 0) / 60,
        training / 60 if training else None,
        max((run.get("memory_gb") or 0 for run in runs), default=0) or None,
        record.get("cpu"),
        record.get("gpu"),
        record.get("threads"),
        record.get("date", "")[:10],
    )
    return dict(zip(COLUMNS, values, strict=True))


def total(lines: dict[str, dict[str, Any]]) -> str:
    """Minutes of a scale: of each notebook the longer of its own and its trainings'."""
    minutes = sum(max(row["minutes"], row["trainings"] or 0) for row in lines.values())
    return f"{minutes:.0f} minutes in all, counting of each line the longer of the two."


def page() -> str:
    """docs/run-times.md."""
    found = records.collect([ROOT / "figures"])
    parts = [INTRODUCTION]
    for scale in dict.fromkeys(scale for scale, _ in found):
        lines = {
            name: line(record)
            for (of, name), record in found.items()
            if of == scale and not name.startswith("bench")
        }
        if lines:
            parts += [f"## Scale {scale}", total(lines), tables.markdown(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    if "--check" in sys.argv:
        if PAGE.read_text("utf-8") == page():
            return 0
        print(f"{PAGE} is not what the records say: python scripts/run_times.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
