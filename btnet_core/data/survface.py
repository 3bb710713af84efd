"""QMUL-SurvFace as distributed: training set and open-set test, faces of 6 to 124 native pixels.

Layout: ``training_set/<id>/*.jpg`` and ``Face_Identification_Test_Set/`` with folders ``gallery``,
``mated_probe``, ``unmated_probe`` and two ``.mat`` lists of (image name, identity). Identities are
matched by id, never by order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data.faces import StoredFaces, image_folder, in_parallel
from btnet_core.data.folders import entries, split_images, warn_of
from btnet_core.errors import DataError
from btnet_core.files import checksum
from btnet_core.kinds import what_is

TEST_FOLDER = "Face_Identification_Test_Set"
NOTE = "STAND-IN.txt"  # its first line names the stand-in that a folder holds
LARGEST = 2**26  # bytes of a list, unpacked; SurvFace's longest has 242,617 names
VERSION = b"\0\1IM"  # of MATLAB 5, little-endian: ends the header of 128 bytes
COMPRESSED, CELLS, TEXT = 15, 1, 4  # of MATLAB 5: a type of element, classes of arrays
CODES = {1: "latin1", 2: "latin1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
NUMBERS = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13), "bBhHiIfdqQ", strict=True))


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


def read_mat(path: Path) -> dict[str, list[Any]]:
    """Names and values of the lists in a MATLAB 5 file: of texts (cells of characters) or numbers.

    scipy's reader crashes on some damaged files; this one reads what such a list needs.

    Raises:
        DataError: it cannot be read, or holds anything else.
    """
    lists, data = {}, memoryview(pixels.read(path))
    if data[124:128] != VERSION:
        found = "a file of MATLAB 7.3 (save it with -v7)" if data[:10] == b"MATLAB 7.3" else ""
        raise DataError(f"{path}: no list in MATLAB 5, but {found or what_is(bytes(data))}")
    try:
        for kind, body in _elements(data[128:]):
            if kind == COMPRESSED:
                unpacked = zlib.decompressobj().decompress(body, LARGEST)
                (_, body), *_ = _elements(memoryview(unpacked))
            title, values = _array(body)
            lists[title] = values
    except (ValueError, IndexError, KeyError, struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"{path}: a list in MATLAB 5, damaged or cut short") from error
    return lists


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of the elements of a file or array. Raises ValueError for one that is cut."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, place)
        start, step = place + 8, size + -size % 8 * (kind != COMPRESSED)
        if kind >> 16:  # a small element: size and type in 4 bytes, content in the next 4
            kind, size, start, step = kind & 0xFFFF, min(kind >> 16, 4), place + 4, 0
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes is longer than what holds it")
        yield kind, data[start : start + size]
        place += 8 + step


def _array(body: memoryview) -> tuple[str, list[Any]]:
    """Name and values of an array; of text, one value."""
    (_, flags), _, (_, name), *content = _elements(body)
    if flags[0] == CELLS:
        values = [value for _, inner in content for value in _array(inner)[1]]
    elif flags[0] == TEXT:
        values = ["".join(bytes(text).decode(CODES[kind]) for kind, text in content)]
    else:
        values = [x for kind, part in content for x in np.frombuffer(part, NUMBERS[kind]).tolist()]
    return bytes(name).decode("ascii"), values


def _read_list(folder: Path, kind: str) -> tuple[list[Path], Tensor]:
    path = folder / f"{kind}_img_ID_pairs.mat"
    if not path.is_file():
        raise DataError(f"{path}: no such file; see `btnet data` for the layout of SurvFace")
    lists = read_mat(path)
    names, ids = (lists.get(f"{kind}_{what}", []) for what in ("set", "ids"))
    whole = all(isinstance(n, int | float) and 0 <= n < 2**62 and n == int(n) for n in ids)
    texts = all(isinstance(name, str) for name in names)
    if not names or len(names) != len(ids) or not whole or not texts:
        raise DataError(
            f"{path}: {kind}_set and {kind}_ids are not one name and one integer for each image; "
            f"lists found: {', '.join(lists) or 'none'}"
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
        name=stand_in_note(root) or "QMUL-SurvFace", stand_in=bool(stand_in_note(root)),
        images=Crops(files), checksum=checksum([*sorted(folder.glob("*.mat")), *files]),
        labels=torch.cat([gallery_ids, mated_ids, torch.full((len(unmated),), -1)]),
        in_gallery=torch.arange(len(files)) < len(gallery),
    )  # fmt: skip


def training_set(root: str | Path) -> StoredFaces:
    """``training_set/<id>/``; images come at 112x112, ``native(i)`` at their own size."""
    return image_folder(Path(root) / "training_set")
