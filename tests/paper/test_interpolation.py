"""Interpolation error (A.1): known derivatives, the bound that fails and the one that holds, the decomposition."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from btnet_core.errors import ConfigError, DataError
from btnet_core.images import Resize, degrade, resize
from btnet_paper.interpolation import (
    cells,
    complete_bound,
    error_curves,
    error_map,
    fourth_difference,
    knee,
    lowpass,
    paper_bound,
    second_differences,
)


def _grid(f, n: int = 9) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    return f(x, y)[None]


def _bilinear_error(f, n: int = 9, steps: int = 20) -> torch.Tensor:
    """max |f - P| in each unit cell of the n x n grid, by dense evaluation: (n-1, n-1)."""
    t = torch.linspace(0, n - 1, (n - 1) * steps + 1, dtype=torch.float64)
    y, x = torch.meshgrid(t, t, indexing="ij")
    up = F.interpolate(_grid(f, n)[None], size=len(t), mode="bilinear", align_corners=True)[0, 0]
    return F.max_pool2d((f(x, y) - up).abs()[None], steps + 1, stride=steps)[0]


@pytest.fixture(scope="module")
def blobs() -> torch.Tensor:
    """(6, 3, 112, 112) smooth uint8-like images with detail at several scales."""
    noise = torch.rand(6, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    scales = [F.interpolate(F.avg_pool2d(noise, k), 112, mode="bicubic") * k for k in (2, 4, 8, 16)]
    images = sum(scales)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low) * 255).round()


def test_operator_is_equation_12():
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=torch.float64)
    images = torch.rand(2, 3, 11, 13, dtype=torch.float64)
    expected = F.conv2d(images.reshape(6, 1, 11, 13), kernel[None, None]).reshape(2, 3, 9, 11)
    torch.testing.assert_close(fourth_difference(images), expected)


@pytest.mark.parametrize(
    ("f", "f_xx", "f_yy", "f_xxyy"),
    [
        (lambda x, y: x**2 * y**2, lambda x, y: 2 * y**2, lambda x, y: 2 * x**2, 4.0),
        (lambda x, y: x**2, lambda x, y: 2 + 0 * x, lambda x, y: 0 * x, 0.0),
        (lambda x, y: 3 * x - 2 * y + 5 + x * y, lambda x, y: 0 * x, lambda x, y: 0 * x, 0.0),
    ],
    ids=["x2y2", "x2", "bilinear surface"],
)
def test_differences_equal_known_derivatives(f, f_xx, f_yy, f_xxyy):
    xx, yy = second_differences(_grid(f))
    torch.testing.assert_close(xx, _grid(f_xx)[:, 1:-1, 1:-1])
    torch.testing.assert_close(yy, _grid(f_yy)[:, 1:-1, 1:-1])
    torch.testing.assert_close(
        fourth_difference(_grid(f)), torch.full((1, 7, 7), f_xxyy, dtype=torch.float64)
    )


def test_paper_bound_fails_on_x_squared_and_the_complete_one_is_attained():
    def square(x, y):
        return x**2

    assert paper_bound(_grid(square)).max() == 0
    error = _bilinear_error(square)[1:-1, 1:-1]
    torch.testing.assert_close(error, torch.full_like(error, 0.25))  # at mid-cell
    torch.testing.assert_close(complete_bound(_grid(square))[0], error)


def test_complete_bound_holds_and_paper_bound_does_not_on_a_cubic():
    def cubic(
        x, y
    ):  # |f_xx|, |f_yy|, |f_xxyy| are largest at corners, so the estimate is the supremum
        return x**3 * y**2 / 50 + y**3 - x * y**2

    error = _bilinear_error(cubic)[1:-1, 1:-1]
    paper = F.max_pool2d(paper_bound(_grid(cubic)), 2, stride=1)[0]
    complete = complete_bound(_grid(cubic))[0]
    assert (error > paper + 1e-9).any()
    assert (error <= complete + 1e-9).all()
    assert (error > 0.5 * complete).any()  # and it is no idle bound


def test_bilinear_surfaces_have_no_error():
    assert complete_bound(_grid(lambda x, y: 3 * x - 2 * y + x * y)).abs().max() < 1e-12


@pytest.mark.parametrize(("size", "r"), [(105, 35), (84, 12), (55, 11)])
def test_the_small_image_holds_samples_of_the_lowpass(size, r):
    images = torch.rand(2, 3, size, size) * 255
    step = size // r  # odd: centres of the small image's pixels are pixels of the large one
    torch.testing.assert_close(
        lowpass(images, r, Resize())[..., step // 2 :: step, step // 2 :: step],
        resize(images, r),
        atol=2e-3,
        rtol=0,
    )


def test_curves_are_means_of_their_definitions(blobs):
    resolutions = [7, 14, 32, 112]
    curves = error_curves(blobs, resolutions)
    assert {v.shape for v in curves.values()} == {(4, 6)}
    small = resize(blobs, 32)
    torch.testing.assert_close(curves["paper"][2], paper_bound(small).mean((1, 2, 3)))
    torch.testing.assert_close(curves["complete"][2], complete_bound(small).mean((1, 2, 3)))
    torch.testing.assert_close(
        curves["measured"][2], (degrade(blobs, 32) - blobs).abs().mean((1, 2, 3))
    )
    torch.testing.assert_close(curves["measured"][2], error_map(blobs, 32).mean((1, 2)))
    assert (curves["measured"] <= curves["interpolation"] + curves["antialiasing"] + 1e-3).all()
    for name in ("measured", "interpolation", "antialiasing"):
        assert curves[name][3].abs().max() < 1e-3  # nothing changes at 112
    assert (curves["measured"][:3].diff(dim=0) < 0).all()  # fewer pixels, more error
    one = error_curves(blobs[2:3], resolutions)
    torch.testing.assert_close(
        one["complete"][:, 0], curves["complete"][:, 2]
    )  # vectorised = one by one


def test_on_smooth_images_the_complete_bound_covers_the_error_and_eq_11_does_not():
    y, x = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    image = (127 + 60 * torch.sin(x / 9) + 60 * torch.cos(y / 11 + x / 30)).expand(1, 3, -1, -1)
    curves = error_curves(image, [28])
    assert curves["complete_holds"].item() > 0.9
    assert curves["paper_holds"].item() < 0.5


def test_without_antialiasing_nothing_is_lost_to_it(blobs):
    curves = error_curves(blobs, [14, 28], Resize(antialias=False))
    assert curves["antialiasing"].abs().max() == 0
    torch.testing.assert_close(curves["measured"], curves["interpolation"])


@pytest.mark.parametrize(("size", "r"), [(112, 28), (112, 7), (112, 30), (28, 9), (16, 16)])
def test_cells_are_those_that_a_pixel_lies_in(size, r):
    """By fractions: pixel p of the large image is at (p + 1/2) r / size - 1/2 of the small one."""
    found = cells(size, r).tolist()
    for p in range(size):
        position = Fraction(2 * p + 1, 2) * r / size - Fraction(1, 2)
        between = [i for i in range(r - 3) if i + 1 <= position < i + 2]
        assert found[p] == (between[0] if between else -1), p
    assert set(found) - {-1} == set(range(r - 3))


def test_bounds_and_where_they_hold_are_those_of_a_loop_in_float64():
    """The definitions, one pixel at a time, on an image whose cells all differ."""
    size, r = 24, 8
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 255
    image = F.avg_pool2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    curves = error_curves(image, [r])
    small, up, smooth = (
        z[0].double().numpy()
        for z in (resize(image, r), degrade(image, r), lowpass(image, r, Resize()))
    )

    def derivatives(c, y, x):
        f = small[c]
        f_xx = f[y, x - 1] - 2 * f[y, x] + f[y, x + 1]
        f_yy = f[y - 1, x] - 2 * f[y, x] + f[y + 1, x]
        f_xxyy = sum((1, -2, 1)[i] * (1, -2, 1)[j] * f[y + i - 1, x + j - 1]
                     for i in range(3) for j in range(3))  # fmt: skip
        return abs(f_xx), abs(f_yy), abs(f_xxyy)

    interior = range(1, r - 1)
    paper = [derivatives(c, y, x)[2] / 64 for c in range(3) for y in interior for x in interior]
    assert curves["paper"].item() == pytest.approx(np.mean(paper), rel=1e-5)
    complete, holds = [], {"paper": [], "complete": []}
    for c in range(3):
        for y in range(1, r - 2):
            for x in range(1, r - 2):
                corners = [derivatives(c, y + i, x + j) for i in (0, 1) for j in (0, 1)]
                xx, yy, xxyy = (max(values) for values in zip(*corners, strict=True))
                complete.append((xx + yy) / 8 + xxyy / 64)
                for p, q in _pixels_between(y, x, size, r):
                    error = abs(up[c, p, q] - smooth[c, p, q])
                    holds["paper"].append(error <= xxyy / 64)
                    holds["complete"].append(error <= complete[-1])
    assert curves["complete"].item() == pytest.approx(np.mean(complete), rel=1e-5)
    assert 0.05 < np.mean(holds["paper"]) < np.mean(holds["complete"]) < 1
    for name, fraction in holds.items():
        assert curves[f"{name}_holds"].item() == pytest.approx(np.mean(fraction), abs=1e-6), name


def _pixels_between(y, x, size, r):
    """Pixels of the large image in the cell whose upper left corner is pixel (y, x) of the small."""
    at = [(p + 0.5) * r / size - 0.5 for p in range(size)]
    inside = [[p for p in range(size) if corner <= at[p] < corner + 1] for corner in (y, x)]
    return [(p, q) for p in inside[0] for q in inside[1]]


def test_eq_11_is_a_sixty_fourth_of_the_mixed_derivative():
    """f = 3 x^2 y^2: f_xxyy = 12, and Eq. 7 at a cell's middle is 12/4 * 1/4 * 1/4."""
    bound = paper_bound(_grid(lambda x, y: 3 * x**2 * y**2))
    torch.testing.assert_close(bound, torch.full_like(bound, 12 / 4 * 0.25 * 0.25))


def test_knee_of_a_hyperbola_is_the_geometric_mean_of_the_range():
    r = np.arange(7, 113)
    assert knee(r, 1 / r) == pytest.approx(math.sqrt(7 * 112), abs=0.5)
    assert knee(r, 100 / r + 3) == knee(r, 1 / r)
    assert knee(r[::-1], 1 / r[::-1]) == knee(r, 1 / r)
    bent = np.where(r < 40, 40 - r, 0.0)
    assert knee(r, bent) == 40


def test_each_curve_is_of_the_given_kernel(blobs):
    for how in (Resize(antialias=False), Resize()):
        small, curves = resize(blobs, 12, how), error_curves(blobs, [12], how)
        torch.testing.assert_close(curves["paper"][0], paper_bound(small).mean((1, 2, 3)))
        shown = error_map(blobs, 12, how)
        expected = (degrade(blobs, 12, how) - blobs).abs()
        torch.testing.assert_close(shown, expected.sum(1) / 3)


def test_a_bound_of_0_holds_where_there_is_no_error():
    curves = error_curves(torch.full((1, 3, 16, 16), 40.0), [4])  # the smallest there is
    assert (curves["paper_holds"].item(), curves["complete_holds"].item()) == (1, 1)


def test_knee_of_three_points():
    assert knee([7, 14, 28], [4, 1, 0]) == 14


@pytest.mark.parametrize(("resolutions", "values"), [
    ([7, 14], [2, 1]), ([7, 14, 28], [2, 1]), ([[7, 14], [28, 56]], [[4, 2], [1, 0]]),
    ([7, 14, 28, 56], [[4, 2], [1, 0]]), ([[7], [14], [28]], [[4], [2], [0]]),
    ([7, 14, 28], [4, math.nan, 0]), ([7, 14, 28], [4, math.inf, 0]),
])  # fmt: skip
def test_no_knee(resolutions, values):
    shapes = rf"{np.shape(resolutions)} resolutions, {np.shape(values)} values"
    with pytest.raises(ConfigError, match=re.escape(shapes)):
        knee(resolutions, values)


def test_refuses_what_it_cannot_answer(blobs):
    for wrong in (blobs[0], blobs[..., :100], blobs[..., :100, :]):
        with pytest.raises(ConfigError, match=re.escape(f"got shape {tuple(wrong.shape)}")):
            error_curves(wrong, [28])
    with pytest.raises(ConfigError, match=r"got \[28, 113\], expected values from 4 to 112"):
        error_curves(blobs, [28, 113])
    with pytest.raises(ConfigError, match=r"got \[\], expected"):
        error_curves(blobs, [])
    with pytest.raises(ConfigError, match="from 4 to 112"):
        error_curves(blobs, [3])
    with pytest.raises(ConfigError, match="bicubic"):
        error_curves(blobs, [28], Resize(kernel="bicubic"))
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        error_curves(blobs / 256, [28])
    with pytest.raises(ConfigError, match="not flat"):
        knee([7, 14, 28], [1.0, 1.0, 1.0])
