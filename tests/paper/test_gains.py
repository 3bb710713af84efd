"""Eqs. 4 and 5 by hand; tests/test_published.py recomputes every gain that the paper prints."""

from __future__ import annotations

from btnet_paper.gains import gain, gains, show_gain


def test_gain_by_hand() -> None:
    assert gain(80.0, 60.0, 70.0) == 2.0
    assert gain(50.0, 60.0, 70.0) == -1.0
    assert (
        gain(50.0, 60.0, 55.0) == -2.0
    )  # the denominator is an absolute value: a worse baseline keeps the sign


def test_undefined_gain_is_never_a_number() -> None:
    assert gain(80.0, 60.0, 60.0) is None
    assert gain(60.0, 60.0, 60.0) is None  # Table 6 prints "+0.00" here
    assert gain(80.0, 0.1 + 0.2, 0.3) is None  # equal but for rounding
    assert show_gain(None) == "-"


def test_gains_as_printed() -> None:
    assert [show_gain(value) for value in (1.0, -305.8, 0.0, -0.001, 9.126)] == [
        "+1.00", "-305.80", "+0.00", "+0.00", "+9.13",
    ]  # fmt: skip


def test_table_uses_mr_across_and_mm_within_resolutions() -> None:
    table = {
        "phi_hr": {"112&7": 50.0, "7&7": 60.0},
        "phi_mm": {"112&7": 45.0, "7&7": 62.0},
        "phi_mr": {"112&7": 60.0, "7&7": 61.0},
        "phi_bt": {"112&7": 80.0, "7&7": 70.0},
    }
    result = gains(table)
    assert result["phi_bt"] == {"112&7": 3.0, "7&7": 5.0}
    assert result["phi_mm"] == {"112&7": -0.5, "7&7": 1.0}
    assert result["phi_hr"] == {"112&7": None, "7&7": None}
    del table["phi_mm"]
    assert gains(table)["phi_bt"] == {"112&7": 3.0, "7&7": None}
