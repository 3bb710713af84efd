"""btnet embed, verify, evaluate, and BTNet.embed behind them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import btnet_core
from btnet_core.errors import DataError
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, ahead
from btnet_tools.cli import main
from btnet_tools.embed import verify

SIDES = {"a/big.png": 112, "a/small.jpg": 20, "b.bmp": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    BTNet(
        build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16)), (28, 7)
    ).save(folder)
    return folder


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for index, (name, side) in enumerate(SIDES.items()):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "faces" / name)
    (tmp_path / "faces" / "notes.txt").write_text("no image")
    return tmp_path / "faces"


def test_embed_writes_a_row_an_image(model: Path, faces: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "e.npz"
    assert main(["embed", str(faces), "--model", str(model), "--out", str(out)]) == 0
    assert "3 embeddings" in capsys.readouterr().out
    table = np.load(out)
    assert table["names"].tolist() == list(SIDES)
    assert table["branch"].tolist() == [112, 28, 7]
    assert table["scale"][1].tolist() == [1.4, 1.4]
    expected = btnet_core.BTNet.load(model).embed([faces / name for name in SIDES])
    np.testing.assert_allclose(table["embeddings"], expected.numpy(), atol=1e-5)
    assert (
        main(
            [
                "embed",
                str(faces / "b.bmp"),
                "--model",
                str(model),
                "--out",
                str(out),
                "--select",
                "max+near",
            ]
        )
        == 0
    )
    assert np.load(out)["names"].tolist() == ["b.bmp"]


def test_unreadable_images_stop_it_or_are_listed(
    model: Path, faces: Path, tmp_path: Path, capsys
) -> None:
    (faces / "a" / "cut.jpg").write_bytes((faces / "a" / "small.jpg").read_bytes()[:100])
    line = ["embed", str(faces), "--model", str(model), "--out", str(tmp_path / "e.npz")]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "cut.jpg" in error
    assert "--keep-going" in error
    assert not (tmp_path / "e.npz").exists()
    assert main([*line, "--keep-going"]) == 1
    assert "left out a/cut.jpg" in capsys.readouterr().err
    table = np.load(tmp_path / "e.npz")
    assert (table["names"].tolist(), table["failed"].tolist()) == (list(SIDES), ["a/cut.jpg"])
    assert table["embeddings"].shape == (3, 16)
    embeddings, info = BTNet.load(model).embed(
        [faces / "b.bmp", faces / "x.png"], keep_going=True, return_info=True
    )
    assert torch.isnan(embeddings).any(1).tolist() == [False, True]
    assert "x.png" in info[1]["error"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("embed nowhere --out {out}", "nowhere"),
        ("embed . --out {out}", "no images"),
        ("embed {faces} --out nodir/e.npz", "nodir"),
        ("embed {faces} --out {out} --select tall+ceil", "tall"),
        ("embed {faces} --out {out} --model nomodel", "btnet adapt"),
        ("verify {faces}/b.bmp {faces}/none.png", "none.png"),
        ("evaluate --pairs none.bin", "none.bin"),
        ("evaluate --pairs none.bin --adapter none.py", "none.py"),
    ],
)
def test_wrong_input_is_named(
    line: str, told: str, model: Path, faces: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    words = line.format(faces=faces, out=tmp_path / "e.npz").split()
    assert main([*words, *([] if "--model" in words else ["--model", str(model)])]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_verify_uses_the_models_threshold(model: Path, faces: Path, tmp_path: Path) -> None:
    net, pair = BTNet.load(model), [str(faces / name) for name in list(SIDES)[:2]]
    cosine = float(torch.prod(net.embed(pair), 0).sum())
    assert "no threshold is known" in verify(net, *pair, str(tmp_path))
    assert "one person" in verify(net, *pair, str(tmp_path), cosine - 0.01)
    (tmp_path / "results").mkdir()
    values = {"thresholds": {"112&28": cosine + 0.01, "112&112": -1.0}, "pairs": ["held"]}
    (tmp_path / "results" / "adapt.json").write_text(json.dumps({"values": values}))
    told = verify(net, *reversed(pair), str(tmp_path))
    assert f"cosine {cosine:.3f}: two people" in told
    assert "small.jpg: 20x20 through branch 28, scaled by 1.40" in told


def test_evaluate_prints_every_pair_of_resolutions(model: Path, capsys) -> None:
    spec = {
        "kind": "drawn",
        "faces": {"kind": "synthetic", "identities": 12, "images": 4, "seed": 0},
        "count": 20,
    }
    assert main(["evaluate", "--model", str(model), "--pairs", json.dumps(spec)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["112&112", "112&28", "112&7", "28&28", "7&7", "28&7"]
    assert "scaled up" not in out


def test_reading_overlaps_with_the_model() -> None:
    """On any number of processors: a reader that waits, as for a disk, costs nothing while the model works."""

    def read(index: int) -> int:
        time.sleep(0.02)
        return index

    start = time.perf_counter()
    for _ in ahead(read, range(40), 16, False):
        time.sleep(0.02)
    assert time.perf_counter() - start < 0.7 * 40 * 0.04


def test_ahead_keeps_order_and_bounds_what_is_held() -> None:
    begun: list[int] = []

    def read(index: int) -> int:
        begun.append(index)
        if index == 3:
            raise DataError("three")
        return index

    stream = ahead(read, range(100), 5, True)
    got = [next(stream) for _ in range(5)]
    assert [str(one) for one in got] == ["0", "1", "2", "three", "4"]
    time.sleep(0.05)
    assert len(begun) <= 11
    stream.close()
    with pytest.raises(DataError, match="three"):
        list(ahead(read, range(5), 2, False))


def test_the_package_exports_btnet_lazily() -> None:
    assert btnet_core.BTNet is BTNet
    with pytest.raises(AttributeError, match="BTNets"):
        btnet_core.BTNets  # noqa: B018
