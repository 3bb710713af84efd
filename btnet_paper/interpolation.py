"""Up-sampling error of bilinear interpolation (paper 3.1, A.1, Figure 1): two bounds and the error itself.

Units: grey levels of [0, 255]. Colour: every quantity is taken per channel, then averaged over R, G, B.
Distance: pixels of the image at resolution r are 1 apart, so derivatives are plain differences.
Reduction: mean over positions and channels, one number per image and resolution.

Shrinking with the antialiased bilinear kernel takes point samples x_r of g_r, the image smoothed by a triangle
of half-width S/r pixels. With up() the bilinear enlargement,

    up(x_r) - x  =  (up(x_r) - g_r)  +  (g_r - x)
    measured        interpolation       antialiasing

and A.1 speaks of the middle term only, with f = g_r (continuous, but with kinks: A.1 wants f smoother, so the
bounds, taken from differences, are estimates). The last term is detail that r pixels cannot hold.
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


def second_differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """f_xx and f_yy by [1, -2, 1] at the interior pixels: (..., H, W) -> two (..., H-2, W-2)."""
    centre = images[..., 1:-1, 1:-1]
    f_xx = images[..., 1:-1, :-2] - 2 * centre + images[..., 1:-1, 2:]
    f_yy = images[..., :-2, 1:-1] - 2 * centre + images[..., 2:, 1:-1]
    return f_xx, f_yy


def fourth_difference(images: Tensor) -> Tensor:
    """f_xxyy by Eq. 12, [1 -2 1; -2 4 -2; 1 -2 1], at the interior pixels: (..., H, W) -> (..., H-2, W-2)."""
    rows = images[..., :-2] - 2 * images[..., 1:-1] + images[..., 2:]
    return rows[..., :-2, :] - 2 * rows[..., 1:-1, :] + rows[..., 2:, :]


def paper_bound(images: Tensor) -> Tensor:
    """Eq. 11, |f_xxyy| / 64 at each interior pixel: (..., H, W) -> (..., H-2, W-2).

    It keeps one of the remainder's three terms and bounds nothing by itself: for f = x^2 it is 0 while the
    error reaches 1/4 (paper-and-code: bound of Figure 1, "Equation 7 is one term of three").
    """
    return fourth_difference(images).abs() / 64


def complete_bound(images: Tensor) -> Tensor:
    """(max|f_xx| + max|f_yy|) / 8 + max|f_xxyy| / 64 in each cell: (..., C, H, W) -> (..., C, H-3, W-3).

    A cell is the unit square between four neighbouring pixels; entry [i, j] has the corners (i+1, j+1) to
    (i+2, j+2), all interior. Each maximum is over the differences centred on those four corners: an estimate
    of the cell's supremum.
    """
    f_xx, f_yy = second_differences(images)
    return (_cell_max(f_xx) + _cell_max(f_yy)) / 8 + _cell_max(fourth_difference(images)) / 64


def _cell_max(corners: Tensor) -> Tensor:
    return F.max_pool2d(corners.abs(), 2, stride=1)


def lowpass(pixels: Tensor, r: int, how: Resize) -> Tensor:
    """g_r at the pixels of the full image, (..., S, S) float32: what the image at r rows holds samples of."""
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
    """Everything Figure 1 needs for (B, 3, S, S) pixels: name -> (len(resolutions), B), in grey levels.

    ``paper``: mean of `paper_bound` over the interior pixels of x_r; ``complete``: mean of `complete_bound` over
    its cells; ``measured``, ``interpolation``, ``antialiasing``: mean absolute value of the three differences
    above over all pixels; ``paper_holds``, ``complete_holds``: share of the pixels inside those cells with
    |interpolation| <= the cell's bound (Eq. 11 read generously: the largest of four corners), 0 to 1.

    "Relative to 112": a bound divided by its value at r = S. The errors are differences to r = S already (0 there).
    """
    size, how = check_pixels(pixels).shape[-1], how or Resize()
    if pixels.ndim != 4 or pixels.shape[-2] != size:
        raise ConfigError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, S, S)")
    if not len(resolutions) or min(resolutions) < SMALLEST or max(resolutions) > size:
        raise ConfigError(
            f"resolutions: got {list(resolutions)}, expected values from {SMALLEST} to {size}"
        )
    rows = [
        {name: v.mean((1, 2, 3)) for name, v in _error_at(pixels.float(), r, size, how).items()}
        for r in resolutions
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _error_at(x: Tensor, r: int, size: int, how: Resize) -> dict[str, Tensor]:
    x_r, g_r = resize(x, r, how), lowpass(x, r, how)
    up = resize(x_r, size, how)
    values = {
        "paper": paper_bound(x_r),
        "complete": complete_bound(x_r),
        "measured": (up - x).abs(),
    }
    values |= {"interpolation": (up - g_r).abs(), "antialiasing": (g_r - x).abs()}
    cell = ((torch.arange(size, device=x.device) + 0.5) * r / size - 0.5).floor().long() - 1
    inside = (cell >= 0) & (
        cell < r - 3
    )  # pixels of the full image that lie in a cell with a bound
    error, cell = values["interpolation"][..., inside, :][..., inside], cell[inside]
    for name, bound in (("paper", _cell_max(values["paper"])), ("complete", values["complete"])):
        values[f"{name}_holds"] = (
            error <= bound[..., cell, :][..., cell] + 1e-3
        ).float()  # float32 slack
    return values


def knee(resolutions: Sequence[float], values: Sequence[float]) -> float:
    """Resolution where a falling convex curve bends most (Kneedle, Satopaa et al. 2011, no smoothing).

    Both axes are scaled to [0, 1]; the knee is where the curve lies farthest below the line from (0, 1) to
    (1, 0). It depends on the range shown: for values ~ 1/r on [a, b] it is sqrt(a b), 28 for [7, 112].
    """
    r, v = np.asarray(resolutions, float), np.asarray(values, float)
    if (
        r.ndim != 1
        or r.shape != v.shape
        or len(r) < 3
        or not np.isfinite(v).all()
        or np.ptp(v) == 0
    ):
        raise ConfigError(
            f"knee: got {r.shape} resolutions, {v.shape} values; expected >= 3 of each, not flat"
        )
    x, y = (r - r.min()) / np.ptp(r), (v - v.min()) / np.ptp(v)
    return float(r[np.argmax(1 - x - y)])
