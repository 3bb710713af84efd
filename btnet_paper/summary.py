"""Recorded results beside the paper's numbers: what was reproduced at which scale, and whether the paper's claims hold.

Only recorded JSON is read. *Tables* are ``{"table1": {row: {column: number}}}`` with the paper's rows and columns; the
numbers of the running text are the table "text", whose only column is "value".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from btnet_core.errors import DataError
from btnet_paper import published, results
from btnet_paper.gains import gains, show_gain
from btnet_paper.scales import pages

Tables = dict[str, dict[str, dict[str, Any]]]
TABLES = tuple(f"table{number}" for number in range(1, 9))
GAINS = (TABLES[0], *TABLES[4:])  # those that print gains
FITTED = ", lengths fitted"  # rows of Tables 5 and 7 with embeddings of fitted length (notebook 08)
MADE_BY = {  # what of the paper each notebook makes
    "01": ("Figure 1",), "02": ("Figure 2", "Figure 3", "Figure 5", "Figure 6"), "05": ("Table 1",),
    "06": ("Table 2", "Figure 8"), "07": ("Table 3", "Table 4", "Figure 7"),
    "08": ("Table 5", "Table 6", "Table 7", "Table 8"), "09": ("Figure 4", "Figure 9"),
}  # fmt: skip


def collect(folders: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Results by (scale, notebook) in `<folder>/results/*.json`; of two the later folder's, its path as "path".

    Files without a scale (benchmarks) are passed over. Raises DataError naming a file that is not JSON or no result.
    """
    found = {}
    for folder in folders:
        for path in sorted((folder / "results").glob("*.json")):
            record = results.load(folder, path.stem)
            if not isinstance(record, dict):
                raise DataError(
                    f"{path} holds a {type(record).__name__}, expected what results.record writes"
                )
            if (
                record.get("scale") in pages() and path.stem != "11_summary"
            ):  # which is made of these
                found[record["scale"], record.get("name", path.stem)] = record | {"path": path}
    return found


def everything(run_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What is recorded in the repository (figures/results), then in the runs of all scales beside `run_dir`, and there."""
    return collect(
        [results.ROOT / "figures", *(run_dir.parent / scale for scale in pages()), run_dir]
    )


def scales(records: Mapping[tuple[str, str], Any]) -> list[str]:
    """The three scales, run or not, and quick ones that were run."""
    return [scale for scale in pages() if "-" not in scale or any(of == scale for of, _ in records)]


def ours(record: Mapping[str, Any]) -> Tables:
    """One record's numbers in the paper's tables. Raises DataError naming the file and what it lacks."""
    try:
        return _ours(record["name"], record["values"])
    except (KeyError, TypeError, AttributeError) as error:
        where = record.get("path", record.get("name"))
        raise DataError(
            f"{where} is not what its notebook records ({type(error).__name__}: {error})"
        ) from None


def _ours(name: str, values: Mapping[str, Any]) -> Tables:
    found: Tables = {}
    text: dict[str, Any] = {}
    if name == "01_upsampling_error":
        text = {"figure1_knee": values["knee"]["measured"], "figure1_images": values["images"]}
    elif name == "02_architecture_and_cost":  # of IResNet-50, by the architecture alone
        share = {row["r"]: 100 * row["share"] for row in values["iresnet50"]}
        text = {f"figure5_share_{r}": round(share[r], 1) for r in (28, 7)}
    elif name == "05_verification":
        accuracy = values["accuracy"].items()
        rows = {
            method: {s: cell["accuracy"] for s, cell in row.items()} for method, row in accuracy
        }
        found["table1"] = {
            m.replace("_v2", "(v2)").replace("_v3", "(v3)"): _printed_at("table1", rows[m])
            for m in rows
        }
        best = {
            s: value
            for s, value in gains(found["table1"]).get("phi_bt", {}).items()
            if value is not None
        }
        for kind, same in (("cross", False), ("same", True)):
            some = [value for s, value in best.items() if _same(s) == same]
            text |= {
                f"{kind}_gain_{end.__name__}": round(end(some), 2) for end in (min, max) if some
            }
    elif name == "06_survface_identification":
        reports = values["reports"].items()
        found["table2"] = {
            f"BTNet ({k})" if "+" in k else k: {"AUC": r["auc"], **r["tpir"]} for k, r in reports
        }
    elif name == "07_ablations":  # whose columns are of another resolution at the scale demo
        found = {table: values[table] for table in ("table3", "table4")} | {"figure7": {}}
        for point in values[
            "figure7"
        ]:  # without printed numbers: setting -> parameters stored -> accuracy
            found["figure7"].setdefault(point["setting"], {})[str(point["stored"])] = point[
                "accuracy"
            ]
    elif name == "08_template_aggregation":
        for key, tables in (("tar", ("table5", "table6")), ("tpir", ("table7", "table8"))):
            found |= {
                table: {m: _printed_at(table, row) for m, row in values[key].items()}
                for table in tables
            }
            fitted = (
                values.get("fitted", {}).get(key, {}).items()
            )  # the same as without at equal resolutions
            found[tables[0]] |= {f"{m}{FITTED}": _printed_at(tables[0], row) for m, row in fitted}
    return found | (
        {"text": {key: {"value": value} for key, value in text.items()}} if text else {}
    )


def _printed_at(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        column: row[column]
        for column in next(iter(published.table(table).values()))
        if column in row
    }


def _same(setting: str) -> bool:
    first, second = setting.split("&")
    return first == second


def by_scale(records: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Tables]:
    """Our tables of every scale, empty for one that has not been run."""
    tables: dict[str, Tables] = {scale: {} for scale in scales(records)}
    for (scale, _), record in records.items():
        for table, rows in ours(record).items():
            tables[scale].setdefault(table, {}).update(rows)
    return tables


def paper() -> Tables:
    """All that the paper prints, as `ours` has it."""
    text = {name: {"value": value} for name, (value, _) in published.texts().items()}
    return {table: published.table(table) for table in TABLES} | {"text": text}  # type: ignore[return-value]


def blocks(
    table: str, records: Mapping[tuple[str, str], Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Our rows of one table, a block for each scale under a title that says what made it, gains in brackets."""
    shown, columns = {}, next(iter(published.table(table).values()))
    for scale in scales(records):
        made = [
            record for (of, _), record in records.items() if of == scale and ours(record).get(table)
        ]
        for record in made:
            values, rows = record["values"], ours(record)[table]
            data = values.get("test") or values.get("data") or ", ".join(values.get("pairs", ()))
            title = f"ours, scale {scale}, seed {record.get('seed')}: {data or record['name']}"
            shown[title] = with_gains(table, rows)
        for record in [
            r for (of, name), r in records.items() if of == scale and name.endswith("_seeds")
        ]:
            mean, std = (record["values"].get(key) for key in ("mean", "std"))
            if table == "table1" and mean and std:
                title = f"ours, scale {scale}, mean ± standard deviation over {len(record['values']['by_seed'])} seeds"
                shown[title] = {
                    m: {s: f"{v:.2f} ± {std[m][s]:.2f}" for s, v in row.items()}
                    for m, row in mean.items()
                }
        for record in [
            r for (of, name), r in records.items() if of == scale and "_ablations_" in name
        ]:
            again = record["values"]
            if rows := again.get("mean", {}).get(table):
                seeds = (
                    f"mean of {count} seeds" if (count := len(again["by_seed"])) > 1 else "one seed"
                )
                title = f"ours, scale {scale}, {trained(again)}, {seeds}"
                shown[title] = {
                    name: {s: f"{v:.2f}" for s, v in row.items()} for name, row in rows.items()
                }
        if not made and "-" not in scale:
            shown[f"ours, scale {scale}"] = {"not run": dict.fromkeys(columns)}
    return shown


def trained(values: Mapping[str, Any]) -> str:
    """How the rows of a record of benchmarks/ablations.py were trained: "14 px, 2 passes"."""
    return f"{values['resolution']} px, {values['epochs']} pass{'es' * (values['epochs'] > 1)}"


def with_gains(table: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers with their gains by Eqs. 4 and 5, for the tables that have them: "87.17 (+1.17)"."""
    if table not in GAINS or "phi_hr" not in rows:
        return {name: dict(row) for name, row in rows.items()}
    gained = {
        name: {s: show_gain(value) for s, value in row.items()} for name, row in gains(rows).items()
    }
    return {
        name: {s: f"{v:.2f} ({gained[name][s]})" for s, v in row.items()}
        for name, row in rows.items()
    }


def printed(table: str) -> dict[str, dict[str, Any]]:
    """The paper's rows of one table, with the gains that it prints in brackets."""
    rows, gain = published.table(table), published.gain
    if table not in GAINS:
        return rows
    return {
        name: {s: f"{v:.2f} ({gain(table, name, s)})" for s, v in row.items()}
        for name, row in rows.items()
    }


def coverage(
    records: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, dict[str, str | None]]:
    """For each figure and table of the paper what each scale has recorded: None where nothing."""
    tables, whole, made = (
        by_scale(records),
        paper(),
        {item: key for key, items in MADE_BY.items() for item in items},
    )
    lines: dict[str, dict[str, str | None]] = {}
    for item in sorted(made):
        table = item.lower().replace(" ", "")
        for scale in scales(records):
            mine = next(
                (
                    r
                    for (of, name), r in records.items()
                    if of == scale and name.startswith(made[item])
                ),
                None,
            )
            cell = f"seed {mine.get('seed')}" if mine else None
            if table in TABLES:  # of Table 2 the paper's own rows count
                wanted = [(row, c) for row, cells in whole[table].items() for c in cells
                          if c != "params" and (table != "table2" or row.startswith("BTNet"))]  # fmt: skip
                have = sum(
                    tables[scale].get(table, {}).get(row, {}).get(c) is not None
                    for row, c in wanted
                )
                columns = {
                    c
                    for cells in tables[scale].get(table, {}).values()
                    for c in cells
                    if c != "params"
                }
                other = ", ".join(sorted(columns - {c for _, c in wanted}))
                cell = (
                    f"{have} of {len(wanted)} numbers" if have else f"at {other}" if other else None
                )
            lines.setdefault(item, {})[f"scale {scale}"] = cell
    return lines


def claims(tables: Tables) -> dict[str, str]:
    """What the paper concludes, looked up in one set of tables: for how many settings it holds, or by how much."""
    answers: dict[str, str] = {}
    one, two, three, four = (tables.get(table, {}) for table in TABLES[:4])

    def count(claim: str, holds: Iterable[bool]) -> None:
        if holds := list(holds):
            answers[claim] = f"{sum(holds)} of {len(holds)}"

    def ahead(names: Iterable[str], *others: str, of: str = "phi_bt") -> Iterator[float]:
        """Points by which one method leads the best of `others` at each setting with a face below 112."""
        for rows in (tables.get(name, {}) for name in names):
            if {of, *others} <= rows.keys():
                for s in rows[of].keys() - {"112&112"}:
                    if all(s in rows[other] for other in others):
                        yield rows[of][s] - max(rows[other][s] for other in others)

    if knee := tables.get("text", {}).get("figure1_knee"):
        answers["Figure 1: the error soars below about this many px"] = f"{knee['value']:g}"
    baselines = ("phi_hr", "phi_mm", "phi_mr")
    count(
        "Table 1: phi_bt above phi_mr below 112", (lead > 0 for lead in ahead(["table1"], "phi_mr"))
    )
    count(
        "Table 1: phi_bt above every baseline below 112",
        (lead > 0 for lead in ahead(["table1"], *baselines)),
    )
    cross = (value for s, value in one.get("phi_mm", {}).items() if not _same(s))
    count(
        "Table 1: phi_mm at chance (50 ± 1) across resolutions",
        (abs(value - 50) < 1 for value in cross),
    )
    if {"phi_hr", "phi_mr"} <= one.keys():
        loss = one["phi_mr"]["112&112"] - one["phi_hr"]["112&112"]
        answers["Table 1: phi_mr against phi_hr at 112&112, points"] = f"{loss:+.2f}"
    for low, high in (("floor", "near"), ("near", "ceil")):
        pairs = (
            (two.get(f"BTNet ({i}+{k})", {}).get("0.3") for k in (low, high))
            for i in ("avg", "min", "max")
        )
        count(
            f"Table 2: {high} above {low} at FPIR 0.3",
            (b > a for a, b in pairs if a is not None and b is not None),
        )
    steps = [three.get(name, {}) for name in published.table("table3")]
    for claim, better, worse in (
        ("BCT above pretraining alone", 2, 1),
        ("branch distillation above BCT", 4, 2),
    ):
        settings = [s for s in steps[better] if s != "params" and s in steps[worse]]
        count(f"Table 3: {claim}", (steps[better][s] > steps[worse][s] for s in settings))
    if len(four) > 1:
        losses = [[row[s] for row in four.values()] for s in next(iter(four.values()))]
        spread = " and ".join(f"{max(column) - min(column):.2f}" for column in losses)
        answers["Table 4: between influence losses, points"] = spread
    curves = [
        sorted((int(stored), a) for stored, a in row.items())
        for row in tables.get("figure7", {}).values()
    ]
    count(
        "Figure 7: most branch layers above fewest",
        (curve[-1][1] > curve[0][1] for curve in curves),
    )
    for how in ("", FITTED):
        near = (
            lead > -1 for lead in ahead(["table5", "table7"], f"phi_hr{how}", of=f"phi_bt{how}")
        )
        count(f"Tables 5, 7: phi_bt above phi_hr or less than 1 point below{how}", near)
    count(
        "Tables 6, 8: phi_bt above every baseline",
        (lead > 0 for lead in ahead(["table6", "table8"], *baselines)),
    )
    return answers


def compare_claims(
    records: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, dict[str, str | None]]:
    """`claims` of the paper's own tables, and beside them of each scale's and of Tables 3 and 4 trained otherwise."""
    answers: dict[str, dict[str, str]] = {"the paper": claims(paper())}
    answers |= {f"scale {scale}": claims(tables) for scale, tables in by_scale(records).items()}
    for (scale, name), record in records.items():
        again = record["values"]
        if "_ablations_" in name and "table3" in again["mean"]:
            mean = {table: again["mean"].get(table, {}) for table in ("table3", "table4")}
            answers[f"scale {scale}, {trained(again)}"] = claims(mean)
    known = dict.fromkeys(claim for found in answers.values() for claim in found)
    return {claim: {whose: found.get(claim) for whose, found in answers.items()} for claim in known}


def text(records: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The numbers of the paper's running text and figures, and ours beside them."""
    made = {f"scale {scale}": tables.get("text", {}) for scale, tables in by_scale(records).items()}
    return {
        f"{about} [{name}]": {"the paper": value}
        | {scale: rows.get(name, {}).get("value") for scale, rows in made.items()}
        for name, (value, about) in published.texts().items()
    }


def show(table: str, records: Mapping[tuple[str, str], Mapping[str, Any]]) -> Any:
    """One of the paper's tables with a block for each scale, as HTML that a notebook shows."""
    from btnet_paper.plots import table as shown

    return shown({}, printed(table), more=blocks(table, records))
