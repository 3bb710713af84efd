"""Template (set) recognition on IJB-C (A.4, Tables 5-8): aggregation, 1:1 TAR@FAR and 1:N TPIR@FPIR.

Setting r1&r2: an image's feature is f_r1(image) + f_r2(flipped image), un-normalised, times its detector score; the
images of one medium (a video) are averaged, and the media of a template added (paper-and-code: template features).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import DataError
from btnet_core.evaluation.identification import mate_rows, open_set, score_chunks, search
from btnet_core.evaluation.verification import (
    TABLE1_SETTINGS,
    Embedder,
    OperatingPoint,
    check_resolutions,
    embed_images,
    tar_at_far,
)


@dataclass(frozen=True, kw_only=True)
class TemplateSet:
    """N images in templates, P template pairs for 1:1, galleries and probes for 1:N. Template ids are any integers."""

    name: str
    checksum: str
    images: Callable[[Any], Tensor]  # indices -> uint8 (n, 3, 112, 112), aligned
    template: Any  # (N,) template of each image
    media: Any  # (N,) medium of each image; counts within its template
    score: Any  # (N,) detector score
    first: Any  # (P,) template ids
    second: Any  # (P,)
    same: Any  # (P,) bool
    galleries: Mapping[
        str, tuple[Any, Any]
    ]  # "G1", "G2" -> (template ids, subjects), one template a subject
    probes: tuple[Any, Any]  # (template ids, subjects)


def aggregate(
    features: Tensor, template: Any, media: Any, score: Any = None
) -> tuple[np.ndarray, Tensor]:
    """Sorted template ids (T,) and their features (T, D): sum over media of the mean of score * image feature.

    Neither image features nor the result are normalised; cosines normalise it.
    """
    template, media = np.asarray(template), np.asarray(media)
    if (
        not len(features)
        == len(template)
        == len(media)
        == len(template if score is None else score)
    ):
        raise DataError(
            f"templates: got {len(features)} features, {len(template)} template and {len(media)} media ids"
        )
    ids, row = np.unique(template, return_inverse=True)
    _, medium = np.unique(media, return_inverse=True)
    medium = row * (medium.max() + 1) + medium  # a medium that two templates share counts in each
    _, medium, counts = np.unique(medium, return_inverse=True, return_counts=True)
    weight = torch.from_numpy(
        (1.0 if score is None else np.asarray(score, np.float64)) / counts[medium]
    )
    result = torch.zeros(len(ids), features.shape[1])
    for part in torch.arange(len(features)).split(65536):  # never a second copy of all features
        result.index_add_(
            0, torch.from_numpy(row)[part], features[part].float() * weight[part, None].float()
        )
    return ids, result


def rows_of(ids: np.ndarray, wanted: Any, what: str) -> np.ndarray:
    """Row of each wanted template in the sorted ``ids``; DataError names the first that has no image."""
    wanted = np.asarray(wanted)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if (missing := np.flatnonzero(ids[rows] != wanted)).size:
        raise DataError(
            f"{what}: template {wanted[missing[0]]} (and {missing.size - 1} more) has no images"
        )
    return rows


@torch.inference_mode()
def pair_scores(
    features: Tensor,
    first: np.ndarray,
    second: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    chunk: int = 8192,
) -> np.ndarray:
    """(P,) float32 cosines of rows ``first`` and ``second`` of (T, D) features, ``chunk`` pairs at a time."""
    unit, result = F.normalize(features.to(device).float()), np.empty(len(first), np.float32)
    for start in range(0, len(first), chunk):
        part = slice(start, start + chunk)
        left, right = (torch.from_numpy(side[part]).to(device) for side in (first, second))
        result[part] = torch.linalg.vecdot(unit[left], unit[right]).cpu()
    return result


def identify_templates(
    features: Tensor, ids: np.ndarray, galleries: Mapping[str, tuple[Any, Any]], probes: tuple[Any, Any],
    *, fpir: float = 0.1, rank: int = 20, device: torch.device | str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """IJB-C 1:N: every probe searches each gallery; mated where its subject is in it, unmated elsewhere.

    Returns {"tpir": mean over the galleries in %, "G1": report of ``open_set``, …}.
    """
    rows = rows_of(ids, probes[0], "probes")
    reports = {}
    for name, (templates, subjects) in galleries.items():
        gallery = features[torch.from_numpy(rows_of(ids, templates, f"gallery {name}"))]
        found = search(
            features[torch.from_numpy(rows)], gallery, mate_rows(subjects, probes[1]), device=device
        )
        reports[name] = open_set(found, [fpir], rank)
    return {
        "tpir": float(np.mean([report["tpir"][str(fpir)] for report in reports.values()])),
        **reports,
    }


@torch.inference_mode()
def identify_merged(
    features: Tensor, ids: np.ndarray, galleries: Mapping[str, tuple[Any, Any]], probes: tuple[Any, Any],
    *, fpir: float = 0.1, device: torch.device | str = "cpu",
) -> OperatingPoint:  # fmt: skip
    """The authors' 1:N (paper-and-code: IJB-C 1:N): galleries merged, every probe mated, no rank test.

    The threshold is the ceil(fpir * probes)-th highest of all negative pairs; the rate is the share of probes whose
    mate scores above it. ``false_rate`` is the number of higher negative pairs per probe.
    """
    gallery = np.concatenate(
        [rows_of(ids, templates, name) for name, (templates, _) in galleries.items()]
    )
    mates = mate_rows(
        np.concatenate([np.asarray(subjects) for _, subjects in galleries.values()]), probes[1]
    )
    rows = rows_of(ids, probes[0], "probes")
    if (mates < 0).any():
        raise DataError(
            f"probes: {np.sum(mates < 0)} have no mate in any gallery; the authors' protocol needs one"
        )
    count, mate, top = (
        math.ceil(fpir * len(rows)),
        np.empty(len(rows)),
        torch.empty(0, device=device),
    )
    for part, scores in score_chunks(features, rows, features[torch.from_numpy(gallery)], device):
        own = torch.from_numpy(mates[part])[:, None].to(scores.device)
        mate[part] = scores.gather(1, own)[:, 0].cpu()
        pool = torch.cat([top, scores.scatter_(1, own, -2.0).flatten()])
        top = pool.topk(min(count, len(pool))).values
    threshold = top[-1].item()
    return OperatingPoint(
        float(np.mean(mate > threshold)), float((top > threshold).sum()) / len(rows), threshold
    )


def evaluate_templates(
    embedder: Embedder, data: TemplateSet, settings: Sequence[tuple[int, int]] = TABLE1_SETTINGS, *,
    far: float = 1e-4, fpir: float = 0.1, rank: int = 20, weighted: bool = True, normalised: bool = False,
    lengths: Mapping[int, float] | None = None, authors: bool = False, device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Tables 5-8: {"112&7": {"tar", "far", "threshold", "tpir", "identification"}, …}, rates in %.

    ``weighted``: by detector score. ``normalised``: unit f_r1 and f_r2 before they are added. ``lengths``: factors of
    the resolutions (``verification.fitted_lengths``); each report then has "fitted", the same with
    lengths[r1] f_r1 + lengths[r2] f_r2. ``authors``: nearest FAR point and the merged 1:N. ``options``: how, batch_size.
    """

    def report(features: Tensor) -> dict[str, Any]:
        ids, templates = aggregate(
            features, data.template, data.media, data.score if weighted else None
        )
        first, second = (rows_of(ids, side, "pairs") for side in (data.first, data.second))
        point = tar_at_far(
            pair_scores(templates, first, second, device=device), data.same, far, authors=authors
        )
        row = {"tar": 100 * point.rate, "far": 100 * point.false_rate, "threshold": point.threshold}
        if authors:
            merged = identify_merged(
                templates, ids, data.galleries, data.probes, fpir=fpir, device=device
            )
            return {**row, "tpir": 100 * merged.rate, "identification": merged._asdict()}
        found = identify_templates(
            templates, ids, data.galleries, data.probes, fpir=fpir, rank=rank, device=device
        )
        return {**row, "tpir": found["tpir"], "identification": found}

    if lengths is not None:
        check_resolutions("lengths", lengths, {r for setting in settings for r in setting})
    reports, cache = {}, dict[tuple[int, bool], Tensor]()
    order = sorted(settings, key=lambda pair: pair[1])
    for place, (r1, r2) in enumerate(order):
        for r, flip in ((r1, False), (r2, True)):
            if (r, flip) not in cache:
                images = (lambda i: data.images(i).flip(-1)) if flip else data.images
                z = embed_images(embedder, images, len(data.template), r, device=device, **options)
                cache[r, flip] = F.normalize(z) if normalised else z
        one, two = cache[r1, False], cache[r2, True]
        later = {(a, False) for a, _ in order[place + 1 :]} | {
            (b, True) for _, b in order[place + 1 :]
        }
        cache = {key: value for key, value in cache.items() if key in later}  # IJB-C: 1 GB each
        row = report(one + two)
        if lengths is not None:
            row["fitted"] = (
                dict(row)
                if r1 == r2
                else report(torch.add(one * lengths[r1], two, alpha=lengths[r2]))
            )
        reports[f"{r1}&{r2}"] = row
    return {f"{r1}&{r2}": reports[f"{r1}&{r2}"] for r1, r2 in settings}
