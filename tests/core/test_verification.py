"""Verification metrics against brute force and scikit-learn, on random scores with ties and on hand-made cases."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from btnet_core.data.pairs import open_pairs
from btnet_core.errors import ConfigError, DataError
from btnet_core.evaluation import verification as v
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.images import Resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet


def scores(seed: int, count: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with about count / levels ties each, both classes present."""
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    same[:2] = True, False
    return np.round(
        rng.integers(0, levels, count) / levels + 0.2 * (same & (rng.random(count) < 0.5)), 6
    ), same


def brute_ten_fold(
    similarity: np.ndarray, same: np.ndarray, folds: int
) -> tuple[list[float], list[float]]:
    """The definition, threshold by threshold."""
    accuracies, chosen = [], []
    for test in np.array_split(np.arange(len(same)), folds):
        train = np.setdiff1d(np.arange(len(same)), test)
        values = np.unique(similarity[train])
        candidates = [
            np.nextafter(values[0], -np.inf),
            *((values[1:] + values[:-1]) / 2),
            values[-1],
        ]
        best = max(candidates, key=lambda t: (np.sum((similarity[train] > t) == same[train]), t))
        chosen.append(best)
        accuracies.append(np.mean((similarity[test] > best) == same[test]))
    return accuracies, chosen


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(20, 120),
    st.sampled_from([1, 2, 5, 30, 1000]),
    st.integers(2, 10),
)
def test_ten_fold_is_the_definition(seed: int, count: int, levels: int, folds: int) -> None:
    similarity, same = scores(seed, count, levels)
    result = v.ten_fold_accuracy(similarity, same, folds)
    accuracies, chosen = brute_ten_fold(similarity, same, folds)
    assert list(result.accuracies) == accuracies
    np.testing.assert_allclose(result.thresholds, chosen, rtol=1e-12)
    assert result.mean == np.mean(accuracies)
    assert result.std == np.std(accuracies)


def test_ten_fold_by_hand() -> None:
    # Two folds. Fold 2 alone gives the threshold 0.5 (between 0.4 and 0.6); fold 1 has one mistake at it.
    similarity = np.array([0.9, 0.45, 0.3, 0.1, 0.6, 0.8, 0.4, 0.2])
    same = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool)
    result = v.ten_fold_accuracy(similarity, same, 2)
    np.testing.assert_allclose(result.thresholds, [0.5, 0.375])
    assert result.accuracies == (0.75, 0.75)  # 0.45 rejected in fold 1; 0.4 accepted in fold 2


def test_of_several_best_thresholds_the_largest() -> None:
    # Descending scores F T F T: rejecting all but the best T, or none above the first, both give 3 of 4.
    result = v.ten_fold_accuracy([1.0, 2.0, 3.0, 4.0] * 2, [False, True, False, True] * 2, 2)
    assert result.thresholds == (3.5, 3.5)


def test_threshold_between_float_neighbours() -> None:
    low = 0.5
    high = float(np.nextafter(low, 1))
    result = v.ten_fold_accuracy([low, high] * 2, [False, True] * 2, 2)
    assert result.thresholds == (low, low)
    assert result.mean == 1.0


def test_all_or_none_accepted() -> None:
    assert v.ten_fold_accuracy([1.0, 2.0] * 2, [False] * 4, 2).thresholds == (2.0, 2.0)
    result = v.ten_fold_accuracy([1.0, 2.0] * 2, [True] * 4, 2)
    assert result.thresholds == (np.nextafter(1.0, 0),) * 2
    assert result.mean == 1.0


def test_threshold_does_not_see_the_test_fold() -> None:
    similarity, same = scores(3, 200, 50)
    before = v.ten_fold_accuracy(similarity, same).thresholds[0]
    similarity[:20] = np.linspace(-1, 2, 20)  # fold 0 only
    assert v.ten_fold_accuracy(similarity, same).thresholds[0] == before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 200), st.sampled_from([1, 3, 20, 1000]))
def test_roc_and_auc_match_sklearn(seed: int, count: int, levels: int) -> None:
    similarity, same = scores(seed, count, levels)
    fpr, tpr, _ = roc_curve(same, similarity, drop_intermediate=False)
    curve = v.roc(similarity, same)
    np.testing.assert_allclose(curve.fpr, fpr)
    np.testing.assert_allclose(curve.tpr, tpr)
    for k, threshold in enumerate(curve.thresholds):
        assert np.mean(similarity[same] > threshold) == curve.tpr[k]
        assert np.mean(similarity[~same] > threshold) == curve.fpr[k]
    assert v.auc(similarity, same) == pytest.approx(roc_auc_score(same, similarity))


def test_a_roc_needs_pairs_of_both_kinds() -> None:
    for same in ([True, True], [False, False]):
        with pytest.raises(
            DataError, match=f"all 2 pairs are {'same' if same[0] else 'different'}"
        ):
            v.roc([0.1, 0.2], same)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 200), st.sampled_from([1, 3, 20, 1000]),
    st.sampled_from([0.0, 1e-4, 0.1, 0.29, 0.3, 0.5, 1.0]),
)  # fmt: skip
def test_tar_at_far_is_the_largest_admissible(
    seed: int, count: int, levels: int, far: float
) -> None:
    similarity, same = scores(seed, count, levels)
    fpr, tpr, _ = roc_curve(same, similarity, drop_intermediate=False)
    point = v.tar_at_far(similarity, same, far)
    assert point.rate == pytest.approx(tpr[fpr <= far].max())
    assert point.false_rate <= far
    assert np.mean(similarity[same] > point.threshold) == point.rate
    nearest = v.tar_at_far(similarity, same, far, authors=True)
    distance = np.abs(fpr - far)
    assert nearest.rate == pytest.approx(tpr[distance == distance.min()].max())


def test_strictest_needed_counts_shares_as_floats_do() -> None:
    negatives = np.arange(100.0)
    assert np.sum(negatives > v.strictest_needed(negatives, 0.29)) == 29  # 0.29 * 100 is 28.999…
    tens = np.repeat(negatives[:10], 10)
    assert np.sum(tens > v.strictest_needed(tens, 0.29)) == 20  # the third ten would make it 30
    assert v.strictest_needed(negatives, 1.0) == -np.inf
    assert v.strictest_needed(negatives, 0.0) == 99


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match=r"\(3,\) and \(2,\)"):
        v.ten_fold_accuracy([1.0, 2.0, 3.0], [True, False])
    with pytest.raises(DataError, match="1 of 3 values are not finite"):
        v.auc([1.0, np.nan, 3.0], [True, False, True])
    with pytest.raises(DataError, match="all 2 pairs are different"):
        v.tar_at_far([1.0, 2.0], [False, False], 0.1)
    with pytest.raises(ConfigError, match="folds: got 10 for 3 pairs"):
        v.ten_fold_accuracy([1.0, 2.0, 3.0], [True, False, True])
    with pytest.raises(ConfigError, match=r"got 1\.5"):
        v.tar_at_far([1.0, 2.0], [True, False], 1.5)


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


def test_evaluate_pairs_against_one_pair_at_a_time() -> None:
    pairs, embedder = pair_set(), Counting()

    def unit(image: int, r: int) -> np.ndarray:
        x = pairs.images([image])
        z = (Counting()(x, r) + Counting()(x.flip(-1), r))[0].double().numpy()
        return z / np.linalg.norm(z)

    def accuracy(r1: int, r2: int) -> np.ndarray:
        ends = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
        similarity = np.float32([unit(a, r1) @ unit(b, r2) for a, b in ends])
        return 100 * np.array(v.ten_fold_accuracy(similarity, pairs.same).accuracies)

    report = v.evaluate_pairs(embedder, pairs, [(112, 7), (7, 7)], batch_size=7)
    assert embedder.seen == {
        112: 2 * pairs.num_images,
        7: 2 * pairs.num_images,
    }  # each image once, and its mirror
    both = (accuracy(112, 7) + accuracy(7, 112)) / 2
    assert accuracy(112, 7).mean() != accuracy(7, 112).mean()
    np.testing.assert_allclose(report["112&7"]["folds"], both)
    assert report["112&7"]["accuracy"] == pytest.approx(both.mean())
    assert report["112&7"]["std"] == pytest.approx(both.std())
    assert [(way["first"], way["second"]) for way in report["112&7"]["directions"]] == [
        (112, 7),
        (7, 112),
    ]
    assert report["7&7"]["accuracy"] == pytest.approx(accuracy(7, 7).mean())
    assert len(report["7&7"]["directions"]) == 1
    theirs = v.evaluate_pairs(embedder, pairs, [(112, 7)], cross="authors")
    assert theirs["112&7"]["accuracy"] == pytest.approx(accuracy(112, 7).mean())


def test_evaluate_pairs_without_flip_and_other_sizes() -> None:
    embedder = Counting()
    v.evaluate_pairs(embedder, pair_set(side=56), [(112, 112)], flip=False)
    assert embedder.seen == {112: 30}
    with pytest.raises(ConfigError, match="cross: got 'one'"):
        v.evaluate_pairs(embedder, pair_set(), [(112, 7)], cross="one")


def test_kept_embeddings_are_read_by_every_method_with_the_same_network(
    tmp_path, monkeypatch
) -> None:

    torch.manual_seed(0)
    btnet = BTNet(
        build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16)).eval(), (14,)
    )
    pairs = open_pairs(
        {
            "kind": "drawn",
            "faces": {"kind": "synthetic", "identities": 4, "images": 3, "seed": 0},
            "count": 20,
            "seed": 0,
        }
    )
    hr, bt = UpsamplingEmbedder(btnet.trunk, device="cpu"), BranchEmbedder(btnet, device="cpu")
    settings = [(112, 112), (112, 14), (14, 14)]
    plain = {name: evaluate_pairs(one, pairs, settings) for name, one in (("hr", hr), ("bt", bt))}
    assert evaluate_pairs(hr, pairs, settings, keep=tmp_path) == plain["hr"]
    assert len(list(tmp_path.iterdir())) == 2
    assert evaluate_pairs(bt, pairs, settings, keep=tmp_path) == plain["bt"]
    assert (
        len(list(tmp_path.iterdir())) == 3
    )  # the trunk's at 112 are there already, its branch's are not phi_hr's
    other = {
        "flip": False,
        "how": Resize(kernel="nearest"),
    }  # of pixels at 112: the name alone differs
    for option in other:
        kept = evaluate_pairs(bt, pairs, settings, keep=tmp_path, **{option: other[option]})
        assert kept == evaluate_pairs(bt, pairs, settings, **{option: other[option]})
    assert len(list(tmp_path.iterdir())) == 7
    assert evaluate_pairs(bt, pairs, settings, flip=False) != plain["bt"]
    coarse = BranchEmbedder(btnet, device="cpu", how=Resize(kernel="nearest"))
    assert coarse.fingerprint(14) != bt.fingerprint(14)
    kept = evaluate_pairs(coarse, pairs, settings, keep=tmp_path)
    assert kept == evaluate_pairs(coarse, pairs, settings) != plain["bt"]
    others = dataclasses.replace(
        pairs, checksum="of other faces", images=lambda i: 255 - pairs.images(i)
    )
    kept = evaluate_pairs(bt, others, settings, keep=tmp_path)
    assert kept == evaluate_pairs(bt, others, settings) != plain["bt"]
    monkeypatch.setattr(type(bt), "__call__", lambda *_: pytest.fail("embedded again"))
    assert evaluate_pairs(bt, pairs, settings, keep=tmp_path) == plain["bt"]
    with torch.no_grad():
        next(btnet.trunk.parameters()).add_(1e-3)
    evaluate_pairs(hr, pairs, settings, keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 13  # other weights, other embeddings


def test_summary_over_sets_and_the_later_folds() -> None:
    sets = [
        {"112&7": {"accuracy": 55.0, "std": 4.0, "folds": [60.0, 50.0]}},
        {"112&7": {"accuracy": 80.0, "std": 0.0, "folds": [80.0, 80.0]}},
    ]
    assert v.summarise(sets) == {
        "112&7": {
            "accuracy": 67.5,
            "std": 2.0,
            "sets": [55.0, 80.0],
            "second_half": 65.0,
            "second_halves": [50.0, 80.0],
        }
    }


def test_a_branch_sees_the_trunks_columns_of_the_face() -> None:
    """A trunk of 96 columns: the outer 8 of 112 on each side say nothing, in a branch as in the trunk."""
    torch.manual_seed(0)
    trunk = build_backbone(BackboneConfig(name="mobilefacenet", size=(112, 96)))
    embedder = BranchEmbedder(BTNet(trunk, (14,)), device="cpu", precision="fp32")
    faces = torch.randint(0, 256, (2, 3, 112, 112)).float()
    other = faces.clone()
    other[..., :8], other[..., -8:] = 0, 255
    for r in (112, 14):
        assert torch.equal(embedder(faces, r), embedder(other, r))
        assert not torch.equal(embedder(faces, r), embedder(faces.flip(-1), r))


def test_centred_cosines_by_hand() -> None:
    """Unit embeddings less the centre of their resolution, made unit again."""
    pairs, centre = pair_set(), {112: torch.full((6,), 0.1), 7: torch.arange(6) / 10}
    found = v.pair_similarities(Counting(), pairs, [(112, 7)], centre=centre, flip=False)
    pixels, sides = pairs.images(np.arange(pairs.num_images)), []
    for r, index in ((112, pairs.first), (7, pairs.second)):
        z = Counting()(pixels, r).double()
        z = z / z.norm(dim=1, keepdim=True) - centre[r]
        sides.append((z / z.norm(dim=1, keepdim=True))[index])
    np.testing.assert_allclose(found[112, 7], (sides[0] * sides[1]).sum(1), atol=1e-6)
    with pytest.raises(ConfigError, match=r"^centre: has resolutions \[112\], needs \[7\], too"):
        v.pair_similarities(Counting(), pairs, [(112, 7)], centre={112: centre[112]})


def test_images_are_read_once_for_all_resolutions() -> None:
    pairs, read = pair_set(), []
    images = pairs.images
    pairs.images = lambda i: (read.append(len(i)), images(i))[1]
    unit = v.unit_embeddings(Counting(), pairs, [7, 112, 14, 7])
    assert read == [30]
    assert sorted(unit) == [7, 14, 112]


def test_what_is_reported_of_each_direction() -> None:
    """In %, but for the thresholds; as many folds as asked for; the AUC is the directions' mean."""
    pairs = pair_set()
    found = v.evaluate_pairs(Counting(), pairs, [(112, 7)], folds=4)["112&7"]
    scores = v.pair_similarities(Counting(), pairs, [(112, 7), (7, 112)])
    for row, way in zip(found["directions"], ((112, 7), (7, 112)), strict=True):
        folds = v.ten_fold_accuracy(scores[way], pairs.same, 4)
        assert row == {
            "first": way[0],
            "second": way[1],
            "accuracy": pytest.approx(100 * folds.mean),
            "std": pytest.approx(100 * folds.std),
            "folds": pytest.approx([100 * value for value in folds.accuracies]),
            "auc": pytest.approx(100 * roc_auc_score(pairs.same, scores[way])),
            "thresholds": list(folds.thresholds),
        }
    assert found["auc"] == pytest.approx(np.mean([row["auc"] for row in found["directions"]]))
    assert found.keys() == {"accuracy", "std", "folds", "auc", "directions"}
    point = v.tar_at_far([0.9, 0.7, 0.6, 0.1], [True, False, True, False], 0.4, authors=True)
    assert point == (1.0, 0.5, 0.1)  # of two points as near the one with the larger TAR


@pytest.mark.parametrize(("same", "different", "good"), [
    (1, 9, True), (9, 1, True), (1, 8, False), (0, 12, False), (12, 0, False),
])  # fmt: skip
def test_pairs_need_both_kinds_and_one_for_each_fold(same: int, different: int, good: bool) -> None:
    pairs = SimpleNamespace(name="a set", same=torch.tensor([True] * same + [False] * different))
    if good:
        v.check_pairs(pairs)
        return
    told = (
        f"a set: {same} pairs of one person and {different} of two; "
        "expected both kinds, and 10 pairs or more"
    )
    with pytest.raises(DataError) as refused:
        v.check_pairs(pairs)
    assert str(refused.value) == told
