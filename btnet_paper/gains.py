"""Cross- and same-resolution gains (Eqs. 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping


def gain(value: float, value_hr: float, value_baseline: float) -> float | None:
    """(M - M_hr) / |M_baseline - M_hr|: Eq. 4 with phi_mr as the baseline, Eq. 5 with phi_mm.

    None where the denominator is 0 (the baseline equals phi_hr); under 1e-9 it is rounding, so 0.
    """
    span = abs(value_baseline - value_hr)
    return (value - value_hr) / span if span > 1e-9 else None


def show_gain(value: float | None) -> str:
    """As the paper prints it: "+1.00", "-305.80", and "-" for an undefined gain."""
    return "-" if value is None else f"{round(value, 2) + 0.0:+.2f}"


def gains(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Every gain of ``{method: {"r1&r2": M}}``, by Eq. 4 where r1 and r2 differ, else by Eq. 5.

    None in phi_hr's own row, where undefined, and without a baseline.
    """
    result: dict[str, dict[str, float | None]] = {}
    for method, row in table.items():
        result[method] = dict.fromkeys(row)
        for setting, value in row.items():
            first, second = setting.split("&")
            baseline = table.get("phi_mm" if first == second else "phi_mr", {}).get(setting)
            base = table["phi_hr"].get(setting)
            if method != "phi_hr" and baseline is not None and base is not None:
                result[method][setting] = gain(value, base, baseline)
    return result
