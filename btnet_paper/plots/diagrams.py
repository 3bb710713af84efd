"""Figures 2 and 3: the architecture, drawn from a BTNet's own modules."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from btnet_core.models.btnet import BTNet, Route
from btnet_paper.plots.style import PAGE, colour, paper_ready

NEUTRAL, ARROW, DASHED = "#555555", "#777777", (0, (2, 1.5))


class Unit(NamedTuple):
    """One unit of a route: its name, stride, rows of its output, and whether the route owns it."""

    name: str
    stride: int
    rows: int
    own: bool


def units(net: Any) -> list[Unit]:
    """The units of a route, or of the trunk, in the order in which a face passes through them."""
    if isinstance(net, Route):
        parts, rows = [(net.branch, True), (net.shared, False)], net.size[0]
    else:
        parts, rows = [(net.body, False)], net.config.size[0]
    chain = []
    for part, own in parts:
        for name, unit in part.named_children():
            rows = (rows - 1) // unit.stride + 1
            chain.append(Unit(name, unit.stride, rows, own))
    return chain


@paper_ready
def figure2(btnet: BTNet) -> Figure:
    """Figure 2: the trunk as a pyramid; a branch keeps r rows and joins where the trunk has r."""
    canonical = btnet.trunk.config.size[0]
    levels = list(dict.fromkeys([canonical, *(unit.rows for unit in units(btnet.trunk))]))
    logs = np.log2(np.array(levels) / min(levels) + 1)
    side = dict(zip(levels, 0.55 + 0.95 * logs / logs.max(), strict=True))
    place = {r: 2.2 + 1.9 * index for index, r in enumerate(levels)}
    depth = {r: -1.35 - 1.05 * index for index, r in enumerate(btnet.resolutions[-2::-1])}
    end = place[levels[-1]] + 1.5
    bottom = min(depth.values(), default=0) - 0.6
    axes = _canvas(PAGE, 1.7 + 0.55 * len(depth), (-0.6, end + 1.9), (bottom, 1.15))
    axes.set_aspect("equal")
    for r in levels:
        _stack(axes, place[r], side[r], r)
    for a, b in itertools.pairwise(levels):
        _arrow(axes, (place[a] + side[a] / 2 + 0.14, 0), (place[b] - side[b] / 2 - 0.03, 0))
    _input(axes, canonical, 0.0, side[canonical] / 3, place[canonical] - side[canonical] / 2 - 0.03)
    for r, y in depth.items():
        _input(axes, r, y, side[r] / 3, 1.2)
        _branch(axes, r, y, place[r], -side[r] / 2)
    axes.text(0.3, 0.95, "input", ha="center", fontsize=7)
    middle = (place[levels[0]] + place[levels[-1]]) / 2
    axes.text(middle, 0.95, "trunk $T$: rows of its feature maps", ha="center", fontsize=7)
    _arrow(axes, (place[levels[-1]] + side[levels[-1]] / 2 + 0.14, 0), (end - 0.1, 0))
    text = f"embedding\n{btnet.trunk.config.embedding}-d"
    _box(axes, (end - 0.05, -0.3, 1.9, 0.6), text, NEUTRAL, solid=False)
    return axes.figure


def _stack(axes: Axes, x: float, side: float, r: int) -> None:
    """Three sheets: feature maps of r rows."""
    style = {"facecolor": "white", "edgecolor": colour(r), "linewidth": 1.4}
    for shift in (0.12, 0.06, 0.0):
        corner = (x - side / 2 + shift, shift - side / 2)
        axes.add_patch(Rectangle(corner, side, side, **style))
    axes.text(x, 0, f"{r}", ha="center", va="center")


def _input(axes: Axes, r: int, y: float, half: float, end: float) -> None:
    """A face of r rows and an arrow from it."""
    style = {"facecolor": "#f2f2f2", "edgecolor": colour(r), "linewidth": 1.4}
    axes.add_patch(Rectangle((0.3 - half, y - half), 2 * half, 2 * half, **style))
    axes.text(0.3, y, f"{r}", ha="center", va="center", fontsize=7)
    _arrow(axes, (0.3 + half, y), (end, y))


def _branch(axes: Axes, r: int, y: float, join: float, bottom: float) -> None:
    """The box of a branch, and its way up to the maps that it joins."""
    right = join - 0.45
    text = f"branch $B_{{{r}}}$: {r} rows throughout"
    _box(axes, (1.25, y - 0.3, right - 1.25, 0.6), text, colour(r), solid=True)
    axes.plot((right, join), (y, y), color=colour(r), linewidth=1)
    _arrow(axes, (join, y), (join, bottom - 0.02), colour(r))


@paper_ready
def figure3(btnet: BTNet) -> Figure:
    """Figure 3: every route unit by unit; runs of like units are one box, /2 is a stride."""
    routes = {r: units(btnet.route(r)) for r in reversed(btnet.resolutions)}
    runs = _runs(list(routes.values()))
    height = 0.62 * len(routes) + 0.55
    axes = _canvas(PAGE, height, (-1.15, len(runs) + 1.1), (0.8 - len(routes), 1.05))
    for row, (r, chain) in enumerate(routes.items()):
        text = {"ha": "center", "va": "center", "color": colour(r), "fontweight": "bold"}
        axes.text(-0.6, 0.25 - row, f"{r} px", fontsize=8, **text)
        for column, run in enumerate(runs):
            _run(axes, column, -row, r, [chain[i] for i in run], whole=row == 0)
            after = chain[min(run[-1] + 1, len(chain) - 1)]
            _join(axes, column, -row, r, ends=chain[run[0]].own and not after.own)
        place, line = (len(runs) + 0.05, -row, 0.95, 0.5), DASHED if row else "-"
        _box(axes, place, "head", NEUTRAL, solid=not row, size=6.2, linestyle=line)
    legend = (
        "filled: trunk, or a branch of its own · dashed: $T_r$, the trunk's weights with "
        "BatchNorm of its own · second line: rows of the output"
    )
    axes.text(-1.1, 0.88, legend, fontsize=6.2)
    return axes.figure


def _runs(chains: list[list[Unit]]) -> list[list[int]]:
    """Indices of units, grouped where neighbours are alike in every route and of one stage."""
    names = [unit.name for unit in chains[0]]
    kinds = [[unit[1:] for unit in column] for column in zip(*chains, strict=True)]
    runs = [[0]]
    for i in range(1, len(names)):
        stage_ends = names[i][0] == "S" and names[i][:2] != names[i - 1][:2]
        if stage_ends or kinds[i] != kinds[i - 1]:
            runs.append([i])
        else:
            runs[-1].append(i)
    return runs


def _run(axes: Axes, column: int, y: int, r: int, run: list[Unit], *, whole: bool) -> None:
    """The box of like units of a route; ``whole``: of the trunk, where all is its own."""
    first, last = run[0], run[-1].name
    name = first.name
    if len(run) > 1:
        name += "-" + last.split("U")[-1].removeprefix("block")
    text = name + (" /2" if first.stride == 2 else "") + f"\n{first.rows}"
    solid = first.own or whole
    edge, line = colour(r) if first.own else NEUTRAL, "-" if solid else DASHED
    size = min(6.2, 52 / len(name))
    place = (column + 0.05, y, 0.86, 0.5)
    _box(axes, place, text, edge, solid=solid, size=size, linestyle=line)


def _join(axes: Axes, column: int, y: int, r: int, *, ends: bool) -> None:
    """The arrow to the next box; where the branch ends, z_r is marked."""
    own = colour(r) if ends else ARROW
    _arrow(axes, (column + 0.91, y + 0.25), (column + 1.05, y + 0.25), own)
    if ends:
        x = column + 0.98
        axes.plot((x, x), (y - 0.06, y + 0.62), color=own, linewidth=1.6)
        axes.text(x, y + 0.67, f"$z_{{{r}}}$", ha="center", fontsize=6.5, color=own)


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> Axes:
    _, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return axes


def _box(
    axes: Axes, place: tuple[float, float, float, float], text: str, edge: str, *, solid: bool,
    size: float = 6, **options: Any,
) -> None:  # fmt: skip
    """A rounded box (x, y, width, height) with a text in it, filled lightly if ``solid``."""
    x, y, width, height = place
    face = mpl.colors.to_rgba(edge, 0.25 if solid else 0.0)
    style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.2 if solid else 0.8}
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style, **options))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], own: str = ARROW
) -> None:
    style = {"arrowstyle": "-|>", "color": own, "linewidth": 1, "mutation_scale": 7}
    axes.annotate("", end, start, arrowprops=style | {"shrinkA": 0, "shrinkB": 0})
