"""btnet data and btnet pack, tried as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from btnet_core.data.faces import open_faces
from btnet_core.data.recordio import FaceRecords
from btnet_core.images import encode
from btnet_tools.catalogue import Download, entries
from btnet_tools.cli import main
from btnet_tools.data import pack_folder

ROOT = Path(__file__).resolve().parents[2]


def picture(value: int, size: int = 112) -> bytes:
    return encode(torch.full((3, size, size), value, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, (person, k, size) in enumerate([("ann", 1, 112), ("ann", 2, 60), ("bob", 1, 112)]):
        (tmp_path / "faces" / person).mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / person / f"{person}_{k:04d}.png").write_bytes(
            picture(50 * value, size)
        )
    return tmp_path / "faces"


def test_pack_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert "3 images" in capsys.readouterr().out
    packed, plain = open_faces(str(tmp_path / "out")), open_faces(str(folder))
    assert packed.labels.tolist() == plain.labels.tolist() == [0, 0, 1]
    assert torch.equal(packed.images(range(3)), plain.images(range(3)))


def test_pack_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message, status in (
        ([str(tmp_path / "none"), str(tmp_path / "o")], "none", 1),
        ([str(tmp_path)], "OUT", 2),
    ):
        assert main(["pack", *arguments]) == status
        assert message in capsys.readouterr().err


def test_data_lists_every_set_found_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    (tmp_path / "lfw.bin").write_bytes(b"broken")
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert all(str(tmp_path / entry.path) in out for entry in entries())
    assert "a test on strangers only for networks that learned from neither part of LFW" in out
    assert "damaged" in out
    assert "NOT FOUND" in out
    assert "get it: btnet data get lfw; btnet data get celeba (LFW's peopleDevTrain" in out


def test_data_get_says_what_it_wrote_or_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BTNET_DATA", str(tmp_path / "data"))
    weights, about = tmp_path / "vdsr.safetensors", Download(by_hand="", tensors="0" * 64)
    save_file({"input.weight": torch.ones(2)}, weights)
    monkeypatch.setattr("btnet_tools.fetch.downloads", lambda: {"vdsr": about})
    assert main(["data", "get", "vdsr", "--from", str(weights)]) == 1
    assert "other weights" in capsys.readouterr().err
    monkeypatch.setattr("btnet_tools.fetch.tensor_digest", lambda _: "0" * 64)
    assert main(["data", "get", "vdsr", "--from", str(weights)]) == 0
    written = tmp_path / "data" / "weights" / "vdsr.safetensors"
    assert capsys.readouterr().out.strip() == str(written)
    assert written.is_file()
    assert main(["data", "fetch", "vdsr"]) == 2
    assert "expected get" in capsys.readouterr().err


def test_the_readme_of_data_names_every_set() -> None:
    readme = (ROOT / "data" / "README.md").read_text()
    assert not [entry.path for entry in entries() if entry.path not in readme]


def test_real_counts_are_listed(btnet_data: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert "15,675 images of 4,336 people" in out
    assert "6,000 pairs" in out


def test_a_picture_of_another_format_is_packed_as_png(folder: Path, tmp_path: Path) -> None:
    """MXNet's layout holds JPEG or PNG; those are packed byte for byte."""
    image = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "bob" / "bob_0002.bmp")
    assert pack_folder(folder, tmp_path / "out") == (4, [])
    records = FaceRecords(tmp_path / "out")
    assert records.image(0) == (folder / "ann" / "ann_0001.png").read_bytes()
    assert records.image(3).startswith(b"\x89PNG")
    assert torch.equal(open_faces(str(tmp_path / "out"))[3][0], image)


def test_bad_images_are_refused_or_left_out(folder: Path, tmp_path: Path, capsys) -> None:
    """Ann's second and all of Carl's are broken: Dora's label follows Bob's."""
    (folder / "ann" / "ann_0002.png").write_bytes(b"")
    for person, content in (("carl", b"<html>"), ("dora", picture(9))):
        (folder / person).mkdir()
        (folder / person / f"{person}_0001.png").write_bytes(content)
    line = ["pack", str(folder), str(tmp_path / "out")]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert "2 of 5 images cannot be read" in error
    assert "--skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert main([*line, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "3 images" in said.out
    assert [name in said.err for name in ("ann_0002", "carl_0001", "bob")] == [True, True, False]
    assert open_faces(str(tmp_path / "out")).labels.tolist() == [0, 1, 2]
