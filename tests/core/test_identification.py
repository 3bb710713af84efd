"""Open-set identification against brute force over the full score matrix, with ties, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from btnet_core.errors import ConfigError, DataError
from btnet_core.evaluation import identification as idn
from btnet_core.images import Resize, resize
from btnet_core.models.btnet import select_branch


def coarse(count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of four +-1, or of one +-1 and zeros: cosines are multiples of 1/2, exact in float32; ties abound."""
    signs = 2.0 * torch.randint(0, 2, (count, 4), generator=generator) - 1
    single = torch.randint(0, 2, (count, 1), generator=generator).bool()
    return torch.where(
        single & (torch.arange(4) != torch.randint(0, 4, (count, 1), generator=generator)),
        0.0,
        signs,
    )


def brute(scores: np.ndarray, mates: np.ndarray, fpir: float, rank: int) -> tuple[float, float]:
    """TPIR and the FPIR reached: every threshold tried, in the words of the definition."""
    unmated = scores[mates < 0].max(1)
    mated = scores[mates >= 0]
    own = mated[np.arange(len(mated)), mates[mates >= 0]]
    ranks = (mated >= own[:, None]).sum(1)
    candidates = np.unique(np.append(scores, [-2.0]))
    t = min(t for t in candidates if np.mean(unmated > t) <= fpir)
    return 100 * np.mean((ranks <= rank) & (own > t)), 100 * np.mean(unmated > t)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3, 20]),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_open_set_is_the_definition(seed: int, entries: int, rank: int, fpir: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gallery, probes = coarse(entries, generator), coarse(40, generator)
    mates = np.where(
        np.arange(40) % 3 == 0, -1, torch.randint(0, entries, (40,), generator=generator).numpy()
    )
    found = idn.search(probes, gallery, mates, chunk=7 * entries)
    report = idn.open_set(found, [fpir], rank)
    scores = (F.normalize(probes) @ F.normalize(gallery).T).double().numpy()
    tpir, reached = brute(scores, mates, fpir, rank)
    assert report["tpir"][str(fpir)] == pytest.approx(tpir)
    assert report["fpir"][str(fpir)] == pytest.approx(reached)
    hit = np.where(found.rank <= rank, found.mate, -9.0)
    labels = np.repeat([1, 0], [len(hit), len(found.unmated)])
    # Mates of too low a rank sit below everything; scikit-learn's area is then the area under TPIR-N.
    assert report["auc"] == pytest.approx(
        100 * roc_auc_score(labels, np.append(hit, found.unmated))
    )


def test_by_hand() -> None:
    found = idn.Search(
        mate=np.array([0.9, 0.8, 0.7, 0.2]), rank=np.array([1, 25, 2, 1]), unmated=np.array([0.75, 0.5, 0.3, 0.1]),
        lowest=-0.1,
    )  # fmt: skip
    report = idn.open_set(found, (0.25, 0.5))
    assert report["thresholds"] == {"0.25": 0.5, "0.5": 0.3}
    assert report["tpir"] == {"0.25": 50.0, "0.5": 50.0}  # 0.9 and 0.7; 0.8 is at rank 25
    assert report["fpir"] == {"0.25": 25.0, "0.5": 50.0}
    assert report["auc"] == pytest.approx(
        100 * (4 + 3 + 1) / 16
    )  # unmated probes below 0.9, 0.7 and 0.2
    assert report["ranks"] == {"1": 50.0, "5": 75.0, "10": 75.0, "20": 75.0}
    assert idn.open_set(found, (1.0,))["tpir"] == {"1.0": 75.0}  # never counts the mate at rank 25


def test_ties_count_against_the_mate() -> None:
    """A collapsed model, all embeddings equal, must not be found to identify anyone."""
    probes, gallery = torch.ones(6, 4), torch.ones(5, 4)
    found = idn.search(probes, gallery, np.array([0, 1, 2, -1, -1, -1]))
    assert found.rank.tolist() == [5, 5, 5]
    report = idn.open_set(found, (0.1,), rank=20)
    assert report["tpir"] == {"0.1": 0.0}
    assert report["auc"] == 50.0


def test_authors_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery, probes = (
        torch.randn(30, 8, generator=generator),
        torch.randn(200, 8, generator=generator),
    )
    mates = np.where(np.arange(200) < 80, -1, np.arange(200) % 30)
    probes += 1.5 * gallery[mates] * torch.from_numpy(mates >= 0)[:, None]
    scores = F.normalize(probes) @ F.normalize(gallery).T
    top, place = scores[80:].topk(20, 1)
    unmated = scores[:80].amax(1)
    grid = np.linspace(min(top.min().item(), unmated.min().item()), unmated.max().item(), 1000)
    correct = place == torch.from_numpy(mates[80:])[:, None]
    dir_ = np.array([(correct & (top > t)).sum().item() / 120 for t in grid])
    far = np.array([(unmated > t).float().mean().item() for t in grid])
    found = idn.search(probes, gallery, mates, lowest_rank=20, chunk=300)
    assert found.lowest == pytest.approx(top.min().item())
    labels = np.where(mates < 0, -1, mates + 100)
    whole = idn.identify(gallery, np.arange(30) + 100, probes, labels, authors=True)
    again = idn.open_set(found, authors=True)
    for key in ("tpir", "fpir", "thresholds"):
        assert whole[key] == pytest.approx(again[key], rel=1e-4), key
    assert whole["auc"] == pytest.approx(again["auc"])
    plain = idn.identify(gallery, np.arange(30) + 100, probes, labels, rank=2)
    searched = idn.search(probes, gallery, mates)
    assert searched.lowest == np.inf
    assert plain == {**idn.open_set(searched, rank=2), "auc": pytest.approx(plain["auc"])}
    report = idn.open_set(found, (0.3, 0.1), authors=True)
    for target in (0.3, 0.1):
        assert report["tpir"][str(target)] == pytest.approx(
            100 * dir_[np.argmin(np.abs(far - target))]
        )
    assert report["auc"] == pytest.approx(100 * np.trapezoid(dir_[::-1], far[::-1]))
    assert idn.open_set(found, (0.3, 0.1))["auc"] != pytest.approx(report["auc"], abs=1e-6)


def test_prototypes_mean_of_unnormalised_features() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    labels, entries = idn.prototypes(features, [7, 7, 3])
    assert labels.tolist() == [3, 7]
    assert torch.equal(entries, torch.tensor([[2.0, 2.0], [0.5, 1.5]]))
    _, unit = idn.prototypes(features, [7, 7, 3], normalised=True)
    assert torch.allclose(unit[1], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_gallery_entry_is_the_mean_of_features_as_long_as_they_are(normalised: bool) -> None:
    """(4, 0) and (0, 1) make (4, 1), nearer to the x axis than the unmated probe; their units make the diagonal."""
    gallery, mated = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    probes, options = torch.cat([mated, torch.tensor([[2.0, 1.5]])]), {"normalised": True}
    given = options if normalised else {}
    found = idn.identify(gallery, [5, 5], probes, [5, -1], fpir=(0.0,), **given)
    assert found["tpir"]["0.0"] == (0 if normalised else 100)
    (row,) = idn.evaluate_strategies(
        lambda rows, r: torch.cat([gallery, probes])[torch.from_numpy(rows)],
        [(28, 28)] * 4, [5, 5, 5, -1], [True, True, False, False], fpir=(0.0,), strategies=[("max", "ceil")], **given,
    ).values()  # fmt: skip
    assert row["tpir"] == found["tpir"]


def test_a_mate_beyond_the_rank_is_never_found() -> None:
    """Everything may pass at FPIR 1, but for the mate of rank 2; and JSON has no infinity."""
    gallery, probes = torch.eye(3), torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.0], [0.1, 0, 0.2]])
    found = idn.search(probes, gallery, np.array([1, 1, -1]))
    assert found.rank.tolist() == [2, 1]
    values = idn.open_set(found, (1.0,), rank=1)
    assert values["tpir"]["1.0"] == values["ranks"]["1"] == 50
    assert values["fpir"]["1.0"] == 100
    assert np.isfinite(values["thresholds"]["1.0"])
    assert idn.open_set(found, (1.0,), rank=2)["tpir"]["1.0"] == 100


def test_the_fpirs_are_the_papers_and_the_authors() -> None:
    found = idn.search(torch.eye(3), torch.eye(3)[:2], np.array([0, 1, -1]))
    assert list(idn.open_set(found)["tpir"]) == ["0.3", "0.2", "0.1", "0.01"]


def test_mate_rows() -> None:
    assert idn.mate_rows([9, 4, 6], [4, 9, 5, -1, 6, 10]).tolist() == [1, 0, -1, -1, 2, -1]
    with pytest.raises(DataError, match="label 4 has more than one entry"):
        idn.mate_rows([4, 9, 4], [4])


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="0 unmated probes"):
        idn.open_set(idn.search(torch.eye(2), torch.eye(2), np.array([0, 1])))
    with pytest.raises(DataError, match="not finite"):
        idn.search(torch.full((2, 2), torch.nan), torch.eye(2), np.array([0, -1]))


def test_strategies_embed_each_image_once_and_match_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(6, 60, (90, 2))
    in_gallery = np.arange(90) < 30
    labels = np.where(np.arange(90) < 60, np.arange(90) % 15, -1)
    base = torch.from_numpy(rng.normal(size=(90, 6))).float()
    turn = {r: torch.from_numpy(rng.normal(size=(6, 6))).float() for r in (7, 14, 28, 112)}
    calls: list[tuple[int, int]] = []

    def embed(indices: np.ndarray, r: int) -> torch.Tensor:
        calls.extend((int(i), r) for i in indices)
        return base[torch.from_numpy(indices)] @ turn[r]

    reports = idn.evaluate_strategies(embed, sizes, labels, in_gallery, fpir=(0.3,), rank=5)
    assert len(reports) == 9
    assert len(calls) == len(set(calls))
    for name, report in reports.items():
        indicator, rounding = name.split("+")
        r = [
            select_branch(int(w), int(h), indicator=indicator, rounding=rounding) for w, h in sizes
        ]
        z = torch.stack([base[i] @ turn[r[i]] for i in range(90)])
        expected = idn.identify(
            z[in_gallery],
            labels[in_gallery],
            z[~in_gallery],
            labels[~in_gallery],
            fpir=(0.3,),
            rank=5,
        )
        assert report["auc"] == pytest.approx(expected["auc"])
        for key in ("tpir", "fpir", "ranks", "thresholds"):
            assert report[key] == pytest.approx(expected[key]), key
        assert report["branches"] == {
            str(k): pytest.approx(100 * r.count(k) / 90) for k in (7, 14, 28, 112)
        }
        for side in (0, 1):
            assert report["scale"][side] == pytest.approx(np.mean(np.array(r) / sizes[:, side]))
    assert len({report["auc"] for report in reports.values()}) > 5


@pytest.mark.parametrize(("upsample", "rows"), [(False, 14), (True, 112)])
def test_native_embedder_resizes_once(upsample: bool, rows: int) -> None:
    images = [torch.full((3, 9 + i, 7 + i), 10 * i, dtype=torch.uint8) for i in range(5)]
    seen: list[tuple[tuple[int, ...], int]] = []

    def embedder(pixels: torch.Tensor, r: int) -> torch.Tensor:
        seen.append((tuple(pixels.shape), r))
        return pixels.mean((2, 3))

    embed = idn.native_embedder(embedder, images.__getitem__, upsample=upsample, batch_size=2)
    assert embed(np.array([4, 0, 2]), 14)[:, 0].tolist() == [40.0, 0.0, 20.0]
    assert seen == [((2, 3, rows, rows), rows), ((1, 3, rows, rows), rows)]

    del seen[:]
    cut = {"crop": lambda pixels: pixels[..., 1:-1] + 3, "size": (112, 96)}
    embed = idn.native_embedder(embedder, images.__getitem__, upsample=upsample, **cut)
    assert embed(np.arange(2), 14)[:, 0].tolist() == [3.0, 13.0]
    assert seen == [((2, 3, rows, rows * 96 // 112), rows)]


def test_native_faces_of_many_batches_by_the_given_kernel() -> None:
    faces = torch.randint(0, 256, (7, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def embedder(pixels: torch.Tensor, r: int) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.flatten(1)

    how = Resize(kernel="nearest")
    embed = idn.native_embedder(embedder, faces.byte().__getitem__, how=how, batch_size=2)
    assert torch.equal(embed(np.arange(7), 5), resize(faces, 5, how).flatten(1))
    assert seen == [2, 2, 2, 1]


def test_who_is_in_the_gallery_may_be_told_by_numbers() -> None:
    """0 and 1 as a file has them, not indices."""
    z, options = torch.eye(4), {"fpir": (0.5,), "strategies": [("max", "ceil")]}
    by = [
        idn.evaluate_strategies(lambda rows, r: z[torch.from_numpy(rows)], [(28, 28)] * 4,
                                [5, 6, 5, -1], told, **options)
        for told in ([1, 1, 0, 0], [True, True, False, False])
    ]  # fmt: skip
    assert by[0] == by[1]


def test_the_authors_grid_begins_at_the_lowest_score() -> None:
    """Of an unmated probe where that is lower than any mated probe's N-th best."""
    found = idn.Search(
        mate=np.array([0.9, 0.1]), rank=np.array([1, 1]), unmated=np.array([-0.5, 0.2, 0.5]),
        lowest=0.0,
    )  # fmt: skip
    grid = np.linspace(-0.5, 0.5, 1000)
    assert idn.open_set(found, (1.0, 0.0), authors=True)["thresholds"]["0.0"] == 0.5
    least = idn.open_set(found, (0.6,), authors=True)["thresholds"]["0.6"]
    assert least == grid[0]  # all points down to -0.5 have FPIR 2/3, the first of them is taken


def test_a_device_that_is_named_is_asked_for() -> None:
    z, nowhere = torch.eye(3), {"device": "nowhere"}
    for call in (
        lambda: next(idn.score_chunks(z, np.arange(3), z, **nowhere)),
        lambda: idn.search(z, z, np.array([0, 1, -1]), **nowhere),
        lambda: idn.identify(z, [0, 1, 2], z, [0, 1, -1], **nowhere),
    ):
        with pytest.raises(ConfigError, match="nowhere"):
            call()


def test_scores_come_in_blocks_of_one_buffer() -> None:
    """Of as many rows as ``chunk`` scores allow, one at least; the last block holds the rest."""
    probes, gallery = torch.eye(7)[:, :5] + 0.1, torch.eye(5)
    rows = np.array([6, 0, 2, 3, 1])
    expected = F.normalize(probes[rows]) @ gallery.T
    for chunk, blocks in ((12, [(0, 2), (2, 4), (4, 5)]), (1, [(k, k + 1) for k in range(5)])):
        found, places = [], set()
        for part, scores in idn.score_chunks(probes, rows, gallery, "cpu", chunk):
            torch.testing.assert_close(scores, expected[part])
            found.append((part.start, part.stop))
            places.add(scores.data_ptr())
        assert found == blocks
        assert len(places) == 1
