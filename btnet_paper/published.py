"""The paper's numbers as printed: Tables 1-8 and the values its text gives for the figures.

Columns are "r1&r2" in Tables 1, 3-8 (Table 3 also "params", in millions) and AUC, 0.3, 0.2, 0.1 (FPIR) in Table 2.
Accuracies, TAR, TPIR and AUC are in %. Rows of Tables 1 and 5-8: phi_hr, phi_mm, phi_mr, phi_bt (Table 1 also
phi_mr(v2), phi_mr(v3)); of Table 2 the method's name, "BTNet (max+ceil)" for the strategies.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from btnet_core.errors import ConfigError


@cache
def _published() -> dict[str, Any]:
    return json.loads(files("btnet_paper").joinpath("published.json").read_text(encoding="utf-8"))


def _pick(known: dict[str, Any], key: str, where: str) -> Any:
    if key not in known:
        raise ConfigError(f"{where}: got {key!r}, the paper has {', '.join(known)}")
    return known[key]


def _cell(table_name: str, row: str, column: str) -> list[Any]:
    rows = _pick(_published()["tables"], table_name, "table")["rows"]
    return _pick(_pick(rows, row, f"{table_name}, row"), column, f"{table_name}, column")


def table(name: str) -> dict[str, dict[str, float | None]]:
    """{row: {column: value}} of "table1" … "table8", rows and columns in the paper's order; None is a printed "-"."""
    rows = _pick(_published()["tables"], name, "table")["rows"]
    return {row: {column: cell[0] for column, cell in cells.items()} for row, cells in rows.items()}


def value(table_name: str, row: str, column: str) -> float | None:
    """One printed number, e.g. ``value("table1", "phi_bt", "14&14")`` = 90.90; None is a printed "-"."""
    return _cell(table_name, row, column)[0]


def gain(table_name: str, row: str, column: str) -> str:
    """The gain printed beside it (Tables 1, 5-8), as printed: "+4.13", "-"."""
    cell = _cell(table_name, row, column)
    if len(cell) < 2:
        raise ConfigError(
            f"{table_name}: the paper prints no gains there, only in Tables 1 and 5-8"
        )
    return cell[1]


def text(name: str) -> Any:
    """A number given in running text, e.g. ``text("figure1_knee")`` = 32 (px); lists are (smallest, largest, mean)."""
    return _pick(_published()["text"], name, "text value")[0]


def texts() -> dict[str, tuple[Any, str]]:
    """Every number of the running text that this project compares: name -> (number, where and what it is)."""
    return {name: (value, about) for name, (value, about) in _published()["text"].items()}


def title(name: str) -> str:
    """What a table shows and its unit, e.g. "Six verification sets, mean accuracy (%)"."""
    entry = _pick(_published()["tables"], name, "table")
    return f"{entry['title']} ({entry['unit']})"


def errata() -> list[dict[str, str]]:
    """Printed gains that have no value by Eq. 5: table, row, column, printed, ours, why."""
    return _published()["errata"]
