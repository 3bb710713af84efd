"""`btnet evaluate`, `verify`, the end of `adapt`: which faces are too small, which threshold.

At every pair of resolutions: accuracy, and TAR at each FAR that the pairs allow, each with its
threshold. Intervals are Wilson's, at 95 %, for the number of different pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from btnet_core.data.faces import FaceSet
from btnet_core.data.pairs import PairSet
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import (
    check_pairs,
    pair_similarities,
    tar_at_far,
    ten_fold_accuracy,
)
from btnet_core.models.btnet import BTNet
from btnet_paper import results
from btnet_tools.embed import Reader, embed_files

FARS = (1e-2, 1e-3, 1e-4)  # each where at least 1 / FAR pairs show different people
WAYS = {"before": "scaled up", "after": "branch"}
SOME_FACES = 1000  # compared with the trunk's own embedding where no pairs can be drawn


def compare(
    btnet: BTNet, sets: Sequence[PairSet | FaceSet], ways: Sequence[str] = ("before", "after"),
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Before (faces scaled up to the trunk) and after (branches), at every pair of resolutions.

    Returns:
        ``sets`` (what it was measured on), and for each of ``ways`` {"112&14":
        :func:`operating_points`, …}; of a face set instead of pairs :func:`fidelity`.

    Raises:
        DataError: too few pairs for ten folds, or all of one kind.
    """
    found: dict[str, Any] = {"sets": [one.name for one in sets]}
    pairs = [one for one in sets if isinstance(one, PairSet)]
    faces = [one for one in sets if isinstance(one, FaceSet)]
    for one in pairs:
        check_pairs(one)
    for way in ways:
        embedder: Any = BranchEmbedder(btnet, device=device)
        if way == "before":
            embedder = UpsamplingEmbedder(btnet.trunk, device=device)
        if pairs:
            found[way] = measure(embedder, pairs, btnet.resolutions)
        else:
            found[way] = fidelity(embedder, faces[0], btnet.resolutions)
    return found


def measure(
    embedder: Any, sets: Sequence[PairSet], resolutions: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """:func:`operating_points` at every pair of resolutions, over both directions."""
    settings = list(combinations_with_replacement(sorted(resolutions, reverse=True), 2))
    both = dict.fromkeys([*settings, *((b, a) for a, b in settings)])
    scores = [pair_similarities(embedder, one, list(both)) for one in sets]
    same = [np.asarray(one.same, bool) for one in sets]
    found = {}
    for a, b in settings:
        ways = dict.fromkeys([(a, b), (b, a)])
        parts = [(of[way], flags) for of, flags in zip(scores, same, strict=True) for way in ways]
        found[f"{a}&{b}"] = operating_points(parts, pairs=sum(map(len, same)), ways=len(ways))
    return found


def operating_points(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], pairs: int, ways: int = 1
) -> dict[str, Any]:
    """Rates in [0, 1] of (similarities, same) of each set and direction; ``pairs`` different ones.

    Accuracy and its threshold are means over the ten folds of each part, ``far`` the false accept
    rate at that threshold; ``tar`` has for each FAR the rate and its threshold over all parts.
    """
    folds = [ten_fold_accuracy(similarity, same) for similarity, same in parts]
    similarity, same = (np.concatenate(column) for column in zip(*parts, strict=True))
    accuracy = float(np.mean([fold.mean for fold in folds]))
    threshold = float(np.mean([fold.thresholds for fold in folds]))
    positives = int(same.sum()) // ways
    found: dict[str, Any] = {
        "pairs": pairs, "accuracy": accuracy, "interval": wilson(accuracy, pairs),
        "threshold": threshold, "far": float(np.mean(similarity[~same] > threshold)), "tar": {},
    }  # fmt: skip
    for far in FARS:
        if pairs - positives >= 1 / far:
            point = tar_at_far(similarity, same, far)
            found["tar"][f"{far:g}"] = {
                "rate": point.rate,
                "interval": wilson(point.rate, positives),
                "threshold": point.threshold,
            }
    return found


def wilson(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a rate measured on ``count`` cases; z = 1.96 covers 95 %."""
    centre = rate + z**2 / (2 * count)
    half = z * np.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    low, high = (float((centre + sign * half) / (1 + z**2 / count)) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def fidelity(
    embedder: Any, faces: FaceSet, resolutions: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """{"14": {"cosine": mean between a face's embedding at 14 pixels and at full size}, …}."""
    pixels = faces.images(range(min(len(faces), SOME_FACES)))
    *lower, full = sorted(resolutions)
    whole = embedder(pixels, full)
    return {
        str(r): {"cosine": float(F.cosine_similarity(embedder(pixels, r), whole).mean())}
        for r in reversed(lower)
    }


def table(found: dict[str, Any]) -> str:
    """What ``compare`` returned, a line for each pair of resolutions and way."""
    first = next(iter(found["after"].values()))
    lines = [f"on {', '.join(found['sets'])}"]
    if "cosine" in first:
        lines[0] += ": no pairs can be drawn (--hold-out more people, or give --pairs)"
        lines.append("size       way         cosine to the face at full size")
    else:
        lines[0] += f": {first['pairs']:,} pairs; [95 % interval, Wilson] > threshold"
        heads = "".join(f"{f'TAR at FAR {far}':<32}" for far in first["tar"])
        lines.append(f"{'size':<11}{'way':<12}{'accuracy (%)':<32}{heads}".rstrip())
    for key in found["after"]:
        for way in (name for name in WAYS if name in found):
            row = found[way][key]
            points = [{**row, "rate": row.get("accuracy")}, *row.get("tar", {}).values()]
            cells = [f"{row['cosine']:.3f}"] if "cosine" in row else map(cell, points)
            lines.append(f"{key:<11}{WAYS[way]:<12}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def cell(point: dict[str, Any]) -> str:
    """A rate in %, its interval, and the threshold."""
    low, high = (100 * bound for bound in point["interval"])
    text = f"{100 * point['rate']:.2f} [{low:.1f}, {high:.1f}] > {point['threshold']:.3f}"
    return f"{text:<32}"


# ---- verify ----------------------------------------------------------------------------------


def verify(
    btnet: BTNet, first: str, second: str, select: str, model: str, threshold: float | None = None
) -> str:
    """Two lines on the images, one with their cosine, the verdict, and the FAR at which it accepts.

    The threshold is the given one, or that of ``btnet adapt`` for the two branches.
    """
    faces = list(embed_files(btnet, [Path(first), Path(second)], Reader(btnet, select)))
    lines = []
    for name, face in zip((first, second), faces, strict=True):
        size, factor = f"{face.size[1]}x{face.size[0]}", face.resize_factor[0]
        lines.append(f"{name}: {size} through branch {face.r}, resized by {factor:.2f}")
    cosine = float(faces[0].embedding @ faces[1].embedding)
    key = "&".join(str(r) for r in sorted((face.r for face in faces), reverse=True))
    known = known_points(model)
    point = known["after"].get(key, {})
    threshold = point.get("threshold") if threshold is None else threshold
    if threshold is None:
        told = f"no threshold of {key} is known for this model: give --threshold"
        return "\n".join([*lines, f"cosine {cosine:.3f}; {told}"])
    verdict = "one person" if cosine > threshold else "two people"
    far = false_accepts(point, threshold)
    told = f"its FAR at {key} is not known"
    if far:
        told = f"accepts {far}{key} on {', '.join(known['sets'])}"
    return "\n".join(
        [*lines, f"cosine {cosine:.3f}: {verdict} (threshold {threshold:.3f}, {told})"]
    )


def known_points(model: str) -> dict[str, Any]:
    """What ``btnet adapt`` recorded beside the model; nothing where it has not."""
    if not (Path(model) / "results" / "adapt.json").is_file():
        return {"sets": [], "after": {}}
    values = results.load(model, "adapt")["values"]
    measured = all(isinstance(point, dict) for point in values["after"].values())
    return values if measured else {"sets": [], "after": {}}


def false_accepts(point: dict[str, Any], threshold: float) -> str:
    """At which FAR ``threshold`` accepts, as far as it was measured: "FAR 0.01 or less: "."""
    if threshold == point.get("threshold"):
        return f"at FAR {point['far']:.2g}: "
    if not point.get("tar"):
        return ""
    held = [far for far, tar in point["tar"].items() if threshold >= tar["threshold"]]
    return f"at FAR {held[-1]} or less: " if held else f"at FAR above {FARS[0]:g}: "
