"""1:N open-set identification (Sections 4.2, 4.3.2): TPIR20@FPIR, AUC, the nine branch selections
of Table 2.

At threshold t: FPIR(t) is the fraction of unmated probes whose best score is > t; TPIR-N(t) that of
mated probes whose mate is within rank N and scores > t. The rank of a mate is the number of gallery
entries that score >= it, itself included: ties count against the mate. TPIR-N@FPIR is taken at the
smallest t whose FPIR does not exceed the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.device import resolve_device
from btnet_core.errors import DataError
from btnet_core.evaluation.verification import CANONICAL, Embedder, strictest_needed
from btnet_core.images import Resize, resize
from btnet_core.models.btnet import select_branch

STRATEGIES = tuple(product(("avg", "min", "max"), ("floor", "near", "ceil")))  # Table 2's order
FPIR = (0.3, 0.2, 0.1, 0.01)  # paper-and-code: TPIR at FPIR 0.01
CHUNK = 2**26  # scores held at a time (256 MiB)


@dataclass(frozen=True)
class Search:
    """What is kept of all scores: of a mated probe its mate's, of an unmated one the best."""

    mate: np.ndarray  # (M,) cosine
    rank: np.ndarray  # (M,) 1 = first
    unmated: np.ndarray  # (U,) cosine
    lowest: float  # smallest N-th best score of a mated probe, for the authors' grid; else inf


def prototypes(
    features: Tensor, labels: Any, *, normalised: bool = False
) -> tuple[np.ndarray, Tensor]:
    """One gallery entry an identity: sorted labels (K,), means (K, D) of its images' un-normalised
    features.

    Images of one identity may come from different branches (paper-and-code: gallery prototypes).
    ``normalised``: unit features first.
    """
    unique, inverse, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    features = F.normalize(features.float()) if normalised else features.float()
    sums = features.new_zeros(len(unique), features.shape[1])
    sums.index_add_(0, torch.from_numpy(inverse), features)
    return unique, sums / torch.from_numpy(counts)[:, None]


def mate_rows(gallery_labels: Any, probe_labels: Any) -> np.ndarray:
    """(n,) the gallery row with each probe's label, -1 for none; DataError if a label has two."""
    gallery, probe = np.asarray(gallery_labels), np.asarray(probe_labels)
    order = np.argsort(gallery)
    twice = gallery[order][1:][np.diff(gallery[order]) == 0]
    if twice.size:
        raise DataError(f"gallery: label {twice[0]} has more than one entry, expected one")
    place = order[np.minimum(np.searchsorted(gallery, probe, sorter=order), len(gallery) - 1)]
    return np.where(gallery[place] == probe, place, -1)


def score_chunks(
    probes: Tensor, rows: np.ndarray, gallery: Tensor, device: torch.device | str = "auto",
    chunk: int = CHUNK,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Cosines of ``probes[rows]`` (n, D) with ``gallery`` (K, D), block by block in one buffer."""
    device = resolve_device(str(device))
    unit = F.normalize(gallery.to(device).float()).T
    step = max(1, min(len(rows), chunk // unit.shape[1]))
    buffer = unit.new_empty(step, unit.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        block = F.normalize(probes[torch.from_numpy(rows[part])].to(device).float())
        yield part, torch.matmul(block, unit, out=buffer[: len(block)])


@torch.inference_mode()
def search(
    probes: Tensor, gallery: Tensor, mates: np.ndarray, *, lowest_rank: int | None = None,
    device: torch.device | str = "auto", chunk: int = CHUNK,
) -> Search:  # fmt: skip
    """Score (n, D) probes against a (K, D) gallery of one entry an identity; ``mates`` as from
    ``mate_rows``.

    Beside the features, memory is one block of ``chunk`` scores. ``lowest_rank`` = N also finds
    ``Search.lowest``.
    """
    mated, unmated = np.flatnonzero(mates >= 0), np.flatnonzero(mates < 0)
    best, score, rank = np.empty(len(unmated)), np.empty(len(mated)), np.empty(len(mated), np.int64)
    lowest = float("inf")
    for part, scores in score_chunks(probes, unmated, gallery, device, chunk):
        best[part] = scores.amax(1).cpu()
    for part, scores in score_chunks(probes, mated, gallery, device, chunk):
        if lowest_rank:
            nth = scores.topk(min(lowest_rank, scores.shape[1]), 1).values[:, -1]
            lowest = min(lowest, nth.min().item())
        mate = scores.gather(1, torch.from_numpy(mates[mated[part]])[:, None].to(scores.device))
        score[part] = mate[:, 0].cpu()
        # 0 and 1 in place: exact sums up to 2^24 entries
        rank[part] = scores.ge_(mate).sum(1).cpu()
    if not (np.isfinite(best).all() and np.isfinite(score).all()):
        raise DataError("probes or gallery: features hold values that are not finite")
    return Search(score, rank, best, lowest)


def above(values: np.ndarray, thresholds: Any) -> np.ndarray:
    """The fraction of ascending ``values`` that lie strictly above each threshold."""
    return (len(values) - np.searchsorted(values, thresholds, "right")) / len(values)


def open_set(
    found: Search, fpir: Sequence[float] = FPIR, rank: int = 20, *, authors: bool = False
) -> dict[str, Any]:
    """{"auc", "tpir": {"0.3": …}, "fpir" (reached), "thresholds", "ranks": {"1": …}}, in % but for
    the thresholds.

    The AUC is the exact area under (FPIR, TPIR-N): P(mate within rank N and above an unmated
    probe's best), equal scores counting half. ``authors``: paper-and-code: TPIR threshold, AUC.
    """
    if not len(found.mate) or not len(found.unmated):
        raise DataError(
            f"open set: got {len(found.mate)} mated and {len(found.unmated)} unmated probes, "
            "need both"
        )
    false = np.sort(found.unmated)
    hit = np.sort(np.where(found.rank <= rank, found.mate, -np.inf))  # a mate beyond rank N: never
    if authors:
        chosen, area = _on_a_grid(found.lowest, hit, false, fpir)
    else:
        chosen = [strictest_needed(false, target) for target in fpir]
        places = [np.searchsorted(false, hit, side) for side in ("left", "right")]
        area = float(np.mean(places)) / len(false)
    # The lowest finite number in the place of -inf, which JSON does not have.
    lowest = float(np.finfo(float).min)
    thresholds = {str(f): max(t, lowest) for f, t in zip(fpir, chosen, strict=True)}
    ranks = sorted({1, 5, 10, 20, rank})
    return {
        "auc": 100 * area, "thresholds": thresholds,
        "tpir": {f: 100 * float(above(hit, t)) for f, t in thresholds.items()},
        "fpir": {f: 100 * float(above(false, t)) for f, t in thresholds.items()},
        "ranks": {str(n): 100 * float(np.mean(found.rank <= n)) for n in ranks}, "mated": len(hit),
        "unmated": len(false),
    }  # fmt: skip


def _on_a_grid(
    lowest: float, hit: np.ndarray, false: np.ndarray, fpir: Sequence[float]
) -> tuple[list[float], float]:
    """The authors' thresholds and area: 1000 even steps, up to the largest of ``false``.

    Of them the threshold of nearest FPIR, and the trapezoidal area under the curve on the grid.
    """
    grid = np.linspace(min(lowest, false[0]), false[-1], 1000)
    x, y = above(false, grid), above(hit, grid)
    chosen = [float(grid[np.argmin(np.abs(x - target))]) for target in fpir]
    return chosen, float(-np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def identify(
    gallery: Tensor, gallery_labels: Any, probes: Tensor, probe_labels: Any, *,
    fpir: Sequence[float] = FPIR, rank: int = 20, normalised: bool = False, authors: bool = False,
    device: torch.device | str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """``open_set`` from image features and labels; unmated are probes whose label it lacks (-1)."""
    labels, entries = prototypes(gallery, gallery_labels, normalised=normalised)
    mates = mate_rows(labels, probe_labels)
    found = search(probes, entries, mates, lowest_rank=rank if authors else None, device=device)
    return open_set(found, fpir, rank, authors=authors)


def native_embedder(
    embedder: Embedder, image: Callable[[int], Tensor], *, upsample: bool = False,
    how: Resize | None = None, crop: Callable[[Tensor], Tensor] = lambda pixels: pixels,
    size: tuple[int, int] = (CANONICAL, CANONICAL), batch_size: int = 256,
) -> Callable[[np.ndarray, int], Tensor]:  # fmt: skip
    """embed(indices, r) -> (n, D) of native faces ``image(i)`` (3, h, w), each resized once to r.

    ``upsample`` makes a baseline's: every face goes to S and r is not used. ``crop`` and ``size``
    are the trunk's.
    """

    def embed(indices: np.ndarray, r: int) -> Tensor:
        rows = size[0] if upsample else r
        target, parts = (rows, round(rows * size[1] / size[0])), []
        for block in np.split(indices, range(batch_size, len(indices), batch_size)):
            faces = [resize(crop(image(int(i))), target, how) for i in block]
            parts.append(embedder(torch.stack(faces), rows).float().cpu())
        return torch.cat(parts)

    return embed


def evaluate_strategies(
    embed: Callable[[np.ndarray, int], Tensor], sizes: Any, labels: Any, in_gallery: Any, *,
    strategies: Sequence[tuple[str, str]] = STRATEGIES,
    resolutions: Sequence[int] = (7, 14, 28, 112), **options: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Table 2's lower half: {"max+ceil": ``identify`` (which takes ``options``), branches, scale}.

    ``sizes`` (N, 2) native (width, height), ``labels`` (N,) with -1 for unmated probes,
    ``in_gallery`` (N,) bool. Each image is embedded once at each resolution that some strategy
    sends it to. ``branches``: % of the images per branch; ``scale``: mean factors by which width
    and height are resized (paper-and-code: no up-sampling).
    """
    (w, h), labels = np.asarray(sizes).T, np.asarray(labels)
    enrolled, chosen = np.asarray(in_gallery, bool), _choices(w, h, strategies, resolutions)
    every = np.stack(list(chosen.values()))
    sent = {r: np.flatnonzero((every == r).any(0)) for r in np.unique(every).tolist()}
    features = {r: embed(indices, r) for r, indices in sent.items()}
    results = {}
    for name, row in chosen.items():
        z = _gather(row, sent, features)
        gallery, probes = (z[enrolled], labels[enrolled]), (z[~enrolled], labels[~enrolled])
        results[name] = {
            **identify(*gallery, *probes, **options),
            "branches": {str(r): 100 * float(np.mean(row == r)) for r in sorted(resolutions)},
            "scale": [float(np.mean(row / w)), float(np.mean(row / h))],
        }
    return results


def _choices(
    w: np.ndarray, h: np.ndarray, strategies: Sequence[tuple[str, str]], resolutions: Sequence[int]
) -> dict[str, np.ndarray]:
    """{"max+ceil": the resolution (N,) that each image of w x h goes to, …}."""
    chosen = {}
    for indicator, rounding in strategies:
        rule = {"indicator": indicator, "rounding": rounding, "resolutions": tuple(resolutions)}
        chosen[f"{indicator}+{rounding}"] = np.asarray(select_branch(w, h, **rule))
    return chosen


def _gather(row: np.ndarray, sent: dict[int, np.ndarray], features: dict[int, Tensor]) -> Tensor:
    """(N, D) each image's feature at resolution ``row[i]``, out of those of images ``sent[r]``."""
    width = next(iter(features.values())).shape[1]
    z = torch.empty(len(row), width)
    for r in np.unique(row).tolist():
        mine = np.flatnonzero(row == r)
        z[torch.from_numpy(mine)] = features[r][torch.from_numpy(np.searchsorted(sent[r], mine))]
    return z
