"""The paper's numbers as printed: Tables 1-8, and values that its text gives.

Columns are "r1&r2" (px) in Tables 1 and 3-8; Table 3 also has "params" (millions). Those of Table 2
are "AUC" and the FPIR at which TPIR20 is given: "0.3", "0.2", "0.1". Accuracies, TAR, TPIR and AUC
are in %. Rows of Tables 1 and 5-8 are phi_hr, phi_mm, phi_mr, phi_bt, in Table 1 also phi_mr(v2)
and phi_mr(v3); in Table 2 the method's name, "BTNet (max+ceil)" for the strategies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from btnet_core.errors import ConfigError

TABLES = tuple(f"table{number}" for number in range(1, 9))
SETTINGS = ("112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112")  # of Table 1


def same(setting: str) -> bool:
    """Whether "r1&r2" compares faces of one resolution."""
    first, second = setting.split("&")
    return first == second


def cells(name: str) -> Iterator[tuple[str, str, float | None, str]]:
    """(row, column, value, gain) of a table in its order; a printed "-" is None, no gain ""."""
    for row, columns in _pick(_published()["tables"], name, "table")["rows"].items():
        for column, (value, *gain) in columns.items():
            yield row, column, value, gain[0] if gain else ""


def table(name: str) -> dict[str, dict[str, float | None]]:
    """{row: {column: value}} of "table1" … "table8"."""
    rows: dict[str, dict[str, float | None]] = {}
    for row, column, value, _ in cells(name):
        rows.setdefault(row, {})[column] = value
    return rows


def value(table_name: str, row: str, column: str) -> float | None:
    """One printed number: ``value("table1", "phi_bt", "14&14")`` is 90.90."""
    return _cell(table_name, row, column)[0]


def gain(table_name: str, row: str, column: str) -> str:
    """The gain printed beside it (Tables 1, 5-8), as printed: "+4.13", "-"."""
    cell = _cell(table_name, row, column)
    if len(cell) < 2:
        raise ConfigError(f"{table_name}: the paper prints no gains there, only in Tables 1, 5-8")
    return cell[1]


def text(name: str) -> Any:
    """A number of the running text: ``text("figure1_knee")`` is 32 (px).

    Lists are (smallest, largest, mean).
    """
    return _pick(_published()["text"], name, "text value")[0]


def texts() -> dict[str, tuple[Any, str]]:
    """Every number of the running text: name -> (number, section, what it is and its unit)."""
    return {name: (number, about) for name, (number, about) in _published()["text"].items()}


def title(name: str) -> str:
    """What a table shows, unit and section: "Six verification sets, … (%; section 4.3.1)"."""
    entry = _pick(_published()["tables"], name, "table")
    return f"{entry['title']} ({entry['unit']}; section {entry['section']})"


def errata() -> list[dict[str, str]]:
    """Printed gains that have no value by Eq. 5: table, row, column, printed, ours, why."""
    return _published()["errata"]


@cache
def _published() -> dict[str, Any]:
    path = files("btnet_paper").joinpath("published.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _pick(known: dict[str, Any], key: str, where: str) -> Any:
    if key not in known:
        raise ConfigError(f"{where}: got {key!r}, the paper has {', '.join(known)}")
    return known[key]


def _cell(table_name: str, row: str, column: str) -> list[Any]:
    rows = _pick(_published()["tables"], table_name, "table")["rows"]
    return _pick(_pick(rows, row, f"{table_name}, row"), column, f"{table_name}, column")
