"""The paper's tables: spot checks against the page, and every printed gain recomputed from the printed accuracies."""

from __future__ import annotations

import pytest

from btnet_core.errors import ConfigError
from btnet_paper import published
from btnet_paper.gains import gains, show_gain

GAIN_TABLES = ("table1", "table5", "table6", "table7", "table8")


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("table1", "phi_bt", "14&14", 90.90),
        ("table1", "phi_mr(v3)", "112&7", 68.80),
        ("table2", "BTNet (max+ceil)", "0.1", 20.6),
        ("table2", "MIND-Net", "0.2", None),
        ("table3", "Pretraining + BCT", "14&14", 78.04),
        ("table3", "Pretraining + BCT + Fix Trunk", "params", 2.29),
        ("table4", "ArcFace", "112&14", 94.17),
        ("table5", "phi_mr", "112&7", 63.11),
        ("table6", "phi_mm", "28&28", 92.58),
        ("table7", "phi_bt", "112&28", 94.33),
        ("table8", "phi_mr", "14&14", 37.58),
    ],
)
def test_as_printed(table: str, row: str, column: str, value: float | None) -> None:
    assert published.value(table, row, column) == value
    assert published.table(table)[row][column] == value


def test_shapes() -> None:
    shapes = {
        name: {len(row) for row in published.table(name).values()}
        for name in map("table{}".format, range(1, 9))
    }
    assert shapes == {
        "table1": {7}, "table2": {4}, "table3": {3}, "table4": {2}, "table5": {3}, "table6": {4}, "table7": {3},
        "table8": {4},
    }  # fmt: skip
    assert [len(published.table(f"table{k}")) for k in range(1, 9)] == [6, 24, 5, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("name", GAIN_TABLES)
def test_every_printed_gain_follows_from_the_printed_accuracies(name: str) -> None:
    known = {(item["row"], item["column"]) for item in published.errata() if item["table"] == name}
    recomputed = gains(published.table(name))  # type: ignore[arg-type]
    checked = 0
    for row, cells in recomputed.items():
        for column, value in cells.items():
            if (row, column) not in known:
                assert show_gain(value) == published.gain(name, row, column), (row, column)
                checked += value is not None
    assert checked == {"table1": 30, "table5": 9, "table6": 6, "table7": 9, "table8": 9}[name]


def test_titles_say_unit_and_section() -> None:
    assert published.title("table1") == "Six verification sets, mean accuracy (%; section 4.3.1)"
    assert all("%" in published.title(f"table{n}") for n in range(1, 9))
    assert all(" section " in published.title(f"table{n}") for n in range(1, 9))


def test_errata_are_what_they_say() -> None:
    assert {(item["table"], item["column"]) for item in published.errata()} == {("table6", "7&7")}
    recomputed = gains(published.table("table6"))  # type: ignore[arg-type]
    for item in published.errata():
        assert published.gain("table6", item["row"], "7&7") == item["printed"]
        assert show_gain(recomputed[item["row"]]["7&7"]) == item["ours"] == "-"


def test_scratch_of_table_3_is_phi_mm_of_table_1() -> None:
    scratch, phi_mm = published.table("table3")["Scratch"], published.table("table1")["phi_mm"]
    both = [scratch["112&14"], scratch["14&14"]]
    assert both == [phi_mm["112&14"], phi_mm["14&14"]] == published.text("scratch_is_phi_mm")


def test_text_values_agree_with_the_tables() -> None:
    bt = {
        column: published.gain("table1", "phi_bt", column)
        for column in published.table("table1")["phi_bt"]
    }
    across = [float(bt[column]) for column in ("112&7", "112&14", "112&28")]
    within = [float(bt[column]) for column in ("7&7", "14&14", "28&28")]
    assert (published.text("cross_gain_min"), published.text("cross_gain_max")) == (
        min(across),
        max(across),
    )
    assert (published.text("same_gain_min"), published.text("same_gain_max")) == (
        min(within),
        max(within),
    )


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="table1, row: got 'phi_bl', the paper has phi_hr, phi_mm"
    ):
        published.value("table1", "phi_bl", "7&7")
    with pytest.raises(ConfigError, match="table: got 'table9'"):
        published.table("table9")
    with pytest.raises(ConfigError, match="no gains"):
        published.gain("table2", "AdaFace", "AUC")
