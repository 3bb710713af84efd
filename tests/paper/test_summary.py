"""Recorded results beside the paper's: which record fills which cell, whose number is whose, claims looked up in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from btnet_core.errors import DataError
from btnet_paper import published, results, summary

SETTINGS = ("112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of a demo with notebooks 05, 07 and 08, away from the repository's own results."""
    monkeypatch.setattr(results, "ROOT", tmp_path / "repository")

    def record(
        name: str, values: dict[str, Any], scale: str = "demo", folder: Path | None = None
    ) -> None:
        results.record(folder or tmp_path / scale, name, values, seed=3, scale=scale)

    points = {"phi_hr": 60.0, "phi_mm": 70.0, "phi_mr": 80.0, "phi_bt": 90.0, "phi_mr_v2": 81.0}
    accuracy = {
        m: {s: {"accuracy": x + (s == "112&14"), "std": 1.0} for s in SETTINGS}
        for m, x in points.items()
    }
    record("05_verification", {"accuracy": accuracy, "pairs": ["toy pairs"]})
    record(
        "05_verification", {"accuracy": {}, "pairs": ["replaced"]}, folder=results.ROOT / "figures"
    )
    record(
        "05_verification",
        {"accuracy": {"phi_hr": {"14&14": {"accuracy": 1.0}}}, "pairs": ["others"]},
        "lfw",
    )
    rows = {
        method: dict.fromkeys(SETTINGS, x) for method, x in points.items() if method != "phi_mr_v2"
    }
    record("08_template_aggregation", {"tar": rows, "tpir": rows, "data": "toy templates"})
    curve = [
        {"setting": "7&7", "stored": n, "accuracy": a, "couple_at": "S"}
        for n, a in ((100, 70.0), (20, 60.0))
    ]
    losses = {"CosFace": {"112&7": 90.0, "7&7": 80.0}, "ArcFace": {"112&7": 90.5, "7&7": 81.0}}
    steps = {
        row: {"112&7": 50.0 + i, "7&7": 60.0, "params": 0.1}
        for i, row in enumerate(published.table("table3"))
    }
    record("07_ablations", {"table3": steps, "table4": losses, "figure7": curve, "pairs": []})
    spread = {
        "mean": {"phi_bt": {"14&14": 89.0}},
        "std": {"phi_bt": {"14&14": 0.5}},
        "by_seed": {"0": 1, "1": 2},
    }
    record("demo_seeds", spread)
    return tmp_path


def test_every_record_is_found_by_its_scale_and_the_runs_own_win(runs: Path) -> None:
    (runs / "demo" / "results" / "bench.json").write_text(
        '{"rows": []}'
    )  # a benchmark: of no scale
    records = summary.everything(runs / "demo")
    assert {(scale, name) for scale, name in records if scale == "lfw"} == {
        ("lfw", "05_verification")
    }
    assert records["demo", "05_verification"]["values"]["pairs"] == ["toy pairs"]
    assert len(records) == 5


def test_cells_are_the_papers_rows_and_columns(runs: Path) -> None:
    tables = summary.by_scale(summary.everything(runs / "demo"))
    demo = tables["demo"]
    assert demo["table1"]["phi_mr(v2)"]["112&14"] == 82.0
    assert {table: set(demo[table]["phi_bt"]) for table in ("table5", "table6")} == {
        "table5": set(published.table("table5")["phi_bt"]),
        "table6": set(published.table("table6")["phi_bt"]),
    }
    assert demo["text"]["cross_gain_max"]["value"] == 1.5  # (90 - 60) / |80 - 60|
    assert demo["text"]["same_gain_min"]["value"] == 3.0  # (90 - 60) / |70 - 60|
    assert tables["paper"] == {}
    assert tables["lfw"]["table1"] == {"phi_hr": {"14&14": 1.0}}


def test_blocks_name_their_scale_and_what_was_not_run(runs: Path) -> None:
    records = summary.everything(runs / "demo")
    shown = summary.blocks("table1", records)
    titles = list(shown)
    assert titles == [
        "ours, scale demo, seed 3: toy pairs",
        "ours, scale demo, mean ± standard deviation over 2 seeds",
        "ours, scale lfw, seed 3: others",
        "ours, scale paper",
    ]
    assert shown[titles[0]]["phi_bt"]["14&14"] == "90.00 (+3.00)"
    assert shown[titles[1]]["phi_bt"]["14&14"] == "89.00 ± 0.50"
    assert shown["ours, scale paper"] == {"not run": dict.fromkeys(SETTINGS)}
    assert summary.printed("table6")["phi_mm"]["7&7"] == "4.83 (+0.00)"
    page = str(summary.show("table2", records))
    assert page.count("not run") == 3
    assert "BTNet (max+ceil)" in page


def test_rows_of_other_seeds_and_trainings_have_blocks_of_their_own(runs: Path) -> None:
    mean = {"table3": {"Pretraining": {"112&7": 82.125, "7&7": 84.0}}}
    for scale, epochs, seeds in (("lfw", 6, {"0": 1}), ("demo", 2, {"0": 1, "1": 1})):
        values = {"mean": mean, "by_seed": seeds, "resolution": 7, "epochs": epochs}
        results.record(runs / scale, f"{scale}_ablations_7px_{epochs}_epochs", values, scale=scale)
    shown = summary.blocks("table3", summary.everything(runs / "demo"))
    assert shown["ours, scale lfw, 7 px, 6 passes, one seed"] == {
        "Pretraining": {"112&7": "82.12", "7&7": "84.00"}
    }
    assert "ours, scale demo, 7 px, 2 passes, mean of 2 seeds" in shown
    assert not any(
        "passes" in title for title in summary.blocks("table4", summary.everything(runs / "demo"))
    )


def test_claims_are_asked_of_tables_trained_otherwise(runs: Path) -> None:
    losses = {
        "CosFace": {"112&14": 93.0, "14&14": 92.5},
        "ArcFace": {"112&14": 92.5, "14&14": 92.75},
    }
    steps = {
        row: {"112&14": 50.0 + i, "14&14": 90.0 - i}
        for i, row in enumerate(published.table("table3"))
    }
    values = {
        "mean": {"table3": steps, "table4": losses},
        "by_seed": {"0": 1},
        "resolution": 14,
        "epochs": 1,
    }
    results.record(runs / "lfw", "lfw_ablations_14px_1_epochs", values, scale="lfw")
    rows = summary.compare_claims(summary.everything(runs / "demo"))
    held = {claim: row["scale lfw, 14 px, 1 pass"] for claim, row in rows.items()}
    assert held["Table 3: BCT above pretraining alone"] == "1 of 2"
    assert held["Table 4: between influence losses, points"] == "0.50 and 0.25"
    assert held["Table 1: phi_bt above phi_mr below 112"] is None


def test_claims_hold_in_the_papers_own_tables_and_are_asked_of_ours(runs: Path) -> None:
    rows = summary.compare_claims(summary.everything(runs / "demo"))
    theirs = {claim: row["the paper"] for claim, row in rows.items()}
    assert theirs["Table 1: phi_bt above every baseline below 112"] == "6 of 6"
    assert theirs["Table 2: ceil above near at FPIR 0.3"] == "3 of 3"
    assert (
        theirs["Tables 5, 7: phi_bt above phi_hr or less than 1 point below"] == "5 of 6"
    )  # 83.93 against 85.60
    assert theirs["Table 4: between influence losses, points"] == "0.09 and 0.12"
    ours = {claim: row["scale demo"] for claim, row in rows.items()}
    assert ours["Table 1: phi_mm at chance (50 ± 1) across resolutions"] == "0 of 3"
    assert ours["Table 1: phi_mr against phi_hr at 112&112, points"] == "+20.00"
    assert ours["Table 4: between influence losses, points"] == "0.50 and 1.00"
    assert ours["Figure 7: most branch layers above fewest"] == "1 of 1"
    assert ours["Table 3: BCT above pretraining alone"] == "1 of 2"
    assert ours["Table 2: ceil above near at FPIR 0.3"] is None
    assert {row["scale paper"] for row in rows.values()} == {None}


def test_fitted_lengths_are_rows_and_a_claim_of_their_own(runs: Path) -> None:
    rows = {
        "phi_hr": {"112&7": 80.0, "7&7": 10.0, "112&112": 95.0},
        "phi_bt": {"112&7": 50.0, "7&7": 30.0, "112&112": 95.0},
    }
    better = {
        "phi_hr": {**rows["phi_hr"], "112&7": 90.0},
        "phi_bt": {**rows["phi_bt"], "112&7": 92.0},
    }
    values = {
        "tar": rows,
        "tpir": rows,
        "data": "toy",
        "fitted": {"tar": better, "tpir": rows, "lengths": {}},
    }
    results.record(runs / "lfw", "08_template_aggregation", values, scale="lfw")
    records = summary.everything(runs / "demo")
    tables = summary.by_scale(records)["lfw"]
    assert tables["table5"]["phi_bt, lengths fitted"] == {"112&7": 92.0}
    assert tables["table5"]["phi_bt"] == {"112&7": 50.0}
    assert set(tables["table6"]) == {"phi_hr", "phi_bt"}
    held = {
        claim: row["scale lfw"]
        for claim, row in summary.compare_claims(records).items()
        if "Tables 5, 7" in claim
    }
    claim = "Tables 5, 7: phi_bt above phi_hr or less than 1 point below"
    assert held == {claim: "0 of 2", f"{claim}, lengths fitted": "1 of 2"}
    assert summary.coverage(records)["Table 5"]["scale lfw"] == "2 of 12 numbers"


def test_coverage_counts_numbers(runs: Path) -> None:
    covered = summary.coverage(summary.everything(runs / "demo"))
    assert covered["Table 1"] == {
        "scale demo": "35 of 42 numbers",
        "scale lfw": "1 of 42 numbers",
        "scale paper": None,
    }
    assert (
        covered["Table 3"]["scale demo"] == "at 112&7, 7&7"
    )  # another resolution than the paper's
    assert covered["Figure 7"]["scale demo"] == "seed 3"
    assert covered["Figure 9"] == {"scale demo": None, "scale lfw": None, "scale paper": None}
    assert len(covered) == 9 + 8


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "list"),
        (
            json.dumps({"scale": "demo", "name": "05_verification", "values": {"accuracy": [1]}}),
            "AttributeError",
        ),
        (json.dumps({"scale": "demo", "name": "08_template_aggregation", "values": {}}), "tar"),
        (json.dumps({"scale": "demo", "name": "01_upsampling_error"}), "values"),
    ],
)
def test_a_damaged_result_is_named(runs: Path, content: str, complaint: str) -> None:
    path = runs / "demo" / "results" / "zz.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as error:
        summary.by_scale(summary.everything(runs / "demo"))
    assert str(path) in str(error.value)
