"""btnet align: crops against a transform known in advance, with a detector that knows where it drew the faces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from btnet_core.data.faces import open_faces
from btnet_core.data.ijbc import ARCFACE
from btnet_core.errors import ConfigError, DataError
from btnet_core.images import encode, resize
from btnet_tools import photographs as module
from btnet_tools.cli import main
from btnet_tools.photographs import Detection, align_photos, cut

FACE = open_faces({"kind": "synthetic", "identities": 2, "images": 1, "seed": 0}).image(0)


def photo(*places: tuple[int, int, int], size: tuple[int, int] = (300, 400)) -> Tensor:
    """Grey, with the face drawn ``side`` pixels wide at each (x, y, side)."""
    picture = torch.full((3, *size), 90, dtype=torch.uint8)
    for x, y, side in places:
        picture[:, y : y + side, x : x + side] = resize(FACE, side).round().to(torch.uint8)
    return picture


def detection(x: int, y: int, side: int) -> Detection:
    """What a perfect detector says of the face at x, y."""
    points = (ARCFACE + 0.5) * side / 112 - 0.5 + (x, y)
    return Detection(box=(x, y, x + side, y + side), points=points)


@pytest.mark.parametrize("side", [112, 28, 14, 7, 224, 150])
def test_a_face_keeps_its_own_size_up_to_112(side: int) -> None:
    """A face drawn at s pixels is cut out as it was drawn; of 112 or more as it looks shrunk to 112."""
    crop = cut(photo((31, 17, side)), detection(31, 17, side).points)
    expected = resize(resize(FACE, side).round(), min(side, 112))
    assert crop.shape == (3, min(side, 112), min(side, 112))
    inner = slice(3, -3) if side > 28 else slice(1, -1)
    difference = (crop.float() - expected)[:, inner, inner].abs()
    assert difference.mean() < (0.01 if side <= 112 else 1.5)


def test_a_turned_face_is_set_upright() -> None:
    """Turned by 90 degrees about its centre: points (x, y) -> (111 - y, x)."""
    turned = torch.rot90(FACE, -1, (1, 2))
    points = np.column_stack([111 - ARCFACE[:, 1], ARCFACE[:, 0]])
    assert torch.equal(cut(turned, points), FACE)


def test_points_that_coincide_are_told() -> None:
    with pytest.raises(DataError, match="coincide"):
        cut(FACE, np.full((5, 2), 3.0))


def test_photographs_give_crops_and_a_list(tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "crops"
    (source / "ann").mkdir(parents=True)
    known = {
        "ann/two.png": [(10, 10, 20), (100, 40, 120)],
        "none.png": [],
        "tiny.png": [(700, 300, 24)],
    }
    for name, places in known.items():
        size = (800, 1280) if name == "tiny.png" else (300, 400)
        (source / name).write_bytes(encode(photo(*places, size=size)))
    (source / "broken.jpg").write_text("<html>")
    (source / "notes.txt").write_text("x")
    answers = iter([known[name] for name in sorted(known)])

    def detect(picture: Tensor) -> list[Detection]:
        return [detection(*place) for place in next(answers)]

    with pytest.warns(UserWarning, match=r"left out 1 files that are no images: notes\.txt"):
        found = align_photos(source, out, detect)
    sides = {name: facts["side"] for name, facts in found["crops"].items()}
    assert sides == {"ann/two.png_0.png": 112, "ann/two.png_1.png": 20, "tiny.png_0.png": 24}
    assert found["crops"]["tiny.png_0.png"]["note"] == "24 pixels, below the detector's 32"
    assert found["crops"]["ann/two.png_1.png"]["note"] == ""
    assert found["without"]["none.png"] == "no face of 16 pixels or more"
    assert "broken.jpg" in found["without"]["broken.jpg"]
    assert json.loads((tmp_path / "crops.json").read_text())["without"] == found["without"]
    assert sorted(p.name for p in out.rglob("*.png")) == sorted(Path(n).name for n in sides)
    with pytest.raises(DataError, match="holds the photographs"):
        align_photos(source, tmp_path, detect)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(photo((10, 10, 20), (100, 40, 120))))
    (tmp_path / "photos" / "b.png").write_bytes(encode(photo()))
    answers = iter([[detection(10, 10, 20), detection(100, 40, 120)], []])
    monkeypatch.setattr(module, "retinaface", lambda: lambda picture: next(answers))
    line = ["align", str(tmp_path / "photos"), str(tmp_path / "crops"), "--largest"]
    assert main(line) == 1  # one photograph gave nothing
    said = capsys.readouterr()
    assert "1 faces in" in said.out
    assert "no crop of b.png: no face" in said.err
    assert [p.name for p in (tmp_path / "crops").iterdir()] == ["a.png_0.png"]


def test_what_the_detector_gets_and_when_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, **options: object) -> None:
            self.bbox, self.landmarks = np.array([1, 2, 30, 40]), ARCFACE

        def detect(self, image: np.ndarray) -> list[Fake]:
            assert image.shape == (5, 4, 3)
            assert image[0, 0].tolist() == [3, 2, 1]  # blue first, as OpenCV
            return [self]

    assert os.environ["ORT_DISABLE_TELEMETRY"]  # before uniface brings onnxruntime
    monkeypatch.setattr(module, "RetinaFace", Fake)
    picture = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 5, 4)
    (face,) = module.retinaface()(picture)
    assert (face.box, face.side) == ((1, 2, 30, 40), 38)

    def offline(**options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(module, "RetinaFace", offline)
    with pytest.raises(ConfigError, match=r"retinaface_mnet_v2\.onnx"):
        module.retinaface()
    monkeypatch.setattr(module, "RetinaFace", None)
    with pytest.raises(ConfigError, match=r"btnet-core\[align\]"):
        module.retinaface()
