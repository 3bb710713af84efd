"""Super-resolution: the published sizes, the published weights, and what enters phi_hr."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btnet_core.data.faces import open_faces
from btnet_core.errors import CheckpointError
from btnet_core.evaluation.embedders import UpsamplingEmbedder
from btnet_core.files import write_safetensors
from btnet_core.images import Resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.costs import count_macs
from btnet_paper.super_resolution import (
    NETWORKS,
    LapSRN,
    SuperResolvingEmbedder,
    bicubic,
    entered,
    load_published,
    loss,
)


@pytest.mark.parametrize(
    ("name", "scale", "parameters"),
    [("SRCNN", 4, 69_251), ("FSRCNN", 4, 24_511), ("FSRCNN", 16, 24_511), ("VDSR", 8, 668_227),
     ("DRRN", 4, 302_211), ("LapSRN", 4, 817_766), ("LapSRN", 8, 1_225_753)],
)  # fmt: skip
def test_sizes_as_published(name: str, scale: int, parameters: int) -> None:
    """Three channels, with biases; slopes of PReLU are not counted. Each gives a face of 112 px."""
    network = NETWORKS[name](scale)
    slopes = {id(m.weight) for m in network.modules() if isinstance(m, nn.PReLU)}
    assert sum(p.numel() for p in network.parameters() if id(p) not in slopes) == parameters
    x = entered(network, torch.rand(1, 3, 112 // scale, 96 // scale), (112, 96))
    if name == "DRRN":  # 92.6 GMACs at 112 x 112
        assert round(count_macs(network, (112, 112)) / 1e9, 1) == 92.6
        return
    found = network(x)
    assert found.shape == (1, 3, 112, 96)
    change = (network(torch.rand_like(x)) - found).abs().sum(1)
    assert float(change.min()) > 0  # no pixel is left out, as between kernels that are too small


def test_a_network_without_effect_is_what_it_starts_from() -> None:
    """VDSR and DRRN add to the bicubic image; LapSRN's own kernel is bilinear to begin with."""
    low = torch.rand(2, 3, 14, 12)
    for name in ("VDSR", "DRRN", "LapSRN"):
        network = NETWORKS[name](2)
        for parameter in network.parameters():
            if parameter.shape[-1:] != (4,):
                nn.init.zeros_(parameter)
        expected = bicubic(low, (28, 24))
        if name == "LapSRN":
            expected = nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
        found = network(entered(network, low, (28, 24)))
        torch.testing.assert_close(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_the_loss_of_each_paper() -> None:
    high = torch.rand(2, 3, 32, 32)
    srcnn, x = NETWORKS["SRCNN"](4), bicubic(bicubic(high, (8, 8)), (32, 32))
    assert loss(srcnn, x, high) == (srcnn(x) - high).square().mean()
    network, low = LapSRN(2), bicubic(high, (8, 8))
    first, second = network.pyramid(low)
    charbonnier = [
        ((image - bicubic(high, image.shape[-2:])) ** 2 + 1e-6).sqrt().mean()
        for image in (first, second)
    ]
    torch.testing.assert_close(loss(network, low, high), sum(charbonnier))
    torch.testing.assert_close(bicubic(high, (32, 32)), high)


def test_the_embedder_enlarges_what_phi_hr_would_see() -> None:
    """With a network that enlarges bilinearly it is phi_hr; at every r the pixels are shrunk as there."""
    backbone = build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16)).eval()
    pixels = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)

    class Bilinear(nn.Module):
        enlarged = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x, (112, 112), mode="bilinear", antialias=True)

    how = Resize()
    plain = UpsamplingEmbedder(backbone, how=how, device="cpu", precision="fp32")(pixels, 14)
    embedder = SuperResolvingEmbedder(backbone, Bilinear(), how=how, device="cpu", precision="fp32")
    torch.testing.assert_close(embedder(pixels, 14), plain, rtol=1e-3, atol=1e-4)
    other = SuperResolvingEmbedder(backbone, NETWORKS["SRCNN"](8), how=how, device="cpu")
    assert other.fingerprint(14) != embedder.fingerprint(14)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: 1 tensors, neither"):
        load_published(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("name", "factor", "gain"), [
    ("vdsr", 2, 2.7), ("vdsr", 4, 2.2), ("lapsrn_x2x4", 2, 2.5), ("lapsrn_x2x4", 4, 2.5),
])  # fmt: skip
def test_published_weights_gain_what_they_should(
    btnet_data: Path, name: str, factor: int, gain: float
) -> None:
    """dB of PSNR over bicubic, on the luminance of 30 aligned faces."""
    network = load_published(btnet_data / "weights" / f"{name}.safetensors")
    faces = open_faces("lfw_devtest").images(range(0, 3000, 100)).float() / 255
    y = ((faces * torch.tensor([65.481, 128.553, 24.966])[:, None, None]).sum(1, True) + 16) / 255
    low = bicubic(y, (112 // factor,) * 2)
    with torch.inference_mode():
        images = [network(bicubic(low, (112, 112)))] if network.enlarged else network.pyramid(low)
        out = next(image for image in images if image.shape == y.shape)
    errors = [(i - y).square().flatten(1).mean(1) for i in (bicubic(low, (112, 112)), out)]
    assert float((10 * (errors[0] / errors[1]).log10()).mean()) == pytest.approx(gain, abs=0.25)
