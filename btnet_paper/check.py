"""`btnet check`: every number of a run beside the committed record of its scale."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from btnet_core.errors import ReproduceError
from btnet_paper import records, results

ROUNDING = 0.005  # half of the last digit that tables print
PAIRS = 6000  # of a verification set whose name gives no number: the six of Table 1 have so many
TRIALS = {"table5": "tar", "table6": "tar", "table7": "tpir", "table8": "tpir"}
KEY = ["table", "row", "setting"]
VERDICTS = ("same", "within", "off", "missing", "unknown")
COUNTED = re.compile(r"params|stored|value (?!.*gain)")  # numbers that no seed moves


def check(scale: str, run_dir: Path) -> pd.DataFrame:
    """Returns each committed number of a scale with the run's, its tolerance, and a verdict.

    The tolerance is the largest of three standard deviations over recorded seeds, the standard
    error of a rate over its pairs or templates, and rounding; "seeds" says whether there are such
    of that number. A number is "same" up to rounding, "within" its tolerance, "off", or "missing";
    one outside it is "unknown" where no seeds are recorded: another processor may have moved it.

    Raises:
        ReproduceError: the scale has no committed record, or the run none.
    """
    committed = records.collect([results.ROOT / "figures"])
    recorded = {name: one for (of, name), one in committed.items() if of == scale}
    run = {name: one for (of, name), one in records.collect([run_dir]).items() if of == scale}
    notebooks = {name: one for name, one in recorded.items() if re.match(r"\d\d_", name)}
    if not notebooks:
        raise ReproduceError(f"no committed record of the scale {scale} in {results.ROOT}/figures")
    if not run:
        raise ReproduceError(f"nothing is recorded in {run_dir}: btnet reproduce --scale {scale}")
    spread = _spread(recorded)
    lines = []
    for name, record in notebooks.items():
        now = _values(run[name]) if name in run else {}
        for key, value in _values(record).items():
            found, deviation = now.get(key), spread.get(key)
            error = _sampling_error(record, key, value)
            tolerance = max(3 * (deviation or 0.0), error)
            counted = bool(COUNTED.match(f"{key[2]} {key[1]}"))
            if tolerance or counted:
                tolerance = max(tolerance, ROUNDING)
            line = {"notebook": name[:2], **dict(zip(KEY, key, strict=True)), "recorded": value}
            line |= {"now": found, "tolerance": tolerance, "seeds": deviation is not None}
            known = deviation is not None or counted
            lines.append(line | {"verdict": _verdict(value, found, tolerance, known)})
    return pd.DataFrame(lines)


def told(checked: pd.DataFrame) -> str:
    """Returns how many there are of each verdict, then the numbers not the same nor within."""
    counts = checked["verdict"].value_counts()
    text = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    lines = [f"{len(checked)} recorded numbers: {text}"]
    without = int((~checked["seeds"]).sum())
    if without:
        said = "no seeds are recorded: sampling and rounding alone are their tolerance"
        lines.append(f"of {without} numbers {said}")
    wrong = checked[checked["verdict"].isin(("off", "missing", "unknown"))]
    if len(wrong):
        lines.append(wrong.to_string(index=False, float_format="{:.2f}".format))
    return "\n".join(lines)


def is_off(checked: pd.DataFrame) -> bool:
    """Whether any number is off; one that was not measured, or of unknown tolerance, is not."""
    return bool((checked["verdict"] == "off").any())


def _verdict(recorded: float, now: float | None, tolerance: float, known: bool) -> str:
    if now is None:
        return "missing"
    difference = abs(now - recorded)
    if difference <= ROUNDING:
        return "same"
    if difference <= tolerance:
        return "within"
    return "off" if known else "unknown"


def _values(record: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Returns the numbers of one record by table, row and setting; undefined ones are left out."""
    long = records.numbers(record)
    long = long[pd.to_numeric(long["value"], errors="coerce").notna()]
    return {(line.table, line.row, line.setting): line.value for line in long.itertuples()}


def _spread(recorded: dict[str, dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Returns standard deviations over seeds, of the numbers for which they are recorded."""
    found = {}
    for name, record in recorded.items():
        if name.endswith("_seeds"):
            for line in records.numbers(record).itertuples():
                if line.spread is not None and not math.isnan(line.spread):
                    found[line.table, line.row, line.setting] = line.spread
    return found


def _sampling_error(record: dict[str, Any], key: tuple[str, str, str], value: float) -> float:
    """Returns the standard error of a rate in %, by the trials that it was counted in; else 0."""
    table, _, setting = key
    if "&" not in setting:
        return 0.0
    values = record["values"]
    if table in TRIALS:
        trials = values.get("trials", {}).get(TRIALS[table], {})
        count = trials.get(setting) if isinstance(trials, dict) else trials
    else:
        count = sum(map(_pairs, values.get("pairs", ())))
    rate = min(max(value / 100, 0.0), 1.0)
    return 100 * math.sqrt(rate * (1 - rate) / count) if count else 0.0


def _pairs(name: str) -> int:
    """Returns the number of pairs that a set's name gives."""
    given = re.search(r"(\d+) pairs", name)
    return int(given[1]) if given else PAIRS
