"""One function per figure of the paper, from plain arrays, dicts or the model itself, to a matplotlib Figure.

Sizes are inches for a two-column page; text is 7-8 pt, fonts stay text in PDF. Colours are seaborn's colour-blind
safe palette: one colour per method and one per resolution throughout. Hollow markers are the paper's printed values.
Nothing is saved here (results.save_figure does) and no global state of matplotlib changes.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from btnet_core.btnet import INDICATORS, ROUNDINGS, BTNet, Route, select_branch
from btnet_core.errors import ConfigError

COLUMN, PAGE = 3.4, 6.9  # inches
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
METHODS = {  # name -> (label, colour, marker)
    "phi_hr": (r"$\phi_{hr}$", GREY, "o"),
    "phi_mm": (r"$\phi_{mm}$", GREEN, "^"),
    "phi_mr": (r"$\phi_{mr}$", ORANGE, "s"),
    "phi_mr_v2": (r"$\phi_{mr(v2)}$", YELLOW, "P"),
    "phi_mr_v3": (r"$\phi_{mr(v3)}$", BROWN, "X"),
    "phi_bt": (r"$\phi_{bt}$", BLUE, "D"),
}
RESOLUTIONS = {112: "#555555", 56: PURPLE, 28: BLUE, 14: GREEN, 7: RED}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "figure.dpi": 150, "pdf.fonttype": 42, "ps.fonttype": 42,
    "font.family": "DejaVu Sans", "figure.facecolor": "white", "image.interpolation": "nearest",
}  # fmt: skip
HOLLOW = {"markerfacecolor": "none", "linestyle": "none", "markeredgewidth": 1.1, "markersize": 6}


def _paper_ready(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in this module's style and hand the figure out closed: a notebook shows it once."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **options: Any) -> Figure:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **options)
            figure.draw_without_rendering()  # ticks are made lazily, and take the style of that moment
            plt.close(figure)
        return figure

    return wrapped


def _label(method: str) -> str:
    return METHODS.get(method, (method,))[0]


def _method(method: str, index: int = 0) -> dict[str, Any]:
    _, colour, marker = METHODS.get(method, (method, sns.color_palette("colorblind").as_hex()[index % 10], "o"))
    return {"color": colour, "marker": marker}


def _colour(r: int) -> str:
    return RESOLUTIONS.get(r, SKY)


def _ticks(axes: Axes, resolutions: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(resolutions), [str(r) for r in resolutions])
    axes.minorticks_off()
    axes.set_xlabel("resolution (px)")


def _picture(image: Any) -> np.ndarray:
    """(3, H, W) pixels in [0, 255] -> what imshow takes."""
    return np.asarray(image, dtype=np.float32).transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)


def _map(feature: Any) -> np.ndarray:
    """(H, W) feature map -> [0, 1] between its 1st and 99th percentile."""
    feature = np.asarray(feature, dtype=np.float32)
    low, high = np.percentile(feature, (1, 99))
    return ((feature - low) / max(high - low, 1e-12)).clip(0, 1)


def _show(axes: Axes, image: np.ndarray, title: str = "", outline: str | None = None, **options: Any) -> Any:
    shown = axes.imshow(image, **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=outline is not None, color=outline, linewidth=2)
    return shown


@_paper_ready
def figure1(
    resolutions: Sequence[int], curves: Mapping[str, Any], knees: Mapping[str, float], *, paper_knee: float | None = 32
) -> Figure:
    """Figure 1: error bounds and measured error against resolution; mean over images and their 10-90 % range.

    Args:
        curves: name -> (len(resolutions), images) in grey levels, of "paper", "complete", "measured" and, only in
            the left panel, "interpolation", the part of the measured error that the bounds speak of.
        knees: name -> resolution of the knee, px.
    """
    labels = {"measured": "measured error", "complete": "complete bound", "paper": "paper's bound (Eq. 11)"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.6), layout="constrained")
    r = np.asarray(resolutions)
    for (name, label), colour, marker in zip(labels.items(), (BLUE, GREEN, ORANGE), "osD", strict=True):
        values = np.asarray(curves[name])
        mean, (low, high) = values.mean(1), np.percentile(values, (10, 90), axis=1)
        shown = mean > 0
        left.plot(r[shown], mean[shown], color=colour, label=label, marker=marker, markevery=max(1, len(r) // 12))
        left.fill_between(r[shown], low[shown], high[shown], color=colour, alpha=0.18, linewidth=0)
        rise = (mean - mean[r.argmax()]) / (mean[r.argmin()] - mean[r.argmax()])
        right.plot(r, rise, color=colour, label=f"{label}, knee at {knees[name]:.0f}")
        right.plot(knees[name], np.interp(knees[name], *zip(*sorted(zip(r, rise, strict=True)), strict=True)), marker,
                   color=colour, markersize=7, markeredgecolor="white")  # fmt: skip
    left.set(yscale="log", ylabel="grey levels of 255", title="Absolute: mean, 10-90 % of images")
    right.set(ylabel=f"share of the rise to {r.min()} px", title=f"Relative to {r.max()}: where the curves bend")
    part = np.asarray(curves["interpolation"]).mean(1)
    left.plot(r[part > 0], part[part > 0], "--", color=BLUE, linewidth=1, label="interpolation part of it")
    if paper_knee:
        right.axvline(paper_knee, color="#888888", linestyle=":", linewidth=1)
        right.plot(paper_knee, 0, "v", color="#444444", clip_on=False, label=f"paper: about {paper_knee:.0f}",
                   **HOLLOW)  # fmt: skip
    for axes in (left, right):
        axes.set_xlabel("resolution (px)")
        axes.set_xticks([7, 14, 28, 56, 84, 112])
    left.set_ylim(bottom=left.get_ylim()[0] / 6)  # room for the legend
    left.legend(loc="lower center", ncols=2)
    right.legend()
    return figure


@_paper_ready
def error_maps(face: Any, degraded: Mapping[int, Any], errors: Mapping[int, Any]) -> Figure:
    """One face (3, S, S) in [0, 255], as it comes back from each resolution, and |error| (S, S) in grey levels."""
    n = len(degraded)
    figure, axes = plt.subplots(
        2, n + 1, figsize=(PAGE, PAGE / (n + 1) * 2 + 0.25), layout="constrained", squeeze=False
    )
    _show(axes[0, 0], _picture(face), f"original, {np.shape(face)[-1]} px")
    axes[1, 0].axis("off")
    top = max(np.percentile(np.asarray(error), 99.5) for error in errors.values())
    for column, (r, image) in enumerate(degraded.items(), start=1):
        error = np.asarray(errors[r])
        _show(axes[0, column], _picture(image), f"{r} px and back")
        shown = _show(axes[1, column], error, f"mean {error.mean():.1f}", cmap="magma", vmin=0, vmax=top)
    figure.colorbar(shown, ax=axes[1, 0], location="right", fraction=0.35, label="|error| (grey levels)")
    return figure


def _chain(net: Any) -> list[tuple[str, int, int, bool]]:
    """(unit, stride, rows out, own?) of a route or trunk, read from its modules; own: not shared with the trunk."""
    parts = [(net.branch, True), (net.shared, False)] if isinstance(net, Route) else [(net.body, False)]
    rows, chain = (net.size if isinstance(net, Route) else net.config.size)[0], []
    for part, own in parts:
        for name, unit in part.named_children():
            rows = (rows - 1) // unit.stride + 1
            chain.append((name, unit.stride, rows, own))
    return chain


def _box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, *, solid: bool, size: float = 6,
         **options: Any) -> None:  # fmt: skip
    face = mpl.colors.to_rgba(colour, 0.25 if solid else 0.0)
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", facecolor=face,
                                  edgecolor=colour, linewidth=1.2 if solid else 0.8, **options))  # fmt: skip
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#777777") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1, "shrinkA": 0,
                                              "shrinkB": 0, "mutation_scale": 7})  # fmt: skip


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


@_paper_ready
def figure2(btnet: BTNet) -> Figure:
    """Figure 2: the trunk as a pyramid of feature maps; each branch keeps r and joins where the trunk has r rows."""
    rows = list(dict.fromkeys(size for _, _, size, _ in _chain(btnet.trunk)))
    canonical = btnet.trunk.config.size[0]
    levels = list(dict.fromkeys([canonical, *rows]))
    side = {r: 0.55 + 0.95 * np.log2(r / min(levels) + 1) / np.log2(canonical / min(levels) + 1) for r in levels}
    place = {r: 2.2 + 1.9 * index for index, r in enumerate(levels)}
    depth = {r: -1.35 - 1.05 * index for index, r in enumerate(btnet.resolutions[-2::-1])}
    end = place[levels[-1]] + 1.5
    bottom = min(depth.values(), default=0) - 0.6
    figure, axes = _canvas(PAGE, 1.7 + 0.55 * len(depth), (-0.6, end + 1.9), (bottom, 1.15))
    axes.set_aspect("equal")
    for r in levels:
        for shift in (0.12, 0.06, 0.0):
            axes.add_patch(Rectangle((place[r] - side[r] / 2 + shift, shift - side[r] / 2), side[r], side[r],
                                     facecolor="white", edgecolor=_colour(r), linewidth=1.4))  # fmt: skip
        axes.text(place[r], 0, f"{r}", ha="center", va="center")
    for a, b in itertools.pairwise(levels):
        _arrow(axes, (place[a] + side[a] / 2 + 0.14, 0), (place[b] - side[b] / 2 - 0.03, 0))
    for r, y in [(canonical, 0.0), *depth.items()]:
        axes.add_patch(Rectangle((0.3 - side[r] / 3, y - side[r] / 3), side[r] / 1.5, side[r] / 1.5, facecolor="#f2f2f2",
                                 edgecolor=_colour(r), linewidth=1.4))  # fmt: skip
        axes.text(0.3, y, f"{r}", ha="center", va="center", fontsize=7)
        if r == canonical:
            _arrow(axes, (0.3 + side[r] / 3, y), (place[r] - side[r] / 2 - 0.03, y))
            continue
        right = place[r] - 0.45
        _arrow(axes, (0.3 + side[r] / 3, y), (1.2, y))
        _box(axes, 1.25, y - 0.3, right - 1.25, 0.6, f"branch $B_{{{r}}}$: {r} rows throughout", _colour(r), solid=True)
        axes.plot((right, place[r]), (y, y), color=_colour(r), linewidth=1)
        _arrow(axes, (place[r], y), (place[r], -side[r] / 2 - 0.02), _colour(r))
    axes.text(0.3, 0.95, "input", ha="center", fontsize=7)
    middle = (place[levels[0]] + place[levels[-1]]) / 2
    axes.text(middle, 0.95, "trunk $T$: rows of its feature maps", ha="center", fontsize=7)
    _arrow(axes, (place[levels[-1]] + side[levels[-1]] / 2 + 0.14, 0), (end - 0.1, 0))
    _box(axes, end - 0.05, -0.3, 1.9, 0.6, f"embedding\n{btnet.trunk.config.embedding}-d", "#555555", solid=False)
    return figure


@_paper_ready
def figure3(btnet: BTNet) -> Figure:
    """Figure 3: every route unit by unit; runs of like units are drawn as one box; /2 is a stride, S3U2-14 a run."""
    routes = {r: _chain(btnet.route(r)) for r in reversed(btnet.resolutions)}
    names = [name for name, *_ in routes[btnet.resolutions[-1]]]
    alike = [tuple((chain[i][1], chain[i][3], chain[i][2]) for chain in routes.values()) for i in range(len(names))]
    runs: list[list[int]] = []
    for i in range(len(names)):
        new = i == 0 or alike[i] != alike[i - 1] or (names[i][:2] != names[i - 1][:2] and names[i][0] == "S")
        runs.append([i]) if new else runs[-1].append(i)
    figure, axes = _canvas(PAGE, 0.62 * len(routes) + 0.55, (-1.15, len(runs) + 1.1), (0.8 - len(routes), 1.05))
    for row, (r, chain) in enumerate(routes.items()):
        y, colour = -row, _colour(r)
        axes.text(-0.6, y + 0.25, f"{r} px", ha="center", va="center", color=colour, fontweight="bold", fontsize=8)
        for column, run in enumerate(runs):
            _, stride, rows, own = chain[run[0]]
            first, last = names[run[0]], names[run[-1]]
            text = first if len(run) == 1 else f"{first}-{last.split('U')[-1].removeprefix('block')}"
            solid, stays = own or r == btnet.resolutions[-1], colour if own else "#555555"
            _box(axes, column + 0.05, y, 0.86, 0.5, f"{text}{' /2' if stride == 2 else ''}\n{rows}", stays, solid=solid,
                 size=min(5.2, 48 / len(text)), linestyle="-" if solid else (0, (2, 1.5)))  # fmt: skip
            ends = own and not chain[min(run[-1] + 1, len(chain) - 1)][3]
            _arrow(axes, (column + 0.91, y + 0.25), (column + 1.05, y + 0.25), colour if ends else "#777777")
            if ends:
                axes.plot((column + 0.98,) * 2, (y - 0.06, y + 0.62), color=colour, linewidth=1.6)
                axes.text(column + 0.98, y + 0.66, f"$z_{{{r}}}$", ha="center", fontsize=6.5, color=colour)
        _box(axes, len(runs) + 0.05, y, 0.95, 0.5, "head", "#555555", solid=not row, size=5.2,
             linestyle=(0, (2, 1.5)) if row else "-")  # fmt: skip
    legend = "filled: trunk, or a branch of its own · dashed: $T_r$, the trunk's weights with BatchNorm of its own"
    axes.text(-1.1, 0.88, f"{legend} · second line: rows of the output", fontsize=6.2)
    return figure


@_paper_ready
def figure4(faces: Mapping[int, Any], maps: Mapping[int, Any]) -> Figure:
    """Figure 4: a face (3, r, r) at each resolution above a feature map (r, r) of the trunk with as many rows."""
    n = len(faces)
    figure, axes = plt.subplots(2, n, figsize=(PAGE, 2 * PAGE / n + 0.3), layout="constrained", squeeze=False)
    for column, (r, face) in enumerate(faces.items()):
        _show(axes[0, column], _picture(face), f"{r} px", _colour(r))
        _show(axes[1, column], _map(maps[r]), "", _colour(r), cmap="viridis")
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("feature map of $T$")
    return figure


def _costs(costs: Sequence[Any]) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(cost) if dataclasses.is_dataclass(cost) else dict(cost) for cost in costs]
    return sorted(rows, key=lambda cost: cost["r"])


@_paper_ready
def figure5(costs: Sequence[Any], *, paper_share: Mapping[int, float] | None = None) -> Figure:
    """Figure 5: parameters to store for each resolution (costs.Cost or dicts); ``paper_share``: r -> 0 to 1."""
    rows = _costs(costs)
    figure, axes = plt.subplots(figsize=(COLUMN, 2.5), layout="constrained")
    whole, x = rows[-1]["stored"] / 1e6, np.arange(len(rows) - 1)
    axes.bar(x - 0.2, whole, 0.38, color=GREY, label="full fine-tuning: a model each")
    stored = [cost["stored"] / 1e6 for cost in rows[:-1]]
    axes.bar(x + 0.2, stored, 0.38, color=BLUE, label=r"$\phi_{bt}$: branch + BN")
    for at, value in zip(x + 0.2, stored, strict=True):
        share = 100 * value / whole
        text = f"{share:.{1 if share >= 1 else 2}f}%"
        axes.annotate(text, (at, value), (0, 6), textcoords="offset points", ha="center", fontsize=6.5)
    printed = {at: (paper_share or {}).get(cost["r"]) for at, cost in zip(x + 0.2, rows[:-1], strict=True)}
    points = [(at, share * whole) for at, share in printed.items() if share is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "D", color="#222222", label="paper", **HOLLOW)
    axes.set(xlabel="resolution (px)", ylabel="parameters stored (millions)", ylim=(0, whole * 1.42))
    axes.set_xticks(x, [str(cost["r"]) for cost in rows[:-1]])
    axes.legend(loc="upper right")
    return figure


@_paper_ready
def figure6(costs: Sequence[Any], times: Mapping[int, Mapping[str, float]], *, where: str = "CPU") -> Figure:
    """Figure 6: multiply-accumulates and measured time a face; ``times``: r -> median, low, high in ms."""
    rows = _costs(costs)
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.3), layout="constrained")
    resolutions, x = [cost["r"] for cost in rows], np.arange(len(rows))
    macs = np.array([[cost["macs"] / 1e9] * 3 for cost in rows])
    timed = np.array([[times[r]["median"], times[r]["low"], times[r]["high"]] for r in resolutions])
    units = ("GMACs a face", f"time a face (ms, {where})")
    for axes, values, unit in zip(panels, (macs, timed), units, strict=True):
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        label = r"$\phi_{hr}$, $\phi_{mm}$, $\phi_{mr}$: up-sampled to S"
        axes.bar(x - 0.2, values[-1, 0], 0.38, color=GREY, label=label)
        axes.bar(x + 0.2, values[:, 0], 0.38, color=BLUE, label=r"$\phi_{bt}$: at its own size",
                 yerr=spread if spread.any() else None, error_kw={"elinewidth": 0.8, "capsize": 2})  # fmt: skip
        for index, value in enumerate(values[:, 0]):
            top = (index + 0.2, value + spread[1, index])
            axes.annotate(f"{value:.3g}", top, (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
        axes.set(xlabel="resolution (px)", ylabel=unit, ylim=(0, values.max() * 1.4))
        axes.set_xticks(x, [str(r) for r in resolutions])
    panels[0].legend(loc="upper left")
    panels[0].set_title("multiply-accumulates, counted")
    panels[1].set_title("time, median and quartiles")
    return figure


@_paper_ready
def figure7(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 7: accuracy against parameters stored, for where the branch ends.

    Each point: ``setting`` (a line, e.g. "14&14"), ``couple_at``, ``stored`` (parameters), ``accuracy`` (%), and if
    known ``spread`` (standard deviation over seeds, points of %), ``standard`` (True for the paper's allocation).
    """
    figure, axes = plt.subplots(figsize=(COLUMN * 1.3, 2.7), layout="constrained")
    palette = (BLUE, ORANGE, GREEN, PURPLE)
    for colour, setting in zip(palette, dict.fromkeys(point["setting"] for point in points), strict=False):
        own = sorted((p for p in points if p["setting"] == setting), key=lambda p: p["stored"])
        x, y = ([p[key] for p in own] for key in ("stored", "accuracy"))
        x = [value / 1e6 for value in x]
        axes.errorbar(x, y, [p.get("spread", 0) for p in own], color=colour, marker="o", capsize=2, label=setting)
        for p, at in zip(own, x, strict=True):
            below = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "fontsize": 6}
            axes.annotate(p["couple_at"], (at, p["accuracy"]), **below)
            if p.get("standard"):
                axes.plot(at, p["accuracy"], "*", color=colour, markersize=11, markeredgecolor="white", zorder=5)
    axes.plot([], [], "*", color="#444444", markersize=9, label="BTNet's allocation")
    axes.set(xscale="log", xlabel="parameters stored per resolution (millions)", ylabel="accuracy (%)")
    axes.margins(y=0.15)
    axes.legend()
    return figure


@_paper_ready
def figure8(results: Mapping[str, float], *, paper: Mapping[str, float] | None = None, metric: str = "TPIR20@FPIR=0.3 (%)",
            resolutions: Sequence[int] = (7, 14, 28, 112)) -> Figure:  # fmt: skip
    """Figure 8: which branch a face goes to, and what each strategy ("max+ceil", ...) achieves; paper's hollow."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.6), layout="constrained")
    side = np.arange(3, 131)
    for rounding, colour, style in zip(ROUNDINGS, (ORANGE, GREEN, BLUE), (":", "--", "-"), strict=True):
        chosen = select_branch(side, side, rounding=rounding, resolutions=resolutions)
        left.step(side, chosen, where="mid", color=colour, linestyle=style, label=rounding)
        for index, indicator in enumerate(INDICATORS):
            key, at = f"{indicator}+{rounding}", index + (ROUNDINGS.index(rounding) - 1) * 0.25
            if key in results:
                right.plot(at, results[key], "o", color=colour, label=f"{rounding}" if not index else "")
            if paper and key in paper:
                right.plot(at, paper[key], "D", color=colour, **HOLLOW)
    left.plot(side, side, color="#bbbbbb", linewidth=0.8, label="no resize")
    left.set(xlabel="indicator: min, max or avg of (W, H) (px)", ylabel="branch (px)", xscale="log", yscale="log")
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(list(resolutions), [str(r) for r in resolutions])
        axis.set_ticks([], minor=True)
    if paper:
        right.plot([], [], "D", color="#444444", label="paper (its own model)", **HOLLOW)
    right.set(xlabel="indicator", ylabel=metric)
    right.set_xticks(range(3), INDICATORS)
    left.legend()
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, columnspacing=1, handletextpad=0.2)
    return figure


@_paper_ready
def figure9(maps: Mapping[str, Mapping[int, Sequence[Any]]], similarity: Mapping[str, Mapping[int, Sequence[float]]], *,
            coupled: Mapping[int, int], measure: str = "similarity to 112 px") -> Figure:  # fmt: skip
    """Figure 9: feature maps by method and stage at each resolution, and below them a number that says the same.

    Args:
        maps: method -> r -> one (H, W) map per stage. similarity: method -> r -> one number per stage (112 left out).
        coupled: r -> index of the stage where phi_bt's branch joins the trunk; outlined and marked.
    """
    methods, resolutions = list(maps), list(next(iter(maps.values())))
    stages = len(maps[methods[0]][resolutions[0]])
    figure = plt.figure(figsize=(PAGE, 0.43 * len(resolutions) + 2.1), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(0.43 * len(resolutions) + 0.5, 1.7))
    grid = upper.subplots(len(resolutions), stages * len(methods), squeeze=False, gridspec_kw={"wspace": 0.02})
    panels = lower.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for m, method in enumerate(methods):
        for row, r in enumerate(resolutions):
            for stage, feature in enumerate(maps[method][r]):
                joins = next((low for low, at in coupled.items() if at == stage and r in (low, max(resolutions))), None)
                outline = _colour(joins) if joins and method == "phi_bt" else None
                title = "" if row else f"{'' if stage else _label(method)}\nst. {stage + 1}"
                _show(grid[row, m * stages + stage], _map(feature), title, outline, cmap="viridis")
            if not m:
                grid[row, 0].set_ylabel(f"{r}", rotation=0, ha="right", va="center")
        for r, values in similarity[method].items():
            panels[m].plot(range(1, stages + 1), values, "o-", color=_colour(r), label=f"{r} px")
            if method == "phi_bt" and r in coupled:
                panels[m].plot(coupled[r] + 1, values[coupled[r]], "s", color=_colour(r), **HOLLOW | {"markersize": 9})
        panels[m].set(xlabel="stage", title=_label(method), xticks=range(1, stages + 1))
    panels[0].set_ylabel(measure)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@_paper_ready
def accuracy_curves(curves: Mapping[str, Mapping[int, Any]], *, paper: Mapping[str, Mapping[int, float]] | None = None,
                    ylabel: str = "verification accuracy (%)", title: str = "") -> Figure:  # fmt: skip
    """Accuracy against resolution: method -> r -> a value or one per seed (mean and standard deviation are shown)."""
    figure, axes = plt.subplots(figsize=(COLUMN * 1.2, 2.6), layout="constrained")
    for index, (method, values) in enumerate(curves.items()):
        r = sorted(values)
        runs = [np.atleast_1d(np.asarray(values[k], float)) for k in r]
        spread = [run.std(ddof=1) if len(run) > 1 else 0.0 for run in runs]
        mean = [run.mean() for run in runs]
        axes.errorbar(r, mean, spread, capsize=2, label=_label(method), **_method(method, index))
        if paper and method in paper:
            axes.plot(list(paper[method]), list(paper[method].values()), **_method(method, index), **HOLLOW)
    if paper:
        axes.plot([], [], "o", color="#444444", label="paper (other data)", **HOLLOW)
    _ticks(axes, sorted({r for values in curves.values() for r in values}))
    axes.set(ylabel=ylabel, title=title)
    axes.legend()
    return figure


@_paper_ready
def loss_curves(histories: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str = "loss", log: bool = True,
                window: int = 20) -> Figure:  # fmt: skip
    """Loss against step: name -> (steps, values); every value faint, the mean over ``window`` neighbours bold."""
    figure, axes = plt.subplots(figsize=(COLUMN * 1.2, 2.4), layout="constrained")
    for index, (name, (steps, values)) in enumerate(histories.items()):
        colour, width = _method(name, index)["color"], min(window, len(values))
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
        middle = slice(width // 2, width // 2 + len(values) - width + 1)
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(np.asarray(steps)[middle], mean, color=colour, label=_label(name))
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    axes.legend()
    return figure


class Table(str):
    """HTML that JupyterLab shows as a table."""

    def _repr_html_(self) -> str:
        return str(self)


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(ours: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Mapping[str, Any]], *, caption: str = "",
          source: str = "ours", digits: int = 2, markdown: bool = False,
          more: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None) -> str:  # fmt: skip
    """Our numbers and, in a block of its own, the paper's: row -> column -> value; a missing or None one is "–".

    ``source`` says what ours were measured on; ``more`` has further blocks of ours by their source. HTML that a
    notebook shows, or with ``markdown`` a pipe table.

    Raises:
        ConfigError: nothing to show.
    """
    blocks = [(source, ours), *(more or {}).items(), ("paper, as printed", paper)]
    blocks = [(title, rows) for title, rows in blocks if rows]
    columns = list(dict.fromkeys(c for _, rows in blocks for row in rows.values() for c in row))
    if not columns:
        raise ConfigError("table: got no rows, expected at least one row with one column")
    if markdown:
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for title, rows in blocks:
            lines.append(f"| **{title}** |" + " |" * len(columns))
            for name, row in rows.items():
                lines.append(f"| {name} | " + " | ".join(_cell(row.get(c), digits) for c in columns) + " |")
        return "\n".join(lines)
    body = "<tr><th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns) + "</tr>"
    for title, rows in blocks:
        left, style = "text-align:left", "color:#777;font-style:italic" if rows is paper else ""
        body += (
            f'<tr><th colspan="{len(columns) + 1}" style="{left};border-top:2px solid">{html.escape(title)}</th></tr>'
        )
        for name, row in rows.items():
            cells = (html.escape(_cell(row.get(c), digits)) for c in columns)
            cells = "".join(f'<td style="text-align:right">{cell}</td>' for cell in cells)
            body += f'<tr style="{style}"><td style="{left}">{html.escape(name)}</td>{cells}</tr>'
    return Table(f"<table><caption>{html.escape(caption)}</caption>{body}</table>")
