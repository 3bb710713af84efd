"""The two figures of notebook 10: a face through every method, and what a branch costs.

They follow a slider, so they have few axes: what takes time in matplotlib. Faces and maps that
stand side by side are one mosaic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from btnet_core.models.btnet import select_branch
from btnet_paper.plots.images import pixels, stretched
from btnet_paper.plots.style import GREEN, HOLLOW, METHODS, RED, STYLE, colour

WIDTH, DPI = 10.0, 108  # inches; 1080 pixels
TILE = 0.65  # inches: a feature map
MARKS = ((1, "o", GREEN), (0, ".", "#bbbbbb"), (-1, "X", RED))  # right name, nobody, wrong one
GREY = "#666666"


def mosaic(rows: Sequence[Sequence[np.ndarray]], side: int) -> np.ndarray:
    """Images (h, w, 3) as squares of ``side`` pixels, white where one is not square."""
    columns = max(len(row) for row in rows)
    sheet = np.full((side * len(rows), side * columns, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            h, w = image.shape[:2]
            high, wide = (max(1, round((side - 4) * length / max(h, w))) for length in (h, w))
            tile = Image.fromarray(image).resize((wide, high), Image.Resampling.NEAREST)
            top, left = side * i + (side - high) // 2, side * j + (side - wide) // 2
            sheet[top : top + high, left : left + wide] = np.asarray(tile)
    return sheet


def face_figure(view: Mapping[str, Any]) -> Figure:
    """What `Explorer.look` found: the face and its branch; then, of each method, what it sees,
    whom it is like, and who is recognised at the resolution of the branch."""
    methods = view["methods"]
    n = len(methods)
    rows = [0.5, 2.7, 0.9] + ([n, 0.8, 0.4 * (n + 1), 0.2] if n else [])  # bands between gaps
    with mpl.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(WIDTH, TILE * sum(rows)), dpi=DPI)
        margins = {"left": 0.045, "right": 0.97, "bottom": 0, "top": 1, "hspace": 0}
        bands = figure.add_gridspec(len(rows), 1, height_ratios=rows, **margins)
        faces, selection = _split(figure, bands[1], (10.8, 3), wspace=0.08)
        _draw_faces(faces, view)
        _draw_selection(selection, view)
        if n:
            seen, cosines, near = _split(figure, bands[3], (4, 3.8, 5.7), wspace=0.04)
            _draw_maps(seen, methods)
            _draw_cosines(cosines, view)
            _draw_nearest(near, view)
            known, strangers = _split(figure, bands[5], (1, 1), wspace=0.1)
            _draw_people(known, view, strangers=False)
            _draw_people(strangers, view, strangers=True)
    return figure


def _split(figure: Figure, band: Any, widths: Sequence[float], wspace: float) -> list[Axes]:
    grid = band.subgridspec(1, len(widths), width_ratios=widths, wspace=wspace)
    return [figure.add_subplot(cell) for cell in grid]


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tiles(axes: Axes, rows: Sequence[Sequence[np.ndarray]], side: int, width: float = 4) -> None:
    """A mosaic in axes that are ``width`` tiles wide, from the upper left corner."""
    sheet = mosaic(rows, side)
    extent = (0, sheet.shape[1] / side, len(rows), 0)
    axes.imshow(sheet, extent=extent, aspect="auto")
    axes.set(xlim=(0, width), ylim=(len(rows), 0))
    _bare(axes)


def _draw_faces(axes: Axes, view: Mapping[str, Any]) -> None:
    error = np.uint8(255 * mpl.colormaps["magma"](view["error"] / 64)[..., :3])
    shown = [pixels(view[name]) for name in ("face", "native", "seen")] + [error]
    _tiles(axes, [shown], side=180)
    h, w = view["native"].shape[-2:]
    mean = f"|error|, mean {view['error'].mean():.1f} levels"
    titles = ("face, 112 px", f"captured: {w} x {h} px", "scaled back up", mean)
    for index, title in enumerate(titles):
        axes.text(index + 0.5, -0.03, title, ha="center", va="bottom", fontsize=8)


def _draw_selection(axes: Axes, view: Mapping[str, Any]) -> None:
    side, resolutions = np.arange(3, 131), view["resolutions"]
    chosen = select_branch(side, side, rounding=view["rounding"], resolutions=resolutions)
    axes.step(side, chosen, "#999999", where="mid")
    axes.plot(view["side"], view["r"], "o", color=colour(view["r"]), markersize=9)
    axes.set(xscale="log", yscale="log")
    rule = f"{view['indicator']} = {view['side']} px, {view['rounding']}"
    axes.set_title(f"{rule}: branch {view['r']}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(resolutions, [str(r) for r in resolutions])
        axis.set_ticks([], minor=True)


def _draw_maps(axes: Axes, methods: Mapping[str, Any]) -> None:
    viridis = mpl.colormaps["viridis"]
    rows = [[np.uint8(255 * viridis(stretched(z))[..., :3]) for z in one["maps"]]
            for one in methods.values()]  # fmt: skip
    _tiles(axes, rows, side=68)
    axes.set_title("feature maps, stages 1 to 4")
    _name_rows(axes, methods)


def _name_rows(axes: Axes, methods: Mapping[str, Any]) -> None:
    axes.set_yticks(np.arange(len(methods)) + 0.5, [METHODS[name][0] for name in methods])
    axes.tick_params(axis="y", length=0)
    for name, text in zip(methods, axes.get_yticklabels(), strict=True):
        text.set(color=METHODS[name][1], fontsize=9)


def _draw_cosines(axes: Axes, view: Mapping[str, Any]) -> None:
    """Cosines with everybody in the gallery, this person's, and the threshold."""
    for y, (name, one) in enumerate(view["methods"].items()):
        axes.plot(one["cosines"], np.full(len(one["cosines"]), y), "|", color="#999999", ms=10)
        axes.plot([one["threshold"]] * 2, (y - 0.4, y + 0.4), "-", color=RED)
        if view["person"] is not None:
            own = one["cosines"][view["person"]]
            axes.plot(own, y, "o", color=METHODS[name][1], markersize=7)
    axes.set(xlim=(-0.5, 1), ylim=(len(view["methods"]) - 0.5, -0.5), yticks=[])
    axes.set_title("cosine with the gallery (● this person)")


def _draw_nearest(axes: Axes, view: Mapping[str, Any]) -> None:
    """The nearest in the gallery, and what the method says of the first."""
    rows = []
    for y, one in enumerate(view["methods"].values()):
        best = np.argsort(-one["cosines"])[:4]
        rows.append([pixels(view["gallery"][person]) for person in best])
        value, right = one["cosines"][best[0]], best[0] == view["person"]
        said, own = ("recognised", GREEN) if right else ("taken for the first", RED)
        if value <= one["threshold"]:
            said, own = "nobody", GREY
        text = f"{said}\n{value:.2f}, threshold {one['threshold']:.2f}"
        axes.text(len(rows[0]) + 0.1, y + 0.5, text, color=own, va="center", fontsize=7)
    _tiles(axes, rows, side=68, width=5.7)
    axes.set_title("nearest in the gallery", loc="left")


def _draw_people(axes: Axes, view: Mapping[str, Any], *, strangers: bool) -> None:
    """Known people, or strangers, shrunk to the resolution of the branch: who is called what."""
    known, total = len(view["gallery"]), len(view["small"])
    these = slice(known, total) if strangers else slice(0, known)
    small = view["small"][these]
    columns = max(1, min(view["r"], round(16 * view["r"] / len(small))))  # of each face, its middle
    cut = (view["r"] - columns) // 2
    strip = np.concatenate([pixels(face[..., cut : cut + columns]) for face in small], axis=1)
    axes.imshow(strip, extent=(0, len(small), 0, -1), aspect="auto")
    _bare(axes)
    at = np.arange(len(small)) + 0.5
    for y, one in enumerate(view["methods"].values()):
        found = one["found"][these]
        for value, mark, own in MARKS:
            some = at[found == value]
            axes.plot(some, np.full(len(some), y + 0.5), mark, color=own, linestyle="none", ms=5)
        count = np.mean(found == (-1 if strangers else 1))
        axes.text(len(small) + 0.2, y + 0.5, f"{count:.0%}", va="center", fontsize=7)
    axes.set(xlim=(0, len(small)), ylim=(len(view["methods"]), -1))
    if strangers:
        axes.set_title(f"strangers: ✗ taken for known, at most {view['fpir']:.0%}")
    else:
        axes.set_title(f"known people at {view['r']} px: ● recognised, ✗ wrong name")
        _name_rows(axes, view["methods"])


def cost_figure(tables: Mapping[int, Sequence[Mapping[str, Any]]], r: int, ends: int) -> Figure:
    """What a branch of ``r`` px costs wherever it ends, and what each route computes.

    ``tables``: r -> rows of `allocations`; ``ends``: the row chosen.
    """
    rows = tables[r]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4), dpi=DPI)
        left, right = figure.subplots(1, 2, width_ratios=(5, 2))
        left.plot([100 * row["share"] for row in rows], ".-", color=colour(r))
        here = HOLLOW | {"markersize": 13}
        left.plot(ends, 100 * rows[ends]["share"], "o", color=colour(r), **here)
        for low, table in tables.items():
            at = [row["standard"] for row in table].index(True)
            star = {"color": colour(low), "markersize": 11, "markeredgecolor": "white"}
            left.plot(at, 100 * table[at]["share"], "*", **star)
            right.barh(str(low), table[0]["macs"] / table[0]["trunk"], color=colour(low))
        left.set(yscale="log", ylabel="stored, % of the trunk")
        left.set_title("where the branch ends (★ BTNet's choices)")
        left.set_yticks((0.1, 1, 10, 100), ("0.1", "1", "10", "100"))
        turn = 60 if len(rows) > 12 else 0
        left.set_xticks(range(len(rows)), [row["unit"] for row in rows], rotation=turn)
        right.set(title="MACs a face over the trunk's", ylabel="r (px)", xlim=(0, 1))
    return figure
