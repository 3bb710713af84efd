"""1:N in millions of entries by an index of faiss; `identification.search` is the exact default."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError
from btnet_core.evaluation.identification import Search

try:
    import faiss
except ImportError:  # exact search needs none
    faiss = None

BLOCK = 65_536  # entries handed over together


class Neighbours:
    """Gallery entries ``(K, D)`` in lists around sqrt(K) centres; similarity is the cosine.

    Args:
        stored: "Flat" as they are; "SQ8" a byte instead of four a number.
        probed: lists that a probe is compared with; more find more and take longer.

    Raises:
        ConfigError: faiss is not installed.
    """

    def __init__(self, gallery: Tensor, stored: str = "Flat", probed: int = 32) -> None:
        if faiss is None:
            raise ConfigError("an index needs faiss: pip install -e '.[search]'")
        self.gallery, self.probed, count = gallery, probed, len(gallery)
        lists = round(math.sqrt(count))
        name = f"IVF{lists},{stored}"
        self.index = faiss.index_factory(gallery.shape[1], name, faiss.METRIC_INNER_PRODUCT)
        self.index.train(_unit(gallery[:: max(1, count // (40 * lists))]))  # 39 a list at least
        for part in gallery.split(BLOCK):
            self.index.add(_unit(part))

    def nearest(self, probes: Tensor, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows ``(n, count)`` of the nearest entries, best first; row -1: no more."""
        self.index.nprobe = self.probed
        return self.index.search(_unit(probes), count)

    def search(self, probes: Tensor, mates: np.ndarray, depth: int = 20) -> Search:
        """As ``identification.search``, from the ``depth`` nearest entries that the index finds.

        A mate that is not among them has the last rank: nobody who uses the index would see it.
        """
        scores, rows = self.nearest(probes, depth)
        mated, own = np.flatnonzero(mates >= 0), torch.from_numpy(mates[mates >= 0])
        faces = F.normalize(probes[torch.from_numpy(mated)].float())
        mate = (faces * F.normalize(self.gallery[own].float())).sum(1).double().numpy()
        here = rows[mated] == mates[mated, None]
        at = np.where(here, scores[mated], -np.inf).max(1, keepdims=True)
        rank = np.where(here.any(1), (scores[mated] >= at).sum(1), len(self.gallery))
        return Search(mate, rank, scores[mates < 0, 0].astype(float), float("inf"))


def _unit(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(rows.float()).cpu().numpy())
