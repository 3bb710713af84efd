"""btnet embed: a row for each picture, the same embeddings as BTNet.embed, errors that are named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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
from btnet_tools import embed as tool
from btnet_tools.cli import main
from btnet_tools.embed import Face, Reader, ahead, embed_folder, embed_shards, warn_of_photographs

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


# ---- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Seven pictures in two folders and one beside them."""
    for index, name in enumerate(("0.png", *(f"{k}/{i}.png" for k in "ab" for i in range(3)))):
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (9 + index, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "many" / name)
    return tmp_path / "many"


def shards(out: Path) -> dict[str, np.ndarray]:
    """{name: embedding} of all shards that the index lists."""
    index, found = json.loads((out / "index.json").read_text()), {}
    for shard in index["shards"]:
        with np.load(out / shard["file"]) as table:
            assert (len(table["names"]), len(table["failed"])) == (shard["names"], shard["failed"])
            found |= dict(zip(table["names"].tolist(), table["embeddings"], strict=True))
    return found


def test_shards_hold_what_one_file_does(model: Path, many: Path, tmp_path: Path, capsys) -> None:
    line = ["embed", str(many), "--model", str(model), "--out"]
    assert main([*line, str(tmp_path / "e.npz")]) == 0
    assert main([*line, str(tmp_path / "out"), "--shard", "3"]) == 0
    assert "3 embeddings in shard_000001.npz" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["names"] for shard in index["shards"]] == [3, 3, 1]
    assert [shard["failed"] for shard in index["shards"]] == [0, 0, 0]
    with np.load(tmp_path / "e.npz") as table:
        whole = dict(zip(table["names"].tolist(), table["embeddings"], strict=True))
    together = shards(tmp_path / "out")
    assert together.keys() == whole.keys()
    for name, embedding in whole.items():
        np.testing.assert_allclose(together[name], embedding, atol=1e-5)


def test_shards_that_are_there_are_not_made_again(model: Path, many: Path, tmp_path: Path) -> None:
    net, out = BTNet.load(model).eval(), tmp_path / "out"
    made = embed_shards(net, str(many), str(out), images=3)
    next(made)
    made.close()  # stopped after the first
    before = (out / "shard_000000.npz").stat().st_mtime_ns
    assert not (out / "index.json").exists()
    assert [name for name, *_ in embed_shards(net, str(many), str(out), images=3)] == [
        "shard_000001.npz",
        "shard_000002.npz",
    ]
    assert (out / "shard_000000.npz").stat().st_mtime_ns == before
    assert len(shards(out)) == 7
    assert not list(embed_shards(net, str(many), str(out), images=3))


def test_each_process_makes_its_share_and_the_last_one_the_index(
    model: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, out = BTNet.load(model).eval(), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = {}
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        made[rank] = [name for name, *_ in embed_shards(net, str(many), str(out), images=2)]
        assert (out / "index.json").exists() == (rank == "0")
    assert made == {
        "1": ["shard_000001.npz", "shard_000003.npz"],
        "0": ["shard_000000.npz", "shard_000002.npz"],
    }
    assert len(shards(out)) == 7


def test_a_kill_in_the_middle_costs_one_shard_at_most(
    model: Path, many: Path, tmp_path: Path
) -> None:
    """SIGKILL in the third shard, with a picture of it already embedded: two stay, the rest is made by the next call."""
    code = (
        "import os, signal, sys\n"
        "from btnet_tools import embed\n"
        "from btnet_tools.cli import main\n"
        "files = embed.embed_files\n"
        "def killed(net, paths, *more):\n"
        "    found = files(net, paths, *more)\n"
        "    killed.calls += 1\n"
        "    if killed.calls == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return found\n"
        "killed.calls, embed.embed_files = 0, killed\n"
        "main(sys.argv[1:])\n"
    )
    line = [
        "embed",
        str(many),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--shard",
        "2",
    ]
    done = subprocess.run([sys.executable, "-c", code, *line], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.npz")) == [
        "shard_000000.npz",
        "shard_000001.npz",
    ]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert main(line) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(shards(out)) == 7


def test_memory_holds_one_shard(model: Path, many: Path, tmp_path: Path, monkeypatch) -> None:
    held: list[int] = []
    files = tool.embed_files
    monkeypatch.setattr(
        tool,
        "embed_files",
        lambda net, paths, *more: held.append(len(paths)) or files(net, paths, *more),
    )
    list(embed_shards(BTNet.load(model).eval(), str(many), str(tmp_path / "out"), images=3))
    assert held == [3, 3, 1]


def in_shards(model: Path, images: Path, folder: Path) -> list[str]:
    """The command that writes shards of three images to ``folder/out``."""
    out = str(folder / "out")
    return ["embed", str(images), "--model", str(model), "--out", out, "--shard", "3"]


@pytest.mark.parametrize("what", ["images", "select", "model", "size", "shard", "nothing"])
def test_a_folder_of_other_embeddings_is_refused(
    what: str, model: Path, many: Path, tmp_path: Path, capsys
) -> None:
    line = in_shards(model, many, tmp_path)
    assert main(line) == 0
    if what == "images":
        (many / "a" / "1.png").rename(many / "a" / "11.png")
    elif what == "select":
        line += ["--select", "max+near"]
    elif what == "model":
        net = BTNet.load(model)
        with torch.no_grad():
            net.trunk.head.fc.weight += 1
        net.save(tmp_path / "other")
        line[3] = str(tmp_path / "other")
    elif what == "size":
        line[-1] = "4"
    elif what == "nothing":
        (tmp_path / "empty").mkdir()
        line[1] = str(tmp_path / "empty")
    else:
        (tmp_path / "out" / "shard_000001.npz").write_text("[")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(line) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    told = {"shard": "shard_000001.npz: no shard", "nothing": "no images"}
    assert told.get(what, "made of other images, or by another") in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_unreadable_image_stops_the_shards_or_is_listed(
    model: Path, many: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many / "b" / "1.png").write_bytes(b"no picture")
    line = in_shards(model, many, tmp_path)
    assert main(line) == 1
    assert "--keep-going" in capsys.readouterr().err
    assert (tmp_path / "out" / "shard_000000.npz").is_file()
    assert main([*line, "--keep-going"]) == 1
    assert "left out b/1.png" in capsys.readouterr().err
    assert len(shards(tmp_path / "out")) == 6
    monkeypatch.setenv("WORLD_SIZE", "1")  # under torchrun a status of 1 would end the others
    assert main([*line[:5], str(tmp_path / "other"), "--keep-going"]) == 0
