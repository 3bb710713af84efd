"""Beyond the paper: how much detail a face really holds, and errors if the blurred are refused.

A blurred or up-sampled face has more pixels than detail. Its optical resolution is estimated from
the power of its spectrum in rings of frequency, by a quadratic fit to 600 LFW and CelebA faces that
were shrunk to known rows, scaled up again and made noisy. It can choose the branch of a face and is
each embedding's reliability.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from btnet_core.errors import DataError
from btnet_core.images import resize

SIDE = 112  # rows and columns at which spectra are compared
RINGS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 57)  # cycles a face: borders of the rings
WEIGHTS = Path(__file__).with_name("quality.json")  # of the fit


def optical_resolution(face: Tensor) -> float:
    """Rows of detail in ``face`` (3, h, w), pixels in [0, 255]: from 1 to its longer side.

    On strange faces nine of ten estimates are within a third.
    """
    estimate = _quadratic(_features(face)[None])[0] @ np.asarray(_weights())
    return float(np.clip(2.0**estimate, 1, max(face.shape[-2:])))


def risk_coverage(
    wrong: Sequence[bool], reliability: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Fraction of the decisions kept (n,), ascending, and of errors among them (n,), in [0, 1].

    The least reliable are refused first; equal reliabilities together: each keeps the risk of the
    last of them. Raises DataError for other than two lists of one length, finite.
    """
    failed, score = np.asarray(wrong, float), np.asarray(reliability, float)
    alike = failed.ndim == 1 and failed.shape == score.shape and len(failed) > 0
    if not alike or not np.isfinite(score).all():
        raise DataError(
            f"risk: got {failed.shape} errors and {score.shape} reliabilities, "
            "expected twice (n,), finite"
        )
    order = np.argsort(-score, kind="stable")
    last = np.searchsorted(-score[order], -score[order], side="right")
    risk = np.cumsum(failed[order])[last - 1] / last
    return np.arange(1, len(failed) + 1) / len(failed), risk


@lru_cache(maxsize=1)
def _weights() -> list[float]:
    return json.loads(WEIGHTS.read_text())


@lru_cache(maxsize=1)
def _rings() -> tuple[Tensor, Tensor]:
    """The window (SIDE, SIDE), and (rings, bins of rfft2) averaging weights."""
    across = torch.fft.rfftfreq(SIDE, 1 / SIDE)
    radius = torch.sqrt(torch.fft.fftfreq(SIDE, 1 / SIDE)[:, None] ** 2 + across**2).flatten()
    inside = torch.stack([(radius >= a) & (radius < b) for a, b in pairwise(RINGS)]).float()
    window = torch.hann_window(SIDE, periodic=False)
    return window[:, None] * window, inside / inside.sum(1, keepdim=True)


def _features(face: Tensor) -> np.ndarray:
    """log2 of the ring powers over the first ring's (10), of the first (in tens), of the side."""
    window, rings = _rings()
    grey = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), resize(face.cpu(), SIDE), dims=1)
    spectrum = torch.fft.rfft2((grey - grey.mean()) * window).abs().square().flatten()
    power = torch.log2((rings @ spectrum).clamp_min(1e-3)).numpy().astype(float)
    return np.array([*(power[1:] - power[0]), power[0] / 10, np.log2(max(face.shape[-2:]))])


def _quadratic(x: np.ndarray) -> np.ndarray:
    """(n, k) -> (n, 1 + k + k (k + 1) / 2): one, every feature, every product of two."""
    i, j = np.triu_indices(x.shape[1])
    return np.column_stack([np.ones(len(x)), x, x[:, i] * x[:, j]])
