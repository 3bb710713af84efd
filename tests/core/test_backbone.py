"""Trunks: structure, exact sizes, foreign checkpoints."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.models.backbone import (
    Backbone,
    BackboneConfig,
    Depthwise,
    PReLU,
    build_backbone,
    load_backbone,
    save_backbone,
)


def small(**changes: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(
        BackboneConfig(**{"name": "iresnet18", "width": 0.125, "embedding": 16} | changes)
    ).eval()


def arcface_torch_names(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The state dict under the names that InsightFace's arcface_torch gives it (written here independently)."""
    renamed = {}
    for name, tensor in backbone.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "head":
            rest = rest.replace("bn.", "bn2.", 1) if rest.startswith("bn.") else rest
        elif rest.startswith("stem."):
            rest = rest.removeprefix("stem.").replace("conv.", "conv1.").replace("bn.", "bn1.")
        else:
            unit, leaf = rest.split(".", 1)
            stage, index = unit[1:].split("U")
            leaf = leaf.replace("shortcut.conv", "downsample.0").replace(
                "shortcut.bn", "downsample.1"
            )
            rest = f"layer{stage}.{int(index) - 1}.{leaf}"
        renamed[rest] = tensor
    return renamed


@pytest.mark.parametrize(
    ("name", "millions"),
    [("iresnet18", 24.03), ("iresnet34", 34.14), ("iresnet50", 43.59), ("iresnet100", 65.16)],
)
def test_parameter_counts_of_the_iresnets(name: str, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_insightface_backbone_pth(prefix: str, tmp_path: Path) -> None:
    backbone = small()
    state = {prefix + name: tensor for name, tensor in arcface_torch_names(backbone).items()}
    torch.save(state, tmp_path / "backbone.pth")
    loaded = load_backbone(tmp_path / "backbone.pth").eval()
    assert loaded.config == backbone.config
    x = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(loaded(x), backbone(x), rtol=0, atol=0)


class Harmful:
    """Unpickling this creates a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Harmful(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_backbone(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_errors_name_the_file_and_the_tensor(tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    del state["layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"cut\.pth.*missing body\.S2U1\.bn1\.weight"):
        load_backbone(tmp_path / "cut.pth")
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"some\.weight"):
        load_backbone(tmp_path / "other.pth")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match=r"half\.safetensors"):
        load_backbone(tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="absent"):
        load_backbone(tmp_path / "absent.safetensors")


def test_configuration_errors() -> None:
    for wrong in ({"name": "resnet50"}, {"size": (100, 100)}, {"width": 0}):
        with pytest.raises(ConfigError):
            BackboneConfig(**wrong)


def test_crop_and_normalise() -> None:
    wide = small(name="mobilefacenet", size=(112, 96), std=128.0)
    pixels = torch.arange(112.0).expand(1, 3, 112, 112)
    assert wide.crop(pixels)[0, 0, 0, [0, -1]].tolist() == [8, 103]
    assert wide.preprocess(pixels)[0, 0, 0, 0].item() == pytest.approx((8 - 127.5) / 128)
    assert wide.crop(torch.zeros(1, 3, 28, 28)).shape[-1] == 24
    with pytest.raises(DataError, match="56"):
        wide.preprocess(torch.zeros(1, 3, 56, 56))


def test_pretrained_mobilefacenet_loads(btnet_data: Path) -> None:
    backbone = load_backbone(btnet_data / "mobilefacenet_casia.safetensors").eval()
    assert sum(p.numel() for p in backbone.parameters()) == 999_552
    assert backbone.config.size == (112, 96)
    rows = backbone.resolutions()
    first = {r: next(name for name, value in rows.items() if value == r) for r in (56, 28, 14, 7)}
    assert first == {56: "conv1", 28: "block0", 14: "block5", 7: "block12"}
    assert backbone(torch.randn(2, 3, 112, 96)).shape == (2, 128)
