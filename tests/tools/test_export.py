"""btnet export: what other programs compute is what PyTorch computes, at any batch; shared weights are stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btnet_core.errors import ConfigError, WriteError
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.blocks import PReLU
from btnet_core.models.btnet import BTNet
from btnet_tools import export as module
from btnet_tools.adapter import Adapter
from btnet_tools.cli import main
from btnet_tools.export import export

ort = pytest.importorskip("onnxruntime")


class Small(Adapter):
    """Few layers, since torch's exporters take seconds for many; most weights in the shared head."""

    embedding = 256

    def build(self) -> nn.Module:
        layers: list[nn.Module] = []
        for stride in (4, 2, 2):
            layers.append(
                nn.Sequential(
                    nn.Conv2d(16 if layers else 3, 16, 3, stride, 1), nn.BatchNorm2d(16), PReLU(16)
                )
            )
        return nn.Sequential(
            *layers, nn.Sequential(nn.Flatten(), nn.Linear(16 * 49, 256), nn.BatchNorm1d(256))
        )

    def split(self, network: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
        *units, head = network
        return {f"unit{i}": unit for i, unit in enumerate(units)}, head


def make(trunk: Backbone, resolutions: tuple[int, ...]) -> BTNet:
    torch.manual_seed(0)
    net = BTNet(trunk, resolutions)
    for key, tensor in net.state_dict().items():  # statistics that are not the identity
        if key.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
    return net.eval()


@pytest.fixture(scope="module")
def net() -> BTNet:
    return make(Small(), (14, 7))


def pixels(net: BTNet, r: int, batch: int) -> torch.Tensor:
    size = net.trunk.config.size
    return (
        torch.rand(
            batch, 3, r, r * size[1] // size[0], generator=torch.Generator().manual_seed(batch)
        )
        * 255
    )


def run(path: Path, kind: str, r: int, x: torch.Tensor) -> list[torch.Tensor]:
    if kind == "onnx":
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [
            torch.from_numpy(value)
            for value in session.run(["embedding", "norm"], {"pixels": x.numpy()})
        ]
    return list(torch.export.load(path).module()(x))


@torch.no_grad()
def check(net: BTNet, path: Path, kind: str, r: int) -> None:
    for batch in (1, 3, 8):
        x = pixels(net, r, batch)
        z = net(net.trunk.normalise(x), r)
        embedding, norm = run(path, kind, r, x)
        torch.testing.assert_close(embedding, torch.nn.functional.normalize(z), atol=1e-4, rtol=0)
        torch.testing.assert_close(norm, z.norm(dim=1), atol=0, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_all_routes_in_one_file(net: BTNet, tmp_path: Path) -> None:
    (path,) = export(net, "onnx", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["btnet.onnx"]
    for r in net.resolutions:
        check(net, path, "onnx", r)
    shared = 4 * sum(p.numel() for p in net.trunk.parameters())
    assert (
        shared < path.stat().st_size < 2 * shared
    )  # of three routes that each pass through the head
    with pytest.raises(Exception, match=str(net.resolutions[0])):
        run(path, "onnx", 7, pixels(net, 7, 2)[:, :, :5])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("iresnet18", (112, 112)), ("mobilefacenet", (112, 96))]
)
def test_the_papers_trunks_in_onnxruntime(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    net = make(
        build_backbone(BackboneConfig(name=name, width=0.25, embedding=16, size=size)), (14,)
    )
    (path,) = export(net, "onnx", tmp_path)
    for r in net.resolutions:
        check(net, path, "onnx", r)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_command(net: BTNet, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    net.save(tmp_path / "net")
    line = ["export", "--model", str(tmp_path / "net"), "--out", str(tmp_path / "out"), "--format"]
    assert main([*line, "pt2"]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {f"btnet_{r}.pt2" for r in net.resolutions}
    for r in net.resolutions:
        check(net, tmp_path / "out" / f"btnet_{r}.pt2", "pt2", r)
    monkeypatch.setattr(module, "onnx", None)
    assert main([*line, "onnx"]) == 1
    assert "btnet-core[tools]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="tflite"):
        export(net, "tflite", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        export(net, "pt2", tmp_path / "file")


def test_a_bgr_trunk_gets_its_channels_in_its_order() -> None:
    class Turned(Small):
        channels = "bgr"

    btnet, plain = make(Turned(), (7,)), make(Small(), (7,))
    plain.load_state_dict(btnet.state_dict())
    faces = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 255
    embedding, _ = module.PixelRoute(btnet, 7)(faces)
    expected, _ = module.PixelRoute(plain, 7)(faces.flip(1))
    torch.testing.assert_close(embedding, expected, rtol=0, atol=0)
    assert not torch.equal(embedding, module.PixelRoute(plain, 7)(faces)[0])
