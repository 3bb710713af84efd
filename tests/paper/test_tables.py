"""Tables say what they are given: values in their cells, ours and the paper's apart, text escaped."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from btnet_core.errors import ConfigError
from btnet_paper import published, records, tables


def rows(html: str) -> list[list[str]]:
    """The texts of the cells, line by line."""
    lines = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in lines]


def test_the_papers_column_stands_beside_ours():
    ours = {"phi_bt": {"14&14": 80.123, "n": 2_293_568, "x": None}}
    theirs = {"phi_hr": {"14&14": 73.88}, "phi_bt": {"14&14": 90.9}}
    shown = tables.show(ours, theirs, caption="demo <b>")
    html = shown.to_html()
    lines = rows(html)
    assert lines[0][1:] == ["14&amp;14", "n", "x"]
    assert lines[1][1:] == ["ours", "the paper", "ours", "ours"]
    assert lines[2] == ["phi_bt", "80.12", "90.90", "2,293,568", "–"]
    assert lines[3] == ["phi_hr", "–", "73.88", "–", "–"]
    assert "demo &lt;b&gt;" in html
    assert html.count("col1 paper") == 2
    assert not re.search("col[02] paper", html)
    assert html == tables.show(ours, theirs, caption="demo <b>").to_html()
    assert shown._repr_markdown_().splitlines()[2:] == [
        "|  | 14&14 | n | x |",
        "| --- | ---: | ---: | ---: |",
        "| phi_bt | 80.12<br>*90.90* | 2,293,568 | – |",
        "| phi_hr | *73.88* | – | – |",
    ]
    with pytest.raises(ConfigError, match="no rows"):
        tables.show({})


def test_a_frame_is_shown_as_it_is_and_two_tables_do_not_share_an_id():
    given = pd.DataFrame({"a": [1.25, 2.0]}, index=["<i>", "two"])
    html = tables.show(given, digits=1).to_html()
    assert [line[-1] for line in rows(html)[1:]] == ["1.2", "2.0"]
    assert "&lt;i&gt;" in html
    one, other = (
        re.search(r'<table id="(\w+)"', tables.show(x).to_html())[1] for x in (given, given * 2)
    )
    assert one != other


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (1234, "1,234"), (np.int64(5), "5"), (0.5, "0.50"),
     (np.float32(0.5), "0.50"), (True, "True"), ("a", "a"), (1234.5, "1,234.50")],
)  # fmt: skip
def test_cells(value, shown):
    assert tables.cell(value) == shown


def test_wide_has_each_number_under_its_setting_with_spread_or_gain():
    lines = [
        ("table1", "phi_hr", "14&14", 60.0),
        ("table1", "phi_mm", "14&14", 70.0),
        ("table1", "phi_bt", "14&14", 90.0),
        ("table1", "phi_bt", "112&7", 50.5, 0.25),
        ("table1", "phi_bt", "112&112", None),
        ("table3", "phi_bt", "params", 2.29),
    ]
    long = records.frame(lines, "scale demo")
    wide = tables.wide("table1", pd.concat([long, records.paper()]))
    assert list(wide.columns) == ["112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112"]
    assert wide.at[("scale demo", "phi_bt"), "14&14"] == "90.00 (+3.00)"
    assert wide.at[("scale demo", "phi_bt"), "112&7"] == "50.50 ± 0.25"
    assert wide.at[("scale demo", "phi_hr"), "14&14"] == "60.00"
    assert wide.at[("the paper", "phi_bt"), "14&14"] == "90.90 (+4.13)"
    assert pd.isna(wide.at[("scale demo", "phi_bt"), "112&112"])
    assert tables.wide("table3", long).at[("scale demo", "phi_bt"), "params"] == "2.29"
    assert [row for source, row in wide.index if source == "the paper"] == list(
        published.table("table1")
    )
    values = tables.values("table1", "scale demo", pd.concat([long, records.paper()]))
    assert values.at["phi_bt", "14&14"] == 90.0
    html = tables.beside("table1", long).to_html()
    assert "Not run: scale lfw, scale paper" in html
    assert published.title("table1") in html


def test_table2_has_one_digit_and_its_columns_in_order():
    wide = tables.wide("table2", records.paper())
    assert list(wide.columns) == ["AUC", "0.3", "0.2", "0.1"]
    assert wide.at[("the paper", "BTNet (max+ceil)"), "0.3"] == "31.2"


def test_markdown_begins_each_block_with_its_name():
    long = pd.concat([records.frame([("table4", "ArcFace", "7&7", 1.0)], "a"), records.paper()])
    lines = tables.markdown(tables.wide("table4", long)).splitlines()
    assert lines[0].startswith("|  | 112&14 | 7&7 | 14&14 |")
    assert lines[1].count("---:") == 3
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "**a**", "ArcFace", "**the paper**", "CosFace", "ArcFace", "CurricularFace",
    ]  # fmt: skip
    assert lines[3] == "| ArcFace | – | 1.00 | – |"
    assert tables.markdown({"x": {"y": 0.25, "z": None}}).endswith("| x | 0.2 | – |")


def test_whole_numbers_stay_whole_beside_others_and_long_texts_stand_on_the_left() -> None:
    mixed = pd.DataFrame(
        {"stored": [1_505_152], "ms": [0.5], "why": ["a text of more than thirty signs"]}
    )
    assert tables.markdown(mixed, digits=2).splitlines()[1:] == [
        "| --- | ---: | ---: | --- |",
        "| 0 | 1,505,152 | 0.50 | a text of more than thirty signs |",
    ]
