"""1:1 verification (4.2): ten-fold accuracy, ROC, TAR@FAR, and the r1&r2 protocol of Table 1.

One decision rule everywhere: two images are called the same person iff ``similarity > threshold``
(strictly). The metrics take plain arrays and return fractions in [0, 1]; ``evaluate_pairs`` gives
%, like the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError, DataError
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.images import Resize, resize

CANONICAL = 112  # S, rows and columns
TABLE1_SETTINGS = ((112, 7), (112, 14), (112, 28), (7, 7), (14, 14), (28, 28), (112, 112))
Embedder = Callable[[Tensor, int], Tensor]  # (pixels (B, 3, 112, 112), r) -> (B, D) un-normalised


@dataclass(frozen=True)
class TenFold:
    """Accuracy as fractions: mean and (population) standard deviation of the folds, then each."""

    mean: float
    std: float
    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]  # chosen on the other folds


class Roc(NamedTuple):
    """All operating points from (0, 0) to (1, 1); point k accepts similarity > thresholds[k]."""

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


class OperatingPoint(NamedTuple):
    """TAR (or TPIR) and the FAR (or FPIR) really reached, as fractions, at ``threshold``."""

    rate: float
    false_rate: float
    threshold: float


def ten_fold_accuracy(similarity: Any, same: Any, folds: int = 10) -> TenFold:
    """Accuracy of each fold at the threshold that is best on the other folds, exact.

    Folds are consecutive blocks (the first P mod ``folds`` hold one pair more). Candidate
    thresholds: midpoints of neighbouring distinct training scores, the largest one (none accepted)
    and the number just below the smallest (all accepted). Of several best the largest is taken, as
    the field does (the first of a rising grid of distances). ``similarity``, ``same``: (P,) scores,
    larger = more alike; (P,) bool.
    """
    similarity, same = check_scores(similarity, same)
    if not 2 <= folds <= len(same):
        raise ConfigError(
            f"folds: got {folds} for {len(same)} pairs, expected 2 to the number of pairs"
        )
    count = len(same)
    sizes = count // folds + (np.arange(folds) < count % folds)
    order = np.argsort(similarity)
    value, fold = similarity[order], np.repeat(np.arange(folds), sizes)[order]
    # correct[k, i]: right decisions in fold k when the i highest of all scores are accepted.
    steps = np.zeros((folds, count + 1), np.int32)
    place = fold[::-1] * (count + 1) + np.arange(1, count + 1)
    steps.ravel()[place] = np.where(same, np.int32(1), np.int32(-1))[order[::-1]]
    steps[:, 0] = np.add.reduceat(~same, np.cumsum(sizes) - sizes, dtype=np.int32)
    correct = np.cumsum(steps, axis=1, dtype=np.int32)
    training = correct.sum(0, dtype=np.int32) - correct
    equal = np.flatnonzero(value[1:] == value[:-1]) + 1
    training[:, count - equal] = -1  # no threshold parts equal scores
    best = np.argmax(training, axis=1)  # the first: the fewest accepted
    thresholds = [_between(value, fold, k, count - int(i)) for k, i in enumerate(best)]
    accepted = count - np.searchsorted(value, thresholds, "right")
    accuracies = correct[np.arange(folds), accepted] / sizes
    return TenFold(
        float(accuracies.mean()), float(accuracies.std()), tuple(accuracies.tolist()),
        tuple(thresholds),
    )  # fmt: skip


def _between(value: np.ndarray, fold: np.ndarray, k: int, i: int) -> float:
    """The candidate that parts other folds' scores among ascending ``value[:i]`` from the rest."""
    below, above = i - 1, i
    while below >= 0 and fold[below] == k:
        below -= 1
    while above < len(value) and fold[above] == k:
        above += 1
    if above == len(value):
        return float(value[below])
    if below < 0:
        return float(np.nextafter(value[above], -np.inf))
    middle = value[below] + (value[above] - value[below]) / 2
    # Neighbours in float64 have no middle.
    return float(middle if middle < value[above] else value[below])


def roc(similarity: Any, same: Any) -> Roc:
    """Every point of the ROC curve, by one sort; equal scores are one point."""
    similarity, same = check_scores(similarity, same, both=True)
    order = np.argsort(-similarity)
    value, label = similarity[order], same[order]
    # the last of each run of equal scores
    last = np.append(np.flatnonzero(value[1:] != value[:-1]), len(value) - 1)
    accepted, true = np.append(0, last + 1), np.append(0, np.cumsum(label)[last])
    thresholds = np.append(value[last], np.nextafter(value[-1], -np.inf))
    return Roc((accepted - true) / np.sum(~label), true / np.sum(label), thresholds)


def auc(similarity: Any, same: Any) -> float:
    """Area under the ROC curve, exact: P(same > different) + P(equal) / 2."""
    fpr, tpr, _ = roc(similarity, same)
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2)


def tar_at_far(similarity: Any, same: Any, far: float, *, authors: bool = False) -> OperatingPoint:
    """The largest TAR whose FAR does not exceed ``far`` (paper-and-code: TAR at FAR), in O(P).

    ``authors``: the ROC point whose FAR is nearest to ``far``, above or below; of equally near ones
    the largest TAR.
    """
    similarity, same = check_scores(similarity, same, both=True)
    if authors:
        curve = roc(similarity, same)
        k = len(curve.fpr) - 1 - int(np.argmin(np.abs(curve.fpr - far)[::-1]))
        return OperatingPoint(float(curve.tpr[k]), float(curve.fpr[k]), float(curve.thresholds[k]))
    threshold = strictest_needed(similarity[~same], far)
    accepted = similarity > threshold
    return OperatingPoint(
        float(np.mean(accepted[same])), float(np.mean(accepted[~same])), threshold
    )


def strictest_needed(negatives: np.ndarray, fraction: float) -> float:
    """The smallest t with at most ``fraction`` of ``negatives`` above it; -inf if all may be."""
    if not 0 <= fraction <= 1:
        raise ConfigError(f"false accept rate: got {fraction}, expected 0 to 1")
    count = len(negatives)
    allowed = min(int(fraction * count) + 1, count)  # + 1: 0.29 * 100 is 28.999… in floats
    allowed -= allowed / count > fraction
    if allowed == count:
        return float("-inf")
    k = count - 1 - allowed
    return float(np.partition(negatives, k)[k])


def check_scores(similarity: Any, same: Any, both: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(P,) float64 and (P,) bool arrays, or DataError; ``both``: both kinds of pairs must occur."""
    similarity, same = np.asarray(similarity, np.float64), np.asarray(same).astype(bool)
    if similarity.ndim != 1 or similarity.shape != same.shape or not len(same):
        raise DataError(
            f"similarity, same: got {similarity.shape} and {same.shape}, "
            "expected twice (P,), P >= 1"
        )
    if not np.isfinite(similarity).all():
        raise DataError(
            f"similarity: {np.sum(~np.isfinite(similarity))} of {len(same)} values are not finite"
        )
    if both and same.all() == same.any():
        raise DataError(
            f"same: all {len(same)} pairs are {'same' if same[0] else 'different'}; both are needed"
        )
    return similarity, same


def check_pairs(pairs: Any, folds: int = 10) -> None:
    """Raise DataError for a PairSet of too few pairs for ``folds``, or of one kind alone."""
    same, count = int(torch.as_tensor(pairs.same).sum()), len(pairs.same)
    if count < folds or not 0 < same < count:
        raise DataError(
            f"{pairs.name}: {same} pairs of one person and {count - same} of two; "
            f"expected both kinds, and {folds} pairs or more"
        )


@torch.inference_mode()
def embed_images(
    embedder: Embedder, images: Callable[[np.ndarray], Tensor], count: int, r: int, *,
    mirror: int | None = None, how: Resize | None = None, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """(count, D) un-normalised f_r(image), plus f_mirror(flipped image) if ``mirror`` is given.

    ``images(indices)`` gives pixels; other sizes than 112x112 are brought to it first with ``how``.
    """
    parts = []
    for start in range(0, count, batch_size):
        indices = np.arange(start, min(start + batch_size, count))
        pixels = images(indices)
        if pixels.shape[-2:] != (CANONICAL, CANONICAL):  # else 8 bits a pixel go to the device
            pixels = resize(pixels, CANONICAL, how)
        z = embedder(pixels, r).float().cpu()
        if mirror is not None:
            z = z + embedder(pixels.flip(-1), mirror).float().cpu()
        parts.append(z)
    return torch.cat(parts)


def unit_embeddings(
    embedder: Embedder, pairs: Any, resolutions: Iterable[int], *, flip: bool = True,
    keep: Path | None = None, how: Resize | None = None, batch_size: int = 256,
) -> dict[int, Tensor]:  # fmt: skip
    """For each r the unit embedding (N, D) of every image of a PairSet (data/pairs.py).

    With ``flip`` the mirrored image's embedding is added before normalising. ``keep``: a folder for
    files from which they are read when the same network has embedded the same images in the same
    way before.
    """
    how, faces = how or Resize(), cache(lambda: pairs.images(np.arange(pairs.num_images)))

    def embed(r: int) -> Tensor:
        own: dict[str, Any] = {"mirror": r if flip else None, "how": how, "batch_size": batch_size}
        return F.normalize(embed_images(embedder, lambda i: faces()[i], len(faces()), r, **own))

    facts = getattr(pairs, "checksum", ""), flip, how.name
    rows = sorted(set(resolutions), reverse=True)
    return {r: kept(keep, embedder, r, facts, embed) for r in rows}


def kept(
    keep: Path | None, embedder: Embedder, r: int, facts: tuple, embed: Callable[[int], Tensor]
) -> Tensor:
    """``embed(r)`` of the images and in the way that ``facts`` name, or as kept in a file."""
    if keep is None or not hasattr(embedder, "fingerprint"):
        return embed(r)
    digest = hashlib.sha256(repr((embedder.fingerprint(r), *facts)).encode()).hexdigest()
    path = Path(keep) / f"{digest[:24]}.safetensors"
    if not path.is_file():
        write_safetensors(path, {"unit": embed(r)}, {"r": str(r)})
    return read_safetensors(path)[0]["unit"]


def check_resolutions(name: str, given: Iterable[int], needed: Iterable[int]) -> None:
    """Raise ConfigError where argument ``name`` lacks a value for a resolution that is needed."""
    if absent := set(needed) - set(given):
        raise ConfigError(f"{name}: has resolutions {sorted(given)}, needs {sorted(absent)}, too")


def pair_similarities(
    embedder: Embedder, pairs: Any, settings: Iterable[tuple[int, int]], *,
    centre: Mapping[int, Tensor] | None = None, **options: Any,
) -> dict[tuple[int, int], np.ndarray]:  # fmt: skip
    """Cosine (P,) of each pair with its first image at r1 rows and its second at r2, per setting
    (r1, r2).

    Each image is embedded once per resolution, and ``centre[r]`` subtracted from its unit
    embedding; ``options`` are those of ``unit_embeddings``.
    """
    unit = unit_embeddings(embedder, pairs, {r for setting in settings for r in setting}, **options)
    if centre is not None:
        check_resolutions("centre", centre, unit)
        unit = {r: F.normalize(z - centre[r]) for r, z in unit.items()}
    first, second = torch.as_tensor(pairs.first), torch.as_tensor(pairs.second)
    return {(a, b): (unit[a][first] * unit[b][second]).sum(1).double().numpy() for a, b in settings}


def evaluate_pairs(
    embedder: Embedder, pairs: Any, settings: Sequence[tuple[int, int]] = TABLE1_SETTINGS, *,
    cross: str = "both", folds: int = 10, **options: Any,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Table 1's protocol: {"112&7": {accuracy, std, folds, auc, directions}, …}, in % but for the
    thresholds.

    ``cross="both"`` averages both directions fold by fold when r1 != r2; "authors" puts only the
    first image of each pair at r1 (paper-and-code: cross-resolution pairs). ``options``: centre,
    flip, keep, how, batch_size.
    """
    if cross not in ("both", "authors"):
        raise ConfigError(f"cross: got {cross!r}, expected 'both' or 'authors'")
    ways = {
        (a, b): [(a, b), (b, a)] if cross == "both" and a != b else [(a, b)] for a, b in settings
    }
    needed = dict.fromkeys(way for group in ways.values() for way in group)
    scores = pair_similarities(embedder, pairs, needed, **options)
    results = {}
    for (a, b), group in ways.items():
        done = [
            {"first": way[0], "second": way[1], **_one_way(scores[way], pairs.same, folds)}
            for way in group
        ]
        mean = np.mean([row["folds"] for row in done], axis=0)
        results[f"{a}&{b}"] = {
            "accuracy": float(mean.mean()), "std": float(mean.std()), "folds": mean.tolist(),
            "auc": float(np.mean([row["auc"] for row in done])), "directions": done,
        }  # fmt: skip
    return results


def _one_way(scores: np.ndarray, same: Any, folds: int) -> dict[str, Any]:
    """Accuracy, its deviation between folds, of each fold, and the AUC, in %; the thresholds."""
    found = ten_fold_accuracy(scores, same, folds)
    return {
        "accuracy": 100 * found.mean,
        "std": 100 * found.std,
        "folds": [100 * value for value in found.accuracies],
        "auc": 100 * auc(scores, same),
        "thresholds": list(found.thresholds),
    }


def summarise(results: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The mean over pair sets of what ``evaluate_pairs`` gives: {"112&7": {accuracy, std, sets,
    second_half, second_halves}, …} in %.

    ``std`` is the mean over the sets of the standard deviation between folds; ``sets`` holds each
    accuracy; ``second_half`` is the accuracy on the later half of the folds, for settings that were
    chosen on the first, and ``second_halves`` that of each set.
    """
    summary = {}
    for setting in results[0]:
        sets = [result[setting] for result in results]
        later = [float(np.mean(row["folds"][len(row["folds"]) // 2 :])) for row in sets]
        summary[setting] = {
            "accuracy": float(np.mean([row["accuracy"] for row in sets])),
            "std": float(np.mean([row["std"] for row in sets])),
            "sets": [row["accuracy"] for row in sets], "second_half": float(np.mean(later)),
            "second_halves": later,
        }  # fmt: skip
    return summary
