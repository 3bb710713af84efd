"""What the paper concludes, looked up in tables: its own and ours.

A claim is a sentence, the section that makes it, and a function of a long frame (records.py) that
says, for each setting, by how many points it holds: above 0 it does, at 0 (a tie) or below it does
not. Nothing is said of settings that were not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import pandas as pd

from btnet_paper import published, records, tables
from btnet_paper.records import FINETUNED, FITTED, PAPER, Records

Leads = dict[str, float]  # setting -> by how much the claim holds
BASELINES = ("phi_hr", "phi_mm", "phi_mr")
CROSS = ("table5", "table7")
SAME = ("table6", "table8")
OCTAVE = 0.5  # Figure 1: how far from 32 px "approximately 32" reaches, as a power of two
CHANCE = 1.0  # points around 50 %
CLOSE = 1.0  # points between "no significant difference", and that phi_bt may be behind phi_hr


class Claim(NamedTuple):
    sentence: str
    section: str  # with the table or figure that shows it
    check: Callable[[pd.DataFrame], Leads]  # of the numbers of one source


def verdicts(long: pd.DataFrame) -> pd.DataFrame:
    """Claims by source, the paper first: "5 of 6 (-1.67 to +20.35)", lowest and highest lead."""
    sources = [PAPER, *(source for source in long["source"].unique() if source != PAPER)]
    columns = {}
    for source in sources:
        mine = long[long["source"] == source]
        columns[source] = {
            f"{claim.section}: {claim.sentence}": verdict(claim.check(mine)) for claim in CLAIMS
        }
    return pd.DataFrame(columns, dtype=object).dropna(axis="columns", how="all")


def verdict(leads: Leads) -> str | None:
    """For how many settings a claim holds, and by how much; None where nothing was measured."""
    if not leads:
        return None
    holds, low, high = sum(v > 0 for v in leads.values()), min(leads.values()), max(leads.values())
    span = f"{low:+.2f}" if len(leads) == 1 else f"{low:+.2f} to {high:+.2f}"
    return f"{holds} of {len(leads)} ({span})"


def told(long: pd.DataFrame, where: str) -> str:
    """Markdown: each claim about ``where`` ("Table 1"), and whether the numbers show it.

    ``long`` holds the numbers of one source; a claim that they say nothing about is left out.
    """
    lines = []
    for claim in CLAIMS:
        ours = claim.check(long) if where in claim.section else {}
        if ours:
            theirs = claim.check(records.paper())
            fails = {s: lead for s, lead in ours.items() if lead <= 0 < theirs.get(s, 1.0)}
            lines.append(_told(claim, len(ours), fails))
    return "\n".join(lines)


def _told(claim: Claim, count: int, fails: Leads) -> str:
    what = f"{claim.sentence} ({claim.section})"
    if not fails:
        return f"- **As in the paper:** {what}, {count} of {count}."
    places = {re.sub(r"^table(\d)", r"Table \1,", place): lead for place, lead in fails.items()}
    misses = ", ".join(f"by {abs(lead):.2f} at {place}" for place, lead in places.items())
    return f"- **Not as in the paper:** {what}, because {len(fails)} of {count} miss: {misses}."


def coverage(found: Records) -> pd.DataFrame:
    """For each figure and table of the paper what each scale has recorded; None where nothing."""
    long = records.all_numbers(found)
    lines = {}
    for item, notebook in sorted(MADE_BY.items()):
        name = item.lower().replace(" ", "")
        cells = {}
        for scale in records.scales(found):
            record = found.get((scale, notebook))
            cells[f"scale {scale}"] = record and f"seed {record.get('seed')}"
            if record and name in published.TABLES:
                cells[f"scale {scale}"] = _count(name, f"scale {scale}", long)
        lines[item] = cells
    return tables.frame(lines)


def summary(covered: pd.DataFrame, asked: pd.DataFrame) -> str:
    """Markdown: what each scale has recorded, how many claims it shows as the paper, what is open.

    ``covered`` is of ``coverage``, ``asked`` of ``verdicts``.
    """
    lines = []
    for scale in records.SCALES:
        source = f"scale {scale}"
        have = covered[source].dropna().index
        lines.append(f"- Scale {scale} has recorded {', '.join(have) or 'nothing'}.")
        if source in asked:
            both = asked[[PAPER, source]].dropna().map(lambda told: told.split(" (")[0])
            same = both.index[both[PAPER] == both[source]]
            lines[-1] += f" {len(same)} of {len(both)} claims hold in as many settings as in the"
            lines[-1] += f" paper's tables: {'; '.join(same)}." if len(same) else " paper's tables."
    nowhere = covered.index[covered.isna().all(axis="columns")]
    lines.append(f"- Open, recorded at no scale: {', '.join(nowhere) or 'nothing'}.")
    if covered["scale paper"].isna().all():
        lines.append("- The paper's own scale has not been run: nothing here is of its data.")
    return "\n".join(lines)


def running_text(long: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the paper's running text, ours beside them."""
    mine = long[long["table"] == "text"]
    wide = mine.pivot(index="row", columns="source", values="value")
    texts = published.texts()
    wide = wide.reindex(index=list(texts), columns=[PAPER, *wide.columns.drop(PAPER)])
    plain = {"na_action": "ignore"}
    wide = wide.map(lambda value: f"{value:g}" if isinstance(value, float) else value, **plain)
    return wide.rename(index={name: f"{about} [{name}]" for name, (_, about) in texts.items()})


def _count(table: str, source: str, long: pd.DataFrame) -> str | None:
    """Of Table 2 the paper's own rows count, of Table 3 not the parameters."""
    wanted = {
        (row, setting)
        for row, setting, *_ in published.cells(table)
        if setting != "params" and (table != "table2" or row.startswith("BTNet"))
    }
    mine = long[(long["table"] == table) & (long["source"] == source)].dropna(subset="value")
    have = set(zip(mine["row"], mine["setting"], strict=True))
    if have & wanted:
        return f"{len(have & wanted)} of {len(wanted)} numbers"
    other = sorted({setting for _, setting in have} - {"params"})
    return f"at {', '.join(other)}" if other else None


def _wide(name: str, long: pd.DataFrame) -> pd.DataFrame:
    return tables.values(name, long["source"].iloc[0], long) if len(long) else pd.DataFrame()


def _ahead(names: Iterable[str], better: str, others: Iterable[str], long: pd.DataFrame) -> Leads:
    """Points by which ``better`` leads the best of ``others``, where a face is below 112."""
    leads: Leads = {}
    for name in names:
        wide = _wide(name, long)
        if {better, *others} <= set(wide.index):
            lead = wide.loc[better] - wide.loc[list(others)].max(skipna=False)
            low = lead.drop("112&112", errors="ignore").dropna()
            leads |= {f"{name} {setting}": float(value) for setting, value in low.items()}
    return leads


def _knee(long: pd.DataFrame) -> Leads:
    knee = long.loc[long["row"] == "figure1_knee", "value"]
    about = published.text("figure1_knee")
    return {f"{r} px": OCTAVE - abs(math.log2(r / about)) for r in knee}


def _mm_at_chance(long: pd.DataFrame) -> Leads:
    wide = _wide("table1", long)
    row = wide.loc["phi_mm"].dropna() if "phi_mm" in wide.index else {}
    return {s: CHANCE - abs(v - 50) for s, v in row.items() if not published.same(s)}


def _mr_loses(long: pd.DataFrame) -> Leads:
    wide = _wide("table1", long)
    if not {"phi_hr", "phi_mr"} <= set(wide.index) or "112&112" not in wide:
        return {}
    return {"112&112": float(wide.at["phi_hr", "112&112"] - wide.at["phi_mr", "112&112"])}


def _rounding(higher: str, lower: str, remark: str, long: pd.DataFrame) -> Leads:
    wide = _wide("table2", long)
    leads = {}
    for indicator in ("avg", "min", "max"):
        one, other = (f"BTNet ({indicator}+{how}){remark}" for how in (higher, lower))
        if {one, other} <= set(wide.index):
            leads[indicator] = float(wide.at[one, "0.3"] - wide.at[other, "0.3"])
    return leads


def _training(better: str, worse: str, long: pd.DataFrame) -> Leads:
    wide = _wide("table3", long).drop(columns="params", errors="ignore")
    if not {better, worse} <= set(wide.index):
        return {}
    return (wide.loc[better] - wide.loc[worse]).dropna().to_dict()


def _losses_agree(long: pd.DataFrame) -> Leads:
    wide = _wide("table4", long)
    return (CLOSE - (wide.max() - wide.min())).dropna().to_dict() if len(wide) > 1 else {}


def _more_branch(long: pd.DataFrame) -> Leads:
    wide = _wide("figure7", long)
    if "stored" not in wide or len(wide) < 2:
        return {}
    accuracy = wide.drop(columns="stored")
    return (accuracy.loc[wide["stored"].idxmax()] - accuracy.loc[wide["stored"].idxmin()]).to_dict()


def _not_behind(remark: str, long: pd.DataFrame) -> Leads:
    leads = _ahead(CROSS, f"phi_bt{remark}", [f"phi_hr{remark}"], long)
    return {setting: lead + CLOSE for setting, lead in leads.items()}


PRETRAINING, BCT = "Pretraining", "Pretraining + BCT"
DISTILLED = "Pretraining + BCT + Fix Trunk + Branch Distillation"
LEADS_MR = partial(_ahead, ["table1"], "phi_bt", ["phi_mr"])
LEADS_ALL = partial(_ahead, ["table1"], "phi_bt", BASELINES)
LEADS_SAME = partial(_ahead, SAME, "phi_bt", BASELINES)
CEIL, NEAR = partial(_rounding, "ceil", "near"), partial(_rounding, "near", "floor")
CLAIMS = (
    Claim("the error soars below about 32 px (within half an octave)", "3.1, Figure 1", _knee),
    Claim("phi_bt above phi_mr below 112", "4.3.1, Table 1", LEADS_MR),
    Claim("phi_bt above every baseline below 112", "4.3.1, Table 1", LEADS_ALL),
    Claim("phi_mm at chance (50 ± 1) across resolutions", "4.3.1, Table 1", _mm_at_chance),
    Claim("phi_mr loses accuracy at 112&112", "4.3.1, Table 1", _mr_loses),
    Claim("near above floor at FPIR 0.3", "4.3.2, Table 2", partial(NEAR, "")),
    Claim("ceil above near at FPIR 0.3", "4.3.2, Table 2", partial(CEIL, "")),
    Claim("near above floor, fine-tuned", "4.3.2, Table 2", partial(NEAR, FINETUNED)),
    Claim("ceil above near, fine-tuned", "4.3.2, Table 2", partial(CEIL, FINETUNED)),
    Claim("BCT above pretraining alone", "5, Table 3", partial(_training, BCT, PRETRAINING)),
    Claim("branch distillation above BCT", "5, Table 3", partial(_training, DISTILLED, BCT)),
    Claim("influence losses less than 1 point apart", "5, Table 4", _losses_agree),
    Claim("most branch layers above fewest", "5, Figure 7", _more_branch),
    Claim("phi_bt less than 1 point below phi_hr", "A.4, Tables 5, 7", partial(_not_behind, "")),
    Claim("the same, lengths fitted", "A.4, Tables 5, 7", partial(_not_behind, FITTED)),
    Claim("phi_bt above every baseline", "A.4, Tables 6, 8", LEADS_SAME),
)
MADE_BY = {
    **dict.fromkeys(("Figure 1",), "01_upsampling_error"),
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 5", "Figure 6"), "02_architecture_and_cost"),
    **dict.fromkeys(("Table 1",), "05_verification"),
    **dict.fromkeys(("Table 2", "Figure 8"), "06_survface_identification"),
    **dict.fromkeys(("Table 3", "Table 4", "Figure 7"), "07_ablations"),
    **dict.fromkeys(("Table 5", "Table 6", "Table 7", "Table 8"), "08_template_aggregation"),
    **dict.fromkeys(("Figure 4", "Figure 9"), "09_feature_maps"),
}
