"""QMUL-SurvFace as distributed: training set and open-set test, faces of 6 to 124 native pixels.

Layout: ``training_set/<id>/*.jpg`` and ``Face_Identification_Test_Set/`` with folders ``gallery``,
``mated_probe``, ``unmated_probe`` and two ``.mat`` lists of (image name, identity). Identities are
matched by id, never by order.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat, savemat
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data.faces import StoredFaces, image_folder, in_parallel
from btnet_core.data.folders import entries, split_images, warn_of
from btnet_core.errors import DataError
from btnet_core.files import checksum

TEST_FOLDER = "Face_Identification_Test_Set"
NOTE = "STAND-IN.txt"  # its first line names the stand-in that a folder holds
LARGEST = 2**26  # bytes of a list, unpacked; SurvFace's longest has 242,617 names
ARRAY, COMPRESSED = 14, 15  # MATLAB 5 data types of elements
NUMBERS = frozenset((1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18))  # and text
CELLS, CLASSES = 1, frozenset((1, 4, *range(6, 16)))  # of arrays: cells, text, numbers


class Crops(Sequence[Tensor]):
    """Images at their own sizes: ``crops[i]`` is uint8 ``(3, h, w)``."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return pixels.decode(pixels.read(self.files[index]), where=str(self.files[index]))

    @cached_property
    def sizes(self) -> Tensor:
        """int64 ``(N, 2)``: width, height of each image as it is shown."""
        shapes = in_parallel(lambda i: tuple(self[i].shape), len(self))
        return torch.tensor([(width, height) for _, height, width in shapes])


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """Gallery, then mated probes (their id is in it), then unmated probes (label -1)."""

    name: str
    checksum: str  # of the lists and every image: a deleted probe changes it
    stand_in: bool  # built from another data set: results on it are not results on SurvFace
    images: Crops
    labels: Tensor  # int64 (N,)
    in_gallery: Tensor  # bool (N,)


def stand_in_note(root: Path) -> str:
    """What a stand-in calls itself; empty for the real data."""
    path = root / NOTE
    return path.read_text("utf-8").splitlines()[0] if path.is_file() else ""


def read_mat(path: Path, names: Sequence[str]) -> list[list[Any]]:
    """The named variables of a MATLAB 5 file as flat lists of text and numbers.

    Raises:
        DataError: it cannot be read, is not one, or does not hold them.
    """
    try:
        data = pixels.read(path)  # at most 256 MB
        _check_arrays(memoryview(data)[128:])
        content = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=names)
        return [np.atleast_1d(content[name]).tolist() for name in names]
    except Exception as error:  # a damaged file raises almost anything
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"{path}: cannot be read as a SurvFace list ({reason})") from None


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of the elements of a MATLAB 5 file or array; ValueError if one is cut."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, place)
        start, step = place + 8, size + -size % 8 * (kind != COMPRESSED)
        if (
            kind >> 16
        ):  # a small element: size and type in the first four bytes, content in the next
            kind, size, start, step = kind & 0xFFFF, min(kind >> 16, 4), place + 4, 0
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes is longer than what holds it")
        yield kind, data[start : start + size]
        place += 8 + step


def _check_arrays(data: memoryview) -> None:
    """Raise ValueError for types and sizes at which scipy's reader may crash or fill the memory."""
    for kind, body in _elements(data):
        if kind == COMPRESSED:
            _check_arrays(memoryview(zlib.decompressobj().decompress(body, LARGEST)))
        elif kind == ARRAY:
            _check_array(body)
        else:
            raise ValueError(f"an element of type {kind} where an array is expected")


def _check_array(body: memoryview) -> None:
    (flags, head), (dimensions, sizes), (name, _), *content = _elements(body)
    shape = np.frombuffer(sizes, "<i4").astype(object)
    if (flags, dimensions, name) != (6, 5, 1) or not 0 <= shape.prod() <= len(body):
        raise ValueError(f"an array of {shape.tolist()} in {len(body)} bytes")
    if head[0] not in CLASSES:
        raise ValueError(f"an array of class {head[0]}")
    for kind, inner in content:
        if kind == ARRAY and head[0] == CELLS:
            _check_array(inner)
        elif kind not in NUMBERS or head[0] == CELLS:
            raise ValueError(f"an element of type {kind} in an array of class {head[0]}")


def _read_list(folder: Path, kind: str) -> tuple[list[Path], Tensor]:
    path = folder / f"{kind}_img_ID_pairs.mat"
    if not path.is_file():
        raise DataError(f"{path}: no such file; see `btnet data` for the layout of SurvFace")
    names, ids = read_mat(path, [f"{kind}_set", f"{kind}_ids"])
    whole = all(isinstance(n, int | float) and 0 <= n < 2**62 and n == int(n) for n in ids)
    texts = all(isinstance(name, str) for name in names)
    if not names or len(names) != len(ids) or not whole or not texts:
        raise DataError(
            f"{path}: {kind}_set and {kind}_ids are not one name and one integer for each image"
        )
    there = {file.name: file for file in entries(folder / kind)[1]}
    if missing := [name for name in names if name not in there]:
        raise DataError(
            f"{path}: {len(missing)} of {len(names)} listed images are missing, "
            f"first {folder / kind / missing[0]}"
        )
    return [there[name] for name in names], torch.tensor([int(n) for n in ids])


def read_open_set(root: str | Path) -> OpenSet:
    """The open-set test under ``root``; DataError if a list, an image or an identity is missing."""
    root = Path(root)
    folder = root / TEST_FOLDER
    if not (folder / "unmated_probe").is_dir():
        raise DataError(
            f"{folder / 'unmated_probe'}: no such folder; "
            "see `btnet data` for the layout of SurvFace"
        )
    gallery, gallery_ids = _read_list(folder, "gallery")
    mated, mated_ids = _read_list(folder, "mated_probe")
    lost = mated_ids[~torch.isin(mated_ids, gallery_ids)]
    if len(lost):
        raise DataError(
            f"{folder}: {len(lost)} mated probes have no gallery image, "
            f"first identity {int(lost[0])}"
        )
    unmated, left_out = split_images(entries(folder / "unmated_probe")[1])
    warn_of(folder, left_out)
    files = [*gallery, *mated, *unmated]
    return OpenSet(
        name=stand_in_note(root) or "QMUL-SurvFace",
        stand_in=bool(stand_in_note(root)),
        images=Crops(files),
        checksum=checksum([*sorted(folder.glob("*.mat")), *files]),
        labels=torch.cat([gallery_ids, mated_ids, torch.full((len(unmated),), -1)]),
        in_gallery=torch.arange(len(files)) < len(gallery),
    )


def training_set(root: str | Path) -> StoredFaces:
    """``training_set/<id>/``; images come at 112x112, ``native(i)`` at their own size."""
    return image_folder(Path(root) / "training_set")


def write_layout(
    root: Path,
    gallery: Iterable[tuple[int, Tensor]],
    mated: Iterable[tuple[int, Tensor]],
    unmated: Iterable[tuple[int, Tensor]],
) -> None:
    """Write the (identity, image) pairs of a test in SurvFace's layout, as JPEG; same pairs, same bytes."""
    test = root / TEST_FOLDER
    for kind, faces in (("gallery", gallery), ("mated_probe", mated)):
        names, ids = _write_images(test / kind, faces, "{identity}_cam1_{i}.jpg")
        table = {
            f"{kind}_set": np.array(names, object)[:, None],
            f"{kind}_ids": np.array(ids, np.int64)[:, None],
        }
        path = test / f"{kind}_img_ID_pairs.mat"
        savemat(str(path), table)
        undated = b"MATLAB 5.0 MAT-file".ljust(116)  # scipy writes the time into these bytes
        path.write_bytes(undated + path.read_bytes()[116:])
    _write_images(test / "unmated_probe", unmated, "{i:06d}.jpg")


def write_training(root: Path, faces: Iterable[tuple[int, Tensor]]) -> None:
    """Write (identity, image) pairs as SurvFace's training set, as JPEG."""
    _write_images(root / "training_set", faces, "{identity}/{identity}_cam1_{i}.jpg")


def _write_images(
    folder: Path, faces: Iterable[tuple[int, Tensor]], name: str
) -> tuple[list[str], list[int]]:
    """Names and identities of the images written; ``name`` is a format of identity and place."""
    names, ids = [], []
    for i, (identity, image) in enumerate(faces):
        names.append(name.format(identity=identity, i=i))
        ids.append(identity)
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pixels.encode(image, "JPEG"))
    return names, ids
