"""1:N by an index of faiss: what it finds is what the exact search has; what it does not find counts against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from btnet_core.errors import ConfigError
from btnet_core.evaluation import identification
from btnet_tools import neighbours
from btnet_tools.neighbours import Neighbours

needs_faiss = pytest.mark.skipif(neighbours.faiss is None, reason="pip install -e '.[search]'")


def faces() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """400 entries; 60 probes, some near their mate, some far, every third without one."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(400, 16, generator=generator)
    mates = np.where(np.arange(60) % 3 == 0, -1, 5 * np.arange(60))
    own = torch.where(torch.from_numpy(mates >= 0)[:, None], gallery[torch.from_numpy(mates)], 0)
    return gallery, own + torch.randn(60, 16, generator=generator), mates


@needs_faiss
@pytest.mark.parametrize("stored", ["Flat", "SQ8"])
def test_with_every_list_it_is_the_exact_search(stored: str) -> None:
    gallery, probes, mates = faces()
    exact = identification.search(probes, gallery, mates, device="cpu")
    found = Neighbours(gallery, stored, probed=20).search(probes, mates, depth=400)
    assert len(np.unique(exact.rank)) > 3
    np.testing.assert_allclose(found.mate, exact.mate, atol=1e-5)
    if stored == "Flat":
        np.testing.assert_array_equal(found.rank, exact.rank)
        np.testing.assert_allclose(found.unmated, exact.unmated, atol=1e-5)
    else:
        assert np.mean(found.rank == exact.rank) > 0.8
        np.testing.assert_allclose(found.unmated, exact.unmated, atol=0.02)


@needs_faiss
def test_a_mate_that_is_not_found_has_the_last_rank() -> None:
    gallery, probes, mates = faces()
    exact = identification.search(probes, gallery, mates, device="cpu")
    deep = Neighbours(gallery, probed=20).search(probes, mates, depth=3)
    assert (deep.rank[exact.rank > 3] == 400).all()
    assert (deep.rank[exact.rank <= 3] == exact.rank[exact.rank <= 3]).all()
    narrow = Neighbours(gallery, probed=1).search(probes, mates)
    assert (narrow.rank == 400).sum() > (exact.rank > 20).sum()
    assert (narrow.unmated <= exact.unmated + 1e-5).all()


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "faiss", None)
    with pytest.raises(ConfigError, match=r"\[search\]"):
        Neighbours(torch.randn(10, 4))
