"""Quick inference through OpenVINO: the embeddings of PyTorch, every route, any batch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.data.faces import open_faces
from btnet_core.device import fast_bf16
from btnet_core.errors import ConfigError
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.models import openvino as module
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.openvino import OpenVinoBTNet
from btnet_core.models.weights import load_backbone

pytest.importorskip("openvino")
needs_bf16 = pytest.mark.skipif(
    not fast_bf16(torch.device("cpu")), reason="no AVX512-BF16 or AMX on this processor"
)
needs_nncf = pytest.mark.skipif(module.nncf is None, reason="nncf is not installed")
COSINE = {"fp32": 0.99999, "bf16": 0.999}


@pytest.fixture(scope="module", params=["iresnet18", "mobilefacenet"])
def btnet(request: pytest.FixtureRequest) -> BTNet:
    """Norms as after training: each scales and shifts, the routes' differ from the trunk's."""
    torch.manual_seed(0)
    size = (32, 32) if request.param == "iresnet18" else (64, 48)
    config = BackboneConfig(name=request.param, width=0.25, embedding=32, size=size, channels="bgr")
    btnet = BTNet(build_backbone(config), (size[0] // 16,)).eval()
    for norm in (m for m in btnet.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for conv in (m for m in btnet.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
    return btnet


def some_faces(count: int, sides: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
        for side in (sides * count)[:count]
    ]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_embeddings_are_pytorchs(btnet: BTNet, precision: str) -> None:
    """Both routes; batches of 32, 8 and 1 for 43 faces; the same order and branches."""
    rows = btnet.trunk.config.size[0]
    images = some_faces(86, (rows, rows // 16))
    quick = OpenVinoBTNet(btnet, precision)
    got, info = quick.embed(images, return_info=True)
    expected, same = btnet.embed(images, return_info=True)
    assert info == same
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, expected).min() > COSINE[precision]
    assert (precision == "fp32") == bool((got - expected).abs().max() < 1e-4)
    assert sorted({batch for _, batch in quick.requests}) == [1, 8, 32]
    embedder = BranchEmbedder(quick, device="cpu")
    assert f"OpenVINO {precision}" in embedder.fingerprint(rows)


def test_lengths_are_kept_and_nothing_is_nothing(btnet: BTNet) -> None:
    if btnet.trunk.config.name != "iresnet18":
        pytest.skip("one network is enough")
    rows = btnet.trunk.config.size[0]
    quick, images = OpenVinoBTNet(btnet, "fp32"), some_faces(1, (rows,))
    got = quick.embed(images, normalise=False)
    torch.testing.assert_close(got, btnet.embed(images, normalise=False), rtol=1e-3, atol=1e-3)
    assert quick.embed([]).shape == (0, 32)
    with pytest.raises(ConfigError, match="resolution 5"):
        quick(torch.zeros(1, 3, 5, 5), 5)


@needs_nncf
@pytest.mark.parametrize(
    ("int8", "lowest", "pays"), [(0.9, -1.0, True), (1.1, -1.0, False), (0.9, 1.01, False)]
)
def test_int8_is_offered_where_it_pays(
    btnet: BTNet, int8: float, lowest: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster than bf16, or as fast, and near enough to fp32; else the reason with its numbers."""
    if btnet.trunk.config.name != "iresnet18":
        pytest.skip("one network is enough: nncf takes seconds")
    timed: list[int] = []

    def milliseconds(self: OpenVinoBTNet, models: dict, x: Tensor) -> dict[str, float]:
        timed.append(x.shape[-2])
        return {"int8": int8, self.hint: 1.0}

    monkeypatch.setattr(OpenVinoBTNet, "_milliseconds", milliseconds)
    monkeypatch.setattr(module, "LOWEST_COSINE", lowest)
    images = some_faces(4, (btnet.trunk.config.size[0],))
    if not pays:
        with pytest.raises(
            ConfigError, match=rf"does not pay .* px cosine .*int8 {int8:.2f} ms, else 1.00"
        ):
            OpenVinoBTNet(btnet, "int8", images)
        return
    quick = OpenVinoBTNet(btnet, "int8", images)
    assert timed == list(btnet.resolutions)
    got, expected = quick.embed(images), btnet.embed(images)
    assert F.cosine_similarity(got, expected).mean() > 0.9
    assert (got - expected).abs().max() > 1e-4, "nothing was quantised"


def test_what_cannot_run_says_so(btnet: BTNet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'int4', expected fp32, bf16, int8"):
        OpenVinoBTNet(btnet, "int4")
    if module.nncf is not None:
        with pytest.raises(ConfigError, match="no faces to set the ranges by"):
            OpenVinoBTNet(btnet, "int8")
    monkeypatch.setattr(module, "nncf", None)
    with pytest.raises(ConfigError, match="int8 needs pip install"):
        OpenVinoBTNet(btnet, "int8", some_faces(1, (32,)))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ConfigError, match="no AVX512-BF16 or AMX"):
        OpenVinoBTNet(btnet, "bf16")
    assert OpenVinoBTNet(btnet, "fp32").hint == "f32"
    monkeypatch.setattr(module, "openvino", None)
    with pytest.raises(ConfigError, match="fp32 needs pip install"):
        OpenVinoBTNet(btnet, "fp32")


@needs_bf16
def test_a_trained_model_in_bf16(btnet_data: Path) -> None:
    btnet = BTNet(load_backbone(btnet_data / "mobilefacenet_casia.safetensors"), (28, 14, 7))
    faces = open_faces(str(btnet_data / "lfw_devtest")).images(range(16))
    images = [F.interpolate(face[None].float(), side)[0] for face in faces for side in (112, 14)]
    quick = OpenVinoBTNet(btnet, "bf16").embed(images)
    assert F.cosine_similarity(quick, btnet.embed(images)).min() > 0.999


SIGNALLED = """
import gc, os, signal, torch
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.openvino import OpenVinoBTNet
config = BackboneConfig(name="iresnet18", width=0.125, embedding=8, size=(32, 32))
quick = OpenVinoBTNet(BTNet(build_backbone(config), (2,)).eval(), "fp32")
for side in (32, 2):
    quick.embed([torch.zeros(3, side, side, dtype=torch.uint8)] * 9)
del quick
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals on this system")
def test_signals_are_handled_after_a_model_has_gone() -> None:
    """A plugin that was unloaded left a stack for signals that was no longer there."""
    run = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_nothing_is_reported_to_the_libraries_makers() -> None:
    """OpenVINO and nncf send their use to a server where openvino_telemetry can be imported."""
    assert sys.modules["openvino_telemetry"] is None
