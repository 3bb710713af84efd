"""docs/results.md and the table of README from the recorded results: no number there is typed.

python scripts/results.py            # write both
python scripts/results.py --check    # fail where they say other than figures/results
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from btnet_paper import beyond, claims, published, records, results, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
INTRODUCTION = """# Results

Every recorded number, written by `python scripts/results.py` from `figures/results/*.json`; the
text around it is in the README. Accuracies, TAR, TPIR and AUC are in %; in brackets gains by
Eqs. 4 and 5; ± is the standard deviation over seeds. The scales measure on different data, so
methods can be compared within a block, not a block with the paper's. phi_mm is the route of r from
random weights, as the paper's costs and its Table 3 have it; what was called so before, scaled up to
112 and started from phi_hr, is the row "phi_mm, from phi_hr". What moved and why is in
[CHANGELOG](../CHANGELOG.md), "Numbers that changed"."""
EXTRA = {
    "second_half": (
        "Table 1 on folds 6 to 10",
        "Settings of the scale lfw were chosen on folds 1 to 5.",
    ),
    "by_set": (
        "Table 1, each verification set by itself",
        "Where a scale has several. Settings were chosen on folds 1 to 5 of LFW's pairs alone.",
    ),
    "centred": (
        "Table 1 with centred embeddings",
        "The mean unit embedding of some hundred training faces (`count` of the record) is subtracted "
        "before the cosine: that of each face's own resolution, or always that of 112 px.",
    ),
    "beyond": (
        "One switch away from the paper's loss",
        "params in millions; length: mean length of the branch's embeddings over the trunk's.",
    ),
    "figure7": ("Figure 7", "Where the branch ends; stored: parameters a resolution."),
}
HEADLINE = ("phi_hr", "phi_mr", "phi_bt")


def headline(long: pd.DataFrame) -> str:
    """README's table: three methods at 112&14 and 14&14 for each scale and the paper."""
    rows = {}
    for source in (*(f"scale {scale}" for scale in records.SCALES), records.PAPER):
        values = tables.values("table1", source, long)
        rows[source] = {
            f"{setting} {method}": values.at[method, setting] if len(values) else None
            for setting in ("112&14", "14&14")
            for method in HEADLINE
        }
    return tables.markdown(rows)


def page(found: records.Records, long: pd.DataFrame) -> str:
    """docs/results.md."""
    parts = [INTRODUCTION, "## The paper's claims", _claims(long)]
    for table in published.TABLES:
        parts += [f"## Table {table[5:]}", published.title(table) + ".", _table(table, long)]
    for table, (title, about) in EXTRA.items():
        if not (long["table"] == table).any():
            continue
        parts += [f"## {title}", about, _table(table, long)]
    parts += [
        "## Numbers of the running text",
        tables.markdown(claims.running_text(long)),
        "## Printed gains without a value",
        tables.markdown(_errata()),
        "## What has been recorded",
        tables.markdown(claims.coverage(found)),
        "## Measured on",
        tables.markdown(records.origins(found)),
        *_alternatives(),
        "## Benchmarks",
        _benchmarks(),
    ]
    return "\n\n".join(parts) + "\n"


def _claims(long: pd.DataFrame) -> str:
    about = (
        "For how many settings each holds, and in brackets by how many points (lowest to highest). "
        "A tie does not count; what was not measured is not asked."
    )
    verdicts = claims.verdicts(long).stack().dropna().to_frame("holds")
    return about + "\n\n" + tables.markdown(verdicts)


def _table(table: str, long: pd.DataFrame) -> str:
    return tables.markdown(tables.wide(table, long))


def _errata() -> pd.DataFrame:
    lines = pd.DataFrame(published.errata())
    names = lines["table"] + ", " + lines["row"] + ", " + lines["column"]
    return lines.set_index(names)[["printed", "why"]]


def _alternatives() -> list[str]:
    """Branches beside what else can be done with phi_hr, on real faces."""
    record = results.load(ROOT / "figures", "lfw_alternatives")
    gains = ", ".join(f"{name} {gain:+.2f}" for name, gain in record["values"]["published"].items())
    about = (
        "Scale lfw, one seed, the mean over LFW and CFP-FF; `python benchmarks/alternatives.py` "
        f"on {record['cpu']} ({', '.join(record['instruction_sets'])}), {record['precision']}. Stored: beside phi_hr, all resolutions together "
        "(phi_mr: in its place). PSNR: RGB, above bicubic enlargement. The published VDSR and LapSRN, on the luminance "
        f"of aligned faces, gain (dB): {gains}. DRRN: 92.6 GMACs at 112x112, not trained."
    )
    frame = beyond.alternatives(record["values"])
    text = frame.apply(lambda column: column.map(_digits(column.name)))
    return ["## Alternatives to branches", about, tables.markdown(text)]


def _digits(column: str) -> Callable[[float], str]:
    digits = {"&": 1, "GMACs": 3, "stored": 3, "minutes": 0, "PSNR": 2}
    count = next(count for part, count in digits.items() if part in column)
    return lambda value: "–" if pd.isna(value) else f"{value:.{count}f}"


def _benchmarks() -> str:
    lines = {}
    for path in sorted((ROOT / "figures" / "results").glob("bench_*.json")):
        for goal in results.load(ROOT / "figures", path.stem).get("goals", ()):
            met = (
                goal["value"] >= goal["goal"] if goal["at_least"] else goal["value"] <= goal["goal"]
            )
            lines[path.stem.removeprefix("bench_"), goal["what"]] = {
                "measured": f"{goal['value']:.4g}",
                "goal": f"{'≥' if goal['at_least'] else '≤'} {goal['goal']:g}",
                "reached": "yes" if met else "**no**",
            }
    frame = pd.DataFrame(list(lines.values()), index=pd.MultiIndex.from_tuples(lines))
    return tables.markdown(frame)


def main() -> int:
    found = records.collect([ROOT / "figures"])
    long = records.all_numbers(found)
    readme = README.read_text("utf-8")
    inner = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)
    new, count = inner.subn(lambda _: headline(long) + "\n", readme)
    if count != 1:
        raise SystemExit(f"README.md has {count} blocks <!-- results -->, expected one")
    for path, text in ((PAGE, page(found, long)), (README, new)):
        if "--check" not in sys.argv[1:]:
            path.write_text(text, "utf-8")
        elif not path.is_file() or path.read_text("utf-8") != text:
            raise SystemExit(f"{path.name} says other than figures/results: python {sys.argv[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
