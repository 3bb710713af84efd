"""Records as one long table: which number fills which cell, whose it is, and what a record lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from btnet_core.errors import DataError
from btnet_paper import published, records, results

SETTINGS = published.SETTINGS
METHODS = ("phi_hr", "phi_mm", "phi_mr", "phi_bt")


def numbers(name: str, values: dict[str, Any], scale: str = "demo") -> pd.DataFrame:
    return records.numbers({"name": name, "scale": scale, "seed": 3, "values": values})


def at(long: pd.DataFrame, table: str, row: str, setting: str, column: str = "value") -> Any:
    lines = long[(long["table"] == table) & (long["row"] == row) & (long["setting"] == setting)]
    assert len(lines) == 1, (table, row, setting, len(lines))
    return lines[column].iloc[0]


def distinct(rows: tuple[str, ...], settings: tuple[str, ...], first: float) -> dict[str, Any]:
    """A number of its own for each cell: a wrong cell cannot look right."""
    every = [(row, setting) for row in rows for setting in settings]
    found: dict[str, Any] = {row: {} for row in rows}
    for index, (row, setting) in enumerate(every):
        found[row][setting] = first + index
    return found


def test_of_two_records_the_runs_own_wins_and_benchmarks_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path / "repository")
    accuracy = {"phi_hr": {"14&14": {"accuracy": 1.0}}}
    for folder, pairs in ((results.ROOT / "figures", "old"), (tmp_path / "runs/demo", "new")):
        values = {"accuracy": accuracy, "pairs": [pairs]}
        results.record(folder, "05_verification", values, seed=3, scale="demo")
    values = {"accuracy": accuracy, "pairs": ["lfw"]}
    results.record(tmp_path / "runs/lfw-mr", "05_verification", values, scale="lfw-mr")
    results.record(tmp_path / "runs/demo", "11_summary", {}, scale="demo")
    results.record(tmp_path / "runs/demo", "bench_growth", {})
    found = records.everything(tmp_path / "runs/demo")
    assert set(found) == {("demo", "05_verification"), ("lfw-mr", "05_verification")}
    assert found["demo", "05_verification"]["values"]["pairs"] == ["new"]
    assert records.scales(found) == ["demo", "lfw", "paper", "lfw-mr"]
    origins = records.origins(found).loc["scale demo: 05_verification"]
    assert (origins["measured on"], origins["seed"]) == ("new", 3)


def test_table1_has_each_accuracy_in_its_cell_and_gains_by_the_equations():
    plain = distinct((*METHODS, "phi_mr_v2"), SETTINGS, 50.0)
    accuracy = {
        name: {
            s: {
                "accuracy": v,
                "second_half": v + 100,
                "sets": [v - 1, v + 1],
                "second_halves": [v + 90, v + 110],
                "std": 7.0,
            }
            for s, v in row.items()
        }
        for name, row in plain.items()
    }
    centred = {"own": {"phi_bt": {"7&7": {"accuracy": 1.5}}}}
    values = {"accuracy": accuracy, "centred": centred, "pairs": ["lfw", "cfp"]}
    long = numbers("05_verification", values)
    alone = numbers("05_verification", values | {"pairs": ["lfw"]})
    assert not (alone["table"] == "by_set").any()
    for name, row in plain.items():
        for setting, value in row.items():
            shown = name.replace("_v2", "(v2)")
            assert at(long, "table1", shown, setting) == value
            assert at(long, "second_half", shown, setting) == value + 100
            assert at(long, "by_set", f"lfw: {shown}", setting) == value - 1
            assert at(long, "by_set", f"cfp: {shown}", setting) == value + 1
            assert at(long, "by_set", f"cfp, folds 6 to 10: {shown}", setting) == value + 110
    assert at(long, "centred", "phi_bt, mean at own", "7&7") == 1.5
    hr, mm, mr, bt = (plain[name] for name in METHODS)
    across = (bt["112&14"] - hr["112&14"]) / abs(mr["112&14"] - hr["112&14"])  # Eq. 4
    within = (bt["14&14"] - hr["14&14"]) / abs(mm["14&14"] - hr["14&14"])  # Eq. 5
    assert (across, within) == (1.5, 3.0)
    assert at(long, "table1", "phi_bt", "112&14", "gain") == "+1.50"
    assert at(long, "table1", "phi_bt", "14&14", "gain") == "+3.00"
    assert at(long, "table1", "phi_hr", "14&14", "gain") == "-"
    assert at(long, "text", "cross_gain_max", "value") == 1.5
    assert at(long, "text", "same_gain_min", "value") == 3.0


def test_table2_shows_tpir_under_the_fpir_it_was_measured_at():
    def report(first: float) -> dict[str, Any]:
        tpir = {"0.3": first + 3, "0.2": first + 2, "0.1": first + 1}
        return {"auc": first, "tpir": tpir, "fpir": {"0.3": 30.0, "0.2": 20.0, "0.1": 10.0}}

    reports = {"max+ceil": report(50), "phi_mr": report(60)}
    fitted = {"reports": {"max+ceil": report(70)}}
    values = {"reports": reports, "fitted": fitted, "finetuned": {"max+ceil": report(80)}}
    long = numbers("06_survface_identification", values)
    assert at(long, "table2", "BTNet (max+ceil)", "AUC") == 50
    assert at(long, "table2", "BTNet (max+ceil)", "0.3") == 53
    assert at(long, "table2", "BTNet (max+ceil)", "0.1") == 51
    assert at(long, "table2", "phi_mr", "0.2") == 62
    assert at(long, "table2", "BTNet (max+ceil), lengths fitted", "0.3") == 73
    assert at(long, "table2", "BTNet (max+ceil), fine-tuned", "0.3") == 83


def test_tables_5_to_8_part_by_metric_and_by_resolution():
    tar, tpir = distinct(METHODS, SETTINGS, 10.0), distinct(METHODS, SETTINGS, 50.0)
    fitted = {"tar": distinct(METHODS, SETTINGS, 200.0), "tpir": {}}
    long = numbers("08_template_aggregation", {"tar": tar, "tpir": tpir, "fitted": fitted})
    for row in METHODS:
        for table, values in (("table5", tar), ("table6", tar), ("table7", tpir), ("table8", tpir)):
            for setting in published.table(table)["phi_hr"]:
                assert at(long, table, row, setting) == values[row][setting]
    name = "phi_bt, lengths fitted"
    assert at(long, "table5", name, "112&7") == fitted["tar"]["phi_bt"]["112&7"]
    assert at(long, "table5", name, "112&7", "gain") == ""
    assert set(long[long["row"] == name]["table"]) == {"table5"}


def test_ablations_keep_rows_apart_and_figure7_its_parameters():
    points = [
        {"setting": s, "couple_at": unit, "stored": n, "accuracy": a, "standard": unit == "S4U1"}
        for s, unit, n, a in (("112&7", "S2U1", 20, 60.0), ("7&7", "S2U1", 20, 61.0),
                              ("112&7", "S4U1", 100, 70.0), ("7&7", "S4U1", 100, 71.0))
    ]  # fmt: skip
    values = {
        "table3": {"Scratch": {"7&7": 1.0, "params": 0.4}, "Pretraining": {"7&7": 2.0}},
        "table4": {"ArcFace": {"7&7": 3.0}},
        "beyond": {"Eq. 3 alone": {"7&7": 4.0, "length": 0.5}},
        "figure7": points,
    }
    long = numbers("07_ablations", values)
    assert at(long, "table3", "Scratch", "7&7") == 1.0
    assert at(long, "table3", "Pretraining", "7&7") == 2.0
    assert at(long, "table4", "ArcFace", "7&7") == 3.0
    assert at(long, "beyond", "Eq. 3 alone", "length") == 0.5
    assert at(long, "figure7", "S4U1 (the rule)", "112&7") == 70.0
    assert at(long, "figure7", "S2U1", "7&7") == 61.0
    assert at(long, "figure7", "S2U1", "stored") == 20


def test_rows_of_several_seeds_have_a_source_and_a_spread_of_their_own():
    values = {
        "mean": {"phi_bt": {"14&14": 89.0}},
        "std": {"phi_bt": {"14&14": 0.5}},
        "by_seed": {"0": 1, "1": 2, "1, 2 threads": 3},
        "selection": {"0": {"max+ceil": 10.0, "max+ceil, lengths fitted": 20.0},
                      "1": {"max+ceil": 12.0, "max+ceil, lengths fitted": 26.0}},
    }  # fmt: skip
    cells = [{"14&14": {"sets": [88.0, n], "second_halves": [87.0, n + 1], "second_half": n}}
             for n in (90.0, 92.0)]  # fmt: skip
    values |= {"pairs": ["lfw", "cfp"], "measured": {n: {"phi_bt": cells[n]} for n in (0, 1)}}
    long = numbers("lfw_seeds", values, "lfw")
    assert at(long, "by_set", "cfp: phi_bt", "14&14") == 91.0
    assert at(long, "by_set", "cfp: phi_bt", "14&14", "spread") == pytest.approx(2**0.5)
    assert at(long, "by_set", "cfp, folds 6 to 10: phi_bt", "14&14") == 92.0
    assert at(long, "second_half", "phi_bt", "14&14", "spread") == pytest.approx(2**0.5)
    assert at(long, "by_set", "lfw: phi_bt", "14&14", "spread") == 0.0
    assert set(long["source"]) == {"scale lfw, 2 seeds"}
    assert at(long, "table1", "phi_bt", "14&14", "spread") == 0.5
    assert at(long, "table2", "BTNet (max+ceil)", "0.3") == 11.0
    name = "BTNet (max+ceil), lengths fitted"
    assert at(long, "table2", name, "0.3", "spread") == pytest.approx(18**0.5)
    single = {"by_seed": {"0": 1}, "std": {"phi_bt": {"14&14": None}}}
    long = numbers("lfw_seeds", {"mean": values["mean"], **single}, "lfw")
    assert set(long["source"]) == {"scale lfw, 1 seed"}
    assert pd.isna(at(long, "table1", "phi_bt", "14&14", "spread"))
    rows = {"table3": {"Scratch": {"7&7": 82.0}}}
    again = {"mean": rows, "std": {"table3": {"Scratch": {"7&7": 0.0}}}, "by_seed": {"0": 1}}
    long = numbers("lfw_ablations_7px_6_epochs", again | {"resolution": 7, "epochs": 6}, "lfw")
    assert set(long["source"]) == {"scale lfw, 7 px, 6 passes, 1 seed"}
    assert pd.isna(at(long, "table3", "Scratch", "7&7", "spread"))


def test_counted_and_measured_numbers_of_the_text():
    costs = [{"r": 112, "share": 1.0}, {"r": 28, "share": 0.0113}, {"r": 7, "share": 0.4887}]
    long = numbers("02_architecture_and_cost", {"iresnet50": costs})
    assert at(long, "text", "figure5_share_28", "value") == 1.1
    assert at(long, "text", "figure5_share_7", "value") == 48.9
    knee = {"measured": 31.0, "paper": 28.0}
    long = numbers("01_upsampling_error", {"knee": knee, "images": 128})
    assert at(long, "text", "figure1_knee", "value") == 31.0
    assert numbers("00_tour", {}).empty


def test_the_papers_frame_is_what_it_prints():
    long = records.paper()
    assert at(long, "table8", "phi_bt", "7&7") == 27.7
    assert at(long, "table8", "phi_bt", "7&7", "gain") == "+204.83"
    assert at(long, "table2", "MIND-Net", "0.2") is None or pd.isna(
        at(long, "table2", "MIND-Net", "0.2")
    )
    assert len(long[long["table"] == "table2"]) == 24 * 4


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "no JSON"),
        ("[]", "list"),
        ({"name": "05_verification", "values": {"accuracy": [1]}}, "another form"),
        ({"name": "08_template_aggregation", "values": {}}, "tar"),
        ({"name": "01_upsampling_error"}, "values"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: Any, complaint: str) -> None:
    path = tmp_path / "results" / "zz.json"
    path.parent.mkdir()
    path.write_text(
        content if isinstance(content, str) else json.dumps(content | {"scale": "demo"})
    )
    with pytest.raises(DataError, match=complaint) as error:
        records.all_numbers(records.collect([tmp_path]))
    assert str(path) in str(error.value)


def test_what_goes_beyond_the_paper_is_notebook_12s_and_older_records_still_count(tmp_path) -> None:
    rows = {"phi_bt": {"112&7": {"accuracy": 1.5}}}
    fitted = {"reports": {"max+ceil": {"auc": 2.5, "tpir": {"0.3": 3.5}}}, "lengths": {}}
    fitted |= {"tar": {"phi_bt": {"112&7": 4.5, "7&7": 5.5}}, "tpir": {}}
    values = {"centred": {"112": rows}, "fitted": fitted, "beyond": {"Eq. 3 alone": {"7&7": 6.5}}}
    results.record(tmp_path, "12_beyond_the_paper", values, scale="demo")
    older = {"accuracy": {}, "centred": {"112": {"phi_bt": {"112&7": {"accuracy": 0.5}}}}}
    results.record(tmp_path, "05_verification", older, scale="demo")
    long = records.all_numbers(records.collect([tmp_path]))
    assert at(long, "centred", "phi_bt, mean at 112", "112&7") == 1.5
    assert at(long, "table2", "BTNet (max+ceil), lengths fitted", "0.3") == 3.5
    assert at(long, "table5", "phi_bt, lengths fitted", "112&7") == 4.5
    assert not ((long["row"] == "phi_bt, lengths fitted") & (long["setting"] == "7&7")).any()
    assert at(long, "beyond", "Eq. 3 alone", "7&7") == 6.5
