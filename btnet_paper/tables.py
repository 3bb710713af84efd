"""Tables as people read them: any rows and columns as HTML in a notebook, or as Markdown in a page.

In a notebook, each column of ours with the paper's beside it, in grey italics:

    tables.show({"phi_bt": {"14&14": 90.1}}, published.table("table1"), caption="scale demo")
    tables.show(DataFrame)                                       # of one's own, as it is
    tables.beside("table1", records.all_numbers(found))          # Table 1 of every scale
"""

from __future__ import annotations

import hashlib
import html
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd
from pandas.io.formats.style import Styler

from btnet_core.errors import ConfigError
from btnet_paper import published
from btnet_paper.records import PAPER, SCALES

LONG = 30  # signs of a text that stands on the left of its column
Rows: TypeAlias = pd.DataFrame | Mapping[str, Mapping[str, Any]]  # row -> column -> value
STYLE = [
    {"selector": "td", "props": "text-align: right"},
    {"selector": "th.row_heading", "props": "text-align: left; vertical-align: top"},
    {"selector": "td.paper", "props": "color: #777; font-style: italic"},
    {"selector": "caption", "props": "caption-side: top; text-align: left"},
]


def frame(rows: Rows) -> pd.DataFrame:
    """Rows and columns in the given order, each value as it is; what a row lacks is NaN."""
    if isinstance(rows, pd.DataFrame):
        return rows
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


class Table(Styler):
    """A table that a notebook shows as HTML, and a page of Markdown as Markdown."""

    digits = 2

    def _repr_markdown_(self) -> str:
        paper = "; below, in italics, the paper's" if self.data.columns.nlevels > 1 else ""
        return f"{self.caption}{paper}\n\n{markdown(self.data, digits=self.digits)}"


def show(ours: Rows, paper: Rows | None = None, *, caption: str = "", digits: int = 2) -> Table:
    """Ours and, beside each column, the paper's, as a notebook shows them.

    ``caption`` says what ours were measured on; floats have ``digits`` digits, what is missing
    is "–". Raises ConfigError where there is neither row nor column.
    """
    both = frame(ours)
    if paper is not None:
        both = _side_by_side(both, frame(paper))
    if both.empty and not len(both.columns):
        raise ConfigError("table: got no rows, expected at least one row with one column")
    return _style(both, caption, digits)


def wide(table: str, long: pd.DataFrame) -> pd.DataFrame:
    """One table of a long frame (see records.py) as texts: (source, row) by setting.

    A text is "88.14", with a spread "88.14 ± 0.31", with a gain "88.14 (+1.02)".
    """
    mine = long[long["table"] == table]
    digits = 1 if table == "table2" else 2
    texts = mine.assign(text=[_text(line, digits) for line in mine.itertuples()])
    pivot = texts.pivot(index=["source", "row"], columns="setting", values="text")
    order = pd.MultiIndex.from_frame(texts[["source", "row"]].drop_duplicates())
    result = pivot.reindex(index=order, columns=sorted(texts["setting"].unique(), key=_place))
    result.index.names, result.columns.name = [None, None], None
    return result


def beside(table: str, long: pd.DataFrame, caption: str = "") -> Table:
    """One of the paper's tables, a block for each source, and in its caption what was not run."""
    shown = wide(table, long)
    sources = shown.index.get_level_values(0)
    missing = [f"scale {scale}" for scale in SCALES if f"scale {scale}" not in sources]
    title = caption or f"Table {table[5:]}. {published.title(table)}"
    return _style(shown, f"{title}. Not run: {', '.join(missing)}" if missing else title, 2)


def configurations(runs: Mapping[str, Any], fields: Sequence[str]) -> pd.DataFrame:
    """Options of runs: a row for each of the ``fields``, a column for each run (a dataclass)."""
    columns = {name: [getattr(config, field) for field in fields] for name, config in runs.items()}
    return pd.DataFrame(columns, index=list(fields), dtype=object)


def values(table: str, source: str, long: pd.DataFrame) -> pd.DataFrame:
    """The numbers of one table and source: rows by settings, floats."""
    mine = long[(long["table"] == table) & (long["source"] == source)]
    pivot = mine.pivot(index="row", columns="setting", values="value").astype(float)
    return pivot.reindex(index=mine["row"].unique(), columns=mine["setting"].unique())


def markdown(rows: Rows, *, digits: int = 1) -> str:
    """A Markdown table; of a frame with (block, row) a bold line begins each block.

    The paper's values of `show` stand below ours, or alone, in italics: side by side is too wide.
    """
    shown = frame(rows).astype(object).map(lambda value: cell(value, digits))
    if shown.columns.nlevels > 1:
        shown = _stacked(shown)
    wide = shown.map(lambda text: max(map(len, text.split("<br>"))) > LONG).any()
    sides = ["---" if left else "---:" for left in wide]
    lines = [_line("", shown.columns), _line("---", sides)]
    block = None
    for name, cells in zip(shown.index, shown.to_numpy(), strict=True):
        if isinstance(name, tuple):
            if name[0] != block:
                block = name[0]
                lines.append(_line(f"**{block}**", [""] * shown.shape[1]))
            name = name[-1]
        lines.append(_line(name, cells))
    return "\n".join(lines)


def _stacked(texts: pd.DataFrame) -> pd.DataFrame:
    """Columns (name, "ours") and (name, PAPER) as one for each name."""
    marked, theirs = texts.copy(), [column for column in texts if column[1] == PAPER]
    marked[theirs] = "*" + texts[theirs] + "*"
    marked = marked.replace(["–", "*–*"], "")
    names = dict.fromkeys(marked.columns.get_level_values(0))
    both = {name: marked[name].agg("<br>".join, axis=1) for name in names}
    return pd.DataFrame(both).replace("^<br>|<br>$", "", regex=True).replace("", "–")


def cell(value: Any, digits: int = 2) -> str:
    """A value as it is printed: "1,234", "0.50", and "–" for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:,.{digits}f}"


def _side_by_side(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Columns (name, "ours") and (name, PAPER), whichever there are; the rows of both."""
    rows = [*ours.index, *theirs.index.difference(ours.index, sort=False)]
    names = [*ours.columns, *theirs.columns.difference(ours.columns, sort=False)]
    columns = {
        (name, source): table[name].astype(object).reindex(rows)
        for name in names
        for source, table in (("ours", ours), (PAPER, theirs))
        if name in table
    }
    return pd.DataFrame(columns, index=rows)


def _style(shown: pd.DataFrame, caption: str, digits: int) -> Table:
    content = f"{caption}\n{shown.to_csv()}"
    name = hashlib.sha256(content.encode()).hexdigest()[:12]  # the same page for the same numbers
    blocks = shown.index.get_level_values(0) if shown.index.nlevels > 1 else [""] * len(shown)
    sources = shown.columns.get_level_values(-1)
    classes = [["paper" if PAPER in (b, of) else "" for of in sources] for b in blocks]
    styler = Table(shown, uuid=name, cell_ids=False, caption=html.escape(caption))
    styler.digits = digits
    styler = styler.format(lambda value: html.escape(cell(value, digits)))
    styler = styler.format_index(lambda label: html.escape(cell(label)), axis=0)
    styler = styler.format_index(lambda label: html.escape(cell(label)), axis=1)
    marks = pd.DataFrame(classes, index=shown.index, columns=shown.columns)
    return styler.set_td_classes(marks).set_table_styles(STYLE)


def _text(line: Any, digits: int) -> str | None:
    if pd.isna(line.value):
        return None
    if line.setting in ("params", "stored"):
        return f"{line.value:,.6g}"
    spread = "" if pd.isna(line.spread) else f" ± {line.spread:.{digits}f}"
    gain = f" ({line.gain})" if line.gain not in ("", "-") else ""
    return f"{line.value:.{digits}f}{spread}{gain}"


def _place(setting: str) -> tuple[int, int]:
    """The order of columns: across resolutions, within one, then whatever else, as it comes."""
    first, _, second = setting.partition("&")
    return (first == second, int(second)) if second else (2, 0)


def _line(name: str, cells: Any) -> str:
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"
