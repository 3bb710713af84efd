"""What a file is said to be: of files that the real programs write."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import open_pairs
from btnet_core.data.survface import read_mat
from btnet_core.errors import ConfigError, DataError
from btnet_core.kinds import what_is
from btnet_core.training.config import TrainConfig


def written(write: object) -> bytes:
    out = io.BytesIO()
    write(out)  # type: ignore[operator]
    return out.getvalue()


def tar(out: io.BytesIO) -> None:
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))


def zipped(out: io.BytesIO) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", "b")


CASES = {
    "an empty file": b"",
    "a file of zeros": bytes(3000),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
    "an HTML page": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>Quota exceeded</title>",
    "an HTML page,": b"<html lang='de'>" + "ä".encode() * 2000,
    "an XML file": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON file": json.dumps({"error": "not found"}).encode(),
    "a text file": b"Not Found\n",
    "a safetensors file": save({"x": torch.zeros(2)}),
    "a pickle": pickle.dumps({"x": 1}),
    "a PyTorch file of the old format": written(
        lambda out: torch.save([1], out, _use_new_zipfile_serialization=False)
    ),
    "a zip archive": written(lambda out: torch.save({"x": 1}, out)),
    "a zip archive,": written(zipped),
    "a gzip file": gzip.compress(b"x"),
    "a tar archive": written(tar),
    "a NumPy array": written(lambda out: np.save(out, np.zeros(2))),
    "a JPEG picture": written(lambda out: Image.new("RGB", (4, 4)).save(out, "JPEG")),
    "a PNG picture": written(lambda out: Image.new("RGB", (4, 4)).save(out, "PNG")),
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "an AVIF picture": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
    "a video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "a TIFF picture": b"II+\0\x08\0\0\0",
    "a JPEG XL picture": b"\0\0\0\x0cJXL \r\n\x87\n",
    "in no known format": bytes(range(128, 256)) * 9,
    "in no known format,": b"ab\x00\x01cd",
}


@pytest.mark.parametrize("words", CASES)
def test_kinds(words: str, tmp_path: Path) -> None:
    said = what_is(CASES[words])
    assert said.startswith(words.rstrip(","))
    assert "\n" not in said
    (tmp_path / "file").write_bytes(CASES[words])
    whole = what_is(tmp_path / "file")
    assert whole == said or words == "a zip archive"  # of which a path tells more
    assert whole == "a PyTorch file" or words != "a zip archive"


def test_an_onnx_model(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx").helper
    graph = helper.make_graph([], "empty", [], [])
    for options in ({}, {"producer_name": "pytorch"}, {"doc_string": "x"}):
        assert what_is(helper.make_model(graph, **options).SerializeToString()) == "an ONNX model"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert what_is(tmp_path / "none") == "a file that cannot be read"
    assert what_is(tmp_path) == "a file that cannot be read"


@given(st.binary(max_size=40), st.sampled_from([b"", b"\x80", b"\x08", b"<", b"\xef\xbb\xbf"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_something(tail: bytes, start: bytes) -> None:
    assert what_is(start + tail)


def test_readers_of_faces_and_pairs_say_what_a_file_is(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n"
    (tmp_path / "train.rec").write_bytes(pointer)
    (tmp_path / "train.idx").write_text("0\t0\n1\t40\n")
    (tmp_path / "pairs.bin").write_bytes(b"<html>Quota exceeded</html>")
    with pytest.raises(DataError, match=r"train\.rec: no RecordIO, but a Git LFS pointer"):
        open_faces(str(tmp_path))
    with pytest.raises(DataError, match=r"pairs\.bin: not a verification set: an HTML page"):
        open_pairs(str(tmp_path / "pairs.bin"))


def test_refused_lists_and_pages_are_told_in_words_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(b"<html>Quota exceeded</html>" + bytes(200))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    (tmp_path / "b.mat").write_bytes(header + bytes(range(256)))
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM"
    (tmp_path / "e.mat").write_bytes(hdf5.ljust(512) + b"\x89HDF\r\n\x1a\n")
    (tmp_path / "f.mat").write_bytes(b"")
    (tmp_path / "c.yaml").write_bytes(b"name: x\na: [")
    (tmp_path / "c.json").write_bytes(b'{"name": 1,\n "batch" 2}')
    (tmp_path / "d.json").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    for call, told in (
        (lambda: read_mat(tmp_path / "a.mat"), r"a\.mat: no list in MATLAB 5, but "),
        (lambda: read_mat(tmp_path / "b.mat"), r"b\.mat: a list in MATLAB 5, damaged or cut short"),
        (
            lambda: read_mat(tmp_path / "e.mat"),
            r"e\.mat: .* a file of MATLAB 7.3 \(save it with -v7",
        ),
        (lambda: read_mat(tmp_path / "f.mat"), r"f\.mat: no list in MATLAB 5, but an empty file"),
        (lambda: TrainConfig.read(tmp_path / "c.yaml"), r"c\.yaml: no YAML \(line 2\)"),
        (lambda: TrainConfig.read(tmp_path / "c.json"), r"no JSON from line 2, column 10 on"),
        (lambda: TrainConfig.read(tmp_path / "d.json"), r"as a page \(a PNG picture\)"),
        (lambda: TrainConfig.read(tmp_path / "e.json"), r"as a page \(No such file"),
    ):
        with pytest.raises((DataError, ConfigError), match=told):
            call()
