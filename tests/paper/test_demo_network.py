"""data/demo: small, found from anywhere, as good as its card says, and made by its script."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from btnet_core import files
from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import open_pairs
from btnet_core.errors import CheckpointError
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.images import encode, resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_paper import results, tables
from btnet_paper.scales import get_scale
from btnet_tools.cli import main

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo"
PEOPLE = {"kind": "synthetic", "identities": 2, "images": 2, "seed": 0}
SPEC = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo_network.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BTNET_DATA", raising=False)


def test_it_is_small_and_has_the_recorded_accuracy() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) < 3_000_000
    net = BTNet.load("demo")
    assert net.resolutions == (7, 14, 28, 112)
    pairs = open_pairs({**get_scale("demo").pairs[0], "count": 300})
    settings = [(112, 14), (14, 14), (112, 112)]
    embedder = BranchEmbedder(net, device="cpu")
    found = evaluate_pairs(embedder, pairs, settings, flip=True)
    recorded = results.load(DEMO, "accuracy")["values"]["as kept here"]
    for setting, cell in found.items():  # of few pairs: two standard errors are 4
        assert cell["accuracy"] == pytest.approx(recorded[setting], abs=5), setting


def test_the_card_says_what_was_recorded() -> None:
    made = results.load(DEMO, "accuracy")["values"]
    trained = results.load(ROOT / "figures", "05_verification")["values"]["accuracy"]["phi_bt"]
    assert made["as trained"] == {name: cell["accuracy"] for name, cell in trained.items()}
    rows = {name: made[name] for name in ("as trained", "as kept here")}
    card = (DEMO / "README.md").read_text("utf-8")
    assert f"<!-- accuracy -->\n{tables.markdown(rows)}\n<!-- /accuracy -->" in card
    assert made["bytes"] == sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))


def test_without_the_repository_it_is_an_error_that_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "COMMITTED", tmp_path / "site-packages" / "data")
    with pytest.raises(CheckpointError, match="that of the repository is its data/demo"):
        BTNet.load("demo")


def test_a_command_takes_it_and_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = open_faces(PEOPLE).images(range(2))
    for name, size in (("a", 112), ("b", 12)):
        path = tmp_path / "faces" / f"{name}.png"
        files.write_atomically(path, encode(resize(faces[0], size).round().byte()))
    assert main(["embed", "faces", "--model", "demo", "--out", "z.npz"]) == 0
    said = capsys.readouterr()
    assert "2 embeddings" in said.out
    assert f"not in this folder, taken from {DEMO}" in said.err
    with np.load(tmp_path / "z.npz") as made:
        assert made["branch"].tolist() == [112, 14]


def test_what_the_script_writes_is_the_rounded_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(name="iresnet18", width=0.125, embedding=32)
    net = BTNet(build_backbone(config), (14,)).eval()
    x = torch.randn(2, 3, 14, 14)
    before = net(x, 14)
    size = script.write(net, tmp_path)
    assert size < 2 * sum(p.numel() for p in net.parameters())
    again = BTNet.load(tmp_path).eval()
    assert torch.equal(again(x, 14), net(x, 14))
    kept, _ = files.read_safetensors(tmp_path / "trunk.safetensors")
    assert {one.dtype for one in kept.values()} == {
        torch.float8_e4m3fn, torch.float16, torch.float32, torch.int64
    }  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(before, net(x, 14))
    assert 0.99 < cosine.min() < 0.999999
