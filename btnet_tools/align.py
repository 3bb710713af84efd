"""Aligned crops of raw pictures: the one antialiased warp, and crops from archives by numbers.

A transform (a, b, tx, ty) is a similarity from raw to crop pixels, pixel centres at integers:
``[x' y'] = [a -b; b a] [x y] + [tx ty]``. Crops are saved as JPEG, quality 95, 4:4:4.
"""

from __future__ import annotations

import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from btnet_core.data.ijbc import moved
from btnet_core.errors import DataError
from btnet_core.images import MAX_BYTES, decode, encode, read
from btnet_core.kinds import what_is

SIZE = 112  # rows and columns of a crop
# RuntimeError: a .zip with a password, or of a compression that this Python has not.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def matrix(transform: Sequence[float] | np.ndarray) -> np.ndarray:
    """The transform as a matrix (2, 3)."""
    a, b, tx, ty = (float(value) for value in transform)
    return np.array([[a, -b, tx], [b, a, ty]])


def crop(picture: Tensor, moves: np.ndarray, side: int = SIZE) -> Tensor:
    """The crop, uint8 (3, side, side), of a raw picture, uint8 (3, H, W); black outside it.

    ``moves`` (2, 3) is the transform's matrix. Where it shrinks the picture (s = |(a, b)| < 1),
    each pixel of the crop is the mean of k x k bilinear samples, k = ceil(1 / s), spread evenly
    over its area: an area average, so that nothing aliases. Where it does not, k = 1: bilinear.
    """
    k = max(1, math.ceil(1 / math.hypot(*moves[:, 0]) - 1e-6))  # but for rounding
    finer = k * moves
    finer[:, 2] += (k - 1) / 2  # the centre of a crop pixel is that of its k x k samples
    samples = moved(picture, finer, (side * k, side * k))
    return F.avg_pool2d(samples[None], k)[0].round().to(torch.uint8)


def members(
    source: Path, depth: int, wanted: Container[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """(last ``depth`` parts of its path, bytes) of the .jpg files in a folder, .zip, .tar or .tgz.

    Archives are read member by member, never unpacked. Only the files in ``wanted`` are read;
    without it, all are listed with no bytes.

    Raises:
        DataError: the archive is damaged or cut short, or a file has more than 256 MB.
    """
    count = 0
    try:
        for path, size, content in _files(source):
            key = "/".join(PurePosixPath(path).parts[-depth:])
            if PurePosixPath(path).suffix.lower() != ".jpg" or "/." in f"/{path}":
                continue
            if size > MAX_BYTES:
                raise DataError(f"{source}, {path}: {size:,} bytes are too many for a picture")
            count += 1
            if wanted is None or key in wanted:
                yield key, b"" if wanted is None else content()
    except _DAMAGED as error:
        locked = isinstance(error, RuntimeError) and "password" in str(error)
        why = "it needs a password" if locked else what_is(source)
        raise DataError(
            f"{source}: no folder, .zip, .tar or .tgz, or damaged after {count} pictures: {why}"
        ) from error


def _files(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """(path, size, function that reads it) of each file in the order of the folder or archive."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                name = path.relative_to(source.parent).as_posix()
                yield name, path.stat().st_size, partial(read, path)
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                yield entry.filename, entry.file_size, partial(archive.read, entry)
    else:
        with tarfile.open(source, "r|*") as stream:
            for member in stream:
                if file := stream.extractfile(member):  # none of a folder
                    yield member.name, member.size, file.read


def cut(
    source: Path, keys: Sequence[str], transforms: np.ndarray, sizes: np.ndarray | None = None,
    crc32: Mapping[str, int] | None = None,
) -> list[bytes]:  # fmt: skip
    """The encoded crops of the pictures ``keys`` (the ends of their paths, all of one depth).

    Args:
        transforms: (N, 4), one for each key.
        sizes: (N, 2), columns and rows that each picture must have.
        crc32: of the bytes of some pictures, by key.

    Raises:
        DataError: a picture is missing, damaged, or another than the numbers are of.
    """
    place = {key: i for i, key in enumerate(keys)}
    crops: dict[int, bytes] = {}
    depth = keys[0].count("/") + 1
    for key, data in tqdm(members(source, depth, place), total=len(keys), unit=" pictures"):
        where, i = f"{source}, {key}", place[key]
        if crc32 and zlib.crc32(data) != crc32.get(key, zlib.crc32(data)):
            raise DataError(f"{where}: is not the file that the committed transforms are of")
        picture = decode(data, where=where)
        _check_size(picture, transforms[i], None if sizes is None else sizes[i], where)
        crops[i] = encode(crop(picture, matrix(transforms[i])), "JPEG")
    missing = [key for key in keys if place[key] not in crops]
    if missing:
        raise DataError(
            f"{source}: lacks {len(missing)} of {len(keys)} pictures, the first is {missing[0]}"
        )
    return [crops[i] for i in range(len(keys))]


def _check_size(
    picture: Tensor, transform: np.ndarray, size: np.ndarray | None, where: str
) -> None:
    """The picture has ``size``, and the centre of the crop lies in it."""
    rows, columns = picture.shape[-2:]
    if size is not None and (columns, rows) != tuple(size):
        raise DataError(f"{where}: got {columns}x{rows} pixels, expected {size[0]}x{size[1]}")
    turn, shift = np.hsplit(matrix(transform), [2])
    x, y = np.linalg.solve(turn, (SIZE - 1) / 2 - shift)[:, 0]
    if not (0 <= x < columns and 0 <= y < rows):
        raise DataError(
            f"{where}: of {columns}x{rows} pixels, the face should be at ({x:.0f}, {y:.0f}): "
            "another release of the set than the transforms are of"
        )
