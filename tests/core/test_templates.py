"""Template aggregation and the IJB-C protocols against loops written from their definitions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve
from torch.nn import functional as F

from btnet_core.data.ijbc import TemplateSet
from btnet_core.errors import ConfigError, DataError
from btnet_core.evaluation import templates as tp


def loop_aggregate(features, template, media, score):
    result = {}
    for t in np.unique(template):
        parts = []
        for m in np.unique(media[template == t]):
            rows = np.flatnonzero((template == t) & (media == m))
            parts.append(np.mean(features[rows] * score[rows, None], axis=0))
        result[t] = np.sum(parts, axis=0)
    return np.array(list(result)), np.stack(list(result.values()))


@pytest.mark.parametrize("weighted", [False, True])
def test_aggregate_is_the_definition(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    features, score = rng.normal(size=(200, 5)), rng.random(200)
    template, media = (
        rng.choice([3, 40, 7, 1000], 200),
        rng.integers(-3, 12, 200),
    )  # media ids recur across templates
    ids, result = tp.aggregate(
        torch.from_numpy(features), template, media, score if weighted else None
    )
    expected_ids, expected = loop_aggregate(
        features, template, media, score if weighted else np.ones(200)
    )
    assert ids.tolist() == expected_ids.tolist() == [3, 7, 40, 1000]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_aggregate_by_hand() -> None:
    # One template: a video of two frames (mean 2, 0) and a still (0, 3) of half the score.
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    _, result = tp.aggregate(features, [5, 5, 5], [1, 1, 2], [1.0, 1.0, 0.5])
    assert torch.allclose(result, torch.tensor([[2.0, 1.5]]))
    with pytest.raises(DataError, match="3 features, 2 template"):
        tp.aggregate(features, [5, 5], [1, 1], None)


def data(seed: int = 0):
    """40 subjects; gallery G1 has 0..14, G2 15..29; five probes of each of 0..29."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(40, 6))
    subject = np.concatenate([np.arange(40), np.repeat(np.arange(30), 5)])
    ids = np.sort(rng.choice(5000, len(subject), replace=False))
    features = torch.from_numpy(centre[subject] + 0.6 * rng.normal(size=(len(subject), 6))).float()
    galleries = {"G1": (ids[:15], subject[:15]), "G2": (ids[15:30], subject[15:30])}
    return features, ids, galleries, (ids[40:], subject[40:])


def test_pair_scores_in_chunks() -> None:
    features, *_ = data()
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, len(features), (2, 1000))
    expected = F.cosine_similarity(
        features[torch.from_numpy(first)], features[torch.from_numpy(second)]
    )
    np.testing.assert_allclose(
        tp.pair_scores(features, first, second, chunk=77), expected, atol=1e-6
    )


def test_identify_two_galleries() -> None:
    features, ids, galleries, probes = data()
    report = tp.identify_templates(features, ids, galleries, probes, fpir=0.1, rank=2)
    unit, at = F.normalize(features).numpy(), {t: k for k, t in enumerate(ids)}
    rates = []
    for templates, subjects in galleries.values():
        scores = unit[[at[t] for t in probes[0]]] @ unit[[at[t] for t in templates]].T
        inside = np.isin(probes[1], subjects)
        unmated = np.sort(scores[~inside].max(1))[::-1]
        t = unmated[7]  # 75 unmated probes, 7 may score above
        found = 0
        for row, who in zip(scores[inside], probes[1][inside], strict=True):
            own = row[list(subjects).index(who)]
            found += own > t and np.sum(row >= own) <= 2
        rates.append(100 * found / inside.sum())
    assert [report["G1"]["tpir"]["0.1"], report["G2"]["tpir"]["0.1"]] == pytest.approx(rates)
    assert report["tpir"] == pytest.approx(np.mean(rates))
    assert 0 < report["tpir"] < 100
    assert (report["G1"]["mated"], report["G1"]["unmated"]) == (75, 75)


def test_identify_merged_as_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    features, ids, galleries, probes = data()
    probes = (probes[0][:143], probes[1][:143])  # 0.1 of them: 14.3
    unit, at = F.normalize(features).numpy(), {t: k for k, t in enumerate(ids)}
    scores = (
        unit[[at[t] for t in probes[0]]]
        @ unit[[at[t] for t in np.concatenate([g[0] for g in galleries.values()])]].T
    )
    subjects = np.concatenate([g[1] for g in galleries.values()])
    mated = probes[1][:, None] == subjects[None]
    negatives = np.sort(scores[~mated])[::-1]
    threshold = negatives[math.ceil(0.1 * 143) - 1]
    for chunk in (2**26, 17 * 30):
        monkeypatch.setattr(tp.score_chunks, "__defaults__", ("cpu", chunk))
        point = tp.identify_merged(features, ids, galleries, probes, fpir=0.1)
        assert point.threshold == pytest.approx(threshold, abs=1e-6)
        assert point.rate == pytest.approx(np.mean(scores[mated] > threshold))
        assert point.false_rate == pytest.approx(14 / 143)
    # The mate of the second probe scores as the highest negative pair: it is not above it.
    corners = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1]])
    halves = {"G1": (np.array([0]), [5]), "G2": (np.array([1]), [6])}
    point = tp.identify_merged(corners, np.arange(4), halves, (np.array([2, 3]), [5, 6]), fpir=0.5)
    assert (point.rate, point.threshold) == (0.5, pytest.approx(0.5**0.5))
    with pytest.raises(DataError, match="68 have no mate"):
        tp.identify_merged(features, ids, {"G1": galleries["G1"]}, probes)


def test_template_without_images_is_named() -> None:
    with pytest.raises(DataError, match="pairs: template 4 \\(and 1 more\\) has no images"):
        tp.rows_of(np.array([1, 3, 7]), [3, 4, 7, 9], "pairs")


def template_set() -> TemplateSet:
    rng = np.random.default_rng(2)
    subject = np.repeat(np.arange(12), 6)  # two templates of three images a subject
    template = 100 + np.arange(72) // 3
    colours = np.clip(rng.integers(60, 200, (12, 6))[subject] + rng.normal(0, 25, (72, 6)), 0, 255)
    pixels = (
        torch.from_numpy(colours).to(torch.uint8).reshape(72, 3, 1, 2).repeat_interleave(112, 2)
    )
    pixels = pixels.repeat_interleave(56, 3)
    ids = np.arange(100, 124)
    pairs = np.array([(a, b) for a in ids for b in ids if a < b])
    return TemplateSet(
        name="hand", checksum="", images=lambda i: pixels[torch.as_tensor(i)], template=template,
        media=np.arange(72) // 2, score=rng.random(72), first=pairs[:, 0], second=pairs[:, 1],
        same=(pairs[:, 0] - 100) // 2 == (pairs[:, 1] - 100) // 2,
        galleries={"G1": (ids[0:12:2], np.arange(6)), "G2": (ids[12::2], np.arange(6, 12))},
        probes=(ids[1::2], np.arange(12)),
    )  # fmt: skip


def embedder(pixels: torch.Tensor, r: int) -> torch.Tensor:
    left, right = pixels.float()[..., :56].mean((2, 3)), pixels.float()[..., 56:].mean((2, 3))
    return torch.cat([2 * left - 256, right - 128], 1) * (r / 112)  # a mirror image is another


def test_evaluate_templates_end_to_end() -> None:
    sets = template_set()
    report = tp.evaluate_templates(
        embedder, sets, [(112, 28), (28, 28)], far=0.05, fpir=0.2, rank=3
    )["112&28"]
    pixels = sets.images(np.arange(72))
    features = (embedder(pixels, 112) + embedder(pixels.flip(-1), 28)).numpy().astype(np.float64)
    ids, result = loop_aggregate(features, sets.template, sets.media, sets.score)
    unit = result / np.linalg.norm(result, axis=1, keepdims=True)
    similarity = np.sum(unit[sets.first - 100] * unit[sets.second - 100], axis=1)
    fpr, tpr, _ = roc_curve(sets.same, similarity, drop_intermediate=False)
    assert report["tar"] == pytest.approx(100 * tpr[fpr <= 0.05].max())
    assert 0 < report["tar"] < 100
    assert report["far"] <= 5
    expected = tp.identify_templates(
        torch.from_numpy(result), ids, sets.galleries, sets.probes, fpir=0.2, rank=3
    )
    assert report["tpir"] == pytest.approx(expected["tpir"])
    theirs = tp.evaluate_templates(embedder, sets, [(112, 28)], far=0.05, fpir=0.2, authors=True)[
        "112&28"
    ]
    plain = loop_aggregate(features, sets.template, sets.media, np.ones(72))[1]
    alike = F.cosine_similarity(*torch.from_numpy(plain[[sets.first - 100, sets.second - 100]]))
    unweighted = tp.evaluate_templates(embedder, sets, [(112, 28)], far=0.05, weighted=False)
    strangers = np.sort(alike.numpy()[~sets.same])[::-1]
    threshold = strangers[int(0.05 * len(strangers))]
    assert unweighted["112&28"]["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert abs(threshold - report["threshold"]) > 1e-4
    distance = np.abs(fpr - 0.05)
    assert theirs["tar"] == pytest.approx(100 * tpr[distance == distance.min()].max())
    assert set(theirs["identification"]) == {"rate", "false_rate", "threshold"}
    assert theirs["tpir"] == 100 * theirs["identification"]["rate"] > 0
    assert report["identification"]["G1"]["tpir"] == pytest.approx(expected["G1"]["tpir"])
    far = (7 + 0.7) / len(strangers)  # nearest to it: the point where 8 strangers pass, not 7
    for authors, passing in ((False, 7), (True, 8)):
        options = {"far": far, "fpir": 0.2, "authors": authors}
        row = tp.evaluate_templates(embedder, sets, [(112, 28)], **options)["112&28"]
        assert row["far"] == pytest.approx(100 * passing / len(strangers))


def test_unit_features_weigh_the_two_images_alike() -> None:
    sets, settings, options = (
        template_set(),
        [(112, 28), (28, 28)],
        {"far": 0.05, "fpir": 0.2, "rank": 3},
    )
    weigh = lambda factor: lambda pixels, r: factor(r) * embedder(pixels, r)  # noqa: E731
    plain = tp.evaluate_templates(embedder, sets, settings, **options)
    unit = tp.evaluate_templates(embedder, sets, settings, normalised=True, **options)
    same = tp.evaluate_templates(
        weigh(lambda r: 112 / r), sets, settings, normalised=True, **options
    )
    assert unit["112&28"]["threshold"] == pytest.approx(same["112&28"]["threshold"], abs=1e-5)
    assert unit["112&28"]["threshold"] != pytest.approx(plain["112&28"]["threshold"], abs=1e-3)


def test_each_image_is_embedded_once_for_a_resolution_and_a_side() -> None:
    sets, seen = template_set(), []

    def counting(pixels: torch.Tensor, r: int) -> torch.Tensor:
        seen.append((r, torch.equal(pixels, sets.images(np.arange(72)).float())))
        return embedder(pixels, r)

    settings = [(112, 7), (112, 28), (28, 28), (7, 7), (112, 112)]
    report = tp.evaluate_templates(counting, sets, settings, far=0.05)
    assert list(report) == ["112&7", "112&28", "28&28", "7&7", "112&112"]
    assert len(seen) == len(set(seen)) == 6  # upright and mirrored
    alone = [
        tp.evaluate_templates(embedder, sets, [pair], far=0.05)[f"{pair[0]}&{pair[1]}"]
        for pair in settings
    ]
    assert list(report.values()) == alone


def test_embeddings_are_kept_without_their_lengths(tmp_path: Path) -> None:
    sets, seen = template_set(), []

    class Known:
        fingerprint = staticmethod(lambda r: f"a network at {r}")

        def __call__(self, pixels: torch.Tensor, r: int) -> torch.Tensor:
            seen.append(r)
            return embedder(pixels, r)

    settings, lengths = [(112, 28), (28, 28)], {112: 1.0, 28: 5.0}
    plain = tp.evaluate_templates(embedder, sets, settings, far=0.05)
    longer = tp.evaluate_templates(
        lambda pixels, r: lengths[r] * embedder(pixels, r), sets, settings, far=0.05
    )
    for _ in range(2):
        kept = {"far": 0.05, "keep": tmp_path}
        assert tp.evaluate_templates(Known(), sets, settings, **kept) == plain
        found = tp.evaluate_templates(Known(), sets, settings, lengths=lengths, **kept)
        assert found["112&28"]["threshold"] == longer["112&28"]["threshold"]
    assert plain["112&28"]["threshold"] != longer["112&28"]["threshold"]
    assert sorted(seen) == [28, 28, 112]
    other = dataclasses.replace(sets, checksum="other")
    tp.evaluate_templates(Known(), other, settings, far=0.05, keep=tmp_path)
    assert len(seen) == 6


def test_the_operating_points_are_those_of_the_paper() -> None:
    """A.4: TAR at FAR 1e-4, TPIR at FPIR 0.1, the mate among the first 20."""
    sets = template_set()
    noise = 60 * torch.randn(72, 6, generator=torch.Generator().manual_seed(0))
    features = embedder(sets.images(np.arange(72)), 112) + noise
    plain = tp.score_templates(features, sets)
    assert plain == tp.score_templates(features, sets, far=1e-4, fpir=0.1, rank=20)
    ids, templates = tp.aggregate(features, sets.template, sets.media, sets.score)
    lists = (templates, ids, sets.galleries, sets.probes)
    assert tp.identify_templates(*lists) == plain["identification"]
    assert tp.identify_merged(*lists) == tp.identify_merged(*lists, fpir=0.1)
    first, any_rank = (tp.score_templates(features, sets, fpir=0.9, rank=r) for r in (1, 6))
    assert first["tpir"] == first["identification"]["tpir"] < any_rank["tpir"]


@pytest.mark.parametrize("lost", ["probes", "gallery G2", "pairs"])
def test_what_has_no_images_is_named(lost: str) -> None:
    sets = template_set()
    ids, who = sets.galleries["G2"]
    changes = {
        "probes": {"probes": (sets.probes[0] + 1000, sets.probes[1])},
        "gallery G2": {"galleries": {**sets.galleries, "G2": (ids + 1000, who)}},
        "pairs": {"first": sets.first + 1000},
    }
    features = embedder(sets.images(np.arange(72)), 112)
    with pytest.raises(DataError, match=f"^{lost}: template 1"):
        tp.score_templates(features, dataclasses.replace(sets, **changes[lost]), far=0.05)


def test_a_device_that_is_named_is_asked_for() -> None:
    sets = template_set()
    features = embedder(sets.images(np.arange(72)), 112)
    ids, templates = tp.aggregate(features, sets.template, sets.media)
    rows, nowhere = np.arange(2), {"device": "nowhere"}
    lists = (templates, ids, sets.galleries, sets.probes)
    for call in (
        lambda: tp.pair_scores(templates, rows, rows, **nowhere),
        lambda: tp.identify_templates(*lists, **nowhere),
        lambda: tp.identify_merged(*lists, **nowhere),
    ):
        with pytest.raises(ConfigError, match="nowhere"):
            call()


def test_the_rank_within_which_the_mate_counts() -> None:
    """25 subjects; the mate of each probe is at rank 21: within 21, not within the 20 of A.4."""
    gallery = torch.eye(26)[:25]
    probe = torch.arange(25.0, 0, -1)
    features = torch.cat([gallery, F.pad(probe, (0, 1))[None], torch.eye(26)[25:]])
    lists = {"G": (np.arange(25), np.arange(25))}
    probes = (np.array([25, 26]), np.array([20, 99]))
    for options, found in (({}, 0.0), ({"rank": 21}, 100.0)):
        report = tp.identify_templates(features, np.arange(27), lists, probes, fpir=1.0, **options)
        assert report["tpir"] == found
