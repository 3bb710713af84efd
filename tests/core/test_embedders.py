"""The compared methods: which network sees what, batch by batch, and what tells their embeddings apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from btnet_core.errors import ConfigError
from btnet_core.evaluation.embedders import (
    BranchEmbedder,
    Embedder,
    MultiModelEmbedder,
    UpsamplingEmbedder,
)
from btnet_core.images import Resize, degrade, resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, weights_digest

NEAREST = Resize(kernel="nearest")
CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def btnet() -> BTNet:
    torch.manual_seed(0)
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16))
    return BTNet(trunk, (14,))


@pytest.fixture(scope="module")
def faces() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 112, 112), generator=generator, dtype=torch.uint8)


class Means(Embedder):
    """Mean colours times a number, and what it was asked."""

    def __init__(self, factor: float, **options) -> None:
        super().__init__(how=NEAREST, **CPU, **options)
        self.factor, self.asked = factor, []
        self.weights = nn.Linear(1, 1)
        nn.init.constant_(self.weights.weight, factor)

    def network(self, r: int) -> nn.Module:
        return self.weights

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        self.asked.append((len(pixels), r))
        return self.factor * pixels.double().mean((2, 3))


def test_phi_mm_has_a_model_of_its_own_for_each_resolution(faces: Tensor) -> None:
    single = {14: Means(2.0, batch_size=2), 112: Means(3.0, batch_size=5)}
    mm = MultiModelEmbedder(single)
    colours = faces.double().mean((2, 3)).float()
    for r, one in single.items():
        torch.testing.assert_close(mm(faces, r), one.factor * colours)
        assert mm.network(r) is one.weights
        assert mm.fingerprint(r) == one.fingerprint(r)
    assert single[14].asked == [(2, 14), (1, 14)]
    assert single[112].asked == [(2, 112), (1, 112)]
    assert mm.fingerprint(14) != mm.fingerprint(112)
    assert (mm.how, mm.precision, mm.batch_size) == (NEAREST, "fp32", 2)
    assert mm.device.type == "cpu"
    assert mm.covered([(112, 14), (28, 28), (14, 14), (112, 28)]) == [(112, 14), (14, 14)]
    with pytest.raises(ConfigError, match=r"^resolution 28: phi_mm has models for \[14, 112\]"):
        mm(faces, 28)


@pytest.mark.parametrize("how", [None, NEAREST])
def test_baselines_scale_up_and_branches_do_not(
    btnet: BTNet, faces: Tensor, how: Resize | None
) -> None:
    hr = UpsamplingEmbedder(btnet.trunk.train(), how=how, batch_size=2, **CPU)
    bt = BranchEmbedder(btnet.train(), how=how, batch_size=2, **CPU)
    assert not btnet.training
    small = resize(faces, 14, how)
    with torch.no_grad():
        up = btnet.trunk((degrade(faces, 14, how) - 127.5) / 127.5)
        own = btnet.routes["14"]((small - 127.5) / 127.5)
    for embedder, expected in ((hr, up), (bt, own)):
        found = embedder(faces, 14)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")
        assert not found.requires_grad
    assert not torch.allclose(up, own, atol=1e-3)
    assert hr.network(14) is hr.network(112) is btnet.trunk
    assert bt.network(14) is btnet.routes["14"]
    assert bt.covered([(112, 14), (28, 14)]) == [(112, 14)]


def test_a_fingerprint_names_weights_way_resize_precision_and_device(btnet: BTNet) -> None:
    hr, bt = UpsamplingEmbedder(btnet.trunk, **CPU), BranchEmbedder(btnet, **CPU)
    trunk, route = weights_digest(btnet.trunk), weights_digest(btnet.routes["14"])
    assert hr.fingerprint(14) == f"{trunk} from 14 px bilinear+antialias, float fp32 cpu"
    assert bt.fingerprint(14) == f"{route} route 14 bilinear+antialias, float fp32 cpu"
    assert bt.fingerprint(112) == hr.fingerprint(112)
    half = UpsamplingEmbedder(btnet.trunk, device="cpu", precision="bf16", how=NEAREST)
    assert half.fingerprint(14) == f"{trunk} from 14 px nearest, float bf16 cpu"
    btnet.inference = "int8"
    try:
        assert bt.fingerprint(14) == f"{route} route 14 bilinear+antialias, float fp32 cpu int8"
    finally:
        btnet.inference = ""


def test_by_default_128_faces_at_once_in_what_the_machine_does_best() -> None:
    one = UpsamplingEmbedder(build_backbone(BackboneConfig(name="iresnet18", width=0.125)))
    assert one.batch_size == 128
    assert one.how == Resize()
    assert one.precision in ("fp32", "bf16")


def test_networks_go_to_the_device_with_channels_last() -> None:
    meta = {"device": "meta", "precision": "fp32"}
    for wrap in (lambda trunk: trunk, lambda trunk: BTNet(trunk, (14,))):
        network = wrap(build_backbone(BackboneConfig(name="iresnet18", width=0.125)))
        kind = BranchEmbedder if isinstance(network, BTNet) else UpsamplingEmbedder
        kind(network, **meta)
        weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert all(p.device.type == "meta" for p in network.parameters())
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_phi_mm_is_as_its_first_model(btnet: BTNet) -> None:
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.125))
    meta = UpsamplingEmbedder(trunk, device="meta", precision="fp32")
    assert MultiModelEmbedder({14: meta}).device.type == "meta"
    mm = MultiModelEmbedder({14: BranchEmbedder(btnet, **CPU)})
    assert mm.network(14) is btnet.routes["14"]
