"""What people's folders and lists are like: names, formats, links, leftovers of other programs."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from btnet_core.data.faces import open_faces, unreadable
from btnet_core.data.folders import find_images, walk
from btnet_core.data.pairs import open_pairs
from btnet_core.data.recordio import write_face_records
from btnet_core.data.survface import TEST_FOLDER, read_open_set, training_set
from btnet_core.errors import ConfigError, DataError
from btnet_core.images import encode
from btnet_paper.layouts import write_survface, write_survface_training

FORMATS = {
    "a.jfif": "JPEG",
    "b.pgm": "PPM",
    "c.ppm": "PPM",
    "d.tif": "TIFF",
    "e.tiff": "TIFF",
    "f.gif": "GIF",
    "g.jp2": "JPEG2000",
    "h.avif": "AVIF",
    "i.JPG_large": "JPEG",
    "j": "PNG",
}


def picture(value: int, kind: str = "PNG", size: tuple[int, int] = (112, 112)) -> bytes:
    """A grey square of ``size`` (rows, columns)."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, value: int = 0, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(value, kind))
    return path


def grey(faces, count: int) -> list[int]:
    return faces.images(range(count))[:, 1, 50, 50].tolist()


def test_images_are_taken_by_what_the_decoder_reads(tmp_path: Path) -> None:
    kinds = {n: k for n, k in FORMATS.items() if k != "AVIF" or features.check("avif")}
    for k, (name, kind) in enumerate(kinds.items()):
        put(tmp_path / "ann" / name, 20 * k, kind)
    put(tmp_path / "bob" / "1.png", 255)
    (tmp_path / "ann" / "notes.txt").write_text("no image")
    (tmp_path / "list.csv").write_text("no image")
    with pytest.warns(UserWarning, match=r"left out 2 files .*: list\.csv, ann/notes\.txt"):
        faces = open_faces(str(tmp_path))
    assert len(faces) == len(kinds) + 1
    wanted = [20 * k for k in range(len(kinds))]
    assert np.abs(np.subtract(grey(faces, len(kinds)), wanted)).max() <= 2
    assert unreadable(faces) == {}


def test_leftovers_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "ann" / "0.png", 7)
    for name in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/ann/0.png",
        ".trash/x/1.png",
        "#recycle/0.png",
        "System Volume Information/0.png",
        "ann/@eaDir/0.png",
    ):
        put(tmp_path / name, 9)
    for name in ("ann/._0.png", "ann/.DS_Store", "ann/Thumbs.db", "desktop.ini", "._ann", "Icon\r"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faces = open_faces(str(tmp_path))
    assert (len(faces), faces.num_identities, grey(faces, 1)) == (1, 1, [7])


def test_loose_images_count_one_by_one_but_not_beside_folders(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.png", 1)
    put(tmp_path / ".hidden" / "c.png", 3)
    (tmp_path / "empty").mkdir()
    faces = open_faces(str(tmp_path))
    assert (faces.labels.tolist(), grey(faces, 2)) == ([0, 1], [1, 2])
    put(tmp_path / "ann" / "0.png")
    with pytest.raises(
        DataError, match=r"2 images, first a\.png, beside 1 folders with images, first ann"
    ):
        open_faces(str(tmp_path))


def test_people_and_images_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    order = [f"p{(k * 7) % 10}" for k in range(10)]
    for k, name in enumerate(order):
        put(tmp_path / name / f"{(k * 3) % 10}.png", int(name[1]))
        put(tmp_path / name / "x.png", 100 + int(name[1]))
    faces = open_faces(str(tmp_path))
    assert grey(faces, 20) == [value for k in range(10) for value in (k, 100 + k)]


def test_images_deeper_than_a_persons_folder_are_named(tmp_path: Path) -> None:
    put(tmp_path / "train" / "ann" / "0.png")
    with pytest.raises(DataError, match=r"found 1 images in .*train/ann"):
        open_faces(str(tmp_path))
    assert open_faces(str(tmp_path / "train")).num_identities == 1


def test_a_folder_called_as_an_image_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "ann.jpg" / "0.png", 5)
    put(tmp_path / "bob" / "0.png", 6)
    faces = open_faces(str(tmp_path))
    assert (faces.labels.tolist(), grey(faces, 2)) == ([0, 1], [5, 6])


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "bob" / "0.png", 4)
    put(tmp_path / "faces" / "ann" / "0.png", 3)
    (tmp_path / "faces" / "bob").symlink_to(tmp_path / "elsewhere" / "bob")
    (tmp_path / "faces" / "ann" / "again").symlink_to(tmp_path / "faces")
    (tmp_path / "faces" / "ann" / "here").symlink_to(".")
    faces = open_faces(str(tmp_path / "faces" / "ann" / ".."))
    assert grey(faces, 2) == [3, 4]
    images, others = find_images(tmp_path / "faces")
    assert [str(path.relative_to(tmp_path / "faces")) for path in images] == [
        "ann/0.png",
        "bob/0.png",
    ]
    assert others == []
    assert [folder.name for folder, _ in walk(tmp_path / "faces")] == ["faces", "ann", "bob"]


def test_paths_with_signs_of_a_language_are_paths(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "user@host:22" / "held:synthetic:identities=3" / "{kind"
    put(place / "ann" / "ann_0001.png", 1)
    put(place / "ann" / "ann_0002.png", 2)
    (place / "pairs@1:2.txt").write_text("ann\t1\t2\n")
    assert len(open_faces(str(place))) == 2
    assert open_pairs(str(place / "pairs@1:2.txt")).num_images == 2
    monkeypatch.chdir(place.parent)
    monkeypatch.delenv("BTNET_DATA", raising=False)
    assert len(open_faces("{kind")) == 2


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "lines",
    [
        ["my faces/bob 1.png 2", "ann.png 0"],  # this project's
        ["my faces/bob 1.png\t2", "ann.png\t0"],
        ["my faces\\bob 1.png 2", ".\\ann.png 0"],  # of Windows
        ["1\tmy faces/bob 1.png\t2", "1\tann.png\t0"],  # InsightFace's
        ["0\tmy faces/bob 1.png\t2\t10\t20\t90\t99", "1\tann.png\t0"],  # with a box
        ["0\t2.000000\tmy faces/bob 1.png", "1\t0.000000\tann.png"],  # im2rec's
        ["7\t2\t0.5\t0.25\tmy faces/bob 1.png", "9\t0\t0.5\t0.25\tann.png"],  # several labels
    ],
)
def test_lists_of_three_programs(tmp_path: Path, lines: list[str], end: str, code: str) -> None:
    put(tmp_path / "my faces" / "bob 1.png", 8)
    put(tmp_path / "ann.png", 9)
    (tmp_path / "faces.lst").write_bytes(end.join([*lines, ""]).encode(code))
    faces = open_faces(str(tmp_path / "faces.lst"))
    assert (faces.labels.tolist(), grey(faces, 2)) == ([2, 0], [8, 9])
    assert faces.num_identities == 3


def test_pairs_txt_of_windows_with_blanks_in_names(tmp_path: Path) -> None:
    for k, suffix in ((1, "jfif"), (2, "tif")):
        kind = {"jfif": "JPEG", "tif": "TIFF"}[suffix]
        put(tmp_path / "Ann Lee" / f"Ann Lee_000{k}.{suffix}", k, kind)
    put(tmp_path / "bob" / "bob_0001.png", 5)
    text = "\ufeff10\t300\r\nAnn Lee\t1\t2\r\nAnn Lee\t2\tbob\t1\r\n"
    (tmp_path / "pairs.txt").write_bytes(text.encode())
    pairs = open_pairs(str(tmp_path / "pairs.txt"))
    assert pairs.same.tolist() == [True, False]
    assert pairs.images(pairs.second)[:, 0, 0, 0].tolist() == [2, 5]


def test_identities_without_images_are_not_drawn(tmp_path: Path) -> None:
    """A subset with the full set's property: 4 of 1000 identities have images, the labels have gaps."""
    faces = [(encode(torch.full((3, 112, 112), k, dtype=torch.uint8)), k // 8) for k in range(32)]
    write_face_records(tmp_path / "rec", faces, (112, 112))
    (tmp_path / "rec" / "property").write_text("1000,112,112")
    part = {"kind": "part", "faces": str(tmp_path / "rec"), "percent": 25}
    for seed in range(5):
        held = open_faces({**part, "held": True, "seed": seed})
        rest = open_faces({**part, "held": False, "seed": seed})
        assert (len(held), held.num_identities, rest.num_identities) == (8, 1, 3)
    half = {**part, "held": True, "percent": 50}
    assert len(open_pairs({"kind": "drawn", "faces": half, "count": 20})) == 20
    with pytest.raises(DataError, match="too few for 20 pairs"):
        open_pairs({"kind": "drawn", "faces": {**part, "held": True}, "count": 20})
    (tmp_path / "one.txt").write_text(f"{put(tmp_path / 'a.png')} 5\n")
    with pytest.raises(DataError, match="images of 1 identity; two are needed"):
        open_faces({"kind": "part", "faces": str(tmp_path / "one.txt"), "held": True})


def test_every_bad_image_is_found_and_left_out(tmp_path: Path) -> None:
    for k in range(5):
        put(tmp_path / f"p{k % 2}" / f"{k}.png", 10 * k)
    (tmp_path / "p0" / "2.png").write_bytes(b"")
    (tmp_path / "p1" / "3.png").write_bytes(picture(1)[:100])
    faces = open_faces(str(tmp_path))
    bad = unreadable(faces)
    assert list(bad) == [1, 4]
    assert all(f"{k}.png" in why for k, why in zip((2, 3), bad.values(), strict=True))
    spec = {"kind": "without", "faces": str(tmp_path), "images": list(bad)}
    good = open_faces(spec)
    assert (grey(good, 3), good.labels.tolist()) == ([0, 40, 10], [0, 0, 1])
    assert good.where(1).endswith("p0/4.png (image 2)")
    assert unreadable(good) == {}
    assert good.checksum != open_faces({**spec, "images": [1]}).checksum
    with pytest.raises(ConfigError, match="some, not all, of 0 to 4"):
        open_faces({**spec, "images": [0, 1, 2, 3, 4]})


def test_survface_of_any_format_and_a_deleted_probe(tmp_path: Path) -> None:
    small = torch.full((3, 10, 8), 3, dtype=torch.uint8)
    write_survface(tmp_path, [(1, small)], [(1, small)], [(0, small)])
    write_survface_training(tmp_path, [(4, small), (9, small)])
    probes = tmp_path / TEST_FOLDER / "unmated_probe"
    put(probes / "9.tif", 50, "TIFF")
    (probes / "._9.tif").write_bytes(b"no image")
    (probes / "readme.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"left out 1 files .*readme\.txt"):
        test = read_open_set(tmp_path)
    assert test.labels.tolist() == [1, 1, -1, -1]
    assert test.images.sizes.tolist() == [[8, 10], [8, 10], [8, 10], [112, 112]]
    os.remove(probes / "9.tif")
    with pytest.warns(UserWarning, match="left out"):
        assert read_open_set(tmp_path).checksum != test.checksum
    faces = training_set(tmp_path)
    assert faces.native(1).shape == (3, 10, 8)
    assert (faces[1][0].shape, faces.labels.tolist()) == ((3, 112, 112), [0, 1])


def test_what_is_no_text_and_names_too_long_are_told(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("a.png 0\nmüller.png 1\n".encode("latin1"))
    wrong = {
        str(tmp_path / "latin.txt"): "expected text in UTF-8, got other bytes in line 2",
        str(put(tmp_path / "face.png")): "expected text in UTF-8, got a PNG picture",
        str(tmp_path / "none.txt"): r"cannot be read \(No such file",
    }
    for path, told in wrong.items():
        with pytest.raises(DataError, match=told) as error:
            open_pairs(path)
        assert "codec" not in str(error.value)
    with pytest.raises(DataError, match="no such file or folder"):
        open_faces("x" * 400)


def test_pictures_of_phones_are_bad_images_not_foreign_files(tmp_path: Path) -> None:
    put(tmp_path / "ann" / "0.png")
    (tmp_path / "ann" / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    bad = unreadable(open_faces(str(tmp_path)))
    assert list(bad) == [1]
    assert "1.HEIC (image 1): cannot decode image (a HEIC picture; save it as" in bad[1]
