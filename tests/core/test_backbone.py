"""Trunks: structure, exact sizes, foreign checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btnet_core.errors import ConfigError, DataError
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.blocks import Depthwise, PReLU
from btnet_core.models.weights import load_backbone, save_backbone


def small(**changes: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(
        BackboneConfig(**{"name": "iresnet18", "width": 0.125, "embedding": 16} | changes)
    ).eval()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("iresnet18", 24.03),
        ("iresnet34", 34.14),
        ("iresnet50", 43.59),
        ("iresnet100", 65.16),
    ],
)
def test_parameter_counts_of_the_iresnets(name: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parameters_of_iresnet200_and_mbf_by_hand() -> None:
    def unit(c_in: int, c: int) -> int:
        """BN, conv3x3, BN, PReLU, conv3x3, BN, and the shortcut of the first of a stage."""
        return 2 * c_in + 9 * c_in * c + 3 * c + 9 * c * c + 2 * c

    stages = zip((6, 26, 60, 6), (64, 64, 128, 256), (64, 128, 256, 512), strict=True)
    units = sum(unit(a, c) + a * c + 2 * c + (n - 1) * unit(c, c) for n, a, c in stages)
    iresnet = 27 * 64 + 3 * 64 + units + 2 * 512 + 512 * 49 * 512 + 512 + 2 * 512

    def depthwise(c_in: int, inner: int, c: int) -> int:
        return c_in * inner + 3 * inner + 9 * inner + 3 * inner + inner * c + 2 * c

    rows = [(128, 128, 128)] * 5 + [(128, 256, 256)] + [(256, 256, 256)] * 6
    rows += [(256, 512, 256)] + [(256, 256, 256)] * 2
    mbf = 27 * 128 + 3 * 128 + 128 * 2 * 9 + 3 * 128 + sum(depthwise(*row) for row in rows)
    mbf += 256 * 512 + 3 * 512 + 512 * 49 + 2 * 512 + 512 * 512 + 2 * 512
    for name, expected in (("iresnet200", iresnet), ("mbf", mbf)):
        with torch.device("meta"):
            backbone = build_backbone(BackboneConfig(name=name))
        assert sum(p.numel() for p in backbone.parameters()) == expected


def test_feature_pyramid_follows_the_strides() -> None:
    rows = small().resolutions()
    assert [rows[name] for name in ("stem", "S1U1", "S2U1", "S3U1", "S4U1")] == [112, 56, 28, 14, 7]
    assert small(size=(64, 64)).resolutions()["S4U2"] == 4
    x = torch.randn(1, 3, 112, 112)
    assert {name: z.shape[-1] for name, z in small().features(x)} == dict(rows)


def test_width_and_canonical_size_change_the_shapes() -> None:
    backbone = small(size=(64, 48), width=0.25)
    assert backbone(torch.randn(2, 3, 64, 48)).shape == (2, 16)
    assert backbone.body.S4U2.conv2.out_channels == 128


def test_embedding_stays_fp32_under_autocast() -> None:
    backbone = small()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = backbone(x)
    assert low.dtype == torch.float32
    assert nn.functional.cosine_similarity(low, backbone(x)).min() > 0.99


@pytest.mark.parametrize("learns", [False, True])
def test_strided_depthwise_in_bf16(learns: bool) -> None:
    """With a gradient in float32, without in bf16: the same map to the rounding of its input, weights and output."""
    conv = Depthwise(8, 8, 3, 2, 1, groups=8, bias=False)
    exact, x = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), torch.randn(2, 8, 9, 9).bfloat16()
    exact.load_state_dict(conv.state_dict())
    a, b = x.clone().requires_grad_(learns), x.float().requires_grad_(learns)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(a)
    z = exact(b)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), z, rtol=0.02, atol=0.02)
    if learns:
        y.float().square().sum().backward()
        z.square().sum().backward()
        assert a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.05, atol=0.05)
        torch.testing.assert_close(conv.weight.grad, exact.weight.grad, rtol=0.02, atol=0.1)


def test_prelu_in_bf16_equals_torch() -> None:
    ours, theirs = PReLU(4), nn.PReLU(4)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.25, -0.5, 1.5, 0.0]))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    x.view(-1)[:3] = 0
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ours(a), theirs(b)
    torch.testing.assert_close(y, z, rtol=0, atol=0)
    y.float().square().sum().backward()
    z.float().square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    backbone = small(name=name, std=128.0)
    save_backbone(backbone, tmp_path / "trunk.safetensors")
    loaded = load_backbone(tmp_path / "trunk.safetensors").eval()
    assert loaded.config == backbone.config
    x = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(loaded(x), backbone(x), rtol=0, atol=0)


def test_configuration_errors() -> None:
    for wrong in ({"name": "resnet50"}, {"size": (100, 100)}, {"width": 0}, {"std": 0}, {"embedding": 1.5}, {"channels": "gbr"}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            BackboneConfig(**wrong)


def test_crop_and_normalise() -> None:
    wide = small(name="mobilefacenet", size=(112, 96), std=128.0)
    pixels = torch.arange(112.0).expand(1, 3, 112, 112)
    assert wide.crop(pixels)[0, 0, 0, [0, -1]].tolist() == [8, 103]
    assert wide.preprocess(pixels)[0, 0, 0, 0].item() == pytest.approx((8 - 127.5) / 128)
    assert wide.crop(torch.zeros(1, 3, 28, 28)).shape[-1] == 24
    with pytest.raises(DataError, match="56"):
        wide.preprocess(torch.zeros(1, 3, 56, 56))


def test_channels_are_turned_where_the_trunk_wants_bgr() -> None:
    pixels = torch.stack([torch.full((112, 112), value) for value in (10.0, 20.0, 30.0)])[None]
    for channels, expected in (("rgb", [10, 20, 30]), ("bgr", [30, 20, 10])):
        backbone = small(channels=channels, mean=0.0, std=1.0)
        assert backbone.preprocess(pixels)[0, :, 0, 0].tolist() == expected
        assert backbone.normalise(pixels[0])[:, 0, 0].tolist() == expected


def test_mbf_has_the_pyramid_of_a_trunk() -> None:
    rows = small(name="mbf").resolutions()
    first = {r: next(name for name, value in rows.items() if value == r) for r in (56, 28, 14, 7)}
    assert first == {56: "conv1", 28: "block0", 14: "block5", 7: "block12"}
    assert small(name="mbf", size=(112, 96))(torch.randn(2, 3, 112, 96)).shape == (2, 16)
