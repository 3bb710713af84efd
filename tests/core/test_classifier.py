"""The classifier: class means, files, PartialFC's draw, labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.losses import build_margin
from btnet_core.training import distributed
from btnet_core.training.classifier import (
    Classifier,
    check_labels,
    class_means,
    fresh_weight,
    load_classifier,
    save_classifier,
)


def test_class_means() -> None:
    z, labels = torch.tensor([[2.0, 0], [0, 5], [3, 0]]), torch.tensor([0, 0, 2])
    expected = torch.tensor([[0.5**0.5] * 2, [0, 0], [1, 0]])
    torch.testing.assert_close(class_means([(z, labels)], 3, 2), expected)
    parts = zip(z.split(1), labels.split(1), strict=True)
    torch.testing.assert_close(class_means(parts, 3, 2), expected)


def test_the_loss_is_the_cross_entropy_of_scaled_cosines() -> None:
    torch.manual_seed(0)
    z, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 1])
    kappa = Classifier(weight, build_margin("normface"))
    cosine = torch.stack([F.cosine_similarity(row, weight) for row in z])
    logits = kappa.margin.s * cosine
    expected = -(logits.softmax(1)[torch.arange(5), labels]).log().mean()
    torch.testing.assert_close(kappa(z, labels), expected)


def test_margins_get_the_targets_and_norms_of_the_batch() -> None:
    """Class 0 and lengths on both sides of the mean; t and the statistics move as by the margin alone."""
    torch.manual_seed(1)
    z, weight = 9 * torch.randn(5, 4), torch.randn(3, 4)
    labels = torch.tensor([0, 2, 1, 0, 0])
    cosine = F.normalize(z) @ F.normalize(weight).T
    for name in ("curricularface", "adaface"):
        kappa, margin = Classifier(weight, build_margin(name, s=4.0)), build_margin(name, s=4.0)
        logits = margin(cosine, labels, cosine[torch.arange(5), labels], z.norm(dim=1))
        torch.testing.assert_close(kappa(z, labels), F.cross_entropy(logits, labels))
        for key, value in margin.state_dict().items():
            torch.testing.assert_close(kappa.margin.state_dict()[key], value)


def test_cosines_are_computed_in_float32_at_least() -> None:
    torch.manual_seed(2)
    z, weight, labels = torch.randn(5, 64), torch.randn(7, 64), torch.tensor([0, 6, 3, 3, 1])
    kappa = Classifier(weight, build_margin("normface"))
    exact = kappa(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kappa(z, labels), exact)
    half = z.bfloat16()
    assert torch.equal(kappa(half, labels), kappa(half.float(), labels))
    assert kappa(z.double(), labels).dtype == torch.float64


def test_each_process_holds_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, parts, places = fresh_weight(7, 4, seed=0), [], []
    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(distributed, "all_sum", lambda value: value)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        kappa = Classifier(weight, build_margin("normface"))
        assert torch.equal(kappa.weight, weight[kappa.first : kappa.first + len(kappa.weight)])
        assert torch.equal(kappa.part(weight), kappa.weight)
        parts.append(kappa.whole())
        places.append(kappa._rows(torch.arange(7))[1])
        assert torch.equal(kappa.whole(2 * kappa.weight.detach()), 2 * parts[-1])
        assert not parts[-1].requires_grad
    assert torch.equal(sum(parts), weight)
    assert torch.stack(places).amax(0).tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert ((torch.stack(places) >= 0).sum(0) == 1).all()
    with pytest.raises(ConfigError, match="identities: got 2 for 3 processes, expected one each"):
        Classifier(weight[:2], build_margin("normface"))


def test_partial_fc_keeps_the_classes_of_the_batch_and_draws_the_rest() -> None:
    weight, labels = fresh_weight(100, 4, 0), torch.tensor([3, 97, 3, 50])
    kappa = Classifier(weight, build_margin("normface"), sample_rate=0.2, seed=5).train()
    drawn = []
    for kappa.step in range(20):
        rows, place = kappa._rows(labels)
        assert len(rows) == 20
        assert torch.equal(rows[place], weight[labels])
        drawn.append({tuple(row.tolist()) for row in rows})
    assert len(set.union(*drawn)) > 90  # every step draws anew
    kappa.eval()
    assert len(kappa._rows(labels)[0]) == 100


def test_files_and_labels(tmp_path: Path) -> None:
    weight = fresh_weight(6, 4, seed=1)
    save_classifier(tmp_path / "k.safetensors", weight)
    assert torch.equal(load_classifier(tmp_path / "k.safetensors", 6, 4), weight)
    assert read_safetensors(tmp_path / "k.safetensors")[1]["kind"] == "btnet_classifier"
    write_safetensors(tmp_path / "other.safetensors", {"w": weight}, {})
    with pytest.raises(CheckpointError, match=r"other.safetensors: got no tensor 'weight', the"):
        load_classifier(tmp_path / "other.safetensors", 6, 4)
    with pytest.raises(CheckpointError, match=r"\(6, 4\).*\(7, 4\)"):
        load_classifier(tmp_path / "k.safetensors", 7, 4)
    check_labels(torch.tensor([0, 5]), 6)
    with pytest.raises(ConfigError, match=r"2 labels outside 0..5, the first is 6 of record 1"):
        check_labels(torch.tensor([0, 6, -1]), 6)


def test_a_fresh_classifier_by_hand() -> None:
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(fresh_weight(6, 4, 7), 0.01 * torch.randn(6, 4, generator=generator))


def test_partial_fc_draws_from_seed_and_step() -> None:
    """Class 0 takes part, too; labels of another shard have no place; the same draw each time."""
    weight, labels = fresh_weight(50, 4, 0), torch.tensor([0, 49, -1, 60])
    one, two, other = (
        Classifier(weight, build_margin("normface"), sample_rate=0.2, seed=seed)
        for seed in (5, 5, 6)
    )
    rows, place = one._rows(labels)
    assert torch.equal(rows[place[:2]], weight[[0, 49]])
    assert place[2:].tolist() == [-1, -1]
    assert torch.equal(two._rows(labels)[0], rows)
    assert not torch.equal(other._rows(labels)[0], rows)


def test_what_the_margin_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of all processes always; lengths only where it needs them; gradients are summed."""
    gathered: list[bool] = []
    monkeypatch.setattr(distributed, "gather", lambda z, *, total: (gathered.append(total), z)[1])
    z, labels, given = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), []
    for name in ("cosface", "adaface"):
        margin = build_margin(name)
        kappa = Classifier(torch.eye(3)[:2], margin)
        margin.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
        kappa(z, labels)
    for cosine, column, target, _ in given:
        assert torch.equal(column, labels)
        assert torch.equal(target, cosine[torch.arange(4), labels])
    assert given[0][3] is None
    torch.testing.assert_close(given[1][3], z.norm(dim=1))
    assert gathered == [True, True]
    elsewhere = Classifier._target(torch.ones(2, 3), torch.tensor([-1, 2]))
    assert elsewhere.tolist() == [0, 1]


def test_a_class_for_each_process_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    kappa = Classifier(torch.eye(2), build_margin("normface"))
    assert (kappa.first, len(kappa.weight), kappa.seed, kappa.step) == (1, 1, 0, 0)
    assert kappa._rows(torch.tensor([0, 1, 2]))[1].tolist() == [-1, 0, -1]


def test_partial_fc_by_hand() -> None:
    """The classes of the batch and those of the largest draws, in ascending order."""
    weight, labels = fresh_weight(20, 4, 0), torch.tensor([19, 0, 0])
    kappa = Classifier(weight, build_margin("normface"), sample_rate=0.25, seed=5)
    kappa.step = 7
    generator = torch.Generator().manual_seed(hash((5, 7, 0)) % 2**63)
    draws = torch.rand(20, generator=generator).tolist()
    others = sorted(range(1, 19), key=lambda k: draws[k])[-3:]
    assert torch.equal(kappa._rows(labels)[0], weight[[0, *sorted(others), 19]])


def test_class_means_are_made_where_the_embeddings_are() -> None:
    z = torch.ones(2, 3, device="meta")
    assert class_means([(z, torch.tensor([0, 1]))], 4, 3).device.type == "meta"
