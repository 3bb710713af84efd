"""Face sets from folders and lists, verification sets from pickles and pairs.txt, pairs drawn from identities."""

from __future__ import annotations

import contextlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from btnet_core.data.faces import open_faces, unreadable
from btnet_core.data.pairs import (
    draw_pairs,
    open_pairs,
    parse_bin,
    parse_pairs,
    read_bin,
    write_bin,
)
from btnet_core.errors import ConfigError, DataError
from btnet_core.images import encode


def picture(value: int, size: int = 112) -> bytes:
    return encode(torch.full((3, size, size), value, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for person, count in (("ann", 3), ("bob", 2), ("cy", 1)):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for k in range(1, count + 1):
            path = tmp_path / "faces" / person / f"{person}_{k:04d}.png"
            path.write_bytes(picture(ord(person[0]) + k, size=112 if k < 3 else 50))
    (tmp_path / "faces" / "empty").mkdir()
    return tmp_path / "faces"


def test_a_part_of_a_renamed_folder_has_the_same_checksum(folder: Path) -> None:
    def checksums(path: Path) -> list[str]:
        part = {"kind": "part", "faces": str(path), "held": True, "percent": 34}
        without = {"kind": "without", "faces": str(path), "images": [1]}
        return [open_faces(spec).checksum for spec in (part, {**part, "held": False}, without)]

    before = checksums(folder)
    assert len(set(before)) == 3
    assert checksums(folder.rename(folder.with_name("renamed"))) == before


def test_image_folder(folder: Path) -> None:
    faces = open_faces(str(folder))
    assert (faces.labels.tolist(), faces.num_identities) == ([0, 0, 0, 1, 1, 2], 3)
    assert faces.images(range(6)).shape == (6, 3, 112, 112)
    before = faces.checksum
    (folder / "bob" / "bob_0001.png").write_bytes(picture(200))
    assert open_faces(str(folder)).checksum != before


def test_list_file(folder: Path) -> None:
    (folder / "list.txt").write_text("bob/bob_0001.png 1\nann/ann_0002.png\t0\n")
    faces = open_faces(str(folder / "list.txt"))
    assert faces.labels.tolist() == [1, 0]
    (folder / "list.txt").write_text("bob/bob_0001.png one\n")
    with pytest.raises(DataError, match=r"list\.txt, line 1"):
        open_faces(str(folder / "list.txt"))
    (folder / "list.txt").write_text("gone.png 0\n")
    with pytest.raises(DataError, match=r"gone\.png"):
        open_faces(str(folder / "list.txt"))[0]


def test_a_committed_list_leaves_images_out_once(folder: Path, tmp_path: Path) -> None:
    """The set that the list is of loses the marked ones; one that was made without them stays."""
    np.savez(tmp_path / "list.npz", left_out=[0, 2, 0, 1, 1, 0])  # bob goes, and ann's second
    spec = {"kind": "without", "faces": str(folder), "images": str(tmp_path / "list.npz")}
    rest, whole = open_faces(spec), open_faces(str(folder))
    assert (rest.labels.tolist(), rest.num_identities) == ([0, 0, 1], 2)
    assert torch.equal(rest.images([0, 1, 2]), whole.images([0, 2, 5]))
    assert rest.checksum != whole.checksum
    for gone in ("bob/bob_0001.png", "bob/bob_0002.png", "ann/ann_0002.png"):
        (folder / gone).unlink()
    assert len(open_faces(spec)) == 3
    (folder / "ann" / "ann_0001.png").unlink()
    with pytest.raises(
        DataError, match=r"list\.npz: a list of 6 images, 3 of which stay; faces has 2"
    ):
        open_faces(spec)
    (tmp_path / "list.npz").write_bytes(b"PK\3\4 no list")
    with pytest.raises(DataError, match=r"list\.npz: no \.npz with `left_out` of each image, but "):
        open_faces(spec)


def test_specs_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        open_faces(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"the key 'people', expected identities, images, seed"):
        open_faces({"kind": "synthetic", "people": 3})
    with pytest.raises(ConfigError, match=r"the kind 'synthetik', expected one of part, synthetic"):
        open_faces({"kind": "synthetik"})
    with pytest.raises(ConfigError, match=r"images: got '3', expected as 20"):
        open_faces({"kind": "synthetic", "images": "3"})
    with pytest.raises(ConfigError, match=r"held is missing; keys of part: faces, held"):
        open_faces({"kind": "part", "faces": "there"})
    with pytest.raises(ConfigError, match=r"expected one of drawn, listed"):
        open_pairs({"kind": "pairs"})
    with pytest.raises(ConfigError, match="neither a path nor a mapping"):
        open_faces("{kind")
    with pytest.raises(DataError, match="<identity>/<image>, found nothing"):
        open_faces(str(tmp_path))


def test_synthetic_spec() -> None:
    faces = open_faces({"kind": "synthetic", "identities": 3, "images": 2, "seed": 5, "first": 7})
    assert (len(faces), faces.num_identities) == (6, 3)
    assert torch.equal(
        faces.images([0])[0],
        open_faces({"kind": "synthetic", "identities": 1, "images": 2, "seed": 5, "first": 7})[0][
            0
        ],
    )


# ---- .bin ----


def pairs_pickle(protocol: int, kind: str) -> bytes:
    data = [picture(value) for value in (1, 2, 3, 1)]
    if kind == "array":
        data = [np.frombuffer(item, np.uint8) for item in data]
    return pickle.dumps((data, [True, np.bool_(False)]), protocol=protocol)


def assert_four(data: bytes) -> None:
    encoded, same = parse_bin(data, where="x")
    assert [len(item) for item in encoded] == [len(picture(value)) for value in (1, 2, 3, 1)]
    assert encoded[0] == picture(1)
    assert same.tolist() == [True, False]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "array"])
def test_bin_of_every_protocol_and_kind(protocol: int, kind: str) -> None:
    assert_four(pairs_pickle(protocol, kind))


def test_bin_written_by_python_2() -> None:
    """Protocol 0 and 2 as Python 2 writes str and numpy arrays, spelled out opcode by opcode."""
    images = [b"U" + bytes([3]) + text for text in (b"ab\xff", b"cde")]
    old = b"\x80\x02(]" + b"(" + b"".join(images) + b"e" + b"](\x88e" + b"t."
    encoded, same = parse_bin(old, where="x")
    assert (encoded, same.tolist()) == ([b"ab\xff", b"cde"], [True])


def test_bin_round_trip_and_equal_images_once(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [picture(value) for value in (1, 2, 3, 1)], [True, False])
    pairs = open_pairs(str(tmp_path / "a.bin"))
    assert (len(pairs), pairs.num_images) == (2, 3)
    assert pairs.images(pairs.second)[:, 0, 0, 0].tolist() == [2, 1]
    assert pairs.same.tolist() == [True, False]


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_with_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    for content in (
        ([Payload(tmp_path / "ran")], [True]),
        Payload(tmp_path / "ran"),
        ([len, len], [True]),
    ):
        (tmp_path / "bad.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=r"bad\.bin.*names"):
            read_bin(tmp_path / "bad.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [
        (True, False),
        [1.0, 0.0],
        np.array([1, 0], ">i4"),
        np.array([1, 0], np.uint16),
        np.array([1, 0], np.float32),
        np.array([[True], [False]]),
    ],
)
def test_bin_with_labels_of_any_kind(flags: object) -> None:
    _, same = parse_bin(pickle.dumps(((b"a", b"b", b"c", b"d"), flags)), where="x")
    assert same.tolist() == [True, False]


def test_what_a_bin_is_instead_is_told_in_words_of_our_own() -> None:
    whole, told = pairs_pickle(4, "bytes"), "here: not a verification set: a pickle of something"
    for data in (pickle.dumps({"a": 1}), whole[:-40], pickle.dumps(1)):
        with pytest.raises(DataError, match=told):
            parse_bin(data, where="here")
    with pytest.raises(DataError, match="pair 1 is labelled 2, expected a bool, 0 or 1"):
        parse_bin(pickle.dumps(([b""] * 4, np.array([1, 2]))), where="here")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        ([b"a"], [True]),
        ([b"a", "b"], [True]),
        ([b"a", b"b"], [2]),
        ([], []),
        ([b"a", b"b"], ["yes"]),
        {},
    ],
)
def test_bin_of_another_content(content: object) -> None:
    with pytest.raises(DataError, match="here"):
        parse_bin(pickle.dumps(content), where="here")


def test_writable_arrays_of_protocol_5() -> None:
    data = [np.frombuffer(item, np.uint8).copy() for item in (b"abc", b"de")]
    encoded, _ = parse_bin(pickle.dumps((data, [True]), protocol=5), where="x")
    assert encoded == [b"abc", b"de"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x05\x96" + (2**35).to_bytes(8, "little"),  # a bytearray of 32 GiB
        b"\x80\x04\x8e" + (2**35).to_bytes(8, "little"),  # bytes
        b"\x80\x02]r\xff\xff\xff\x7f.",  # place 2 billion of the memo
        b"\x80\x02]r" + (10**7).to_bytes(4, "little") + b".",  # place 10 million: 160 MB
    ],
)
def test_an_announced_size_is_not_allocated(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            parse_bin(data, where="x")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_no_verification_set(data: bytes) -> None:
    for candidate in (data, b"\x80\x02" + data):
        with pytest.raises(DataError):
            parse_bin(candidate, where="x")


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_parses_or_raises_data_error(at: int, value: int) -> None:
    data = bytearray(pickle.dumps(([np.frombuffer(b"abc", np.uint8), b"def"], [True]), protocol=2))
    data[at % len(data)] = value
    with contextlib.suppress(DataError):
        encoded, _ = parse_bin(bytes(data), where="x")
        assert len(encoded) == 2


def test_pairs_txt(folder: Path) -> None:
    (folder / "pairs.txt").write_text("1 1\nann 1 2\nann 1 bob 2\n")
    pairs = open_pairs(str(folder / "pairs.txt"))
    assert (pairs.same.tolist(), pairs.num_images) == ([True, False], 3)
    (folder / "pairs.txt").write_text("ann 1 9\n")
    with pytest.raises(DataError, match=r"pairs\.txt, line 1: no image .*ann_0009"):
        open_pairs(str(folder / "pairs.txt"))
    (folder / "pairs.txt").write_text("ann 1\n2 bob x\n")
    with pytest.raises(DataError, match="line 1"):
        open_pairs(str(folder / "pairs.txt"))


def test_pairs_txt_with_dots_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "J.R._Doe").mkdir()
    for k in (1, 2):
        (tmp_path / "J.R._Doe" / f"J.R._Doe_{k:04d}.png").write_bytes(picture(k))
    (tmp_path / "pairs.txt").write_text("J.R._Doe 1 00002\n")
    files, same = parse_pairs(tmp_path / "pairs.txt")
    assert ([file.name for file in files], same) == (
        ["J.R._Doe_0001.png", "J.R._Doe_0002.png"],
        [True],
    )


@given(
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from([b"a" * 300 + b" 1 2", b"a 1 " + b"9" * 5000, b"a " + b"9" * 5000]),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_or_raises_data_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    path = tmp_path_factory.mktemp("text") / "list.txt"
    path.write_bytes(text)
    with pytest.raises(DataError):
        parse_pairs(path)
    with contextlib.suppress(DataError):
        open_faces(str(path)).images([0])


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.png 0\n")
    with pytest.raises(DataError, match=r"gone\.png"):
        _ = open_faces(str(tmp_path / "list.txt")).checksum


def test_the_real_verification_sets(btnet_data: Path) -> None:
    for name, count in (("lfw_devtest.bin", 1000), ("lfw_devtest_6000.bin", 6000)):
        pairs = open_pairs(name)
        assert (len(pairs), int(pairs.same.sum())) == (count, count // 2)
        assert pairs.images(pairs.first[:2]).shape == (2, 3, 112, 112)


# ---- pairs drawn from identities ----


def test_drawn_pairs_are_what_they_say() -> None:
    faces = open_faces({"kind": "synthetic", "identities": 60, "images": 5, "seed": 0})
    pairs = draw_pairs(faces, 400, seed=3)
    a, b = faces.labels[pairs.first], faces.labels[pairs.second]
    assert torch.equal(a == b, pairs.same)
    assert (pairs.first != pairs.second).all()
    keys = {
        tuple(sorted(pair))
        for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    }
    assert len(keys) == 400
    people = [
        set(torch.cat([a[k * 40 : k * 40 + 40], b[k * 40 : k * 40 + 40]]).tolist())
        for k in range(10)
    ]
    assert all(not people[i] & people[j] for i in range(10) for j in range(i))
    assert all(pairs.same[k * 40 : k * 40 + 40].sum() == 20 for k in range(10))
    again, other = draw_pairs(faces, 400, seed=3), draw_pairs(faces, 400, seed=4)
    assert torch.equal(again.first, pairs.first)
    assert not torch.equal(other.first, pairs.first)
    assert again.checksum == pairs.checksum != other.checksum
    spec = open_pairs(
        {
            "kind": "drawn",
            "faces": {"kind": "synthetic", "identities": 60, "images": 5, "seed": 0},
            "count": 400,
            "seed": 3,
        }
    )
    assert torch.equal(spec.second, pairs.second)


def test_faces_that_are_drawn_are_not_drawn_by_several_threads_to_check_them() -> None:
    faces = open_faces({"kind": "synthetic", "identities": 20, "images": 4})
    assert unreadable(faces) == {}
    again = open_faces({"kind": "synthetic", "identities": 20, "images": 4})
    assert torch.equal(faces.images(range(80)), again.images(range(80)))
    assert not faces.images([5]).eq(0).all()


def test_no_pair_is_drawn_twice_in_either_order() -> None:
    faces = open_faces({"kind": "synthetic", "identities": 5, "images": 3})
    for seed in range(30):
        pairs = draw_pairs(faces, 20, seed)
        ends = torch.stack([pairs.first, pairs.second], 1).sort(1).values.tolist()
        assert len({tuple(pair) for pair in ends}) == 20


def test_people_held_out_depend_on_the_seed() -> None:
    part = {"kind": "part", "faces": {"kind": "synthetic", "identities": 30, "images": 1}}
    held = [open_faces({**part, "held": True, "seed": seed}).indices.tolist() for seed in range(4)]
    assert len({tuple(indices) for indices in held}) == 4
    assert all(len(indices) == 3 for indices in held)
    assert open_faces({**part, "held": True, "percent": 12}).num_identities == 4  # 3.6


def test_drawn_pairs_need_enough_people() -> None:
    with pytest.raises(DataError, match="too few"):
        draw_pairs(open_faces({"kind": "synthetic", "identities": 3, "images": 2, "seed": 0}), 400)
    with pytest.raises(ConfigError, match="multiple of 20"):
        draw_pairs(open_faces({"kind": "synthetic", "identities": 3, "images": 2, "seed": 0}), 30)
