"""The classifier: class means, files, PartialFC's draw, labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.losses import build_margin
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
    with pytest.raises(CheckpointError, match=r"\(6, 4\).*\(7, 4\)"):
        load_classifier(tmp_path / "k.safetensors", 7, 4)
    check_labels(torch.tensor([0, 5]), 6)
    with pytest.raises(ConfigError, match=r"2 labels outside 0..5, the first is 6 of record 1"):
        check_labels(torch.tensor([0, 6, -1]), 6)
