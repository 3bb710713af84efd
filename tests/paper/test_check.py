"""`btnet check`: a rerun held against the record, with tolerances that can be said where from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from btnet_core.errors import ReproduceError
from btnet_paper import check, results
from btnet_tools.cli import main

RATE = {"accuracy": 80.0, "std": 1.0}
ACCURACY = {
    "phi_hr": {"14&14": dict(RATE), "112&112": dict(RATE)},
    "phi_bt": {"14&14": dict(RATE), "112&112": dict(RATE)},
}
VALUES = {"accuracy": ACCURACY, "pairs": ["toy, 1600 pairs, seed 0"]}  # one error: 1 point
TABLE2 = {"reports": {"max+ceil": {"auc": 70.0, "tpir": {"0.3": 50.0}}}}
SEEDS = {
    "by_seed": {},
    "mean": {"phi_bt": {"14&14": 80.0}},
    "std": {"phi_bt": {"14&14": 0.7}},  # three of them: 2.1 points
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with committed records of the scale demo, and a run that gave the same."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for folder in (tmp_path / "figures", tmp_path / "runs" / "demo"):
        write(folder, "05_verification", VALUES)
        write(folder, "06_survface_identification", TABLE2)
    write(tmp_path / "figures", "demo_seeds", SEEDS)
    return tmp_path


def write(folder: Path, name: str, values: dict[str, Any]) -> None:
    results.record(folder, name, values, scale="demo")


def rerun(place: Path, name: str, row: str, setting: str, value: float | None) -> None:
    values = copy.deepcopy(VALUES)
    values["accuracy"][row][setting]["accuracy"] = value
    if value is None:
        del values["accuracy"][row][setting]
    write(place / "runs/demo", name, values)


def verdict(place: Path, row: str, setting: str) -> tuple[str, float, bool]:
    found = check.check("demo", place / "runs" / "demo")
    (line,) = found[
        (found["table"] == "table1") & (found["row"] == row) & (found["setting"] == setting)
    ].itertuples()
    return line.verdict, line.tolerance, line.seeds


def test_the_same_run_is_the_same(place: Path, capsys: pytest.CaptureFixture) -> None:
    found = check.check("demo", place / "runs/demo")
    assert set(found["verdict"]) == {"same"}
    assert not check.is_off(found)
    assert main(["check", "--runs", str(place / "runs")]) == 0
    told = capsys.readouterr().out
    assert f"{len(found)} same, 0 within, 0 off, 0 missing, 0 unknown" in told
    assert "no seeds are recorded" in told


@pytest.mark.parametrize(
    ("row", "value", "expected", "tolerance", "seeds"),
    [
        ("phi_hr", 80.004, "same", 1.0, False),
        ("phi_hr", 80.9, "within", 1.0, False),
        ("phi_hr", 78.9, "unknown", 1.0, False),
        ("phi_bt", 77.95, "within", 2.1, True),
        ("phi_bt", 82.2, "off", 2.1, True),
        ("phi_bt", None, "missing", 2.1, True),
    ],
)
def test_a_number_that_moved(
    place: Path, row: str, value: float | None, expected: str, tolerance: float, seeds: bool
) -> None:
    rerun(place, "05_verification", row, "14&14", value)
    assert verdict(place, row, "14&14") == (expected, pytest.approx(tolerance), seeds)
    assert verdict(place, row, "112&112")[0] == "same"
    assert main(["check", "--runs", str(place / "runs")]) == (1 if expected == "off" else 0)


def test_without_seeds_or_trials_there_is_no_tolerance_to_invent(place: Path) -> None:
    moved = copy.deepcopy(TABLE2)
    moved["reports"]["max+ceil"]["auc"] = 71.0
    write(place / "runs/demo", "06_survface_identification", moved)
    found = check.check("demo", place / "runs/demo")
    assert found[found["setting"] == "AUC"]["verdict"].tolist() == ["unknown"]
    assert "71.00" in check.told(found)


def test_numbers_that_were_counted_have_to_be_equal(place: Path) -> None:
    costs = {"iresnet50": [{"r": 28, "share": 0.011}, {"r": 7, "share": 0.489}]}
    write(place / "figures", "02_architecture_and_cost", costs)
    costs["iresnet50"][1]["share"] = 0.5
    write(place / "runs/demo", "02_architecture_and_cost", costs)
    found = check.check("demo", place / "runs/demo")
    assert found[found["row"] == "figure5_share_7"]["verdict"].tolist() == ["off"]
    assert found[found["row"] == "figure5_share_28"]["verdict"].tolist() == ["same"]


def test_gains_are_not_counted_but_follow_from_accuracies(place: Path) -> None:
    """They move with every seed, so that one outside its rounding is not off."""
    values = copy.deepcopy(VALUES)
    values["accuracy"]["phi_mr"] = {"112&14": {"accuracy": 75.0}}
    values["accuracy"]["phi_hr"]["112&14"] = {"accuracy": 60.0}
    for folder, accuracy in (("figures", 80.0), ("runs/demo", 80.4)):
        values["accuracy"]["phi_bt"]["112&14"] = {"accuracy": accuracy}
        write(place / folder, "05_verification", values)
    found = check.check("demo", place / "runs/demo").set_index("row")
    assert found.loc["cross_gain_max", "recorded"] == 1.33
    assert found.loc["cross_gain_max", "verdict"] == "unknown"


def test_nothing_to_compare_is_named(place: Path) -> None:
    with pytest.raises(ReproduceError, match="no committed record of the scale paper"):
        check.check("paper", place / "runs/paper")
    with pytest.raises(ReproduceError, match="btnet reproduce --scale demo"):
        check.check("demo", place / "elsewhere")
