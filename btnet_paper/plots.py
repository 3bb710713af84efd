"""One function per figure of the paper, from the values that its notebook records (or the model) to a Figure.

Values and arrays are those of results.record, as they are or read back from JSON; figures.py knows which. Sizes are inches for a two-column page; text is 7-8 pt, fonts stay text in PDF. Colours are seaborn's colour-blind
safe palette: one colour per method and one per resolution throughout. Hollow markers are the paper's printed values.
Nothing is saved here (figures.save_figure does) and no global state of matplotlib changes.
"""

from __future__ import annotations

import functools
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
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

from btnet_core.models.btnet import INDICATORS, ROUNDINGS, BTNet, Route, select_branch
from btnet_paper import published

COLUMN, PAGE = 3.4, 6.9  # inches
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette(
    "colorblind"
).as_hex()
METHODS = {  # name -> (label, colour, marker)
    "phi_hr": (r"$\phi_{hr}$", GREY, "o"),
    "phi_mm": (r"$\phi_{mm}$", GREEN, "^"),
    "phi_mr": (r"$\phi_{mr}$", ORANGE, "s"),
    "phi_mr_v2": (r"$\phi_{mr(v2)}$", YELLOW, "P"),
    "phi_mr_v3": (r"$\phi_{mr(v3)}$", BROWN, "X"),
    "phi_bt": (r"$\phi_{bt}$", BLUE, "D"),
    "phi_bt, lengths fitted": (r"$\phi_{bt}$, lengths fitted", PURPLE, "v"),
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
    """phi_mr(v2) and phi_mr_v2 are one method; phi_mm_28 is one model of phi_mm; "phi_mr, remark" keeps its remark."""
    method, *remark = method.split(", ", 1)
    if remark:
        return f"{_label(method)}, {remark[0]}"
    method = method.replace("(v", "_v").rstrip(")") if method.startswith("phi_") else method
    name, _, r = method.rpartition("_")
    return (
        f"{METHODS[name][0]}, {r} px"
        if name in METHODS and r.isdigit()
        else METHODS.get(method, (method,))[0]
    )


def _method(method: str, index: int = 0) -> dict[str, Any]:
    if method.rpartition("_")[2].isdigit():  # one model of phi_mm, one branch of phi_bt
        return {"color": _colour(int(method.rpartition("_")[2])), "marker": "o"}
    _, colour, marker = METHODS.get(
        method, (method, sns.color_palette("colorblind").as_hex()[index % 10], "o")
    )
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
    return (
        np.asarray(image, dtype=np.float32).transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)
    )


def _map(feature: Any) -> np.ndarray:
    """(H, W) feature map -> [0, 1] between its 1st and 99th percentile."""
    feature = np.asarray(feature, dtype=np.float32)
    low, high = np.percentile(feature, (1, 99))
    return ((feature - low) / max(high - low, 1e-12)).clip(0, 1)


def _show(
    axes: Axes, image: np.ndarray, title: str = "", outline: str | None = None, **options: Any
) -> Any:
    shown = axes.imshow(image, **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=outline is not None, color=outline, linewidth=2)
    return shown


@_paper_ready
def figure1(values: Mapping[str, Any]) -> Figure:
    """Figure 1: error bounds and measured error against resolution; mean over images and their 10-90 % range.

    ``values`` of notebook 01: "resolutions" (px), "knee" (px) and, of the curves "paper", "complete", "measured" and
    "interpolation" (the part of the measured error that the bounds speak of), "mean", "low", "high" in grey levels.
    """
    labels = {
        "measured": "measured error",
        "complete": "complete bound",
        "paper": "paper's bound (Eq. 11)",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.6), layout="constrained")
    r, knees, paper_knee = (
        np.asarray(values["resolutions"]),
        values["knee"],
        published.text("figure1_knee"),
    )
    for (name, label), colour, marker in zip(
        labels.items(), (BLUE, GREEN, ORANGE), "osD", strict=True
    ):
        mean, low, high = (np.asarray(values[name][key]) for key in ("mean", "low", "high"))
        shown = mean > 0
        left.plot(
            r[shown],
            mean[shown],
            color=colour,
            label=label,
            marker=marker,
            markevery=max(1, len(r) // 12),
        )
        left.fill_between(r[shown], low[shown], high[shown], color=colour, alpha=0.18, linewidth=0)
        rise = (mean - mean[r.argmax()]) / (mean[r.argmin()] - mean[r.argmax()])
        right.plot(r, rise, color=colour, label=f"{label}, knee at {knees[name]:.0f}")
        right.plot(knees[name], np.interp(knees[name], *zip(*sorted(zip(r, rise, strict=True)), strict=True)), marker,
                   color=colour, markersize=7, markeredgecolor="white")  # fmt: skip
    left.set(yscale="log", ylabel="grey levels of 255", title="Absolute: mean, 10-90 % of images")
    right.set(
        ylabel=f"share of the rise to {r.min()} px",
        title=f"Relative to {r.max()} px: where the curves bend",
    )
    part = np.asarray(values["interpolation"]["mean"])
    left.plot(
        r[part > 0], part[part > 0], "--", color=BLUE, linewidth=1, label="interpolation part of it"
    )
    right.axvline(paper_knee, color="#888888", linestyle=":", linewidth=1)
    right.plot(
        paper_knee,
        0,
        "v",
        color="#444444",
        clip_on=False,
        label=f"paper: about {paper_knee:.0f}",
        **HOLLOW,
    )
    for axes in (left, right):
        axes.set_xlabel("resolution (px)")
        axes.set_xticks([7, 14, 28, 56, 84, 112])
    left.set_ylim(bottom=left.get_ylim()[0] / 6)  # room for the legend
    left.legend(loc="lower center", ncols=2)
    right.legend()
    figure.set_layout_engine("constrained", w_pad=0.1)
    return figure


@_paper_ready
def error_maps(arrays: Mapping[str, Any]) -> Figure:
    """Figure 1, beside it: one "face" (3, S, S) in [0, 255], as it comes "back" (n, 3, S, S) from each of "resolutions"
    (n,), and the absolute "error" (n, S, S) in grey levels."""
    errors, n = np.asarray(arrays["error"], np.float32), len(arrays["resolutions"])
    width = [1.0] * (n + 1) + [0.07]
    figure, axes = plt.subplots(2, n + 2, figsize=(PAGE, 2 * PAGE / sum(width) + 0.35), layout="constrained",
                                width_ratios=width, squeeze=False)  # fmt: skip
    _show(axes[0, 0], _picture(arrays["face"]), f"original, {np.shape(arrays['face'])[-1]} px")
    for blank in (axes[1, 0], axes[0, -1]):
        blank.axis("off")
    axes[1, 0].text(
        1, 0.5, "absolute error,\nmean in grey levels", ha="right", va="center", fontsize=7
    )
    top = np.percentile(errors, 99.5, axis=(1, 2)).max()
    for column, r in enumerate(np.asarray(arrays["resolutions"]).tolist()):
        _show(axes[0, column + 1], _picture(arrays["back"][column]), f"{r} px and back")
        title = f"mean {errors[column].mean():.1f}"
        shown = _show(axes[1, column + 1], errors[column], title, cmap="magma", vmin=0, vmax=top)
    figure.colorbar(shown, cax=axes[1, -1], label="grey levels of 255")
    return figure


def _chain(net: Any) -> list[tuple[str, int, int, bool]]:
    """(unit, stride, rows out, own?) of a route or trunk, read from its modules; own: not shared with the trunk."""
    parts = (
        [(net.branch, True), (net.shared, False)] if isinstance(net, Route) else [(net.body, False)]
    )
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


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#777777"
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1, "shrinkA": 0,
                                              "shrinkB": 0, "mutation_scale": 7})  # fmt: skip


def _canvas(
    width: float, height: float, x: tuple[float, float], y: tuple[float, float]
) -> tuple[Figure, Axes]:
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
    side = {
        r: 0.55 + 0.95 * np.log2(r / min(levels) + 1) / np.log2(canonical / min(levels) + 1)
        for r in levels
    }
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
        _box(
            axes,
            1.25,
            y - 0.3,
            right - 1.25,
            0.6,
            f"branch $B_{{{r}}}$: {r} rows throughout",
            _colour(r),
            solid=True,
        )
        axes.plot((right, place[r]), (y, y), color=_colour(r), linewidth=1)
        _arrow(axes, (place[r], y), (place[r], -side[r] / 2 - 0.02), _colour(r))
    axes.text(0.3, 0.95, "input", ha="center", fontsize=7)
    middle = (place[levels[0]] + place[levels[-1]]) / 2
    axes.text(middle, 0.95, "trunk $T$: rows of its feature maps", ha="center", fontsize=7)
    _arrow(axes, (place[levels[-1]] + side[levels[-1]] / 2 + 0.14, 0), (end - 0.1, 0))
    _box(
        axes,
        end - 0.05,
        -0.3,
        1.9,
        0.6,
        f"embedding\n{btnet.trunk.config.embedding}-d",
        "#555555",
        solid=False,
    )
    return figure


@_paper_ready
def figure3(btnet: BTNet) -> Figure:
    """Figure 3: every route unit by unit; runs of like units are drawn as one box; /2 is a stride, S3U2-14 a run."""
    routes = {r: _chain(btnet.route(r)) for r in reversed(btnet.resolutions)}
    names = [name for name, *_ in routes[btnet.resolutions[-1]]]
    alike = [
        tuple((chain[i][1], chain[i][3], chain[i][2]) for chain in routes.values())
        for i in range(len(names))
    ]
    runs: list[list[int]] = []
    for i in range(len(names)):
        new = (
            i == 0
            or alike[i] != alike[i - 1]
            or (names[i][:2] != names[i - 1][:2] and names[i][0] == "S")
        )
        runs.append([i]) if new else runs[-1].append(i)
    figure, axes = _canvas(
        PAGE, 0.62 * len(routes) + 0.55, (-1.15, len(runs) + 1.1), (0.8 - len(routes), 1.05)
    )
    for row, (r, chain) in enumerate(routes.items()):
        y, colour = -row, _colour(r)
        axes.text(
            -0.6,
            y + 0.25,
            f"{r} px",
            ha="center",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=8,
        )
        for column, run in enumerate(runs):
            _, stride, rows, own = chain[run[0]]
            first, last = names[run[0]], names[run[-1]]
            text = (
                first if len(run) == 1 else f"{first}-{last.split('U')[-1].removeprefix('block')}"
            )
            solid, stays = own or r == btnet.resolutions[-1], colour if own else "#555555"
            _box(axes, column + 0.05, y, 0.86, 0.5, f"{text}{' /2' if stride == 2 else ''}\n{rows}", stays, solid=solid,
                 size=min(6.2, 52 / len(text)), linestyle="-" if solid else (0, (2, 1.5)))  # fmt: skip
            ends = own and not chain[min(run[-1] + 1, len(chain) - 1)][3]
            _arrow(
                axes,
                (column + 0.91, y + 0.25),
                (column + 1.05, y + 0.25),
                colour if ends else "#777777",
            )
            if ends:
                axes.plot((column + 0.98,) * 2, (y - 0.06, y + 0.62), color=colour, linewidth=1.6)
                axes.text(
                    column + 0.98, y + 0.66, f"$z_{{{r}}}$", ha="center", fontsize=6.5, color=colour
                )
        _box(axes, len(runs) + 0.05, y, 0.95, 0.5, "head", "#555555", solid=not row, size=6.2,
             linestyle=(0, (2, 1.5)) if row else "-")  # fmt: skip
    legend = "filled: trunk, or a branch of its own · dashed: $T_r$, the trunk's weights with BatchNorm of its own"
    axes.text(-1.1, 0.88, f"{legend} · second line: rows of the output", fontsize=6.2)
    return figure


@_paper_ready
def figure4(arrays: Mapping[str, Any]) -> Figure:
    """Figure 4: a face "face_<r>" (3, r, r) above a map "trunk_<r>" (r, r) of the trunk that saw it at full size."""
    resolutions = sorted(
        (int(name[5:]) for name in arrays if name.startswith("face_")), reverse=True
    )
    n = len(resolutions)
    figure, axes = plt.subplots(
        2, n, figsize=(PAGE, 2 * PAGE / n + 0.2), layout="constrained", squeeze=False
    )
    for column, r in enumerate(resolutions):
        _show(axes[0, column], _picture(arrays[f"face_{r}"]), f"{r} px", _colour(r))
        _show(axes[1, column], _map(arrays[f"trunk_{r}"]), "", _colour(r), cmap="viridis")
    axes[0, 0].set_ylabel("face, shrunk")
    axes[1, 0].set_ylabel("map of $T$, face at full size")
    return figure


@_paper_ready
def figure5(values: Mapping[str, Any]) -> Figure:
    """Figure 5: parameters to store for each resolution; ``values`` of notebook 02: costs of the paper's trunk."""
    rows = sorted(values["iresnet50"], key=lambda cost: cost["r"])
    figure, axes = plt.subplots(figsize=(COLUMN, 2.5), layout="constrained")
    whole, x = rows[-1]["stored"] / 1e6, np.arange(len(rows) - 1)
    axes.bar(x - 0.2, whole, 0.38, color=GREY, label="full fine-tuning: a model each")
    stored = [cost["stored"] / 1e6 for cost in rows[:-1]]
    axes.bar(x + 0.2, stored, 0.38, color=BLUE, label=r"$\phi_{bt}$: branch + BN")
    for at, value in zip(x + 0.2, stored, strict=True):
        share = 100 * value / whole
        text = f"{share:.{1 if share >= 1 else 2}f} %"
        axes.annotate(
            text, (at, value), (0, 6), textcoords="offset points", ha="center", fontsize=6.5
        )
    printed = {r: whole * published.text(f"figure5_share_{r}") / 100 for r in (28, 7)}
    printed[14] = published.value("table3", "Pretraining + BCT + Fix Trunk", "params") or 0
    points = [
        (at, printed[cost["r"]])
        for at, cost in zip(x + 0.2, rows[:-1], strict=True)
        if cost["r"] in printed
    ]
    axes.plot(
        *zip(*points, strict=True),
        "D",
        color="#222222",
        label="paper, as printed",
        clip_on=False,
        **HOLLOW,
    )
    axes.set(
        xlabel="resolution (px)", ylabel="parameters stored (millions)", ylim=(0, whole * 1.42)
    )
    axes.set_xticks(x, [str(cost["r"]) for cost in rows[:-1]])
    axes.legend(loc="upper right")
    return figure


@_paper_ready
def figure6(values: Mapping[str, Any]) -> Figure:
    """Figure 6: multiply-accumulates and measured time a face; ``values`` of notebook 02: costs with "ms", "device"."""
    rows = sorted(values["iresnet50"], key=lambda cost: cost["r"])
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.4), layout="constrained")
    x = np.arange(len(rows))
    macs = np.array([[cost["macs"] / 1e9] * 3 for cost in rows])
    timed = np.array([[cost["ms"][key] for key in ("median", "low", "high")] for cost in rows])
    units = ("GMACs a face", f"time a face (ms, {values['device'].upper()})")
    for axes, points, unit in zip(panels, (macs, timed), units, strict=True):
        spread = np.abs(points[:, 1:] - points[:, :1]).T
        axes.bar(
            x - 0.2,
            points[-1, 0],
            0.38,
            color=GREY,
            label=r"$\phi_{hr}$, $\phi_{mr}$: scaled up first",
        )
        axes.bar(x + 0.2, points[:, 0], 0.38, color=BLUE, label=r"$\phi_{mm}$, $\phi_{bt}$: at its own size",
                 yerr=spread if spread.any() else None, error_kw={"elinewidth": 0.8, "capsize": 2})  # fmt: skip
        for index, value in enumerate(points[:, 0]):
            top = (index + 0.2, value + spread[1, index])
            axes.annotate(
                f"{value:.3g}", top, (0, 2), textcoords="offset points", ha="center", fontsize=6.5
            )
        axes.set(xlabel="resolution (px)", ylabel=unit, ylim=(0, points.max() * 1.12))
        axes.set_xticks(x, [str(cost["r"]) for cost in rows])
    panels[0].set_title("multiply-accumulates, counted")
    panels[1].set_title("time, median and quartiles")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@_paper_ready
def figure7(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 7: accuracy against parameters stored, for where the branch ends.

    Each point: ``setting`` (a line, e.g. "14&14"), ``couple_at``, ``stored`` (parameters), ``accuracy`` (%), and if
    known ``spread`` (standard error, points of %), ``standard`` (True for the paper's allocation).
    """
    figure, axes = plt.subplots(figsize=(COLUMN * 1.3, 2.9), layout="constrained")
    palette = (BLUE, ORANGE, GREEN, PURPLE)
    for colour, setting in zip(
        palette, dict.fromkeys(point["setting"] for point in points), strict=False
    ):
        own = sorted((p for p in points if p["setting"] == setting), key=lambda p: p["stored"])
        x, y = ([p[key] for p in own] for key in ("stored", "accuracy"))
        x = [value / 1e6 for value in x]
        axes.errorbar(
            x,
            y,
            [p.get("spread", 0) for p in own],
            color=colour,
            marker="o",
            capsize=2,
            label=setting,
        )
        for p, at in zip(own, x, strict=True):
            if p.get("standard"):
                axes.plot(
                    at,
                    p["accuracy"],
                    "*",
                    color=colour,
                    markersize=11,
                    markeredgecolor="white",
                    zorder=5,
                )
    before = 0.0
    for stored, name in sorted({(p["stored"] / 1e6, p["couple_at"]) for p in points}):
        axes.axvline(stored, color="#dddddd", linewidth=0.6, zorder=0)
        side = (
            "left" if stored < 1.15 * before else "center"
        )  # beside the name of a line that is close
        axes.text(
            stored,
            1.02,
            name,
            transform=axes.get_xaxis_transform(),
            rotation=90,
            ha=side,
            fontsize=6.5,
        )
        before = stored
    axes.plot([], [], "*", color="#444444", markersize=9, label="BTNet's allocation")
    axes.set(
        xscale="log",
        xlabel="parameters stored per resolution (millions)",
        ylabel="verification accuracy (%)",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(False, axis="x")
    axes.margins(y=0.15)
    axes.legend(title="bars: standard error", title_fontsize=7)
    return figure


@_paper_ready
def figure8(
    reports: Mapping[str, Any], *, scale: str = "", resolutions: Sequence[int] = (7, 14, 28, 112)
) -> Figure:
    """Figure 8: which branch a face goes to, and what each strategy ("max+ceil", ...) achieves; the paper's hollow.

    ``reports`` of notebook 06; bars are the binomial standard error over its mated probes.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    side, printed = np.arange(3, 131), published.table("table2")
    for place, (rounding, colour, style) in enumerate(
        zip(ROUNDINGS, (ORANGE, GREEN, BLUE), (":", "--", "-"), strict=True)
    ):
        chosen = select_branch(side, side, rounding=rounding, resolutions=resolutions)
        left.step(side, chosen, where="mid", color=colour, linestyle=style, label=rounding)
        for index, indicator in enumerate(INDICATORS):
            key, at = f"{indicator}+{rounding}", index + (place - 1) * 0.22
            if key in reports:
                value, mated = reports[key]["tpir"]["0.3"], reports[key]["mated"]
                right.errorbar(at, value, binomial(value, mated), fmt="o", color=colour, capsize=2)
            right.plot(at + 0.08, printed[f"BTNet ({key})"]["0.3"], "D", color=colour, **HOLLOW)
    left.plot(side, side, color="#bbbbbb", linewidth=0.8, label="no resize")
    left.set(
        xlabel="indicator: min, max or avg of (W, H) (px)",
        ylabel="branch (px)",
        xscale="log",
        yscale="log",
    )
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(list(resolutions), [str(r) for r in resolutions])
        axis.set_ticks([], minor=True)
    right.errorbar(
        [], [], [], fmt="o", color="#444444", capsize=2, label=f"scale {scale}, standard error"
    )
    right.plot([], [], "D", color="#444444", label="paper, QMUL-SurvFace", **HOLLOW)
    right.set(xlabel="indicator", ylabel="TPIR20 at FPIR 0.3 (%)", xlim=(-0.5, 2.5))
    right.set_xticks(range(3), INDICATORS)
    left.legend(loc="upper left")
    right.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=1, handletextpad=0.4
    )
    figure.set_layout_engine("constrained", w_pad=0.1)
    return figure


@_paper_ready
def figure9(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Figure:
    """Figure 9: feature maps by method and stage at each resolution, and below them a number that says the same.

    Args:
        values: of notebook 09: "resolutions"; "coupled", r -> the stage (from 1) where its branch joins the trunk, which is
            outlined; "similarity", method -> r -> "mean" and "error" (standard error over faces), one a stage.
        arrays: "<method>_<r>_<stage>" (h, w), one map each.
    """
    methods, resolutions = list(values["similarity"]), values["resolutions"]
    coupled = {int(r): stage for r, stage in values["coupled"].items()}
    stages = range(1, len(next(iter(values["similarity"][methods[0]].values()))["mean"]) + 1)
    side, step = 0.355, 0.385  # inches: a map, and the distance to the next
    block = step * len(stages) + 0.13
    width, height = max(0.4 + block * len(methods), 1.4 * COLUMN), step * len(resolutions) + 2.25
    figure = plt.figure(figsize=(width, height))
    for index, method in enumerate(methods):
        left = 0.42 + index * block + (width - 0.4 - block * len(methods)) / 2
        for row, r in enumerate(resolutions):
            for stage in stages:
                place = left + (stage - 1) * step, height - 0.4 - (row + 1) * step
                axes = figure.add_axes(
                    (place[0] / width, place[1] / height, side / width, side / height)
                )
                joins = next(
                    (
                        low
                        for low, at in coupled.items()
                        if at == stage and r in (low, max(resolutions))
                    ),
                    None,
                )
                outline = _colour(joins) if joins and method == "phi_bt" else None
                _show(axes, _map(arrays[f"{method}_{r}_{stage}"]), "", outline, cmap="viridis")
                axes.set_title("" if row else f"{stage}", fontsize=7, pad=3)
                if stage == 1 and not index:
                    axes.set_ylabel(f"{r} px", rotation=0, ha="right", va="center", fontsize=7)
        middle = (left + (block - 0.13) / 2) / width
        figure.text(middle, 1 - 0.14 / height, f"{_label(method)}, stage", ha="center", va="center")
        panel = figure.add_axes((left / width, 0.7 / height, (block - 0.2) / width, 1 / height))
        for r, points in values["similarity"][method].items():
            style = {"fmt": "o-", "color": _colour(int(r)), "capsize": 2, "label": f"{r} px"}
            panel.errorbar(stages, points["mean"], points["error"], **style)
            if method == "phi_bt" and int(r) in coupled:
                at = coupled[int(r)]
                panel.plot(
                    at,
                    points["mean"][at - 1],
                    "s",
                    color=_colour(int(r)),
                    **HOLLOW | {"markersize": 9},
                )
        panel.set(xlabel="stage", xticks=stages, xlim=(0.6, len(stages) + 0.4), ylim=(0, 1))
        if index:
            panel.tick_params(labelleft=False)
        else:
            panel.set_ylabel("cosine to 112 px")
            handles, labels = panel.get_legend_handles_labels()
    if "phi_bt" in methods:
        handles.append(
            plt.Line2D([], [], marker="s", color="#444444", **HOLLOW | {"markersize": 9})
        )
        labels.append("a branch joins the trunk")
    figure.legend(handles, labels, loc="lower center", ncols=len(handles))
    return figure


@_paper_ready
def tour(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Figure:
    """Notebook 00: faces "face_<i>" (3, h, w), a row for each of "people", outlined in the colour of the "branch" that each
    took, and the cosine "similarity" of all pairs."""
    people, branches = values["people"], values["branch"]
    each = len(branches) // people
    figure = plt.figure(figsize=(PAGE, 3.1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    for index, axes in enumerate(left.subplots(people, each, squeeze=False).flat):
        rows, columns = values["size"][index]
        title = (
            ""
            if index >= each
            else f"{columns} x {rows}\n" + r"$\rightarrow$" + f" {branches[index]} px"
        )
        _show(axes, _picture(arrays[f"face_{index}"]), title, _colour(branches[index]))
        if index % each == 0:
            axes.set_ylabel(f"person {index // each + 1}", fontsize=7)
    axes = right.subplots()
    shown = _show(
        axes,
        np.asarray(values["similarity"]),
        cmap="viridis",
        vmin=min(0, np.min(values["similarity"])),
        vmax=1,
    )
    for edge in range(each, len(branches), each):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    middles = np.arange(people) * each + (each - 1) / 2
    names = [f"person {index + 1}" for index in range(people)]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set_title("cosine of the embeddings" + ("" if values["trained"] else " (NOT TRAINED)"))
    right.colorbar(shown, ax=axes, shrink=0.85)
    return figure


def binomial(percent: float, n: int) -> float:
    """Standard error, in %, of a share of ``n`` independent trials."""
    return 100 * float(np.sqrt(percent / 100 * (1 - percent / 100) / n))


@_paper_ready
def accuracy_curves(panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], *, ylabel: str, note: str,
                    paper: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None) -> Figure:  # fmt: skip
    """Accuracy against resolution: title -> method -> r -> (value, standard error), and the paper's values, hollow.

    ``note`` says in the legend what ours were measured on.
    """
    shape = (1, len(panels)) if len(panels) < 3 else (2, -(-len(panels) // 2))
    figure, grid = plt.subplots(*shape, figsize=((COLUMN, PAGE)[len(panels) > 1], 0.55 + 2.2 * shape[0]), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axes, (title, methods) in zip(grid.flat, panels.items(), strict=False):
        for index, (method, points) in enumerate(methods.items()):
            r, shift = (
                sorted(points),
                2 ** (0.07 * (index - (len(methods) - 1) / 2)),
            )  # so that bars stay apart
            value, error = zip(*(points[k] for k in r), strict=True)
            axes.errorbar(
                [k * shift for k in r],
                value,
                error,
                capsize=2,
                label=_label(method),
                **_method(method, index),
            )
            printed = {
                k: v
                for k, v in (paper or {}).get(title, {}).get(method, {}).items()
                if v is not None
            }
            axes.plot(
                [k * shift for k in printed],
                list(printed.values()),
                **_method(method, index),
                **HOLLOW,
            )
        _ticks(axes, sorted({r for points in methods.values() for r in points}))
        axes.set(ylabel=ylabel if axes in grid[:, 0] else "", title=title)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    grey = {"color": "#444444", "marker": "o"}
    handles += [plt.Line2D([], [], **grey), plt.Line2D([], [], **grey, **HOLLOW)][
        : 2 if paper else 1
    ]
    labels += [note, "paper, as printed"][: 2 if paper else 1]
    columns = 2 if len(panels) == 1 else 6 if len(handles) <= 6 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)
    return figure


@_paper_ready
def loss_curves(histories: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str = "loss",
                log: bool = True) -> Figure:  # fmt: skip
    """Loss against step: name -> (steps, values), each the mean since the one before."""
    figure, axes = plt.subplots(figsize=(COLUMN * 1.2, 2.4), layout="constrained")
    for index, (name, (steps, values)) in enumerate(histories.items()):
        axes.plot(steps, values, color=_method(name, index)["color"], label=_label(name))
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    if log:  # plain numbers, at most six of them
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    axes.legend()
    return figure


@_paper_ready
def risk_coverage(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, risk: str = "errors"
) -> Figure:
    """Error against the share kept, from 5 %: name -> (coverage, risk) as of quality.risk_coverage, in [0, 1]."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.4), layout="constrained")
    for index, (name, (coverage, error)) in enumerate(curves.items()):
        colour = _method(name, index)["color"]
        share, some = (
            100 * np.asarray(coverage),
            np.asarray(coverage) >= 0.05,
        )  # of a few decisions it says nothing
        axes.plot(share[some], 100 * np.asarray(error)[some], color=colour, label=_label(name))
    axes.set(
        xlabel="kept, most reliable first (%)", ylabel=f"{risk} (%)", xlim=(0, 100), ylim=(0, None)
    )
    if curves:
        axes.legend()
    return figure


@_paper_ready
def benchmarks(values: Mapping[str, Any]) -> Figure:
    """How far each benchmark is beyond its goal: ``rows`` of bench.collect, but for differences. Hollow: not reached."""
    rows = [row for row in values["rows"] if "points lost" not in row["what"]]
    kinds = list(dict.fromkeys(row["benchmark"] for row in rows))
    colour = dict(
        zip(kinds, itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, BROWN, SKY)), strict=False)
    )
    figure, axes = plt.subplots(figsize=(PAGE, 0.6 + 0.155 * len(rows)), layout="constrained")
    axes.axvline(1, color="#444444", linewidth=0.8)
    cells: list[tuple[float, str, str, str]] = [(-1.1, "measured", "goal", "bold")]
    for y, row in enumerate(rows):
        factor = row["value"] / row["goal"] if row["at_least"] else row["goal"] / row["value"]
        face = colour[row["benchmark"]] if row["reached"] else "white"
        axes.plot((1, factor), (y, y), color=colour[row["benchmark"]])
        axes.plot(
            factor,
            y,
            "o",
            color=colour[row["benchmark"]],
            markerfacecolor=face,
            markeredgewidth=1.1,
        )
        goal = f"{'≥' if row['at_least'] else '≤'} {row['goal']:g}"
        cells.append(
            (
                y,
                f"{row['value']:.0f}" if row["value"] >= 100 else f"{row['value']:.3g}",
                goal,
                "normal",
            )
        )
    for y, value, goal, weight in cells:
        place = {
            "transform": axes.get_yaxis_transform(),
            "va": "center",
            "fontsize": 6,
            "weight": weight,
        }
        axes.text(1.12, y, value, ha="right", **place)
        axes.text(1.15, y, goal, ha="left", **place)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=6)
    axes.set(
        xscale="log",
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="times better than the goal (1: just reached; hollow: not)",
    )
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)
    return figure


@_paper_ready
def cost_growth(values: Mapping[str, Any]) -> Figure:
    """Time and memory as images, identities, the gallery and resolutions grow: the values of bench_growth.json."""
    figure, grid = plt.subplots(2, 3, figsize=(PAGE, 3.9), layout="constrained")
    images, kinds = (
        values["images"],
        list(dict.fromkeys(row["kind"] for row in values["identities"])),
    )

    def curve(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, **style: Any) -> None:
        rows = [
            row for row in rows if y != "MiB" or row[y] >= 1
        ]  # less than a process's memory resolves
        axes.plot([row[x] for row in rows], [row[y] for row in rows], **{"marker": "o", **style})

    curve(grid[0, 0], images["steps"], "images", "ms", color=BLUE, label="step, batch 32")
    curve(
        grid[0, 0],
        images["draws"],
        "images",
        "ms a step",
        color=ORANGE,
        marker="s",
        label="drawing the batch",
    )
    for kind, colour, marker in zip(kinds, (BLUE, ORANGE, GREEN), "osD", strict=False):
        rows, style = (
            [row for row in values["identities"] if row["kind"] == kind],
            {"color": colour, "marker": marker},
        )
        curve(grid[0, 1], rows, "classes", "ms", label=kind, **style)
        curve(grid[0, 2], rows, "classes", "MiB", **style)
        curve(grid[0, 2], rows, "classes", "MiB on paper", **style | HOLLOW)
    curve(grid[1, 0], values["gallery"], "gallery", "ms a probe", color=PURPLE)
    curve(grid[1, 1], values["gallery"], "gallery", "MiB", color=PURPLE)
    for axes, x, y in ((grid[0, 0], "images", "ms a step"), (grid[0, 1], "identities", "classifier, ms a step"),
                       (grid[0, 2], "identities", "classifier, MiB"), (grid[1, 0], "gallery", "1:N, ms a probe"),
                       (grid[1, 1], "gallery", "1:N, MiB")):  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.minorticks_off()
    grid[1, 1].yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    grid[1, 1].yaxis.set_major_formatter("{x:g}")
    rows = [{**row, "MB": row["bytes"] / 1e6, "own": row["bytes as models of their own"] / 1e6}
            for row in values["resolutions"]]  # fmt: skip
    curve(grid[1, 2], rows, "resolutions", "MB", color=BLUE, label="BTNet")
    curve(grid[1, 2], rows, "resolutions", "own", color=GREY, marker="s", label="a model each")
    grid[1, 2].set(
        xlabel="resolutions",
        ylabel="stored, MB",
        ylim=(0, None),
        xticks=[row["resolutions"] for row in rows],
    )
    grid[0, 0].legend()
    grid[0, 1].legend()
    grid[1, 2].legend()
    black = {"color": "#444444", "marker": "o"}
    marks = [plt.Line2D([], [], linestyle="none", **black), plt.Line2D([], [], **black | HOLLOW)]
    grid[0, 2].legend(marks, ["measured", "on paper"])
    return figure


@_paper_ready
def inference(values: Mapping[str, Any]) -> Figure:
    """The values of bench_inference.json: each mode under the processor's roof, time by route, and against MACs."""
    times, (large, small) = values["times"], list(next(iter(values["times"]["ms"].values())))
    peaks, ms = times["peaks"], times["ms"]
    colours = {
        "onnxruntime": GREY,
        "PyTorch fp32": BROWN,
        "PyTorch bf16": YELLOW,
        "torch.compile bf16": PINK,
    }
    colours |= dict(zip(times["roofline"], (BLUE, GREEN, RED), strict=False))
    marks = dict(zip(ms[next(iter(ms))][large], "osD^", strict=False))
    figure, (roof, bars, ratio) = plt.subplots(
        1, 3, figsize=(PAGE, 2.7), layout="constrained", width_ratios=(5, 4, 4)
    )
    x = np.geomspace(1, 3000, 200)
    for mode, batches in times["roofline"].items():
        roof.plot(
            x, np.minimum(peaks[mode], x * peaks["bandwidth"]), color=colours[mode], linewidth=0.8
        )
        roof.text(
            3000, peaks[mode] * 1.04, f"{mode} peak", ha="right", fontsize=6, color=colours[mode]
        )
        for batch, hollow in ((large, {}), (small, {"markerfacecolor": "none"})):
            for r, at in batches[batch].items():
                roof.plot(
                    at["intensity"],
                    at["gmacs"],
                    marks[r],
                    color=colours[mode],
                    linestyle="none",
                    **hollow,
                )
    roof.set(
        xscale="log",
        yscale="log",
        xlabel="MACs a byte",
        ylabel="GMAC/s",
        xlim=(5, 3000),
        ylim=(20, None),
    )
    roof.legend([plt.Line2D([], [], color="#444444", marker=mark, linestyle="none") for mark in marks.values()],
                [f"{r} px" for r in marks], title=f"batch {large} (hollow: {small})", title_fontsize=6, fontsize=6, loc="lower right")  # fmt: skip
    macs = {r: value / times["macs"]["112"] for r, value in times["macs"].items()}
    for index, (name, by_batch) in enumerate(ms.items()):
        rows = by_batch[large]
        place = np.arange(len(rows)) + (index - len(ms) / 2 + 0.5) * 0.14
        bars.bar(place, list(rows.values()), 0.13, color=colours[name], label=name)
        ratio.plot(
            [value / rows["112"] / macs[r] for r, value in rows.items()],
            color=colours[name],
            marker="o",
        )
    bars.set(ylabel=f"ms a face, batch {large}", yscale="log")
    for axis in (bars.yaxis, roof.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(plt.NullLocator())
    figure.legend(
        *bars.get_legend_handles_labels(), fontsize=6.5, loc="outside upper center", ncols=6
    )
    ratio.axhline(0.9, color="#444444", linestyle=":", linewidth=0.8)
    ratio.set(ylabel="time / MACs, relative to 112 px")
    for axes in (bars, ratio):
        axes.set_xticks(range(len(macs)), [f"{r} px" for r in macs])
    return figure


@_paper_ready
def pictures(strips: Mapping[str, Sequence[Any]], titles: Sequence[str] = ()) -> Figure:
    """Faces ``(3, h, w)`` in [0, 255], a strip for each name; ``titles`` stand above the first."""
    columns = max(len(strip) for strip in strips.values())
    size = (PAGE, PAGE / columns * len(strips) + 0.25)
    figure, grid = plt.subplots(len(strips), columns, figsize=size, squeeze=False)
    for row, (name, strip) in enumerate(strips.items()):
        for column, axes in enumerate(grid[row]):
            if column >= len(strip):
                axes.axis("off")
                continue
            title = str(titles[column]) if not row and column < len(titles) else ""
            _show(axes, _picture(strip[column]), title)
        grid[row, 0].set_ylabel(name, fontsize=7)
    figure.set_layout_engine("constrained")
    return figure
