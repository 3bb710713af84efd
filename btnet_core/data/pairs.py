"""1:1 verification sets: InsightFace ``.bin`` files (read without trusting the pickle), LFW-style ``pairs.txt``."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data.faces import SUFFIXES, PairSet, fit, read_lines, stack
from btnet_core.errors import DataError
from btnet_core.files import checksum, data_root, write_atomically

SIX = ("lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw")


class _Array:
    """Stands for a numpy array in the pickle; only its bytes are kept, and only of uint8 arrays."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data: bytes | None = None

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, data = state
        self.data = dtype.of(data)


class _Dtype:
    __slots__ = ("kind",)

    def __init__(self, kind: Any, *_: Any) -> None:
        self.kind = kind.decode("ascii") if isinstance(kind, bytes) else kind

    def __setstate__(self, state: Any) -> None:  # byte order and the like: nothing a byte needs
        pass

    def of(self, data: Any) -> bytes:
        if self.kind not in ("u1", "|u1", "uint8", "b1", "|b1", "bool") or not isinstance(
            data, (bytes, bytearray)
        ):
            raise pickle.UnpicklingError(f"an array of {self.kind!r} where only uint8 is admitted")
        return bytes(data)


class _Unpickler(pickle._Unpickler):
    """Admits lists, tuples, numbers, bytes, uint8 arrays; a name outside this table is refused, not imported.

    The Python implementation on purpose: in C, a single opcode can make the memo allocate gigabytes.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")
        self._encoded: dict[str, bytes] = {}

    def _encode(self, text: str, encoding: Any = "latin1") -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
        if text not in self._encoded:  # one object for one text, however often it is encoded
            self._encoded[text] = text.encode("latin1")
        return self._encoded[text]

    def _bytearray8(self) -> None:  # the original allocates the announced length before it reads
        length = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        data = self.read(length) if length < 2**48 else b""  # type: ignore[attr-defined]
        if len(data) < length:
            raise pickle.UnpicklingError("truncated")
        self.append(data)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _bytearray8,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
            "numpy.core.numeric",
            "numpy._core.numeric",
        ):
            if name == "_reconstruct":
                return lambda *_: _Array()
            if name == "scalar":
                return lambda dtype, data: bool(dtype.of(data)[0])
            if name == "_frombuffer":
                return lambda data, dtype, *_: dtype.of(data)
        if (module, name) == ("numpy", "dtype"):
            return lambda *args: _Dtype(*args)
        if (module, name) == ("numpy", "ndarray"):
            return None
        if (module, name) in (("__builtin__", "bytearray"), ("builtins", "bytearray")):
            return lambda data=b"", *_: (
                self._encode(data) if isinstance(data, str) else bytes(memoryview(data))
            )
        raise pickle.UnpicklingError(
            f"the pickle names {module}.{name}, which no verification set needs"
        )


def parse_bin(data: bytes, *, where: str) -> tuple[list[bytes], np.ndarray]:
    """Encoded images (2P) and ``same`` bool ``(P,)`` of a ``.bin`` pickle, read without running anything in it.

    Raises:
        DataError: it holds anything but (list of bytes or uint8 arrays, list of bools), or the counts differ.
    """
    try:
        content = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{where}: not a verification set: {type(error).__name__}: {str(error)[:200]}"
        ) from None
    if (
        not isinstance(content, (tuple, list))
        or len(content) != 2
        or not all(isinstance(x, list) for x in content)
    ):
        raise DataError(
            f"{where}: holds {type(content).__name__}, expected (list of images, list of bools)"
        )
    encoded = []
    for i, item in enumerate(content[0]):
        item = item.data if isinstance(item, _Array) else item
        if not isinstance(item, (bytes, bytearray)):
            raise DataError(
                f"{where}: image {i} is {type(item).__name__}, expected bytes or a uint8 array"
            )
        encoded.append(bytes(item))
    for i, flag in enumerate(content[1]):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise DataError(f"{where}: pair {i} is labelled {type(flag).__name__}, expected a bool")
    if not content[1] or len(encoded) != 2 * len(content[1]):
        raise DataError(
            f"{where}: {len(encoded)} images and {len(content[1])} pairs, expected two images a pair"
        )
    return encoded, np.array(content[1], bool)


def _pair_set(
    name: str, digest: str, encoded: Sequence[bytes], same: np.ndarray, places: Sequence[str]
) -> PairSet:
    """Equal images are kept, decoded and embedded once. All get the size of the first."""
    slots: dict[bytes, int] = {}
    table = torch.tensor([slots.setdefault(data, len(slots)) for data in encoded]).reshape(-1, 2)
    unique, where = list(slots), dict(zip(table.flatten().tolist(), places, strict=True))
    height, width = pixels.decode(unique[0], where=where[0]).shape[-2:]

    def read(i: int) -> Tensor:
        return fit(pixels.decode(unique[i], where=where[i]), (height, width))

    def images(indices: Iterable[int]) -> Tensor:
        return stack(read, indices, (height, width))

    return PairSet(
        name=name, checksum=digest, first=table[:, 0], second=table[:, 1], same=torch.from_numpy(same),
        images=images, num_images=len(unique),
    )  # fmt: skip


def read_bin(path: str | Path) -> PairSet:
    """A verification set from an InsightFace ``.bin``; the pairs keep the order of the file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such verification set; see `btnet data`")
    encoded, same = parse_bin(path.read_bytes(), where=str(path))
    return _pair_set(
        path.stem,
        checksum([path]),
        encoded,
        same,
        [f"{path}, image {i}" for i in range(len(encoded))],
    )


def write_bin(path: str | Path, encoded: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write 2P encoded images and P flags as InsightFace's tools read them (pickle protocol 4)."""
    pairs = (list(encoded), [bool(flag) for flag in same])
    write_atomically(path, lambda file: pickle.dump(pairs, file, protocol=4))


def parse_pairs(
    path: str | Path, folder: str | Path | None = None
) -> tuple[list[Path], list[bool]]:
    """The 2P image files and P flags of LFW's ``pairs.txt``: ``name 1 2`` or ``name 1 other 2`` in each line.

    Image n of a person is ``folder/name/name_000n.<suffix>``; ``folder`` is the one the file lies in by default.
    A first line of counts is skipped.
    """
    path = Path(path)
    folder = Path(folder) if folder else path.parent
    files: list[Path] = []
    same = []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split()
        if not fields or (
            number == 1 and len(fields) <= 2 and all(field.isdigit() for field in fields)
        ):
            continue
        if len(fields) == 3:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise DataError(
                f"{path}, line {number}: got {line[:80]!r}, expected 'name 1 2' or 'name 1 other 2'"
            )
        for name, n in (fields[:2], fields[2:]):
            stem = folder / name / f"{name}_{n.lstrip('0'):0>4}"
            found = next(
                (file for s in SUFFIXES if os.path.isfile(file := Path(f"{stem}{s}"))), None
            )
            if found is None:
                raise DataError(f"{path}, line {number}: no image {stem}.* ({', '.join(SUFFIXES)})")
            files.append(found)
        same.append(fields[0] == fields[2])
    if not same:
        raise DataError(f"{path}: no pairs in it")
    return files, same


def pairs_file(path: str | Path, folder: str | Path | None = None) -> PairSet:
    """A verification set from LFW's ``pairs.txt`` over a folder of images (:func:`parse_pairs`)."""
    files, same = parse_pairs(path, folder)
    digest = checksum([Path(path), *sorted(set(files))])
    return _pair_set(
        Path(path).stem,
        digest,
        [pixels.read(f) for f in files],
        np.array(same),
        [str(f) for f in files],
    )


def six_verification_sets(root: str | Path | None = None) -> dict[str, PairSet]:
    """LFW, CFP-FF, CFP-FP, AgeDB-30, CALFW, CPLFW from ``root`` (the data root by default), for the mean over six.

    Raises:
        DataError: names every file that is missing.
    """
    root = Path(root) if root else data_root()
    missing = [str(root / f"{name}.bin") for name in SIX if not (root / f"{name}.bin").is_file()]
    if missing:
        raise DataError(f"missing verification sets: {', '.join(missing)}; see `btnet data`")
    return {name: read_bin(root / f"{name}.bin") for name in SIX}
