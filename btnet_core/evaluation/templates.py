"""Template (set) recognition on IJB-C (A.4, Tables 5-8): aggregation, 1:1 TAR@FAR and 1:N
TPIR@FPIR.

Setting r1&r2: an image's feature is f_r1(image) + f_r2(flipped image), un-normalised, times its
detector score; the images of one medium (a video) are averaged, and the media of a template added
(paper-and-code: template features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.data.ijbc import TemplateSet
from btnet_core.device import resolve_device
from btnet_core.errors import DataError
from btnet_core.evaluation.identification import mate_rows, open_set, score_chunks, search
from btnet_core.evaluation.verification import (
    TABLE1_SETTINGS,
    Embedder,
    OperatingPoint,
    embed_images,
    kept,
    tar_at_far,
)
from btnet_core.images import Resize

Lists = Mapping[str, tuple[Any, Any]]  # galleries: name -> (template ids, subjects)


def aggregate(
    features: Tensor, template: Any, media: Any, score: Any = None
) -> tuple[np.ndarray, Tensor]:
    """Sorted template ids (T,), features (T, D): sum over media of the mean of score * feature.

    Neither image features nor the result are normalised; cosines normalise it.
    """
    template, media = np.asarray(template), np.asarray(media)
    score = np.ones(len(template)) if score is None else np.asarray(score, np.float64)
    if not len(features) == len(template) == len(media) == len(score):
        raise DataError(
            f"templates: got {len(features)} features, {len(template)} template "
            f"and {len(media)} media ids"
        )
    ids, row = np.unique(template, return_inverse=True)
    _, medium = np.unique(media, return_inverse=True)
    medium = row * (medium.max() + 1) + medium  # a medium that two templates share counts in each
    _, medium, counts = np.unique(medium, return_inverse=True, return_counts=True)
    weight, rows = torch.from_numpy(score / counts[medium]).float(), torch.from_numpy(row)
    result = torch.zeros(len(ids), features.shape[1])
    for part in torch.arange(len(features)).split(65536):  # never a second copy of all features
        result.index_add_(0, rows[part], features[part].float() * weight[part, None])
    return ids, result


def rows_of(ids: np.ndarray, wanted: Any, what: str) -> np.ndarray:
    """Row of each wanted template in the sorted ``ids``; DataError for one without images."""
    wanted = np.asarray(wanted)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    missing = wanted[ids[rows] != wanted]
    if missing.size:
        more = f" (and {missing.size - 1} more)"
        raise DataError(f"{what}: template {missing[0]}{more} has no images")
    return rows


@torch.inference_mode()
def pair_scores(
    features: Tensor, first: np.ndarray, second: np.ndarray, *,
    device: torch.device | str = "auto", chunk: int = 8192,
) -> np.ndarray:  # fmt: skip
    """(P,) float32 cosines of rows ``first`` and ``second`` of (T, D) features, by chunks."""
    device = resolve_device(str(device))
    unit, result = F.normalize(features.to(device).float()), np.empty(len(first), np.float32)
    for start in range(0, len(first), chunk):
        part = slice(start, start + chunk)
        left, right = (unit[torch.from_numpy(side[part]).to(device)] for side in (first, second))
        result[part] = torch.linalg.vecdot(left, right).cpu()
    return result


def identify_templates(
    features: Tensor, ids: np.ndarray, galleries: Lists, probes: tuple[Any, Any], *,
    fpir: float = 0.1, rank: int = 20, device: torch.device | str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """IJB-C 1:N: every probe searches each gallery; mated where its subject is in it.

    Returns {"tpir": mean over the galleries in %, "G1": what ``open_set`` returns, …}.
    """
    searching = features[torch.from_numpy(rows_of(ids, probes[0], "probes"))]
    results = {}
    for name, (templates, subjects) in galleries.items():
        gallery = features[torch.from_numpy(rows_of(ids, templates, f"gallery {name}"))]
        found = search(searching, gallery, mate_rows(subjects, probes[1]), device=device)
        results[name] = open_set(found, [fpir], rank)
    mean = float(np.mean([result["tpir"][str(fpir)] for result in results.values()]))
    return {"tpir": mean, **results}


@torch.inference_mode()
def identify_merged(
    features: Tensor, ids: np.ndarray, galleries: Lists, probes: tuple[Any, Any], *,
    fpir: float = 0.1, device: torch.device | str = "auto",
) -> OperatingPoint:  # fmt: skip
    """The authors' 1:N (paper-and-code: IJB-C 1:N): galleries merged, every probe mated, no rank
    test.

    The threshold is the ceil(fpir * probes)-th highest of all negative pairs; the rate is the
    fraction of probes whose mate scores above it. ``false_rate`` is the number of higher negative
    pairs per probe.
    """
    entries = [rows_of(ids, templates, name) for name, (templates, _) in galleries.items()]
    subjects = [np.asarray(people) for _, people in galleries.values()]
    mates = mate_rows(np.concatenate(subjects), probes[1])
    rows = rows_of(ids, probes[0], "probes")
    if (mates < 0).any():
        raise DataError(
            f"probes: {np.sum(mates < 0)} have no mate in any gallery; "
            "the authors' protocol needs one"
        )
    count, mate, top = math.ceil(fpir * len(rows)), np.empty(len(rows)), torch.empty(0)
    gallery = features[torch.from_numpy(np.concatenate(entries))]
    for part, scores in score_chunks(features, rows, gallery, device):
        own = torch.from_numpy(mates[part])[:, None].to(scores.device)
        mate[part] = scores.gather(1, own)[:, 0].cpu()
        negatives = scores.scatter_(1, own, -2.0).flatten()  # below every cosine
        pool = torch.cat([top, negatives.topk(min(count, len(negatives))).values.cpu()])
        top = pool.topk(min(count, len(pool))).values
    threshold = top[-1].item()
    higher = float((top > threshold).sum()) / len(rows)
    return OperatingPoint(float(np.mean(mate > threshold)), higher, threshold)


def evaluate_templates(
    embedder: Embedder, data: TemplateSet, settings: Sequence[tuple[int, int]] = TABLE1_SETTINGS,
    *, normalised: bool = False, how: Resize | None = None, keep: Path | None = None,
    lengths: Mapping[int, float] | None = None, **protocol: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Tables 5-8: {"112&7": what ``score_templates`` returns, …}; ``protocol`` are its options.

    ``normalised``: unit f_r1 and f_r2 before they are added; ``lengths[r]``: times that. ``keep``:
    folder of embeddings, as of ``unit_embeddings``.
    """

    def embed(r: int, flip: bool) -> Tensor:
        images = (lambda indices: data.images(indices).flip(-1)) if flip else data.images
        options: dict[str, Any] = {"count": len(data.template), "how": how}
        facts = (data.checksum, "templates", flip, (how or Resize()).name)
        z = kept(keep, embedder, r, facts, lambda r: embed_images(embedder, images, r=r, **options))
        return (F.normalize(z) if normalised else z) * (lengths[r] if lengths else 1)

    results, at_hand = {}, dict[tuple[int, bool], Tensor]()
    order = sorted(settings, key=lambda pair: pair[1])
    for place, (r1, r2) in enumerate(order):
        needed = {(r1, False), (r2, True)} - at_hand.keys()
        at_hand |= {key: embed(*key) for key in needed}
        features = at_hand[r1, False] + at_hand[r2, True]
        later = {key for a, b in order[place + 1 :] for key in ((a, False), (b, True))}
        at_hand = {key: z for key, z in at_hand.items() if key in later}  # IJB-C: 1 GB each
        results[f"{r1}&{r2}"] = score_templates(features, data, **protocol)
    return {f"{r1}&{r2}": results[f"{r1}&{r2}"] for r1, r2 in settings}


def score_templates(
    features: Tensor, data: TemplateSet, *, far: float = 1e-4, fpir: float = 0.1, rank: int = 20,
    weighted: bool = True, authors: bool = False, device: torch.device | str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """{"tar", "far", "threshold", "tpir", "identification"} of image features (N, D), rates in %.

    ``weighted``: by detector score. ``authors``: nearest FAR point and the merged 1:N.
    """
    ids, templates = aggregate(
        features, data.template, data.media, data.score if weighted else None
    )
    first, second = (rows_of(ids, side, "pairs") for side in (data.first, data.second))
    scores = pair_scores(templates, first, second, device=device)
    point = tar_at_far(scores, data.same, far, authors=authors)
    result = {"tar": 100 * point.rate, "far": 100 * point.false_rate, "threshold": point.threshold}
    lists: dict[str, Any] = {
        "galleries": data.galleries, "probes": data.probes, "fpir": fpir, "device": device,
    }  # fmt: skip
    if authors:
        merged = identify_merged(templates, ids, **lists)
        return {**result, "tpir": 100 * merged.rate, "identification": merged._asdict()}
    found = identify_templates(templates, ids, rank=rank, **lists)
    return {**result, "tpir": found["tpir"], "identification": found}
