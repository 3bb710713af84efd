"""RecordIO without mxnet: the layout byte by byte, random access, damage."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from btnet_core.data.faces import open_faces, unreadable
from btnet_core.data.recordio import (
    MAGIC,
    FaceRecords,
    RecordFile,
    RecordWriter,
    write_face_records,
)
from btnet_core.errors import ConfigError, DataError
from btnet_core.images import decode, encode


def picture(value: int) -> bytes:
    return encode(torch.full((3, 112, 112), value, dtype=torch.uint8))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    faces = [(picture(10 * label + k), label) for label in range(3) for k in range(4)]
    write_face_records(tmp_path / "set", faces, (112, 112))
    return tmp_path / "set"


def test_bytes_are_the_documented_layout(tmp_path: Path) -> None:
    """Written against the format's description, not against the reader."""
    write_face_records(tmp_path, [(b"abcdef", 0), (b"gh", 1)], (112, 112))
    data = (tmp_path / "train.rec").read_bytes()
    magic, word = struct.unpack_from("<II", data)
    assert (magic, word >> 29, word & (2**29 - 1)) == (0xCED7230A, 0, 24 + 8)
    assert struct.unpack_from("<IfQQ2f", data, 8) == (2, 0.0, 0, 0, 3.0, 5.0)
    assert struct.unpack_from("<IfQQ", data, 8 + 32 + 8) == (0, 0.0, 1, 0)
    lines = [line.split("\t") for line in (tmp_path / "train.idx").read_text().splitlines()]
    assert [int(key) for key, _ in lines] == [0, 1, 2, 3, 4]
    assert all(data[int(offset) : int(offset) + 4] == MAGIC for _, offset in lines)
    assert (tmp_path / "property").read_text().strip() == "2,112,112"


def test_round_trip(packed: Path) -> None:
    faces = open_faces(str(packed))
    assert (len(faces), faces.num_identities) == (12, 3)
    assert faces.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image, label = faces[9]
    assert (image.shape, image.dtype, label) == ((3, 112, 112), torch.uint8, 2)
    assert int(image[0, 0, 0]) == 21
    assert faces.images([11, 0])[:, 0, 5, 5].tolist() == [23, 0]


@given(st.lists(st.sampled_from([MAGIC, b"abcd", b"x", b"\x0a\x23", b""]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_payloads_with_the_magic_inside_survive(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("magic") / "x.rec"
    payloads = [b"".join(pieces), b"next"]
    with RecordWriter(path) as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    assert [RecordFile(path).payload(i) for i in (1, 0)] == payloads[::-1]
    for offset in range(0, path.stat().st_size, 4):  # every aligned magic of the file starts a part
        if path.read_bytes()[offset : offset + 4] == MAGIC:
            word = struct.unpack_from("<I", path.read_bytes(), offset + 4)[0]
            assert offset + 8 + (word & (2**29 - 1)) <= path.stat().st_size


def test_a_record_is_split_at_aligned_magics_alone(tmp_path: Path) -> None:
    """By hand, from the format's description: the magic at byte 1 stays, the one at byte 8 is dropped."""
    with RecordWriter(tmp_path / "x.rec") as writer:
        writer.write(0, b"x" + MAGIC + b"abc" + MAGIC + b"de")
    first = struct.pack("<4sI", MAGIC, 1 << 29 | 8) + b"x" + MAGIC + b"abc"
    last = struct.pack("<4sI", MAGIC, 3 << 29 | 2) + b"de\0\0"
    assert (tmp_path / "x.rec").read_bytes() == first + last


def test_each_part_of_a_split_record_is_padded(tmp_path: Path) -> None:
    parts = ((1, b"abc\0", 3), (2, b"", 0), (3, b"defgh\0\0\0", 5))
    data = [
        struct.pack("<4sI", MAGIC, flag << 29 | size) + content for flag, content, size in parts
    ]
    (tmp_path / "x.rec").write_bytes(b"".join(data))
    (tmp_path / "x.idx").write_text("0\t0\n")
    assert RecordFile(tmp_path / "x.rec").payload(0) == b"abc" + MAGIC + MAGIC + b"defgh"


def rewritten(packed: Path, key: int, record: bytes) -> None:
    """Put another record of the same length in the place of ``key``."""
    offset = RecordFile(packed / "train.rec").offsets[key]
    data = bytearray((packed / "train.rec").read_bytes())
    data[offset + 8 : offset + 8 + len(record)] = record
    (packed / "train.rec").write_bytes(bytes(data))


def test_an_image_inside_a_range_with_another_label_is_named(packed: Path) -> None:
    """Labels come from the ends of each identity's range; the second image of it is checked when read."""
    rewritten(packed, 2, struct.pack("<IfQQ", 0, 2.0, 2, 0))
    records = FaceRecords(packed)
    assert records.labels[:4].tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"index 2.*label 2, its identity record says 0"):
        records.image(1)


def test_ranges_that_do_not_hold_leave_the_labels_of_the_images(packed: Path) -> None:
    rewritten(packed, 4, struct.pack("<IfQQ", 0, 2.0, 4, 0))  # the last image of the first range
    assert FaceRecords(packed).labels.tolist() == [0, 0, 0, 2, 1, 1, 1, 1, 2, 2, 2, 2]
    rewritten(packed, 4, struct.pack("<IfQQ", 0, 0.0, 4, 0))
    rewritten(packed, 13, struct.pack("<IfQQ2f", 2, 0.0, 13, 0, 1.0, 4.0))  # one image short
    assert FaceRecords(packed).labels[:5].tolist() == [0, 0, 0, 0, 1]


def test_an_offset_between_words_is_named(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "x.rec") as writer:
        writer.write(0, bytes(40))
    (tmp_path / "x.idx").write_text("0\t2\n")
    with pytest.raises(DataError, match=r"x\.idx: 1 offsets do not fit .* offset 2"):
        RecordFile(tmp_path / "x.rec")


def test_several_labels_in_a_record(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec") as writer:
        payload = struct.pack("<IfQQ", 3, 0.0, 0, 0) + struct.pack("<3f", 1, 0.5, 0.25) + picture(3)
        writer.write(0, payload)
        writer.write(1, struct.pack("<IfQQ", 0, 0.0, 1, 0) + picture(4))
    records = FaceRecords(tmp_path)
    assert records.labels.tolist() == [1, 0]
    assert records.file.record(0).labels.tolist() == [1, 0.5, 0.25]
    assert int(decode(records.image(0), where="x")[0, 0, 0]) == 3


def test_worker_processes_read_the_same(packed: Path) -> None:
    faces = open_faces(str(packed))
    faces[0]  # the mapping is open before the workers start
    loader = DataLoader(faces, batch_size=5, num_workers=2, multiprocessing_context="spawn")
    values = torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist()
    assert values == [int(faces[i][0][0, 0, 0]) for i in range(len(faces))]


def test_damage_is_named(packed: Path) -> None:
    rec, idx = packed / "train.rec", packed / "train.idx"
    whole, index = rec.read_bytes(), idx.read_text()
    rec.write_bytes(whole[:-60])
    with pytest.raises(DataError, match=r"train\.(rec|idx).*(ends inside|do not fit)"):
        open_faces(str(packed))
    rec.write_bytes(b"\xf0\x9f\x00\x01" + whole[4:])
    with pytest.raises(DataError, match=r"train\.rec, index 0, offset 0: no record"):
        open_faces(str(packed))
    rec.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(DataError, match=r"train\.rec: no RecordIO, but a zip archive"):
        open_faces(str(packed))
    rec.write_bytes(whole)
    idx.write_text(index.replace("\t", "\t9", 4))
    with pytest.raises(DataError, match=r"train\.idx.*offset"):
        open_faces(str(packed))
    idx.write_text("garbage\n")
    with pytest.raises(DataError, match=r"train\.idx"):
        open_faces(str(packed))
    idx.unlink()
    with pytest.raises(DataError, match=r"train\.idx: no such file"):
        open_faces(str(packed))


@pytest.mark.parametrize("label", [float("nan"), -1.0, 0.5, 7.0])
def test_wrong_labels_are_found(tmp_path: Path, label: float) -> None:
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, struct.pack("<IfQQ", 0, 0.0, 0, 0) + picture(0))
        writer.write(1, struct.pack("<IfQQ", 0, label, 1, 0) + picture(1))
    (tmp_path / "property").write_text("2,112,112")
    with pytest.raises(DataError, match=r"index 1.*label"):
        open_faces(str(tmp_path))


def test_a_broken_image_is_an_error_and_can_be_left_out(tmp_path: Path) -> None:
    faces = [(picture(0), 0), (b"no image", 0), (picture(2), 0), (picture(3), 1)]
    write_face_records(tmp_path, faces, (112, 112))
    with pytest.raises(DataError, match=r"train\.rec, index 2, offset \d+"):
        open_faces(str(tmp_path)).images([1])
    (bad, why), *others = unreadable(open_faces(str(tmp_path))).items()
    assert (bad, others) == (1, [])
    assert "index 2, offset" in why
    rest = open_faces({"kind": "without", "faces": str(tmp_path), "images": [bad]})
    assert rest.images(range(3))[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert rest.labels.tolist() == [0, 0, 1]
    with pytest.raises(ConfigError, match=r"images: got \[4\]"):
        open_faces({"kind": "without", "faces": str(tmp_path), "images": [4]})


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label 2"):
        write_face_records(tmp_path, [(b"a", 0), (b"b", 2)], (112, 112))
    assert list(tmp_path.iterdir()) == []


@given(st.binary(max_size=300), st.binary(max_size=60))
@settings(max_examples=80, deadline=None)
def test_arbitrary_files_raise_data_error_only(
    tmp_path_factory: pytest.TempPathFactory, rec: bytes, idx: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "train.rec").write_bytes(MAGIC + rec)
    for index in (idx, b"0\t0\n1\t8\n"):
        (folder / "train.idx").write_bytes(index)
        with contextlib.suppress(DataError):
            FaceRecords(folder).image(0)


def test_the_real_sets(btnet_data: Path) -> None:
    train, test = open_faces("faces_train"), open_faces("lfw_devtest")
    assert (len(train), train.num_identities) == (15_675, 4_336)
    assert (len(test), test.num_identities) == (3_708, 1_711)
    assert train.images([0, 15_674]).float().std() > 20
    counts = np.bincount(train.labels.numpy())
    assert (counts > 0).all()
    assert counts[:4_038].sum() == 9_525
