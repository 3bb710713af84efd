"""The tables of README and docs/fast.md from the recorded results, so that no number in them was typed by hand.

python scripts/readme.py            # rewrite the blocks between <!-- name --> and <!-- /name -->
python scripts/readme.py --check    # fail where the README says other than figures/results
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from btnet_paper import published, results, summary
from btnet_tools import bench

ROOT = Path(__file__).resolve().parents[1]
Records = dict[tuple[str, str], dict[str, Any]]


def markdown(columns: Iterable[str], blocks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A table with a bold line for each block; rows ``{name: {column: cell}}``, numbers with one digit."""
    columns = list(columns)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, rows in blocks.items():
        lines += [f"| **{title}** |" + " |" * len(columns)] if title else []
        lines += [
            f"| {name} | " + " | ".join(show(row.get(column)) for column in columns) + " |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A cell: "–" for what was not measured."""
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def made(records: Records, notebook: str) -> dict[str, dict[str, Any]]:
    """The records of a notebook by scale."""
    return {
        scale: records[scale, notebook]
        for scale in summary.scales(records)
        if (scale, notebook) in records
    }


def table1(records: Records) -> str:
    """Table 1 of the scales and of the paper, gains in brackets."""
    blocks = {}
    for scale, record in made(records, "05_verification").items():
        if "-" in scale:
            continue
        accuracy = record["values"]["accuracy"]
        blocks[f"ours, scale {scale}"] = accuracies(record)
        if scale == "lfw" and "phi_bt" in accuracy:
            blocks["the same, folds 6 to 10 (settings were chosen on 1 to 5)"] = {
                name: {s: cell["second_half"] for s, cell in row.items()}
                for name, row in accuracy.items()
            }
    blocks["the paper, six sets"] = {
        name: {s: cell.replace(" (-)", "") for s, cell in row.items()}
        for name, row in summary.printed("table1").items()
    }
    return markdown(settings(blocks), blocks)


def centred(records: Records) -> str:
    """phi_mr and phi_bt with centred embeddings, folds 6 to 10 below."""
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    for scale, record in made(records, "05_verification").items():
        if "-" in scale or "centred" not in record["values"]:
            continue
        for title, key in (
            (f"scale {scale}", "accuracy"),
            (f"scale {scale}, folds 6 to 10", "second_half"),
        ):
            blocks[title] = {
                f"{name}, {'as it is' if rows is record['values']['accuracy'] else f'mean at {of}'}":
                {s: cell[key] for s, cell in rows[name].items()}
                for name in ("phi_mr", "phi_bt")
                for of, rows in (("", record["values"]["accuracy"]), ("each", record["values"]["centred"]["own"]),
                                 ("112", record["values"]["centred"]["112"]))
            }  # fmt: skip
    return markdown(settings(blocks), blocks)


def variants(records: Records) -> str:
    """Table 1 of the variants of a scale (lfw-mr, …), gains in brackets."""
    found = {
        scale: record for scale, record in made(records, "05_verification").items() if "-" in scale
    }
    later = "phi_bt, folds 6 to 10"
    blocks = {
        f"scale {scale}": accuracies(record)
        | {
            later: {
                s: cell["second_half"] for s, cell in record["values"]["accuracy"]["phi_bt"].items()
            }
        }
        for scale, record in found.items()
    }
    return markdown(settings(blocks), blocks)


def accuracies(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a record of notebook 05."""
    accuracy = record["values"]["accuracy"]
    rows = {
        name: {s: cell["accuracy"] for s, cell in row.items()} for name, row in accuracy.items()
    }
    return short(summary.with_gains("table1", rows))


def settings(blocks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The settings of Table 1 that some row has."""
    order = ("112&7", "112&14", "112&28", "112&56", "7&7", "14&14", "28&28", "56&56", "112&112")
    return [s for s in order if any(s in row for rows in blocks.values() for row in rows.values())]


def short(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracies with one digit; gains as they are, without brackets where undefined."""

    def cut(cell):
        return re.sub(r"^(\d+\.\d+)", lambda m: f"{float(m[1]):.1f}", str(cell)).replace(" (-)", "")

    return {name: {column: cut(cell) for column, cell in row.items()} for name, row in rows.items()}


def seeds(records: Records) -> str:
    """Mean and standard deviation over seeds."""
    blocks = {}
    for (scale, name), record in records.items():
        if name.endswith("_seeds"):
            mean, std = record["values"]["mean"], record["values"]["std"]
            count = len(record["values"]["by_seed"])
            blocks[f"scale {scale}, {count} seeds"] = {
                method: {s: f"{value:.1f} ± {std[method][s]:.1f}" for s, value in row.items()}
                for method, row in mean.items()
            }
    return markdown(settings(blocks), blocks)


def ablations(records: Records) -> str:
    """Tables 3 and 4, what is beyond the paper, and Figure 7: a pair of columns for each scale, the paper's last."""
    found = made(records, "07_ablations")
    columns = list[str]()
    parts = {"Table 3": "table3", "Table 4: influence loss": "table4", "one switch away": "beyond"}
    blocks: dict[str, dict[str, dict[str, Any]]] = {
        title: {} for title in (*parts, "Figure 7: where the branch ends")
    }
    for scale, record in [*found.items(), ("paper", None)]:
        r = "14" if record is None else record["values"]["figure7"][0]["setting"].split("&")[1]
        names = {setting: f"{scale}: {setting}" for setting in (f"112&{r}", f"{r}&{r}")}
        columns += names.values()
        for title, part in parts.items():
            rows = (
                record["values"][part]
                if record
                else published.table(part)
                if part != "beyond"
                else {}
            )
            for name, row in rows.items():
                blocks[title].setdefault(name, {}).update(
                    {column: row[s] if record else f"{row[s]:.2f}" for s, column in names.items()}
                )
        for point in record["values"]["figure7"] if record else ():
            name = (
                f"{scale}, {point['couple_at']}: {point['stored']:,} parameters"
                + " (the rule)" * point["standard"]
            )
            blocks["Figure 7: where the branch ends"].setdefault(name, {})[
                names[point["setting"]]
            ] = point["accuracy"]
    return markdown(columns, blocks)


def repeated(records: Records) -> str:
    """Rows of notebook 07 with other seeds, longer, or at another resolution: benchmarks/ablations.py."""
    blocks = {}
    for (scale, name), record in records.items():
        if "_ablations_" in name:
            values, seeds = record["values"], len(record["values"]["by_seed"])
            title = f"scale {scale}, {summary.trained(values)}, {seeds} seed{'s' * (seeds > 1)}"
            rows: dict[str, dict[str, str]] = {}
            for table, means in values["mean"].items():
                for row, cells in means.items():
                    shown = (f"{mean:.1f}" + f" ± {values['std'][table][row][s]:.1f}" * (seeds > 1)
                             for s, mean in cells.items())  # fmt: skip
                    rows.setdefault(row, dict(zip(("112&r", "r&r"), shown, strict=True)))
            blocks[title] = rows
    return markdown(("112&r", "r&r"), blocks)


def standins(records: Records) -> str:
    """Table 2 at FPIR 0.3 and Tables 5 to 8 on stand-ins, by scale: numbers that the paper's cannot be compared with."""
    lines = []
    for scale, record in made(records, "06_survface_identification").items():
        rows = {name: report["tpir"]["0.3"] for name, report in record["values"]["reports"].items()}
        if "max+ceil" in rows:
            order = sorted(rows, key=lambda name: -rows[name])
            lines.append(
                f"- Table 2, scale `{scale}`, TPIR20 in % at FPIR 0.3: "
                + ", ".join(f"{n} {rows[n]:.1f}" for n in order)
                + "."
            )
        if again := record["values"].get("fitted", {}).get("reports"):
            order = sorted(again, key=lambda name: -again[name]["tpir"]["0.3"])
            lines.append(
                f"- The same with lengths fitted, scale `{scale}`: "
                + ", ".join(f"{n} {again[n]['tpir']['0.3']:.1f}" for n in order)
                + "."
            )
    for (scale, name), record in records.items():
        of_seeds = (
            list(record["values"].get("selection", {}).values()) if name.endswith("_seeds") else []
        )
        if of_seeds:
            means = {n: statistics.mean(row[n] for row in of_seeds) for n in of_seeds[0]}
            spread = {n: statistics.stdev(row[n] for row in of_seeds) for n in means}
            for what, fits in (("models and stand-ins", False), ("the same, lengths fitted", True)):
                order = sorted(
                    (n for n in means if n.endswith(summary.FITTED) is fits),
                    key=lambda name: -means[name],
                )
                shown = (
                    f"{n.removesuffix(summary.FITTED)} {means[n]:.1f} ± {spread[n]:.1f}"
                    for n in order
                )
                lines += (
                    [f"- Scale `{scale}`, {len(of_seeds)} seeds of {what}: {', '.join(shown)}."]
                    if order
                    else []
                )
    columns = ["112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112"]
    blocks = {
        f"scale {scale}: {title}": record["values"][key]
        | {f"{name}{summary.FITTED}": {s: value for s, value in row.items() if s in columns[:3]}
           for name, row in record["values"].get("fitted", {}).get(key, {}).items()}
        for scale, record in made(records, "08_template_aggregation").items()
        for key, title in (("tar", f"TAR at FAR {record['config']['far']:g} (Tables 5, 6)"),
                           ("tpir", "TPIR at FPIR 0.1 (Tables 7, 8)"))
    }  # fmt: skip
    return "\n".join(lines) + "\n\n" + markdown(columns, blocks)


def inference_ms(_: Records) -> str:
    """docs/fast.md: milliseconds of each mode by route, with onnxruntime's fp32 over them in brackets."""
    ms = {name: batches["32"] for name, batches in inference()["times"]["ms"].items()}
    base = ms["onnxruntime"]
    rows = {
        name: {f"{r} px": f"{v:.1f} (x {base[r] / v:.1f})" for r, v in row.items()}
        for name, row in ms.items()
    }
    return markdown([f"{r} px" for r in base], {"": rows})


def inference_roof(_: Records) -> str:
    """docs/fast.md: peaks, and the share of them that each mode reaches at batch 32."""
    times = inference()["times"]
    rows = {
        mode: {"peak, GMAC/s": f"{times['peaks'][mode]:.0f}"}
        | {f"{r} px": f"{100 * at['of_peak']:.0f} %" for r, at in by_batch["32"].items()}
        for mode, by_batch in times["roofline"].items()
    }
    return (
        markdown(next(iter(rows.values())), {"": rows})
        + f"\n\nMemory: {times['peaks']['bandwidth']:.0f} GB/s."
    )


def inference_accuracy(_: Records) -> str:
    """docs/fast.md: accuracy of each mode."""
    reports = inference()["accuracy"]["accuracy"]
    rows = {m: {s: f"{value:.2f}" for s, value in row.items()} for m, row in reports.items()}
    return markdown(reports["plain"], {"": rows})


def inference() -> dict[str, Any]:
    return results.load(results.ROOT / "figures", "bench_inference")["values"]


SHOWN = ("embed", "ten folds", "1:N", "bf16, 112", "int8, 112", "int8, 7 px", "RecordIO", "branch training, demo-14:",
         "branch training, mobilefacenet-14", "branch training, iresnet50-14")  # fmt: skip


def speed(_: Records) -> str:
    """Some of the goals that `btnet bench` prints."""
    lines = {
        row["what"]: {
            "measured": f"{row['value']:.3g}",
            "goal": f"{'≥' if row['at_least'] else '≤'} {row['goal']:g}",
            "reached": "yes" if row["reached"] else "**no**",
        }
        for row in bench.collect(results.ROOT / "figures")
        if row["what"].startswith(SHOWN) and "MACs" not in row["what"]
    }
    return markdown(["measured", "goal", "reached"], {"": lines})


BLOCKS: dict[str, dict[str, Callable[[Records], str]]] = {
    "README.md": {
        "table1": table1,
        "centred": centred,
        "variants": variants,
        "seeds": seeds,
        "ablations": ablations,
        "repeated": repeated,
        "standins": standins,
        "speed": speed,
    },
    "docs/fast.md": {"ms": inference_ms, "roof": inference_roof, "accuracy": inference_accuracy},
}


def main() -> int:
    records: Records = summary.collect([results.ROOT / "figures"])
    for page, blocks in BLOCKS.items():
        text = was = (ROOT / page).read_text("utf-8")
        for name, block in blocks.items():
            inner = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
            text, count = inner.subn((block(records) + "\n").replace("\\", r"\\"), text)
            if count != 1:
                raise SystemExit(f"{page} has {count} blocks {name}, expected one")
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(text, "utf-8")
        elif text != was:
            raise SystemExit(f"{page} says other than figures/results: python scripts/readme.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
