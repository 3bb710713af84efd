"""What has been recorded, by whom and at which scale, as one long table of numbers.

A *long* frame has a line for each number and the columns ``COLUMNS``. Its tables are the paper's
("table1" … "table8", "figure7", "text" for numbers of the running text) and what goes beyond
it ("second_half", "by_set", "centred", "beyond"). Only recorded JSON is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from btnet_core.errors import DataError
from btnet_paper import published, results
from btnet_paper.gains import gains, show_gain

Records = dict[tuple[str, str], dict[str, Any]]  # (scale, notebook or benchmark) -> record
Number = tuple[Any, ...]  # table, row, setting, value and perhaps spread
COLUMNS = ["table", "source", "row", "setting", "value", "spread", "gain"]
GAINS = ("table1", "table5", "table6", "table7", "table8")  # those that print gains
PAPER = "the paper"  # the source of what it prints
SCALES = ("demo", "lfw", "paper")  # in this order; variants ("lfw-mr") follow
FITTED = ", lengths fitted"  # rows with embeddings multiplied by one number for each resolution
FINETUNED = ", fine-tuned"  # rows of networks that have learned from SurvFace's training part
NAMES = {"phi_mr_v2": "phi_mr(v2)", "phi_mr_v3": "phi_mr(v3)"}  # as Table 1 prints them


def collect(folders: Iterable[Path]) -> Records:
    """Records in `<folder>/results/*.json` that name a scale; of two the later folder's.

    Each has its path as "path". Notebook 11 is left out: it is made of the others. Raises
    DataError naming a file that is not JSON or no record.
    """
    found: Records = {}
    for folder in folders:
        for path in sorted((folder / "results").glob("*.json")):
            record = results.load(folder, path.stem)
            if not isinstance(record, dict):
                got = type(record).__name__
                raise DataError(f"{path} holds a {got}, expected what results.record writes")
            name = record.get("name", path.stem)
            if record.get("scale") and name != "11_summary":
                found[record["scale"], name] = record | {"path": path}
    return found


def everything(run_dir: Path) -> Records:
    """Records of the repository (figures/results), of the runs beside `run_dir`, and its own."""
    beside = sorted(path.parent for path in run_dir.parent.glob("*/results"))
    return collect([results.ROOT / "figures", *beside, run_dir])


def scales(records: Records) -> list[str]:
    """The three scales, run or not, and the variants that were run."""
    return [*SCALES, *sorted({scale for scale, _ in records} - set(SCALES))]


def origins(records: Records) -> pd.DataFrame:
    """Of each record: seed, what it was measured on, kernel, date."""
    lines = {}
    for (scale, name), record in records.items():
        values = record["values"]
        data = values.get("test") or values.get("data") or ", ".join(values.get("pairs", ()))
        lines[f"scale {scale}: {name}"] = {
            "seed": record.get("seed"), "measured on": data, "kernel": record.get("kernel"),
            "date": record.get("date", "")[:10],
        }  # fmt: skip
    return pd.DataFrame(list(lines.values()), index=list(lines), dtype=object)


def made(records: Records, notebook: str) -> dict[str, dict[str, Any]]:
    """Scale -> its record of one notebook, for the scales that have one."""
    return {of: records[of, notebook] for of in scales(records) if (of, notebook) in records}


def frame(lines: Iterable[Number], source: str) -> pd.DataFrame:
    """A long frame of (table, row, setting, value[, spread]); gains by Eqs. 4 and 5 are added.

    Rows with fitted lengths have none: the equations compare methods, not ways of adding.
    """
    padded = [(table, source, *rest, *[None] * (4 - len(rest)), "") for table, *rest in lines]
    long = pd.DataFrame([line[:7] for line in padded], columns=COLUMNS)
    for table in GAINS:
        mine = (long["table"] == table) & ~long["row"].str.endswith(FITTED)
        rows: dict[str, dict[str, Any]] = {}
        for line in long[mine].itertuples():
            rows.setdefault(line.row, {})[line.setting] = line.value
        if "phi_hr" in rows:
            gained = gains(rows)
            long.loc[mine, "gain"] = [
                show_gain(gained[line.row][line.setting]) for line in long[mine].itertuples()
            ]
    return long


def paper() -> pd.DataFrame:
    """All that the paper prints, gains as printed; a printed "-" is None."""
    lines = [
        (table, PAPER, row, setting, value, None, gain)
        for table in published.TABLES
        for row, setting, value, gain in published.cells(table)
    ]
    lines += [
        ("text", PAPER, name, "value", value, None, "")
        for name, (value, _) in published.texts().items()
    ]
    return pd.DataFrame(lines, columns=COLUMNS)


def numbers(record: Mapping[str, Any]) -> pd.DataFrame:
    """The long frame of one record; empty for a notebook that fills no table.

    Raises DataError naming the file and what it lacks.
    """
    name, scale = record["name"], record.get("scale")
    try:
        if "_ablations_" in name:
            return frame(_repeated(record["values"]), f"scale {scale}, {trained(record)}")
        if name.endswith("_seeds"):
            count = len({run.partition(",")[0] for run in record["values"]["by_seed"]})
            return frame(
                _seeds(record["values"]), f"scale {scale}, {count} seed{'s' * (count > 1)}"
            )
        lines: list[Number] = []
        if name in READERS:
            lines = [*READERS[name](record["values"]), *_beyond(record["values"])]
        return frame(lines, f"scale {scale}")
    except (KeyError, TypeError, AttributeError) as error:
        where = record.get("path", name)
        lacks = f"lacks {error}" if isinstance(error, KeyError) else "has another form"
        raise DataError(f"{where} is not what its notebook records: it {lacks}") from None


def trained(record: Mapping[str, Any]) -> str:
    """How rows of benchmarks/ablations.py were trained: "14 px, 2 passes, 1 seed"."""
    values = record["values"]
    passes, seeds = values["epochs"], len(values["by_seed"])
    epochs = f"{passes} pass{'es' if passes > 1 else ''}"
    return f"{values['resolution']} px, {epochs}, {seeds} seed{'s' if seeds > 1 else ''}"


def all_numbers(records: Records) -> pd.DataFrame:
    """Ours and the paper's, the paper's last."""
    order = scales(records)
    mine = sorted(records.values(), key=lambda record: order.index(record["scale"]))
    long = pd.concat([*map(numbers, mine), paper()], ignore_index=True)
    # What notebook 12 shows stood in 05 to 08 before: of two records of a number 12's counts.
    return long.drop_duplicates(["table", "source", "row", "setting"], keep="last")


def _figure1(values: Mapping[str, Any]) -> Iterator[Number]:
    yield "text", "figure1_knee", "value", values["knee"]["measured"]
    yield "text", "figure1_images", "value", values["images"]


def _costs(values: Mapping[str, Any]) -> Iterator[Number]:
    """Of IResNet-50, counted: the same at every scale."""
    for cost in values["iresnet50"]:
        if cost["r"] in (28, 7):
            yield "text", f"figure5_share_{cost['r']}", "value", round(100 * cost["share"], 1)


def _verification(values: Mapping[str, Any]) -> Iterator[Number]:
    accuracy = {NAMES.get(name, name): row for name, row in values["accuracy"].items()}
    for name, row in accuracy.items():
        for setting, cell in row.items():
            yield "table1", name, setting, cell["accuracy"]
            yield "second_half", name, setting, cell.get("second_half")
            yield from _by_set(name, setting, cell, values.get("pairs", ()))
    printed = {name: {s: cell["accuracy"] for s, cell in row.items() if s in published.SETTINGS}
               for name, row in accuracy.items()}  # fmt: skip
    best = gains(printed).get("phi_bt", {}) if "phi_hr" in printed else {}
    for kind, same in (("cross", False), ("same", True)):
        some = [v for s, v in best.items() if v is not None and published.same(s) is same]
        for end in (min, max) if some else ():
            yield "text", f"{kind}_gain_{end.__name__}", "value", round(end(some), 2)


def _by_set(
    name: str, setting: str, cell: Mapping[str, Any], sets: Sequence[str]
) -> Iterator[Number]:
    """Each of several verification sets by itself, and the later folds of those."""
    for i, one in enumerate(sets if len(sets) > 1 else ()):
        yield "by_set", f"{one}: {name}", setting, cell["sets"][i]
        yield "by_set", f"{one}, folds 6 to 10: {name}", setting, cell["second_halves"][i]


def _survface(values: Mapping[str, Any]) -> Iterator[Number]:
    yield from _selection(values["reports"], "")
    yield from _selection(values.get("finetuned", {}), FINETUNED)


def _selection(reports: Mapping[str, Any], remark: str) -> Iterator[Number]:
    for key, report in reports.items():
        row = f"BTNet ({key})" if "+" in key else key
        yield "table2", row + remark, "AUC", report["auc"]
        for fpir, tpir in report["tpir"].items():
            yield "table2", row + remark, fpir, tpir


def _ablations(values: Mapping[str, Any]) -> Iterator[Number]:
    for table in ("table3", "table4"):
        for row, cells in values.get(table, {}).items():
            for setting, value in cells.items():
                yield table, row, setting, value
    stored = {}
    for point in values["figure7"]:
        unit = point["couple_at"] + (" (the rule)" if point.get("standard") else "")
        stored[unit] = point["stored"]
        yield "figure7", unit, point["setting"], point["accuracy"]
    for unit, parameters in stored.items():
        yield "figure7", unit, "stored", parameters


def _templates(values: Mapping[str, Any]) -> Iterator[Number]:
    for key, across, within in (("tar", "table5", "table6"), ("tpir", "table7", "table8")):
        for name, row in values[key].items():
            for setting, value in row.items():
                yield within if published.same(setting) else across, name, setting, value


def _beyond(values: Mapping[str, Any]) -> Iterator[Number]:
    """What goes beyond the paper: of notebook 12, and of the older records of 05 to 08."""
    for of, rows in values.get("centred", {}).items():
        for name, row in rows.items():
            for setting, cell in row.items():
                yield "centred", f"{NAMES.get(name, name)}, mean at {of}", setting, cell["accuracy"]
    fitted = values.get("fitted", {})
    yield from _selection(fitted.get("reports", {}), FITTED)
    for key, table in (("tar", "table5"), ("tpir", "table7")):
        for name, row in fitted.get(key, {}).items():
            for setting, value in row.items():
                if not published.same(setting):  # within a resolution lengths change nothing
                    yield table, name + FITTED, setting, value
    for row, cells in values.get("beyond", {}).items():
        for setting, value in cells.items():
            yield "beyond", row, setting, value


def _seeds(values: Mapping[str, Any]) -> Iterator[Number]:
    for name, row in values.get("mean", {}).items():
        for setting, mean in row.items():
            yield "table1", NAMES.get(name, name), setting, mean, values["std"][name][setting]
            sets = values.get("pairs", ())
            cells = [run[name][setting] for run in values.get("measured", {}).values()]
            if cells:
                later = pd.Series([cell["second_half"] for cell in cells])
                yield "second_half", NAMES.get(name, name), setting, later.mean(), later.std()
            for i, one in enumerate(sets if len(sets) > 1 else ()):
                for key, remark in (("sets", ""), ("second_halves", ", folds 6 to 10")):
                    found = pd.Series([cell[key][i] for cell in cells])
                    yield "by_set", f"{one}{remark}: {name}", setting, found.mean(), found.std()
    selection = pd.DataFrame(values.get("selection", {}))  # strategies x seeds
    for key, found in selection.T.items():
        row = f"BTNet ({key.removesuffix(FITTED)})" if "+" in key else key.removesuffix(FITTED)
        remark = FITTED if key.endswith(FITTED) else ""
        yield "table2", row + remark, "0.3", found.mean(), found.std()


def _repeated(values: Mapping[str, Any]) -> Iterator[Number]:
    several = len(values["by_seed"]) > 1
    for table, rows in values["mean"].items():
        for row, cells in rows.items():
            for setting, mean in cells.items():
                spread = values["std"][table][row][setting] if several else None
                yield table, row, setting, mean, spread


READERS: dict[str, Callable[[Mapping[str, Any]], Iterable[Number]]] = {
    "01_upsampling_error": _figure1,
    "02_architecture_and_cost": _costs,
    "05_verification": _verification,
    "06_survface_identification": _survface,
    "07_ablations": _ablations,
    "08_template_aggregation": _templates,
    "12_beyond_the_paper": lambda values: (),  # all of it is _beyond
}
