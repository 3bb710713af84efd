"""Quick inference: what is folded is equal, what is rounded is near, what cannot run says so."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.data.faces import open_faces
from btnet_core.errors import BTNetError, ConfigError
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.models import fast
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.weights import load_backbone
from btnet_tools.cli import main

TRUNKS = {
    "iresnet18": BackboneConfig(name="iresnet18", width=0.25, embedding=64),
    "mobilefacenet": BackboneConfig(
        name="mobilefacenet", width=0.5, size=(112, 96), embedding=64, std=128.0
    ),
}
FACES = {"kind": "synthetic", "identities": 16, "images": 4, "seed": 3}
COSINE = {"fp32": 0.999999, "bf16": 0.999, "int8": 0.99}


def net_of(name: str) -> BTNet:
    """Norms as after training: every one scales and shifts, and the routes' copies differ from the trunk's."""
    torch.manual_seed(0)
    net = BTNet(build_backbone(TRUNKS[name]), (28, 7)).eval()
    for norm in (m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
    return net


def batch(net: BTNet, r: int, count: int = 3) -> Tensor:
    route = net.route(r)
    size = net.trunk.config.size if isinstance(route, Backbone) else route.size
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(r)) * 2 - 1


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("r", [112, 28, 7])
@torch.inference_mode()
def test_folded_equals_unfolded(name: str, r: int) -> None:
    net = net_of(name)
    x = batch(net, r)
    folded = fast.fold(net.route(r))
    assert error(folded(x), net.route(r)(x)) < 1e-5
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in folded.modules())


@torch.inference_mode()
def test_folding_is_exact_at_borders() -> None:
    """Every pixel of a unit's map, not only the embedding; and its norm stays where a shift would be too large."""
    unit = net_of("iresnet18").trunk.body.S1U2
    x, zero = torch.randn(2, 16, 9, 7), torch.zeros(16)
    whole = unit(x)
    for gamma, stays in ((1.0, False), (0.01, True)):
        unit.bn1.weight[3] = gamma
        unit.bn1.bias[3] = 0.7
        whole, shift = unit(x), fast._shift(unit.bn1)
        assert (shift is None) == stays
        moved = x if shift is None else (x + shift.view(1, -1, 1, 1)).float()
        y = fast._FoldedUnit(copy.deepcopy(unit), shift, zero)(moved)
        inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert error(y, whole) < 1e-5
        edges, expected = y.clone(), whole.clone()
        edges[inside] = expected[inside] = 0
        assert error(edges, expected) < 1e-5


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (14, 5)])
@torch.inference_mode()
def test_winograd_is_the_convolution(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(128, 24, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 128, *size).contiguous(memory_format=torch.channels_last)
    laid = fast._Conv(conv)
    assert laid.kernels is not None
    assert error(fast.winograd(x, laid.kernels, conv.bias), conv(x)) < 1e-5
    added = torch.randn(16, 24, *size).contiguous(memory_format=torch.channels_last)
    assert error(laid(x, added), conv(x) + added) < 1e-5
    assert error(laid(x[:1], added[:1]), conv(x[:1]) + added[:1]) < 1e-5  # too few tiles: oneDNN


@pytest.mark.parametrize("mode", fast.MODES)
@pytest.mark.parametrize("name", TRUNKS)
def test_embeddings_of_a_mode(name: str, mode: str) -> None:
    """The same order, sizes and branches; near fp32 by the cosine that the docs promise."""
    try:
        fast.check_mode(mode)
    except ConfigError as reason:
        pytest.skip(str(reason))
    net, faces = net_of(name), open_faces(FACES)
    pixels = [faces[i][0] for i in range(24)]
    sides = [7, 7, 7] if mode == "int8" else [112, 20, 7]  # every route takes seconds to quantise
    images = [
        F.interpolate(p[None].float(), side)[0] for p, side in zip(pixels, sides * 8, strict=True)
    ]
    expected, info = net.embed(images, return_info=True)
    quick = net.fast(mode, faces.images(range(32)))
    got, same = quick.embed(images, return_info=True)
    assert same == info
    assert got.dtype == torch.float32
    untrained = (
        0.01 if mode == "int8" else 0.0
    )  # narrow and random: rounding averages out less than in real networks
    assert F.cosine_similarity(got, expected).mean() > COSINE[mode] - untrained
    assert quick.mode in BranchEmbedder(quick, device="cpu").fingerprint(7)
    if mode != "fp32":
        assert (got - expected).abs().max() > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("mode", fast.MODES)
def test_trained_model(mode: str, btnet_data: Path) -> None:
    try:
        fast.check_mode(mode)
    except ConfigError as reason:
        pytest.skip(str(reason))
    net = BTNet(load_backbone(btnet_data / "mobilefacenet_casia.safetensors"), ())
    faces = open_faces(str(btnet_data / "lfw_devtest")).images(range(32))
    quick = net.fast(mode, fast.some_faces(str(btnet_data / "faces_train")))
    assert F.cosine_similarity(quick.embed(faces), net.embed(faces)).mean() > COSINE[mode]


def test_a_mode_that_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = net_of("mobilefacenet")
    with pytest.raises(ConfigError, match=re.escape("'int4', expected one of fp32, bf16, int8")):
        net.fast("int4")
    with pytest.raises(BTNetError, match="faces to calibrate"):
        net.fast("int8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for mode, needs in (("bf16", "avx512_bf16"), ("int8", "avx512_vnni")):
        with pytest.raises(ConfigError, match=f"this processor lacks {needs}"):
            net.fast(mode)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net_of("mobilefacenet").save(tmp_path / "net")
    from PIL import Image

    (tmp_path / "faces").mkdir()
    Image.new("RGB", (20, 20), (90, 120, 60)).save(tmp_path / "faces" / "a.png")
    command = [
        "embed",
        str(tmp_path / "faces"),
        "--model",
        str(tmp_path / "net"),
        "--out",
        str(tmp_path / "e.npz"),
    ]
    assert main([*command, "--mode", "fp32"]) == 0
    assert main([*command, "--mode", "fp8"]) == 2
    assert "fp32, bf16, int8" in capsys.readouterr().err
