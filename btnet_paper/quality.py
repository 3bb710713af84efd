"""How much detail a face really holds, and how often embeddings fail if the less detailed ones are refused.

A blurred or up-sampled face has more pixels than detail. Its optical resolution is estimated from the power of its
spectrum in rings of frequency, by a quadratic fit to faces that were shrunk to known rows, scaled up again and made
noisy. It chooses the branch (``BTNet.embed(indicator="detail")``) and is each embedding's reliability.
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

from btnet_core.data.faces import FaceSet
from btnet_core.errors import DataError
from btnet_core.images import Resize, resize

SIDE = 112  # rows and columns at which spectra are compared
RINGS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 57)  # cycles a face: borders of the rings
LEAST = 5  # rows of detail that the estimate can tell apart
WEIGHTS = Path(__file__).with_name("quality.json")  # of `calibrate`, on 600 LFW and CelebA faces


def optical_resolution(face: Tensor, weights: Sequence[float] | None = None) -> float:
    """Rows of detail in ``face`` (3, h, w), pixels in [0, 255]: from 1 to its longer side. Nine of ten within a third."""
    power, side = _features(face), max(face.shape[-2:])
    estimate = _quadratic(power[None])[0] @ np.asarray(_weights() if weights is None else weights)
    return float(np.clip(2.0**estimate, 1, side))


def calibrate(faces: FaceSet, count: int = 600, seed: int = 0, variants: int = 6) -> list[float]:
    """The ``weights`` of ``optical_resolution`` for other faces than the usual ones: least squares on ``count`` faces.

    Each is shrunk to r rows, scaled up to h >= r rows by one of three kernels, and given noise of up to 15 levels.
    """
    rng, rows, target = np.random.default_rng(seed), [], []
    for face in faces.images(rng.choice(len(faces), min(count, len(faces)), replace=False)):
        for _ in range(variants):
            r = round(np.exp(rng.uniform(np.log(LEAST), np.log(SIDE))))
            h = round(np.exp(rng.uniform(np.log(r), np.log(SIDE)))) if rng.random() < 0.7 else r
            kernel = ("bilinear", "bicubic", "area")[rng.integers(3)]
            small = resize(resize(face, r), h, Resize(kernel=kernel))
            noise = rng.normal(0, rng.uniform(0, 15) if rng.random() < 0.6 else 0, small.shape)
            rows.append(_features((small + torch.from_numpy(noise).float()).clamp(0, 255)))
            target.append(np.log2(r))
    design = _quadratic(np.stack(rows))
    ridge = np.eye(
        design.shape[1]
    )  # keeps the many nearly equal columns from large opposite weights
    return np.linalg.solve(design.T @ design + ridge, design.T @ np.array(target)).tolist()


def risk_coverage(
    wrong: Sequence[bool], reliability: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the decisions kept (n,), ascending, and the share of errors among them, least reliable refused first.

    Equal reliabilities are refused together: each keeps the risk of the last of them.
    """
    failed, score = np.asarray(wrong, float), np.asarray(reliability, float)
    if (
        failed.shape != score.shape
        or failed.ndim != 1
        or not len(failed)
        or not np.isfinite(score).all()
    ):
        raise DataError(
            f"risk: got {failed.shape} errors and {score.shape} reliabilities, expected twice (n,), finite"
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
    """log2 of the ring powers relative to the first ring (10), the first (in tens), log2 of the longer side."""
    window, rings = _rings()
    grey = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), resize(face.cpu(), SIDE), dims=1)
    spectrum = torch.fft.rfft2((grey - grey.mean()) * window).abs().square().flatten()
    power = torch.log2((rings @ spectrum).clamp_min(1e-3)).numpy().astype(float)
    return np.array([*(power[1:] - power[0]), power[0] / 10, np.log2(max(face.shape[-2:]))])


def _quadratic(x: np.ndarray) -> np.ndarray:
    """(n, k) -> (n, 1 + k + k (k + 1) / 2): one, every feature, every product of two."""
    i, j = np.triu_indices(x.shape[1])
    return np.column_stack([np.ones(len(x)), x, x[:, i] * x[:, j]])
