"""Figures with faces, feature maps and errors in them: Figures 1, 4 and 9, and that of the tour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from btnet_paper import published
from btnet_paper.plots.style import (
    BLUE,
    COLUMN,
    DARK,
    GREEN,
    HOLLOW,
    ORANGE,
    PAGE,
    colour,
    label,
    paper_ready,
)

CURVES = {  # of Figure 1: name -> (label, colour, marker)
    "measured": ("measured error", BLUE, "o"),
    "complete": ("complete bound", GREEN, "s"),
    "paper": ("paper's bound (Eq. 11)", ORANGE, "D"),
}


def pixels(image: Any) -> np.ndarray:
    """(3, H, W) in [0, 255] -> (H, W, 3) uint8, as imshow takes it."""
    shown = np.asarray(image, dtype=np.float32).transpose(1, 2, 0)
    return shown.round().clip(0, 255).astype(np.uint8)


def stretched(feature: Any) -> np.ndarray:
    """(H, W) feature map -> [0, 1], between its 1st and 99th percentile."""
    feature = np.asarray(feature, dtype=np.float32)
    low, high = np.percentile(feature, (1, 99))
    return ((feature - low) / max(high - low, 1e-12)).clip(0, 1)


def show(axes: Axes, image: np.ndarray, title: str = "", outline: str = "", **options: Any) -> Any:
    """An image without ticks, outlined in a colour if one is given."""
    shown = axes.imshow(image, **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=bool(outline), color=outline or None, linewidth=2)
    return shown


@paper_ready
def figure1(values: Mapping[str, Any]) -> Figure:
    """Figure 1: bounds and measured error against resolution, mean over images and 10-90 %.

    ``values`` of notebook 01: "resolutions" (px), "knee" (px) and the curves "paper", "complete",
    "measured" and "interpolation" (the part of the measured error that the bounds speak of), each
    with "mean", "low" and "high" in grey levels.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.8))
    r = np.asarray(values["resolutions"])
    for name, (text, own, marker) in CURVES.items():
        mean, low, high = (np.asarray(values[name][key]) for key in ("mean", "low", "high"))
        shown = mean > 0  # nothing changes at 112 px, and zero has no logarithm
        every = max(1, len(r) // 12)
        left.plot(r[shown], mean[shown], marker, ls="-", color=own, label=text, markevery=every)
        left.fill_between(r[shown], low[shown], high[shown], color=own, alpha=0.18, linewidth=0)
        _rise(right, r, mean, values["knee"][name], own, marker)
    part = np.asarray(values["interpolation"]["mean"])
    some = part > 0
    text = "interpolation alone"
    left.plot(r[some], part[some], "--", color=BLUE, linewidth=1, label=text)
    theirs = published.text("figure1_knee")
    right.axvline(theirs, color="#888888", linestyle=":", linewidth=1)
    right.plot(theirs, 0, "v", color=DARK, clip_on=False, label=f"paper: about {theirs}", **HOLLOW)
    left.set(yscale="log", ylabel="grey levels of 255", title="mean, 10-90 % of images")
    right.set(ylabel=f"fraction of the rise to {r.min()} px", title=f"relative to {r.max()} px")
    for axes in (left, right):
        axes.set_xlabel("resolution (px)")
        axes.set_xticks([7, 14, 28, 56, 84, 112])
    right.legend(title="knee (px)", title_fontsize=7, loc="upper right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _rise(axes: Axes, r: np.ndarray, mean: np.ndarray, knee: float, own: str, marker: str) -> None:
    """A curve from 0 at the largest to 1 at the smallest resolution, and its knee."""
    last, first = mean[r.argmax()], mean[r.argmin()]
    rise = (mean - last) / (first - last)
    order = np.argsort(r)
    at = float(np.interp(knee, r[order], rise[order]))
    axes.plot(r, rise, color=own)
    mark = {"markersize": 7, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot(knee, at, marker, color=own, label=f"{knee:.0f}", **mark)


@paper_ready
def error_maps(arrays: Mapping[str, Any]) -> Figure:
    """Beside Figure 1: a face shrunk and scaled up again, and the error, on one colour scale.

    "face" (3, S, S) in [0, 255]; "back" (n, 3, S, S) as it comes back from each of "resolutions"
    (n,); "error" (n, S, S), absolute, in grey levels.
    """
    errors, n = np.asarray(arrays["error"], np.float32), len(arrays["resolutions"])
    top = np.percentile(errors, 99.5, axis=(1, 2)).max()
    figure, axes = plt.subplots(2, n + 1, figsize=(PAGE, 2.75), squeeze=False)
    show(axes[0, 0], pixels(arrays["face"]), f"original, {np.shape(arrays['face'])[-1]} px")
    axes[1, 0].axis("off")
    text = "absolute error,\nmean in grey levels"
    axes[1, 0].text(1, 0.5, text, ha="right", va="center", fontsize=7)
    for column, r in enumerate(np.asarray(arrays["resolutions"]).tolist()):
        show(axes[0, column + 1], pixels(arrays["back"][column]), f"{r} px and back")
        mean = f"mean {errors[column].mean():.1f}"
        shown = show(axes[1, column + 1], errors[column], mean, cmap="magma", vmin=0, vmax=top)
    figure.colorbar(shown, ax=axes[1, :], label="grey levels of 255", shrink=0.9, pad=0.01)
    return figure


@paper_ready
def pictures(strips: Mapping[str, Sequence[Any]], titles: Sequence[str] = ()) -> Figure:
    """Faces (3, h, w) in [0, 255], a strip for each name; ``titles`` stand above the first."""
    columns = max(len(strip) for strip in strips.values())
    size = (PAGE, PAGE / columns * len(strips) + 0.25)
    figure, grid = plt.subplots(len(strips), columns, figsize=size, squeeze=False)
    for row, (name, strip) in enumerate(strips.items()):
        for column, axes in enumerate(grid[row]):
            if column >= len(strip):
                axes.axis("off")
                continue
            title = str(titles[column]) if not row and column < len(titles) else ""
            show(axes, pixels(strip[column]), title)
        grid[row, 0].set_ylabel(name, fontsize=7)
    return figure


@paper_ready
def figure4(arrays: Mapping[str, Any]) -> Figure:
    """Figure 4: a face "face_<r>" (3, r, r) above a map "trunk_<r>" (r, r) of the trunk.

    The trunk saw the face at full size.
    """
    rows = sorted((int(name[5:]) for name in arrays if name.startswith("face_")), reverse=True)
    figure, axes = plt.subplots(2, len(rows), figsize=(PAGE, 2 * PAGE / len(rows)), squeeze=False)
    for column, r in enumerate(rows):
        show(axes[0, column], pixels(arrays[f"face_{r}"]), f"{r} px", colour(r))
        show(axes[1, column], stretched(arrays[f"trunk_{r}"]), "", colour(r), cmap="viridis")
    axes[0, 0].set_ylabel("face, shrunk")
    axes[1, 0].set_ylabel("map of $T$, face at full size")
    return figure


@paper_ready
def figure9(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Figure:
    """Figure 9: feature maps by method, stage and resolution; below, how alike they are to 112 px.

    Args:
        values: of notebook 09: "resolutions"; "coupled", r -> the stage (from 1) where its branch
            joins the trunk, which is outlined; "similarity", method -> r -> "mean" and "error"
            (standard error over faces), one a stage.
        arrays: "<method>_<r>_<stage>" (h, w), one map each.
    """
    methods = list(values["similarity"])
    coupled = {int(r): stage for r, stage in values["coupled"].items()}
    rows = len(values["resolutions"])
    figure = plt.figure(figsize=(max(PAGE * len(methods) / 4, COLUMN), 0.6 + 0.4 * rows + 1.5))
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.4 + 0.4 * rows, 1.7))
    blocks = np.atleast_1d(top.subfigures(1, len(methods)))
    panels = bottom.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for block, axes, method in zip(blocks, panels, methods, strict=True):
        own = coupled if method == "phi_bt" else {}
        _maps(block, method, values["resolutions"], own, arrays)
        _likeness(axes, values["similarity"][method], own)
    panels[0].set_ylabel("cosine to 112 px")
    handles, labels = panels[0].get_legend_handles_labels()
    square = HOLLOW | {"markersize": 9}
    handles.append(plt.Line2D([], [], marker="s", color=DARK, **square))
    labels.append("a branch joins the trunk")
    bottom.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure


def _maps(
    block: Any, method: str, rows: Sequence[int], coupled: dict[int, int], arrays: Mapping[str, Any]
) -> None:
    """Maps of one method, a row for each resolution; the layer where r joins is outlined.

    It is outlined twice: for the face of r px, and for that of full size, which it should be like.
    """
    stages = sum(name.startswith(f"{method}_{rows[0]}_") for name in arrays)
    block.suptitle(f"{label(method)}, stage", fontsize=8)
    grid = block.subplots(len(rows), stages, squeeze=False)
    for line, r in zip(grid, rows, strict=True):
        for stage, axes in enumerate(line, 1):
            joins = [low for low, at in coupled.items() if at == stage and r in (low, max(rows))]
            outline = colour(joins[0]) if joins else ""
            title = f"{stage}" if r == rows[0] else ""
            show(axes, stretched(arrays[f"{method}_{r}_{stage}"]), title, outline, cmap="viridis")
        line[0].set_ylabel(f"{r}", rotation=0, ha="right", va="center", fontsize=7)


def _likeness(axes: Axes, similarity: Mapping[str, Any], coupled: dict[int, int]) -> None:
    for r, points in similarity.items():
        own, stages = colour(int(r)), np.arange(1, len(points["mean"]) + 1)
        bars = {"fmt": "o-", "color": own, "capsize": 2, "label": f"{r} px"}
        axes.errorbar(stages, points["mean"], points["error"], **bars)
        if int(r) in coupled:
            at = coupled[int(r)]
            axes.plot(at, points["mean"][at - 1], "s", color=own, **HOLLOW | {"markersize": 9})
    axes.set(xlabel="stage", xticks=stages, xlim=(0.6, len(stages) + 0.4), ylim=(0, 1))


@paper_ready
def tour(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Figure:
    """Notebook 00: faces "face_<i>" (3, h, w), a row for each person, and the cosines of all pairs.

    Each face is outlined in the colour of the branch that it took.
    """
    people, branches = values["people"], values["branch"]
    each = len(branches) // people
    figure = plt.figure(figsize=(PAGE, 3.1))
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    for index, axes in enumerate(left.subplots(people, each, squeeze=False).flat):
        rows, columns = values["size"][index]
        title = f"{columns} x {rows}\n" + r"$\rightarrow$" + f" {branches[index]} px"
        outline = colour(branches[index])
        show(axes, pixels(arrays[f"face_{index}"]), title if index < each else "", outline)
        if index % each == 0:
            axes.set_ylabel(f"person {index // each + 1}", fontsize=7)
    _cosines(right, np.asarray(values["similarity"]), people)
    return figure


def _cosines(part: Any, cosines: np.ndarray, people: int) -> None:
    """White at 0: a line between people, on each block its mean without a face and itself."""
    each = len(cosines) // people
    axes = part.subplots()
    shown = show(axes, cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    for edge in range(each, len(cosines), each):
        axes.axhline(edge - 0.5, color=DARK, linewidth=0.8)
        axes.axvline(edge - 0.5, color=DARK, linewidth=0.8)
    others = np.where(np.eye(len(cosines), dtype=bool), np.nan, cosines)
    means = np.nanmean(others.reshape(people, each, people, each), axis=(1, 3))
    middles = np.arange(people) * each + (each - 1) / 2
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
    for (i, j), mean in np.ndenumerate(means):
        where = {"ha": "center", "va": "center", "fontsize": 6.5, "bbox": box}
        axes.text(middles[j], middles[i], f"{mean:.2f}", **where)
    names = [f"person {index + 1}" for index in range(people)]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set_title("cosines, and the mean of each two people")
    part.colorbar(shown, ax=axes, shrink=0.85)
