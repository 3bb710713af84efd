"""Error of bilinear up-sampling (paper 3.1, A.1, Figure 1): two bounds and the error itself.

Units: grey levels of [0, 255]. Colour: every quantity is taken per channel, then averaged over
R, G, B. Distance: pixels of the image at resolution r are 1 apart, so derivatives are plain
differences. Reduction: mean over positions and channels, one number per image and resolution.

Shrinking with the antialiased bilinear kernel takes point samples x_r of g_r, the image smoothed by
a triangle of half-width S/r pixels. With up() the bilinear enlargement,

    up(x_r) - x  =  (up(x_r) - g_r)  +  (g_r - x)
    measured        interpolation       antialiasing

and A.1 speaks of the middle term only, with f = g_r (continuous, but with kinks: A.1 wants f
smoother, so the bounds, taken from differences, are estimates). The last term is detail that r
pixels cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError
from btnet_core.images import Resize, check_pixels, degrade, resize

SMALLEST = 4  # rows; fewer have no cell whose four corners all have neighbours
SLACK = 1e-3  # grey levels: what float32 may add to an error


def second_differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """f_xx and f_yy by [1, -2, 1] at the interior pixels: (..., H, W) -> 2 x (..., H-2, W-2)."""
    centre = images[..., 1:-1, 1:-1]
    f_xx = images[..., 1:-1, :-2] - 2 * centre + images[..., 1:-1, 2:]
    f_yy = images[..., :-2, 1:-1] - 2 * centre + images[..., 2:, 1:-1]
    return f_xx, f_yy


def fourth_difference(images: Tensor) -> Tensor:
    """f_xxyy by Eq. 12, [1 -2 1; -2 4 -2; 1 -2 1], at the interior pixels: to (..., H-2, W-2)."""
    rows = images[..., :-2] - 2 * images[..., 1:-1] + images[..., 2:]
    return rows[..., :-2, :] - 2 * rows[..., 1:-1, :] + rows[..., 2:, :]


def paper_bound(images: Tensor) -> Tensor:
    """Eq. 11, |f_xxyy| / 64 at each interior pixel: (..., H, W) -> (..., H-2, W-2).

    It keeps one of the remainder's three terms and bounds nothing by itself: for f = x^2 it is 0
    while the error reaches 1/4 (paper-and-code: bound of Figure 1).
    """
    return fourth_difference(images).abs() / 64


def complete_bound(images: Tensor) -> Tensor:
    """(max|f_xx| + max|f_yy|) / 8 + max|f_xxyy| / 64 of each cell: (..., H, W) -> (..., H-3, W-3).

    A cell is the unit square between four neighbouring pixels; entry [i, j] has the corners
    (i+1, j+1) to (i+2, j+2), all interior. Each maximum is over the differences centred on those
    four corners: an estimate of the cell's supremum.
    """
    f_xx, f_yy = second_differences(images)
    return (_cell_max(f_xx) + _cell_max(f_yy)) / 8 + _cell_max(fourth_difference(images)) / 64


def _cell_max(corners: Tensor) -> Tensor:
    return F.max_pool2d(corners.abs(), 2, stride=1)


def lowpass(pixels: Tensor, r: int, how: Resize) -> Tensor:
    """g_r at the pixels of the full image, (..., S, S): what the image at r rows has samples of."""
    if how.kernel != "bilinear":
        raise ConfigError(f"kernel: got {how.kernel!r}; A.1 is about bilinear interpolation")
    if not how.antialias:
        return pixels.float()
    size = pixels.shape[-1]
    position = torch.arange(size, device=pixels.device)
    weights = (1 - (position[:, None] - position).abs() * r / size).clamp_min(0)
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ pixels.float() @ weights.T


def error_map(pixels: Tensor, r: int, how: Resize | None = None) -> Tensor:
    """|up(x_r) - x| averaged over channels, in grey levels: (..., 3, H, W) -> (..., H, W)."""
    return (degrade(check_pixels(pixels), r, how) - pixels.float()).abs().mean(-3)


def error_curves(
    pixels: Tensor, resolutions: Sequence[int], how: Resize | None = None
) -> dict[str, Tensor]:
    """Everything Figure 1 needs for (B, 3, S, S) pixels: name -> (len(resolutions), B).

    In grey levels: ``paper``, mean of `paper_bound` over the interior pixels of x_r; ``complete``,
    mean of `complete_bound` over its cells; ``measured``, ``interpolation``, ``antialiasing``, mean
    absolute value of the three differences above over all pixels. From 0 to 1: ``paper_holds``,
    ``complete_holds``, the fraction of the pixels inside those cells with |interpolation| at most
    the cell's bound (Eq. 11 read generously: the largest of its four corners).
    """
    size, how = check_pixels(pixels).shape[-1], how or Resize()
    if pixels.ndim != 4 or pixels.shape[-2] != size:
        raise ConfigError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, S, S)")
    if not len(resolutions) or min(resolutions) < SMALLEST or max(resolutions) > size:
        raise ConfigError(
            f"resolutions: got {list(resolutions)}, expected values from {SMALLEST} to {size}"
        )
    rows = [_error_at(pixels.float(), r, how) for r in resolutions]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _error_at(x: Tensor, r: int, how: Resize) -> dict[str, Tensor]:
    """One point of each curve: name -> (B,)."""
    x_r, g_r = resize(x, r, how), lowpass(x, r, how)
    up = resize(x_r, x.shape[-1], how)
    interpolation = (up - g_r).abs()
    paper, complete = paper_bound(x_r), complete_bound(x_r)
    values = {
        "paper": paper, "complete": complete, "measured": (up - x).abs(),
        "interpolation": interpolation, "antialiasing": (g_r - x).abs(),
        "paper_holds": _holds(interpolation, _cell_max(paper)),
        "complete_holds": _holds(interpolation, complete),
    }  # fmt: skip
    return {name: value.mean((1, 2, 3)) for name, value in values.items()}


def _holds(error: Tensor, bound: Tensor) -> Tensor:
    """1 where |error| (..., S, S) is within the bound (..., r-3, r-3) of its cell, else 0."""
    cell = cells(error.shape[-1], bound.shape[-1] + 3).to(error.device)
    inside = cell >= 0
    mine = error[..., inside, :][..., inside]
    own = bound[..., cell[inside], :][..., cell[inside]]
    return (mine <= own + SLACK).float()


def cells(size: int, r: int) -> Tensor:
    """Where each of ``size`` pixels along a side lies among the r - 3 cells that have a bound.

    (size,) integers: i for the cell between pixels i + 1 and i + 2 of the image at r rows, -1 for
    a pixel outside of all of them.
    """
    position = (torch.arange(size) + 0.5) * r / size - 0.5  # in pixels of the small image
    cell = position.floor().long() - 1
    return torch.where((cell >= 0) & (cell < r - 3), cell, -1)


def knee(resolutions: Sequence[float], values: Sequence[float]) -> float:
    """Resolution where a falling convex curve bends most (Kneedle, Satopaa et al. 2011).

    Both axes are scaled to [0, 1], nothing is smoothed; the knee is where the curve lies farthest
    below the line from (0, 1) to (1, 0). It depends on the range shown: for values ~ 1/r on [a, b]
    it is sqrt(a b), 28 for [7, 112].
    """
    r, v = np.asarray(resolutions, float), np.asarray(values, float)
    alike = r.ndim == 1 and r.shape == v.shape and len(r) >= 3
    if not alike or not np.isfinite(v).all() or np.ptp(v) == 0:
        raise ConfigError(
            f"knee: got {r.shape} resolutions, {v.shape} values; expected >= 3 of each, not flat"
        )
    x, y = (r - r.min()) / np.ptp(r), (v - v.min()) / np.ptp(v)
    return float(r[np.argmax(1 - x - y)])
