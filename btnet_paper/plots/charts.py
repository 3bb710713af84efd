"""The paper's charts, from the values that a notebook records to a figure that can be published.

Nothing is saved here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

from btnet_core.models.btnet import INDICATORS, ROUNDINGS, select_branch
from btnet_paper import published
from btnet_paper.plots.style import (
    BLUE,
    COLUMN,
    DARK,
    GREEN,
    GREY,
    HOLLOW,
    ORANGE,
    PAGE,
    PURPLE,
    READINGS,
    binomial,
    label,
    of_method,
    paper_ready,
)

Point = tuple[float, float]  # value, standard error
Panel = Mapping[str, Mapping[int, Point]]  # method -> r -> point


@paper_ready
def accuracy_curves(
    panels: Mapping[str, Panel], *, ylabel: str, note: str,
    paper: Mapping[str, Mapping[str, Mapping[int, float | None]]] | None = None,
) -> Figure:  # fmt: skip
    """Accuracy against resolution: a panel for each title, and the paper's values, hollow.

    ``note`` says in the legend what ours were measured on.
    """
    rows, columns = (1, len(panels)) if len(panels) < 3 else (2, -(-len(panels) // 2))
    width = PAGE if len(panels) > 1 else COLUMN
    figure, grid = plt.subplots(rows, columns, figsize=(width, 0.55 + 2.2 * rows), squeeze=False)
    printed = paper or {}
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        _curves(axes, panel, printed.get(title, {}))
        axes.set(ylabel=ylabel if axes in grid[:, 0] else "", title=title)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color=DARK, marker="o"))
    labels.append(note)
    if paper:
        handles.append(plt.Line2D([], [], color=DARK, marker="o", **HOLLOW))
        labels.append("paper, as printed")
    columns = 2 if len(panels) == 1 else 6 if len(handles) <= 6 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)
    return figure


def _curves(axes: Axes, panel: Panel, printed: Mapping[str, Mapping[int, float | None]]) -> None:
    """The curves of one panel, each moved a little so that error bars stay apart."""
    for index, (method, points) in enumerate(panel.items()):
        shift = 2 ** (0.07 * (index - (len(panel) - 1) / 2))
        known = sorted(points)
        value, error = zip(*(points[r] for r in known), strict=True)
        own = of_method(method, index)
        axes.errorbar(
            [r * shift for r in known], value, error, capsize=2, label=label(method), **own
        )
        theirs = {r: v for r, v in printed.get(method, {}).items() if v is not None}
        axes.plot([r * shift for r in theirs], list(theirs.values()), **own, **HOLLOW)
    ticks = sorted({r for points in panel.values() for r in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(r) for r in ticks])
    axes.minorticks_off()
    axes.set_xlabel("resolution (px)")


@paper_ready
def loss_curves(
    histories: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str = "loss",
    log: bool = True,
) -> Figure:  # fmt: skip
    """Loss against step: name -> (steps, values), each value the mean since the one before."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.4))
    for index, (name, (steps, values)) in enumerate(histories.items()):
        line = "--" if name.rpartition("_")[0] in READINGS else "-"
        axes.plot(steps, values, line, color=of_method(name, index)["color"], label=label(name))
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    if log:  # plain numbers, at most six of them
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    ncols = 3 if len(histories) < 7 else 2  # longer names
    figure.legend(loc="outside lower center", ncols=ncols, columnspacing=1.2)
    return figure


@paper_ready
def risk_coverage(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, risk: str = "errors"
) -> Figure:
    """Errors against what is kept: name -> (coverage, risk) of quality.risk_coverage, in [0, 1]."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.4))
    for index, (name, (coverage, error)) in enumerate(curves.items()):
        kept, wrong = 100 * np.asarray(coverage), 100 * np.asarray(error)
        some = kept >= 5  # of a few decisions it says nothing
        axes.plot(kept[some], wrong[some], color=of_method(name, index)["color"], label=label(name))
    axes.set(xlabel="kept, most reliable first (%)", ylabel=f"{risk} (%)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@paper_ready
def figure5(values: Mapping[str, Any]) -> Figure:
    """Figure 5: parameters to store for each resolution; ``values`` of notebook 02."""
    *rows, trunk = sorted(values["iresnet50"], key=lambda cost: cost["r"])
    whole, x = trunk["stored"] / 1e6, np.arange(len(rows))
    stored = [cost["stored"] / 1e6 for cost in rows]
    printed = {r: whole * published.text(f"figure5_share_{r}") / 100 for r in (28, 7)}
    printed[14] = published.value("table3", "Pretraining + BCT + Fix Trunk", "params")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.5))
    axes.bar(x - 0.2, whole, 0.38, color=GREY, label="full fine-tuning")
    axes.bar(x + 0.2, stored, 0.38, color=BLUE, label=r"$\phi_{bt}$: branch + BN")
    for at, value in zip(x + 0.2, stored, strict=True):
        percent = 100 * value / whole
        text = f"{percent:.{1 if percent >= 1 else 2}f} %"
        _above(axes, at - 0.17, value, text, points=6, ha="left")  # clear of the grey bar
    known = [i for i, cost in enumerate(rows) if cost["r"] in printed]
    theirs = [printed[rows[i]["r"]] for i in known]
    axes.plot(x[known] + 0.2, theirs, "D", color="#222222", label="paper, as printed", **HOLLOW)
    axes.set(xlabel="resolution (px)", ylabel="parameters stored (millions)")
    axes.set_xticks(x, [str(cost["r"]) for cost in rows])
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1, handletextpad=0.5)
    return figure


@paper_ready
def figure6(values: Mapping[str, Any]) -> Figure:
    """Figure 6: multiply-accumulates and time a face; ``values`` of notebook 02 with "ms".

    phi_mm is a model of the route's architecture for each resolution, so it costs what phi_bt does.
    """
    rows = sorted(values["iresnet50"], key=lambda cost: cost["r"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.4))
    macs = np.array([cost["macs"] / 1e9 for cost in rows])
    median, low, high = (
        np.array([c["ms"][key] for c in rows]) for key in ("median", "low", "high")
    )
    _against_trunk(left, macs, None)
    _against_trunk(right, median, np.stack([median - low, high - median]))
    left.set(title="multiply-accumulates, counted", ylabel="GMACs a face")
    device = values["device"].upper()
    right.set(title="time, median and quartiles", ylabel=f"time a face (ms, {device})")
    for axes in (left, right):
        axes.set_xlabel("resolution (px)")
        axes.set_xticks(range(len(rows)), [str(cost["r"]) for cost in rows])
        axes.margins(y=0.12)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _against_trunk(axes: Axes, values: np.ndarray, spread: np.ndarray | None) -> None:
    """Bars of each route beside the trunk's, the last; ``spread`` (2, n) is below and above."""
    x = np.arange(len(values))
    trunk, own = r"$\phi_{hr}$, $\phi_{mr}$: scaled up first", r"$\phi_{bt}$, $\phi_{mm}$: own size"
    axes.bar(x - 0.2, values[-1], 0.38, color=GREY, label=trunk)
    line = {"elinewidth": 0.8, "capsize": 2}
    axes.bar(x + 0.2, values, 0.38, color=BLUE, label=own, yerr=spread, error_kw=line)
    tops = values if spread is None else values + spread[1]
    for at, top, value in zip(x + 0.2, tops, values, strict=True):
        _above(axes, at, top, f"{value:.3g}", points=2)


def _above(axes: Axes, x: float, y: float, text: str, *, points: float, ha: str = "center") -> None:
    place = {"textcoords": "offset points", "ha": ha, "fontsize": 6.5}
    axes.annotate(text, (x, y), (0, points), **place)


@paper_ready
def figure7(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 7: accuracy against parameters stored, for where the branch ends.

    Each point: ``setting`` (a line, e.g. "14&14"), ``couple_at``, ``stored`` (parameters),
    ``accuracy`` (%), and if known ``spread`` (standard error, points of %) and ``standard`` (True
    for the paper's allocation).
    """
    figure, axes = plt.subplots(figsize=(COLUMN, 2.7))
    for own, setting in zip((BLUE, ORANGE, GREEN, PURPLE), _settings(points), strict=False):
        mine = sorted((p for p in points if p["setting"] == setting), key=lambda p: p["stored"])
        x = [p["stored"] / 1e6 for p in mine]
        y, spread = [p["accuracy"] for p in mine], [p.get("spread", 0) for p in mine]
        axes.errorbar(x, y, spread, color=own, marker="o", capsize=2, label=setting)
        stars = [i for i, p in enumerate(mine) if p.get("standard")]
        star = {"color": own, "markersize": 11, "markeredgecolor": "white", "zorder": 5}
        axes.plot([x[i] for i in stars], [y[i] for i in stars], "*", **star)
    _name_units(axes, sorted({(p["stored"] / 1e6, p["couple_at"]) for p in points}))
    axes.plot([], [], "*", color=DARK, markersize=9, label="BTNet's allocation")
    axes.set(xscale="log", xlabel="parameters stored per resolution (millions)")
    axes.set_ylabel("accuracy (%), bars: standard error")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(False, axis="x")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _settings(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(point["setting"] for point in points))


def _name_units(axes: Axes, units: Sequence[tuple[float, str]]) -> None:
    """A line at each amount of parameters; over it the unit's name, beside one that is close."""
    before = 0.0
    for stored, name in units:
        axes.axvline(stored, color="#dddddd", linewidth=0.6, zorder=0)
        side = "left" if stored < 1.15 * before else "center"
        place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": side}
        axes.text(stored, 1.02, name, fontsize=6.5, **place)
        before = stored


@paper_ready
def figure8(
    reports: Mapping[str, Any], *, scale: str = "", resolutions: Sequence[int] = (7, 14, 28, 112)
) -> Figure:
    """Figure 8: which branch a face goes to, and what each strategy achieves; the paper's hollow.

    ``reports`` of notebook 06, by strategy ("max+ceil"); bars are the binomial standard error over
    its mated probes.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.9))
    _selection(left, resolutions)
    printed = published.table("table2")
    for place, (rounding, own) in enumerate(zip(ROUNDINGS, (ORANGE, GREEN, BLUE), strict=True)):
        for index, indicator in enumerate(INDICATORS):
            key, at = f"{indicator}+{rounding}", index + 0.22 * (place - 1)
            if key in reports:
                value, mated = reports[key]["tpir"]["0.3"], reports[key]["mated"]
                right.errorbar(at, value, binomial(value, mated), fmt="o", color=own, capsize=2)
            right.plot(at + 0.08, printed[f"BTNet ({key})"]["0.3"], "D", color=own, **HOLLOW)
    note = f"scale {scale}, standard error"
    right.errorbar([], [], [], fmt="o", color=DARK, capsize=2, label=note)
    right.plot([], [], "D", color=DARK, label="paper, QMUL-SurvFace", **HOLLOW)
    right.set(xlabel="indicator", ylabel="TPIR20 at FPIR 0.3 (%)", xlim=(-0.5, 2.5))
    right.set_xticks(range(len(INDICATORS)), INDICATORS)
    figure.legend(loc="outside lower center", ncols=6, columnspacing=1.2, handletextpad=0.5)
    return figure


def _selection(axes: Axes, resolutions: Sequence[int]) -> None:
    """The branch that each rounding gives a face, by the selection itself."""
    side = np.arange(3, 131)
    for rounding, own, dash in zip(ROUNDINGS, (ORANGE, GREEN, BLUE), (":", "--", "-"), strict=True):
        chosen = select_branch(side, side, rounding=rounding, resolutions=resolutions)
        axes.step(side, chosen, where="mid", color=own, linestyle=dash, label=rounding)
    axes.plot(side, side, color="#bbbbbb", linewidth=0.8, label="no resize")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="indicator: min, max or avg of (W, H) (px)", ylabel="branch (px)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(list(resolutions), [str(r) for r in resolutions])
        axis.set_ticks([], minor=True)
