"""Feature maps at the stages: the layers that the branches join, of the method that is asked, and their likeness."""

from __future__ import annotations

import pytest
import torch

from btnet_core.evaluation.embedders import BranchEmbedder, MultiModelEmbedder, UpsamplingEmbedder
from btnet_core.images import resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_paper.features import alike, network, stage_features, stages, strength

SMALL = BackboneConfig(name="iresnet18", width=0.125, embedding=16)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 255


def test_stages_of_a_branch_are_z_r_and_what_follows(pixels: torch.Tensor) -> None:
    torch.manual_seed(0)
    btnet = BTNet(build_backbone(SMALL), (28, 7))
    embedder = BranchEmbedder(btnet, device="cpu", precision="fp32", batch_size=2)
    assert stages(btnet.trunk) == (56, 28, 14, 7)
    found = stage_features(embedder, pixels, 28)
    assert [tuple(z.shape[2:]) for z in found] == [(28, 28), (28, 28), (14, 14), (7, 7)]
    with torch.inference_mode():
        z_28 = btnet.route(28).encode(btnet.trunk.normalise(resize(pixels, 28)))
    torch.testing.assert_close(found[1], z_28, atol=1e-4, rtol=1e-4)
    assert [tuple(z.shape[2:]) for z in stage_features(embedder, pixels, 112)] == [
        (n, n) for n in (56, 28, 14, 7)
    ]
    assert not any(module._forward_hooks for module in btnet.modules())


def test_each_method_by_its_own_network(pixels: torch.Tensor) -> None:
    hr, small = build_backbone(SMALL), build_backbone(SMALL)
    up = {"device": "cpu", "precision": "fp32"}
    single = {112: UpsamplingEmbedder(hr, **up), 14: UpsamplingEmbedder(small, **up)}
    mm = MultiModelEmbedder(single)
    assert network(mm, 14) == (small, small)
    assert network(UpsamplingEmbedder(hr, device="cpu"), 14) == (hr, hr)
    one, other = (stage_features(mm, pixels, r)[0] for r in (112, 14))
    assert one.shape == other.shape
    assert not torch.allclose(one, other)


def test_alike_is_the_cosine_on_the_coarser_grid() -> None:
    z = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(alike(z, -2 * z), torch.tensor([-1.0, -1.0]))
    large = z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(alike(large, z), torch.ones(2))
    torch.testing.assert_close(alike(z, large), torch.ones(2))


def test_strength_is_the_root_mean_square_over_channels() -> None:
    z = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5)
    torch.testing.assert_close(strength(z), torch.full((1, 5, 5), 12.5**0.5))
