"""Centred embeddings and fitted lengths against their formulae."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from btnet_core.errors import ConfigError
from btnet_core.evaluation import verification as v
from btnet_paper import beyond


class Counting:
    """An embedder that knows nothing of faces: mean colours, turned by an angle that depends on r."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __call__(self, pixels: torch.Tensor, r: int) -> torch.Tensor:
        assert pixels.shape[1:] == (3, 112, 112)
        self.seen[r] = self.seen.get(r, 0) + len(pixels)
        left, right = pixels.float()[..., :56].mean((2, 3)), pixels.float()[..., 56:].mean((2, 3))
        return torch.cat([left * (1 + 0.5 * (r == 7)), right - 50 * (r == 7)], 1) - 100


def pair_set(count: int = 40, images: int = 30, side: int = 112) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (images, 3, 1, 2), generator=generator, dtype=torch.uint8)
    pixels = colours.repeat_interleave(side, 2).repeat_interleave(side // 2, 3)
    index = torch.randint(0, images, (2, count), generator=generator)
    same = torch.arange(count) % 2 == 0
    return SimpleNamespace(
        first=index[0],
        second=index[1],
        same=same,
        num_images=images,
        images=lambda i: pixels[torch.as_tensor(i)],
    )


def test_centred_embeddings_lose_what_all_faces_of_a_resolution_share() -> None:
    pairs, embedder = pair_set(), Counting()
    faces = pair_set(images=9)
    sized = type(
        "Faces",
        (),
        {"images": staticmethod(faces.images), "checksum": "nine", "__len__": lambda self: 9},
    )()
    centre = beyond.centres(embedder, sized, [112, 7], count=3, flip=False)
    assert embedder.seen == {112: 3, 7: 3}

    def unit(pixels: torch.Tensor, r: int) -> torch.Tensor:
        return torch.nn.functional.normalize(Counting()(pixels, r))

    chosen = faces.images([0, 4, 8])
    assert torch.allclose(centre[7], unit(chosen, 7).mean(0))
    first, second = pairs.images(pairs.first), pairs.images(pairs.second)
    a, b = unit(first, 112) - centre[112], unit(second, 7) - centre[7]
    wanted = torch.nn.functional.cosine_similarity(a, b).double().numpy()
    scores = v.pair_similarities(embedder, pairs, [(112, 7)], centre=centre, flip=False)[112, 7]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    plain = v.pair_similarities(embedder, pairs, [(112, 7)], flip=False)[112, 7]
    assert np.abs(scores - plain).max() > 0.1
    report = v.evaluate_pairs(embedder, pairs, [(112, 7)], centre=centre, flip=False)
    assert (
        report["112&7"]["auc"]
        != v.evaluate_pairs(embedder, pairs, [(112, 7)], flip=False)["112&7"]["auc"]
    )
    with pytest.raises(ConfigError, match=r"centre: has resolutions \[7\], needs \[112\], too"):
        v.evaluate_pairs(embedder, pairs, [(112, 7)], centre={7: centre[7]})


def test_fitted_lengths_are_the_least_squares_factors() -> None:
    faces = pair_set(images=9)
    sized = type(
        "Faces",
        (),
        {"images": staticmethod(faces.images), "checksum": "nine", "__len__": lambda self: 9},
    )()
    embedder = Counting()
    factors = beyond.fitted_lengths(embedder, sized, [112, 7], count=3)
    assert embedder.seen == {112: 3, 7: 3}
    assert set(factors) == {112, 7}
    assert factors[112] == 1.0
    chosen = faces.images([0, 4, 8])
    z, wanted = (Counting()(chosen, r).double().flatten() for r in (7, 112))
    (best,) = np.linalg.lstsq(z[:, None].numpy(), wanted.numpy(), rcond=None)[0]
    assert factors[7] == pytest.approx(best)
    assert abs(best - 1) > 1e-2


def test_lengths_multiply_each_resolutions_embeddings() -> None:
    longer = beyond.with_lengths(lambda faces, r: faces * r, {7: 0.5, 14: 2.0})
    assert [longer(torch.ones(1), r).item() for r in (7, 14)] == [3.5, 28.0]


def test_the_table_of_alternatives() -> None:
    cell = {"accuracy": 90.0, "sets": [89.0, 91.0]}
    plain = {
        "accuracy": {"112&14": cell},
        "macs": {"14": 2_000_000_000},
        "stored": 500_000,
        "minutes": 3,
    }
    found = beyond.alternatives(
        {"rows": {"phi_bt": plain, "SRCNN": {**plain, "psnr_gain": {"14": 1.5}}}}
    )
    assert list(found.columns) == ["112&14", "GMACs, 14 px", "stored, M", "minutes", "PSNR, dB"]
    assert found.loc["SRCNN"].tolist() == [90.0, 2.0, 0.5, 3.0, 1.5]
    assert np.isnan(found.loc["phi_bt", "PSNR, dB"])
