"""btnet embed: a row for each picture, the same embeddings as BTNet.embed, errors that are named."""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import btnet_core
from btnet_core.errors import DataError
from btnet_core.images import encode, resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_tools.cli import main
from btnet_tools.embed import Face, Reader, ahead, embed_folder, warn_of_photographs

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
    assert table["size"].tolist() == [[112, 112], [20, 20], [7, 7]]
    assert table["resize_factor"][1].tolist() == [1.4, 1.4]
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


def test_a_trunk_with_fewer_columns_reports_the_picture_as_it_is(tmp_path: Path) -> None:
    """A MobileFaceNet of 112x96 crops a 30 x 40 picture to its shape; 112 pictures fill batches of 64."""
    torch.manual_seed(0)
    config = BackboneConfig(name="mobilefacenet", size=(112, 96), width=0.25, embedding=16)
    net = BTNet(build_backbone(config), (28, 14)).eval()
    sizes = [(30, 40), (14, 12), (100, 100), (20, 20)] * 28
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        (tmp_path / "faces").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{i:03d}.png")
    count, failed = embed_folder(net, str(tmp_path / "faces"), str(tmp_path / "e.npz"))
    assert (count, failed) == (112, {})
    with np.load(tmp_path / "e.npz") as table:
        assert table["size"].tolist() == [list(size) for size in sizes]
        expected = net.embed(sorted((tmp_path / "faces").iterdir())).numpy()
        np.testing.assert_allclose(table["embeddings"], expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(table["embeddings"], axis=1), 1, atol=1e-5)


@pytest.mark.skipif(not find_spec("openvino"), reason="no openvino: pip install -e '.[tools]'")
def test_quick_inference_gives_the_same_embeddings(
    model: Path, faces: Path, tmp_path: Path
) -> None:
    line = ["embed", str(faces), "--model", str(model), "--out"]
    assert main([*line, str(tmp_path / "a.npz")]) == 0
    assert main([*line, str(tmp_path / "b.npz"), "--precision", "fp32"]) == 0
    plain, quick = (np.load(tmp_path / name)["embeddings"] for name in ("a.npz", "b.npz"))
    np.testing.assert_allclose(plain, quick, atol=1e-4)


def test_pictures_that_are_no_crops_are_warned_of_once() -> None:
    def face(*size: int) -> Face:
        return Face(size=size, r=112, resize_factor=(1.0, 1.0), reliability=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_photographs({"a": face(112, 112), "b": face(250, 250), "c": face(20, 12)})
    odd = {"a": face(112, 112), "wide": face(100, 300), "large": face(600, 500)}
    with pytest.warns(
        UserWarning, match=r"2 pictures .* first wide \(300x100\).*btnet align"
    ) as seen:
        warn_of_photographs(odd)
    assert len(seen) == 1


def test_detail_chooses_the_branch(model: Path, tmp_path: Path) -> None:
    """A face of 7 pixels that was scaled up to 112 has little detail: detail+near sends it to a small branch."""
    face = torch.randint(0, 256, (3, 7, 7), generator=torch.Generator().manual_seed(0))
    (tmp_path / "a.png").write_bytes(encode(resize(face.float(), 112).round().to(torch.uint8)))
    net = BTNet.load(model)
    by_size, by_detail = (
        Reader(net, rule)(tmp_path / "a.png") for rule in ("max+ceil", "detail+near")
    )
    assert (by_size.r, by_detail.r) == (112, 7)
    assert by_detail.pixels.shape == (3, 7, 7)
    assert by_size.reliability == by_detail.reliability < 17.5


def test_unreadable_images_stop_it_or_are_listed(
    model: Path, faces: Path, tmp_path: Path, capsys
) -> None:
    (faces / "a" / "cut.jpg").write_bytes((faces / "a" / "small.jpg").read_bytes()[:100])
    line = ["embed", str(faces), "--model", str(model), "--out", str(tmp_path / "e.npz")]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert "cut.jpg" in error
    assert "--keep-going" in error
    bad = str(faces / "a" / "cut.jpg")
    assert main(["verify", bad, bad, "--model", str(model)]) == 1
    assert "--" not in capsys.readouterr().err  # verify leaves nothing out
    assert not (tmp_path / "e.npz").exists()
    assert main([*line, "--keep-going"]) == 1
    assert "left out a/cut.jpg" in capsys.readouterr().err
    table = np.load(tmp_path / "e.npz")
    assert (table["names"].tolist(), table["failed"].tolist()) == (list(SIDES), ["a/cut.jpg"])
    assert table["embeddings"].shape == (3, 16)


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
    assert main([*words, *([] if "--model" in words else ["--model", str(model)])]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_reading_overlaps_with_the_model() -> None:
    """On any number of processors: a reader that waits, as for a disk, costs nothing while the model works."""

    def read(index: int) -> int:
        time.sleep(0.02)
        return index

    start = time.perf_counter()
    for _ in ahead(read, range(40), 16):
        time.sleep(0.02)
    assert time.perf_counter() - start < 0.7 * 40 * 0.04


def test_ahead_keeps_order_and_bounds_what_is_held() -> None:
    begun: list[int] = []

    def read(index: int) -> int:
        begun.append(index)
        if index == 3:
            raise DataError("three")
        return index

    stream = ahead(read, range(100), 5)
    got = [next(stream) for _ in range(5)]
    assert [str(one) for one in got] == ["0", "1", "2", "three", "4"]
    time.sleep(0.05)
    assert len(begun) <= 11
    stream.close()


def test_the_package_exports_btnet_lazily() -> None:
    assert btnet_core.BTNet is BTNet
    with pytest.raises(AttributeError, match="BTNets"):
        btnet_core.BTNets  # noqa: B018
