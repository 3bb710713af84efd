"""What all figures share: sizes, colours, the labels of methods, and a decorator that applies them.

Sizes are inches of a two-column page, text is 7 to 8 pt, fonts stay text in PDF. Colours are
seaborn's colour-blind safe palette: one for each method and one for each resolution throughout.
Hollow markers are the paper's printed values. No global state of matplotlib changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 6.9  # inches
PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = PALETTE
METHODS = {  # name -> (label, colour, marker)
    "phi_hr": (r"$\phi_{hr}$", GREY, "o"),
    "phi_mm": (r"$\phi_{mm}$", GREEN, "^"),
    "phi_mm, scaled up": (r"$\phi_{mm}$, scaled up", PINK, ">"),
    "phi_mm, from phi_hr": (r"$\phi_{mm}$, from $\phi_{hr}$", SKY, "<"),
    "phi_mr": (r"$\phi_{mr}$", ORANGE, "s"),
    "phi_mr_v2": (r"$\phi_{mr(v2)}$", YELLOW, "P"),
    "phi_mr_v3": (r"$\phi_{mr(v3)}$", BROWN, "X"),
    "phi_bt": (r"$\phi_{bt}$", BLUE, "D"),
    "phi_bt, lengths fitted": (r"$\phi_{bt}$, lengths fitted", PURPLE, "v"),
}
RESOLUTIONS = {112: "#555555", 56: PURPLE, 28: BLUE, 14: GREEN, 7: RED}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "font.family": "DejaVu Sans",
    "image.interpolation": "nearest",
}
HOLLOW = {"markerfacecolor": "none", "linestyle": "none", "markeredgewidth": 1.1, "markersize": 6}
DARK = "#444444"
READINGS = {"phi_mm_hr": "phi_mm, from phi_hr", "phi_mm_up": "phi_mm, scaled up"}  # folder -> name


def paper_ready(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in this module's style and hands the figure out closed: a notebook shows it once."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **options: Any) -> Figure:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **options)
            figure.draw_without_rendering()  # ticks are made late, and take the style of then
            plt.close(figure)
        return figure

    return wrapped


def label(name: str) -> str:
    """As figures write a method: phi_mr(v2) is phi_mr_v2, phi_bt_28 a model of one resolution."""
    name = name.replace("(v", "_v").replace(")", "") if name.startswith("phi_mr(") else name
    if name in METHODS:
        return METHODS[name][0]
    method, _, r = name.rpartition("_")
    return f"{label(READINGS.get(method, method))}, {r} px" if r.isdigit() else name


def of_method(name: str, index: int = 0) -> dict[str, Any]:
    """Colour and marker of a method, or of a model of one resolution."""
    r = name.rpartition("_")[2]
    if r.isdigit():
        return {"color": colour(int(r)), "marker": "o"}
    _, own, marker = METHODS.get(name, (name, PALETTE[index % len(PALETTE)], "o"))
    return {"color": own, "marker": marker}


def colour(r: int) -> str:
    """The colour of a resolution."""
    return RESOLUTIONS.get(r, SKY)


def binomial(percent: float, n: int) -> float:
    """Standard error, in points of %, of a rate measured on ``n`` independent trials."""
    return 100 * float(np.sqrt(percent / 100 * (1 - percent / 100) / n))
