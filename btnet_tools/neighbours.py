"""1:N search in millions of entries: the nearest few of a probe by an index of faiss, an option.

Exact blocks (``identification.search``) are the default. `pip install -e '.[search]'` brings faiss.
"""

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

BLOCK = 65_536  # entries or probes handed over together


class Neighbours:
    """Gallery entries ``(K, D)`` in an index; similarity is the cosine.

    Args:
        kind: faiss's name of the index; "": entries as they are, in lists around sqrt(K) centres.
            "IVF1000,SQ8" keeps a byte instead of four a number.
        probed: lists that a probe is compared with; more find more and take longer.

    Raises:
        ConfigError: faiss is not installed, or knows no such index.
    """

    def __init__(self, gallery: Tensor, kind: str = "", probed: int = 32) -> None:
        if faiss is None:
            raise ConfigError("an index needs faiss: pip install -e '.[search]'")
        count, width = gallery.shape
        lists = max(1, round(math.sqrt(count)))
        name = kind or f"IVF{lists},Flat"
        try:
            self.index = faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError:
            raise ConfigError(f"kind: got {kind!r}, expected an index of faiss") from None
        if not self.index.is_trained:
            step = max(1, count // (40 * lists))  # 39 entries a list are faiss's least
            self.index.train(_unit(gallery[::step]))
        for part in gallery.split(BLOCK):
            self.index.add(_unit(part))
        self.probed = probed

    def nearest(self, probes: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows ``(n, count)`` of the nearest entries, best first; -1: none found."""
        if isinstance(self.index, faiss.IndexIVF):
            self.index.nprobe = self.probed
        found = [self.index.search(_unit(part), count) for part in probes.split(BLOCK)]
        return np.concatenate([s for s, _ in found]), np.concatenate([r for _, r in found])


def search(
    probes: Tensor, gallery: Tensor, mates: np.ndarray, *, depth: int = 20, kind: str = "",
    probed: int = 32, index: Neighbours | None = None, **exact: object,
) -> Search:  # fmt: skip
    """As ``identification.search``, from the ``depth`` nearest entries that the index finds.

    A mate that is not among them has the last rank: nobody who uses the index would see it.
    ``index``: one that has been made of ``gallery``. ``exact`` is not used (device, chunk).
    """
    if exact.get("lowest_rank"):
        raise ConfigError("the authors' grid of thresholds needs the exact search")
    index = index or Neighbours(gallery, kind, probed)
    scores, rows = index.nearest(probes, min(depth, len(gallery)))
    mated = mates >= 0
    own = (
        F.normalize(probes[torch.from_numpy(mated)].float())
        * F.normalize(gallery[torch.from_numpy(mates[mated])].float())
    ).sum(1)
    here = rows[mated] == mates[mated][:, None]
    place = scores[mated][here.any(1), here.argmax(1)[here.any(1)]]
    rank = np.full(mated.sum(), len(gallery), np.int64)
    rank[here.any(1)] = (scores[mated][here.any(1)] >= place[:, None]).sum(1)
    return Search(own.double().numpy(), rank, scores[~mated, 0].astype(float), float("inf"))


def _unit(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(rows.float()).cpu().numpy())
