"""MXNet RecordIO face sets (``train.rec``, ``train.idx``, ``property``), read and written without
mxnet.

A record is ``magic (uint32), cflag (3 bits) | length (29 bits), payload padded to 4 bytes``; the
payload of a face is an IRHeader ``flag (uint32), label (float32), id, id2 (uint64)``, ``flag``
float32 labels, then JPEG or PNG bytes. Where the magic occurs 4-byte-aligned inside a payload, the
writer drops it and splits the record there (cflag 1 first, 2 middle, 3 last part); the reader puts
it back.

InsightFace's layout: record 0 has flag 2 and labels ``[images + 1, end of keys]``, images have keys
``1 … images``, then one record per identity with flag 2 and labels ``[first key, end key]``. A file
without a header record holds images only (as ``im2rec`` writes it).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from btnet_core.errors import DataError
from btnet_core.files import integer_table
from btnet_core.kinds import what_is

MAGIC = struct.pack("<I", 0xCED7230A)
PART, HEADER = struct.Struct("<4sI"), struct.Struct("<IfQQ")
LONGEST = (1 << 29) - 1  # bytes of a part
MAX_LABEL = 2**24  # float32 holds every integer up to here


class Record(NamedTuple):
    """What one payload holds."""

    flag: int
    labels: np.ndarray  # float32 (max(flag, 1),)
    image: bytes


class RecordFile:
    """Random access to the records of ``x.rec`` through ``x.idx``, by position in the order of
    keys.

    The file is memory-mapped when first read, in each process anew after pickling, so that one
    object serves several threads, forked or spawned workers.

    Raises:
        DataError: a file is missing or empty, or the index does not fit it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path.with_suffix(".idx")
        for file in (self.path, index):
            if not file.is_file():
                raise DataError(
                    f"{file}: no such file; a RecordIO set is a .rec with its .idx beside it"
                )
        kind = what_is(self.path)
        if kind not in ("a RecordIO file", "in no known format"):
            raise DataError(f"{self.path}: no RecordIO, but {kind}")
        size = self.path.stat().st_size
        if index.stat().st_size > 40 * (size // 8 + 1):
            raise DataError(f"{index}: longer than an index of {self.path.name} can be")
        table = integer_table(index.read_bytes(), 2, where=str(index))
        if not len(table):
            raise DataError(f"{index}: empty index")
        self.keys, self.offsets = table[np.argsort(table[:, 0], kind="stable")].T.copy()
        if (np.diff(self.keys) == 0).any():
            raise DataError(f"{index}: a key occurs twice")
        wrong = np.flatnonzero((self.offsets % 4 != 0) | (self.offsets > size - PART.size))
        if len(wrong):
            raise DataError(
                f"{index}: {len(wrong)} offsets do not fit {self.path.name} ({size} bytes), "
                f"first key {self.keys[wrong[0]]}, offset {self.offsets[wrong[0]]}"
            )
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, position: int) -> str:
        """File, key and offset of a record, for messages."""
        return f"{self.path}, index {self.keys[position]}, offset {self.offsets[position]}"

    def payload(self, position: int) -> bytes:
        """The payload of one record, its parts joined."""
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data, offset, parts = self._map, int(self.offsets[position]), list[bytes]()
        while True:
            head = data[offset : offset + PART.size]
            magic, word = PART.unpack(head) if len(head) == PART.size else (b"", 0)
            flag, length = word >> 29, word & LONGEST
            start = offset + PART.size
            if start + length > len(data):
                raise DataError(f"{self.where(position)}: the file ends inside the record")
            if magic != MAGIC or flag > 3 or (flag in (0, 1)) != (not parts):
                part = f"no record (part {len(parts)}) starts at {offset}"
                raise DataError(f"{self.where(position)}: {part}")
            parts.append(data[start : start + length])
            if flag in (0, 3):
                return MAGIC.join(parts)
            offset = start + (length + 3) // 4 * 4

    def record(self, position: int) -> Record:
        """Header and image of one record. Raises DataError when it is shorter than it says."""
        payload = self.payload(position)
        if len(payload) < HEADER.size:
            raise DataError(
                f"{self.where(position)}: {len(payload)} bytes, expected {HEADER.size} of header"
            )
        flag, label, _, _ = HEADER.unpack_from(payload)
        end = HEADER.size + 4 * flag
        if len(payload) < end:
            raise DataError(
                f"{self.where(position)}: {flag} labels in a record of {len(payload)} bytes"
            )
        labels = (
            np.frombuffer(payload, "<f4", flag, HEADER.size)
            if flag
            else np.array([label], np.float32)
        )
        return Record(flag, labels, payload[end:])


class FaceRecords:
    """The images of a RecordIO face set: ``labels`` int64 ``(N,)``, ``num_identities``,
    ``image(i)``.

    With InsightFace's identity records, labels come from the first and last image of each identity
    (a set of five million opens without reading all of it) and every image is checked against them
    when it is read. ``num_identities`` is the first number of ``property`` where there is that
    file.

    Raises:
        DataError: see :class:`RecordFile`; a header or label that is not what the layout says.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.file = RecordFile(path / "train.rec" if path.is_dir() else path)
        self.start, self.count, labels = 0, len(self.file), None
        first = self.file.record(0)
        if first.flag == 2 and not first.image:
            images_end, keys_end = self._header(first)
            self.start, self.count = 1, images_end - 1
            labels = self._labels_of_ranges(images_end, keys_end)
        if self.count < 1:
            raise DataError(f"{self.file.path}: no images in it")
        if labels is None:
            labels = np.array([self._label(i) for i in range(self.count)], np.int64)
        self.labels, classes = labels, self._classes()
        self.num_identities = classes or int(labels.max()) + 1
        last = (classes or MAX_LABEL + 1) - 1
        wrong = np.flatnonzero(labels > last)
        if len(wrong):
            raise DataError(f"{self.where(wrong[0])}: label {labels[wrong[0]]}, not 0 to {last}")

    def _classes(self) -> int:
        """The first number of ``property``; 0 without that file."""
        path = self.file.path.with_name("property")
        if not path.is_file():
            return 0
        text = path.read_bytes()[:100].strip().replace(b",", b" ")
        table = integer_table(text, 3, where=str(path))
        if len(table) != 1 or table[0, 0] < 1:
            raise DataError(f"{path}: expected 'classes,rows,columns' with at least one class")
        return int(table[0, 0])

    def _header(self, first: Record) -> tuple[int, int]:
        """Ends of the images' keys and of all keys, checked against the index."""
        images_end, keys_end = self._range(0, first)
        keys = self.file.keys
        if keys_end != len(keys) or keys[0] != 0 or keys[-1] != len(keys) - 1:
            raise DataError(
                f"{self.file.where(0)}: header announces keys 0 to {keys_end - 1}, "
                f"the index has {len(keys)} from {keys[0]} to {keys[-1]}"
            )
        return images_end, keys_end

    def _range(self, position: int, record: Record) -> tuple[int, int]:
        """The two labels of a header or identity record."""
        low, high = record.labels[:2].tolist() if len(record.labels) >= 2 else (0.0, 0.0)
        whole = low % 1 == high % 1 == 0  # false for NaN, too
        if not (whole and 1 <= low <= high <= len(self.file)):
            raise DataError(
                f"{self.file.where(position)}: header labels {record.labels[:4].tolist()} "
                "are no range"
            )
        return int(low), int(high)

    def _labels_of_ranges(self, images_end: int, keys_end: int) -> np.ndarray | None:
        """Labels from the identity records; None where these do not tile the images."""
        found = [self._range(p, self.file.record(p)) for p in range(images_end, keys_end)]
        ranges = sorted((low, high) for low, high in found if high > low)
        starts, ends = [low for low, _ in ranges], [1, *(high for _, high in ranges)]
        if starts != ends[:-1] or ends[-1] != images_end:
            return None
        labels = [self._label(low - 1) for low in starts]
        if labels != [self._label(high - 2) for high in ends[1:]]:
            return None
        return np.repeat(np.array(labels, np.int64), np.diff(ends))

    def _label(self, i: int, record: Record | None = None) -> int:
        label = float((record or self.file.record(self.start + i)).labels[0])
        if not (0 <= label < 2**31 and label % 1 == 0):
            raise DataError(f"{self.where(i)}: label {label}, expected an integer from 0")
        return int(label)

    def where(self, i: int) -> str:
        return self.file.where(self.start + i)

    def image(self, i: int) -> bytes:
        """Encoded image ``i`` (0-based). Raises DataError when its label is not ``labels[i]``."""
        record = self.file.record(self.start + i)
        label, expected = self._label(i, record), self.labels[i]
        if label != expected:
            raise DataError(f"{self.where(i)}: label {label}, its identity record says {expected}")
        return record.image


class RecordWriter:
    """Write ``x.rec`` and ``x.idx``, put in place when the ``with`` block ends well."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._parts = [self.path.with_suffix(suffix + ".part") for suffix in (".rec", ".idx")]
        self._file = open(self._parts[0], "wb")  # noqa: SIM115 (closed in __exit__)
        self._index: list[str] = []

    def write(self, key: int, payload: bytes) -> None:
        """Append a record, split at each aligned magic."""
        if len(payload) > LONGEST:
            raise DataError(
                f"{self.path}: record {key} of {len(payload)} bytes, the limit is {LONGEST}"
            )
        self._index.append(f"{key}\t{self._file.tell()}\n")
        found = (match.start() for match in re.finditer(re.escape(MAGIC), payload))
        cuts = [-4, *(place for place in found if place % 4 == 0), len(payload)]
        for cut, end in pairwise(cuts):
            first, last = cut == cuts[0], end == cuts[-1]
            flag = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}
            part = payload[cut + 4 : end]
            self._file.write(PART.pack(MAGIC, flag[first, last] << 29 | len(part)))
            self._file.write(part + bytes(-len(part) % 4))

    def rewrite_first(self, payload: bytes) -> None:
        """Replace the first record by one of the same length."""
        self._file.seek(PART.size)
        self._file.write(payload)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._parts[1].write_text("".join(self._index))
            os.replace(self._parts[0], self.path.with_suffix(".rec"))
            os.replace(self._parts[1], self.path.with_suffix(".idx"))
        for part in self._parts:
            part.unlink(missing_ok=True)


def range_record(low: int, high: int, key: int) -> bytes:
    """A header or identity record: the keys from ``low`` to before ``high``."""
    return HEADER.pack(2, 0.0, key, 0) + struct.pack("<2f", low, high)


def write_face_records(
    folder: str | Path, faces: Iterable[tuple[bytes, int]], size: tuple[int, int]
) -> int:
    """Write ``train.rec``, ``train.idx``, ``property`` in InsightFace's layout; the number of
    images.

    ``faces``: (JPEG or PNG bytes, label) sorted by label 0, 1, 2, … without gaps; ``size``: their
    rows, columns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key, starts = 1, list[int]()
    with RecordWriter(folder / "train.rec") as writer:
        writer.write(0, range_record(1, 1, 0))  # its place; the numbers come last
        for image, label in faces:
            if label == len(starts):
                starts.append(key)
            if label != len(starts) - 1:
                raise DataError(
                    f"{folder}: image {key} has label {label}, "
                    f"expected {len(starts)} or the one before"
                )
            writer.write(key, HEADER.pack(0, label, key, 0) + image)
            key += 1
        if not starts or key + len(starts) > MAX_LABEL:
            raise DataError(f"{folder}: {key - 1} images; the layout holds 1 to {MAX_LABEL}")
        for i, (low, high) in enumerate(pairwise([*starts, key])):
            writer.write(key + i, range_record(low, high, key + i))
        writer.rewrite_first(range_record(key, key + len(starts), 0))
    (folder / "property").write_text(f"{len(starts)},{size[0]},{size[1]}")
    return key - 1
