"""1:1 verification sets: InsightFace's ``.bin``, LFW's ``pairs.txt``, pairs drawn from faces."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data.faces import FaceSet, at_size, decode_each, open_faces
from btnet_core.data.folders import entries, is_image, read_lines
from btnet_core.data.sources import Spec, open_kind, parse_spec
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import checksum, find, write_atomically
from btnet_core.kinds import what_is


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs of images for 1:1 verification; ten folds are ten consecutive blocks of P / 10 pairs.

    ``first``, ``second`` int64 ``(P,)`` point into the set's images; ``same`` bool ``(P,)``;
    ``images(indices)`` gives uint8 ``(n, 3, H, W)`` of one size.
    """

    name: str
    checksum: str
    first: Tensor
    second: Tensor
    same: Tensor
    images: Callable[[Iterable[int]], Tensor]
    num_images: int

    def __len__(self) -> int:
        return len(self.same)


def open_pairs(spec: Spec) -> PairSet:
    """Open a ``.bin`` or a ``pairs.txt`` with its images beside it (a text), or a kind (a mapping).

    ``{kind: drawn, faces: SPEC, count: 6000, seed: 0}``: :func:`draw_pairs`;
    ``{kind: listed, path: pairs.txt, images: FOLDER}``: a list whose images lie elsewhere.
    """
    spec = parse_spec(spec)
    if not isinstance(spec, str):
        return open_kind(spec, {"drawn": draw_pairs, "listed": listed_pairs})
    path = find(spec)
    return read_bin(path) if path.suffix.lower() == ".bin" else pairs_file(path)


def listed_pairs(path: str, images: str) -> PairSet:
    """The pairs of a ``pairs.txt`` over a folder of images; paths as for ``open_pairs``."""
    return pairs_file(find(path), find(images))


# ---- .bin: a pickle of (encoded images, flags), read without trusting it ----


class _Refused(Exception):
    """What a pickle holds and a verification set does not."""


class _Array:
    """Stands for a numpy array in the pickle: its bytes and the name of their type."""

    kind, data = "", b""

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, data = state
        self.kind, self.data = dtype.kind, data


class _Type:
    """Stands for a numpy dtype. Of its state only a byte order that is not ours matters."""

    def __init__(self, kind: Any = "", *_: Any) -> None:
        self.kind = (kind.decode() if isinstance(kind, bytes) else kind).lstrip("|")

    def __setstate__(self, state: Any) -> None:
        if state[1] in (">", b">"):
            self.kind = f">{self.kind}"


def _buffer(data: Any, dtype: _Type) -> _Array:
    array = _Array()
    array.kind, array.data = dtype.kind, data
    return array


class _Unpickler(pickle.Unpickler):
    """Admits plain values and stand-ins of byte arrays; any other name is refused, not imported."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        # Functions made here, not the module's: a pickle can set attributes of what it is given.
        encode = lru_cache(maxsize=None)(lambda text: text.encode("latin1"))  # each text once
        numpy = {
            "_reconstruct": lambda *_: _Array(),
            "scalar": lambda dtype, data: _flags(_buffer(data[:8], dtype))[0],
            "_frombuffer": lambda data, dtype, *_: _buffer(data, dtype),
        }
        self.known: dict[tuple[str, str], Any] = {
            ("_codecs", "encode"): lambda text, encoding="latin1": encode(text),
            ("numpy", "dtype"): _Type,
            ("numpy", "ndarray"): None,
        }
        for name, function in numpy.items():
            for package in ("numpy.core", "numpy._core"):
                for module in ("multiarray", "numeric"):
                    self.known[f"{package}.{module}", name] = function
        for module in ("builtins", "__builtin__"):
            self.known[module, "bytearray"] = lambda data=b"", *_: (
                encode(data) if isinstance(data, str) else data
            )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise _Refused(f"the pickle names {module}.{name}, which no verification set needs")
        return self.known[module, name]


def _unpickle(data: bytes) -> Any:
    """The content, in memory that the size of ``data`` bounds."""
    for opcode, argument, _ in pickletools.genops(data):  # refuses what is longer than the data
        if opcode.name.endswith("PUT") and int(str(argument)) > len(data):
            raise _Refused(f"place {argument} of the memo in {len(data)} bytes")
    return _Unpickler(data).load()


def _flags(array: _Array) -> list[Any]:
    """The values of an array of numbers. Raises _Refused for another type."""
    if not re.fullmatch(r">?[iu][1248]|>?f[248]|b1|bool|uint8|int64", array.kind):
        raise _Refused(f"the labels are an array of {array.kind!r}")
    return np.frombuffer(array.data, array.kind).tolist()


def parse_bin(data: bytes, *, where: str) -> tuple[list[bytes], np.ndarray]:
    """Encoded images (2P) and ``same`` bool ``(P,)`` of a ``.bin`` pickle; nothing in it is run.

    Raises:
        DataError: it holds anything but images (bytes or uint8 arrays) and labels (bools or the
            numbers 0 and 1, a list or an array), or the counts differ.
    """
    try:
        images, flags = _unpickle(data)
        flags = _flags(flags) if isinstance(flags, _Array) else flags
        if not isinstance(images, list | tuple) or not isinstance(flags, list | tuple):
            raise _Refused("expected (list of images, list of bools)")
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{where}: not a verification set: {_why_not(data, error)}") from None
    kept: dict[int, bytes] = {}  # one copy of what the pickle names many times
    encoded = [_image_bytes(item, f"{where}: image {i}", kept) for i, item in enumerate(images)]
    for i, flag in enumerate(flags):
        if not isinstance(flag, int | float) or flag not in (0, 1):
            got = flag if isinstance(flag, int | float) else type(flag).__name__
            raise DataError(f"{where}: pair {i} is labelled {got}, expected a bool, 0 or 1")
    if not flags or len(encoded) != 2 * len(flags):
        raise DataError(
            f"{where}: {len(encoded)} images and {len(flags)} pairs, expected two images a pair"
        )
    return encoded, np.array(flags, bool)


def _why_not(data: bytes, error: Exception) -> str:
    """In our words why ``data`` was refused with ``error``."""
    kind = what_is(data)
    if not kind.startswith("a pickle"):
        return kind
    if isinstance(error, _Refused):
        return str(error)
    return "a pickle of something else, cut short or damaged"


def _image_bytes(item: Any, where: str, kept: dict[int, bytes]) -> bytes:
    if isinstance(item, _Array) and item.kind not in ("u1", "uint8"):
        raise DataError(f"{where} is an array of {item.kind!r}, expected bytes or a uint8 array")
    data = item.data if isinstance(item, _Array) else item
    if not isinstance(data, bytes | bytearray):
        kind = type(data).__name__
        raise DataError(f"{where} is {kind}, expected bytes or a uint8 array")
    if id(data) not in kept:
        kept[id(data)] = bytes(data)
    return kept[id(data)]


def read_bin(path: str | Path) -> PairSet:
    """A verification set from an InsightFace ``.bin``; the pairs keep the order of the file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such verification set; see `btnet data`")
    encoded, same = parse_bin(path.read_bytes(), where=str(path))
    places = [f"{path}, image {i}" for i in range(len(encoded))]
    return _pair_set(path.stem, checksum([path]), encoded, same, places)


def write_bin(path: str | Path, encoded: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write 2P encoded images and P flags as InsightFace's tools read them (pickle protocol 4)."""
    content = pickle.dumps((list(encoded), [bool(flag) for flag in same]), protocol=4)
    write_atomically(Path(path), content)


def _pair_set(
    name: str, digest: str, encoded: Sequence[bytes], same: np.ndarray, places: Sequence[str]
) -> PairSet:
    """Equal images are kept, decoded and embedded once. All get the size of the first."""
    slots: dict[bytes, int] = {}
    table = torch.tensor([slots.setdefault(data, len(slots)) for data in encoded]).reshape(-1, 2)
    unique, where = list(slots), dict(zip(table.flatten().tolist(), places, strict=True))
    height, width = pixels.decode(unique[0], where=where[0]).shape[-2:]

    def read(i: int) -> Tensor:
        return at_size(pixels.decode(unique[i], where=where[i]), (height, width))

    def images(indices: Iterable[int]) -> Tensor:
        return decode_each(read, indices, (height, width))

    return PairSet(
        name=name, checksum=digest, first=table[:, 0], second=table[:, 1],
        same=torch.from_numpy(same), images=images, num_images=len(unique),
    )  # fmt: skip


# ---- pairs.txt ----


def parse_pairs(
    path: str | Path, folder: str | Path | None = None
) -> tuple[list[Path], list[bool]]:
    """The 2P image files and P flags of LFW's ``pairs.txt``: ``name 1 2`` or ``name 1 other 2``.

    Image n of a person is ``folder/name/name_000n.<suffix>``; ``folder`` is the one the file lies
    in by default. A first line of counts is skipped. Names with blanks need tabs between the
    fields.
    """
    path = Path(path)
    folder = Path(folder) if folder else path.parent
    files: list[Path] = []
    same = []
    images_of = lru_cache(maxsize=None)(lambda name: _images_by_stem(folder / name))
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if not fields[0:1] or fields == [""] or (number == 1 and _counts(fields)):
            continue
        if len(fields) == 3:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise DataError(
                f"{path}, line {number}: got {line[:80]!r}, expected 'name 1 2' or 'name 1 other 2'"
            )
        for name, n in (fields[:2], fields[2:]):
            stem = f"{name}_{n.lstrip('0'):0>4}"
            if stem not in images_of(name):
                raise DataError(f"{path}, line {number}: no image {folder / name / stem}.*")
            files.append(images_of(name)[stem])
        same.append(fields[0] == fields[2])
    if not same:
        raise DataError(f"{path}: no pairs in it")
    return files, same


def _counts(fields: Sequence[str]) -> bool:
    return len(fields) <= 2 and all(field.isdigit() for field in fields)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """The images of one person's folder by name without suffix; empty where there is none."""
    if not os.path.isdir(folder):  # no error for a name that is too long
        return {}
    found: dict[str, Path] = {}
    for file in entries(folder)[1]:
        if file.stem not in found and is_image(file):
            found[file.stem] = file
    return found


def pairs_file(path: str | Path, folder: str | Path | None = None) -> PairSet:
    """A verification set from LFW's ``pairs.txt`` over a folder of images (:func:`parse_pairs`)."""
    files, same = parse_pairs(path, folder)
    digest = checksum([Path(path), *sorted(set(files))])
    encoded = [pixels.read(file) for file in files]
    return _pair_set(Path(path).stem, digest, encoded, np.array(same), [str(f) for f in files])


# ---- pairs drawn from a face set ----


def draw_pairs(faces: Spec | FaceSet, count: int = 6000, seed: int = 0) -> PairSet:
    """``count`` pairs in ten folds, each half same, half different, drawn evenly over the people.

    No person is in two folds where each tenth of the identities holds enough pairs; otherwise
    (``shared identities`` in the name) all folds draw from all. No pair occurs twice. The same
    ``seed`` gives the same pairs.
    """
    faces = faces if isinstance(faces, FaceSet) else open_faces(faces)
    if count < 20 or count % 20:
        raise ConfigError(f"count: got {count}, expected a multiple of 20: ten folds, half same")
    rng, half = np.random.default_rng(seed), count // 20
    found = by_identity(faces.labels)
    people = [found[i] for i in rng.permutation(len(found))]
    folds = [people[i::10] for i in range(10)]
    shared = not all(_holds(fold, half) for fold in folds)
    if shared and not _holds(people, 10 * half):
        raise DataError(
            f"{faces.name}: {len(faces)} images of {len(people)} people "
            f"are too few for {count} pairs"
        )
    if shared:
        same = np.array_split(_same_pairs(people, 10 * half, rng), 10)
        different = np.array_split(_different_pairs(people, 10 * half, rng), 10)
    else:
        same = [_same_pairs(fold, half, rng) for fold in folds]
        different = [_different_pairs(fold, half, rng) for fold in folds]
    blocks = zip(same, different, strict=True)
    table = torch.from_numpy(np.concatenate([np.concatenate(fold) for fold in blocks]))
    facts = f"{faces.checksum} {count} {seed} 1"
    return PairSet(
        name=f"{faces.name}, {count} pairs, seed {seed}{', shared identities' * shared}",
        checksum="sha256:" + hashlib.sha256(facts.encode()).hexdigest(), first=table[:, 0],
        second=table[:, 1], same=torch.tensor(([True] * half + [False] * half) * 10),
        images=faces.images, num_images=len(faces),
    )  # fmt: skip


def by_identity(labels: Tensor) -> list[np.ndarray]:
    """The images of each identity that has some, in the order of the labels."""
    values = np.asarray(labels)
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _holds(people: list[np.ndarray], half: int) -> bool:
    """Whether there are ``half`` pairs of one person, and four times as many of two."""
    sizes = np.array([len(images) for images in people], np.int64)
    same = (sizes * (sizes - 1) // 2).sum()
    different = (sizes.sum() ** 2 - (sizes**2).sum()) // 2
    return bool(same >= half and different >= 4 * half)


def _same_pairs(people: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """One new pair of each person in turn, until there are ``count``."""
    able, used = [images for images in people if len(images) > 1], dict[int, Iterator[int]]()
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        for i, images in enumerate(able):
            if i not in used:
                every = len(images) * (len(images) - 1) // 2
                used[i] = iter(rng.choice(every, min(every, count), replace=False))
            if (k := next(used[i], None)) is not None:
                b = int((1 + np.sqrt(1 + 8 * k)) // 2)  # pair k of (0, 1) (0, 2) (1, 2) (0, 3) …
                pairs.append((images[k - b * (b - 1) // 2], images[b]))
    return np.array(pairs[:count])


def _different_pairs(people: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        a, b = rng.choice(len(people), 2, replace=False)
        one, other = int(rng.choice(people[a])), int(rng.choice(people[b]))
        pairs[min(one, other), max(one, other)] = None
    return np.array(list(pairs))
