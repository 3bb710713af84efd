"""Beyond the paper (notebook 12): embeddings less their mean, of fitted lengths; alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from btnet_core.evaluation.verification import CANONICAL, Embedder, embed_images, unit_embeddings
from btnet_paper import results


def centres(
    embedder: Embedder, faces: Any, resolutions: Iterable[int], *, count: int = 200, **options: Any
) -> dict[int, Tensor]:
    """For each r the mean unit embedding (D,) of ``count`` faces, spread evenly over a FaceSet.

    Faces of one resolution share a part of their embeddings that says nothing about who they are;
    ``evaluate_pairs`` subtracts it. Take training faces. ``options`` are those of
    ``unit_embeddings``.
    """
    unit = unit_embeddings(embedder, _spread(faces, count), resolutions, **options)
    return {r: z.mean(0) for r, z in unit.items()}


def fitted_lengths(
    embedder: Embedder, faces: Any, resolutions: Iterable[int], *, count: int = 200, **options: Any
) -> dict[int, float]:
    """For each r the factor by which un-normalised embeddings of r px come closest, in least
    squares, to those of 112.

    sum <z_r, z_112> / sum <z_r, z_r> over ``count`` faces, spread evenly over a FaceSet: 1 at 112,
    small where z_r is long or says little, as of Eq. 3 alone, which leaves open the length of a
    branch's embeddings and so their part in sums (templates, gallery entries). Take training faces.
    ``options`` are those of ``embed_images``.
    """
    sample = _spread(faces, count)

    def embed(r: int) -> Tensor:
        return embed_images(embedder, sample.images, sample.num_images, r, **options).double()

    reference = embed(CANONICAL)
    factors = {CANONICAL: 1.0}
    for r in set(resolutions) - {CANONICAL}:
        z = embed(r)
        factors[r] = float((z * reference).sum() / z.square().sum())
    return factors


def _spread(faces: Any, count: int) -> SimpleNamespace:
    """``count`` faces, evenly spread over a FaceSet, as an image set for ``unit_embeddings``."""
    chosen = np.linspace(0, len(faces) - 1, min(count, len(faces))).astype(int)
    return SimpleNamespace(
        images=lambda rows: faces.images(chosen[rows]),
        num_images=len(chosen),
        checksum=f"{faces.checksum} {len(chosen)}",
    )


def with_lengths(embed: Embedder, lengths: Mapping[int, float]) -> Embedder:
    """Returns ``embed(faces, r)`` times ``lengths[r]``; for one of ``native_embedder``, too."""
    return lambda faces, r: lengths[r] * embed(faces, r)


def alternatives(values: Mapping[str, Any] | None = None, r: int = 14) -> pd.DataFrame:
    """Returns what benchmarks/alternatives.py recorded: a row for each way to treat small faces.

    Accuracies in % by setting, the mean over the sets; GMACs of a face of ``r`` px; parameters
    stored beside phi_hr, millions; minutes of training; dB of PSNR at r above bicubic enlargement.
    Without ``values`` those of the repository's record.
    """
    if values is None:
        values = results.load(results.ROOT / "figures", "lfw_alternatives")["values"]
    rows = {}
    for name, row in values["rows"].items():
        cells = {setting: cell["accuracy"] for setting, cell in row["accuracy"].items()}
        cells[f"GMACs, {r} px"] = row["macs"][str(r)] / 1e9
        cells["stored, M"], cells["minutes"] = row["stored"] / 1e6, row["minutes"]
        cells["PSNR, dB"] = row.get("psnr_gain", {}).get(str(r))
        rows[name] = cells
    return pd.DataFrame(rows).T.astype(float)
