"""Face sets: images with identity labels, from RecordIO, folders, lists or a registered source.

Pixels are uint8 RGB ``(3, S, S)`` in [0, 255], S = 112; other sizes are resized (bilinear,
antialiased).
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from btnet_core import images as pixels
from btnet_core.data.folders import identity_folders, read_lines
from btnet_core.data.recordio import MAX_LABEL, FaceRecords
from btnet_core.data.sources import FACES, Spec, open_kind, parse_spec, register
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import checksum, find
from btnet_core.kinds import what_is


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:  # one in each process: threads do not survive a fork
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def in_parallel(do: Callable[[int], Any], count: int) -> list[Any]:
    """``[do(0), …, do(count - 1)]``, by several threads."""
    starts = range(0, count, 16)
    blocks = _pool(os.getpid()).map(
        lambda start: [do(place) for place in range(start, min(start + 16, count))], starts
    )
    return [result for block in blocks for result in block]


def decode_each(
    read: Callable[[int], Tensor], indices: Iterable[int], size: tuple[int, int]
) -> Tensor:
    """uint8 ``(n, 3, *size)`` of ``read(i)`` for each index, by several threads."""
    wanted = [int(i) for i in indices]
    result = torch.empty(len(wanted), 3, *size, dtype=torch.uint8)
    pixels_of = result.numpy()  # a shared view: torch calls from many threads contend

    def place(k: int) -> None:
        pixels_of[k] = read(wanted[k]).numpy()

    in_parallel(place, len(wanted))
    return result


def at_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image at ``size``, resized and rounded when it has another."""
    if tuple(image.shape[-2:]) == size:
        return image
    return pixels.resize(image, size, pixels.Resize(round_uint8=True)).to(torch.uint8)


class FaceSet(Dataset, ABC):
    """Images with identity labels. ``faces[i] -> (uint8 (3, 112, 112), label)``.

    Attributes:
        name: what to call it in results.
        labels: int64 ``(N,)``, from 0 to ``num_identities - 1``. An identity may have no image.
        num_identities: size of the classifier it needs.
        checksum: of the files (:func:`btnet_core.files.checksum`) or of the renderer's parameters.
    """

    name: str
    labels: Tensor
    num_identities: int
    checksum: str
    size: int = 112

    @abstractmethod
    def native(self, index: int) -> Tensor:
        """Image ``index`` at the size it is stored in, uint8 ``(3, H, W)``."""

    def image(self, index: int) -> Tensor:
        """Image ``index`` as uint8 ``(3, 112, 112)``."""
        return at_size(self.native(index), (self.size, self.size))

    def images(self, indices: Iterable[int]) -> Tensor:
        """uint8 ``(n, 3, 112, 112)``, decoded by several threads."""
        return decode_each(self.image, indices, (self.size, self.size))

    def where(self, index: int) -> str:
        """What to call image ``index`` in messages."""
        return f"{self.name}, image {index}"

    def check(self, index: int) -> None:
        """Raise DataError where image ``index`` cannot be read; those that are drawn can."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: image {index} of {len(self)}")
        index = int(index) % len(self)
        return self.image(index), int(self.labels[index])


class StoredFaces(FaceSet):
    """A face set on disk: ``encoded(i)`` gives the bytes of image ``i``, ``where(i)`` its place."""

    def __init__(
        self, name: str, labels: Tensor, num_identities: int, files: Sequence[Path],
        encoded: Callable[[int], bytes], where: Callable[[int], str],
    ) -> None:  # fmt: skip
        self.name, self.labels, self.num_identities = name, labels, num_identities
        self.files, self.encoded = files, encoded
        self.where = where  # type: ignore[method-assign, assignment]

    @cached_property
    def checksum(self) -> str:  # type: ignore[override]
        return checksum(self.files)

    def native(self, index: int) -> Tensor:
        return pixels.decode(self.encoded(index), where=self.where(index))

    def check(self, index: int) -> None:
        self.native(index)


def unreadable(faces: FaceSet) -> dict[int, str]:
    """{index: why} of every image that cannot be read; decodes the whole set."""

    def reason(index: int) -> str:
        try:
            faces.check(index)
        except DataError as error:
            return str(error)
        return ""

    return {i: why for i, why in enumerate(in_parallel(reason, len(faces))) if why}


class Part(FaceSet):
    """The images ``indices`` of another set (``which`` in words), labels numbered anew from 0."""

    def __init__(self, faces: FaceSet, indices: Tensor, which: str) -> None:
        self.faces, self.indices, self.name = faces, indices, f"{faces.name}, {which}"
        identities, self.labels = torch.unique(faces.labels[indices], return_inverse=True)
        self.num_identities = len(identities)
        self.checksum = "sha256:" + hashlib.sha256(f"{faces.checksum} {which}".encode()).hexdigest()

    def native(self, index: int) -> Tensor:
        return self.faces.native(int(self.indices[index]))

    def check(self, index: int) -> None:
        self.faces.check(int(self.indices[index]))

    def images(self, indices: Iterable[int]) -> Tensor:
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        return self.faces.images(self.indices[rows].tolist())

    def where(self, index: int) -> str:
        return self.faces.where(int(self.indices[index]))


def hold_out(faces: Spec | FaceSet, held: bool, percent: int = 10, seed: int = 0) -> Part:
    """``percent`` of the identities that have images (``held``), or all images of the others.

    At least one identity is in each part.
    """
    faces = faces if isinstance(faces, FaceSet) else open_faces(faces)
    present = torch.unique(faces.labels)
    if not 0 < percent < 100:
        raise ConfigError(f"percent: got {percent}, expected 1 to 99 of the identities")
    if len(present) < 2:
        raise DataError(
            f"{faces.name}: images of {len(present)} identity; two are needed to hold one out"
        )
    order = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))]
    count = min(max(1, round(len(present) * percent / 100)), len(present) - 1)
    chosen = torch.isin(faces.labels, order[:count])
    which = f"{'held' if held else 'without'} {percent} % of the identities, seed {seed}"
    return Part(faces, torch.nonzero(chosen if held else ~chosen).flatten(), which)


def leave_out(faces: Spec | FaceSet, images: Sequence[int] | str) -> FaceSet:
    """All but the ``images``: indices (see :func:`unreadable`), or a list (:func:`marked`)."""
    faces = faces if isinstance(faces, FaceSet) else open_faces(faces)
    if isinstance(images, str):
        images = marked(images, faces)
        if not images:
            return faces
    kept = torch.ones(len(faces), dtype=torch.bool)
    if any(not 0 <= int(i) < len(faces) for i in images) or len(set(images)) == len(faces):
        raise ConfigError(f"images: got {images}, expected some, not all, of 0 to {len(faces) - 1}")
    kept[torch.as_tensor(images, dtype=torch.int64)] = False
    digest = hashlib.sha256(repr(sorted(images)).encode()).hexdigest()[:10]
    which = f"without {len(set(images))} images ({digest})"
    return Part(faces, torch.nonzero(kept).flatten(), which)


def marked(path: str, faces: FaceSet) -> list[int]:
    """The images that ``left_out`` of an .npz marks: for each a number, 0 for those that stay.

    None where ``faces`` has just as many images as stay: they were left out when it was made.

    Raises:
        DataError: the list is of a set of another size.
    """
    try:
        left_out = np.load(find(path))["left_out"] != 0
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        kind = what_is(find(path))
        raise DataError(f"{path}: no .npz with `left_out` of each image, but {kind}") from error
    stay = len(left_out) - int(left_out.sum())
    if len(faces) not in (len(left_out), stay):
        raise DataError(
            f"{path}: a list of {len(left_out):,} images, {stay:,} of which stay; "
            f"{faces.name} has {len(faces):,}"
        )
    return np.flatnonzero(left_out).tolist() if len(faces) == len(left_out) else []


class _Files:
    """Read image files by position; a class, so that data-loader workers can pickle it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __call__(self, index: int) -> bytes:
        return pixels.read(self.files[index])

    def where(self, index: int) -> str:
        return f"{self.files[index]} (image {index})"


def image_folder(path: str | Path) -> StoredFaces:
    """One sub-folder per identity; in a folder of images alone, each is an identity of its own."""
    groups = identity_folders(Path(path))
    labels = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    read = _Files([file for group in groups for file in group])
    return StoredFaces(Path(path).name, labels, len(groups), read.files, read, read.where)


def list_file(path: str | Path) -> StoredFaces:
    """A text file of images (relative to its folder) and labels (integers from 0), one a line.

    ``path label``; InsightFace's ``1<tab>path<tab>label``; or im2rec's
    ``index<tab>label…<tab>path``.
    """
    path = Path(path)
    files, labels = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, label = _name_and_label(line)
        if not name or not 0 <= label <= MAX_LABEL:
            raise DataError(
                f"{path}, line {number}: got {line[:80]!r}, "
                "expected an image path and an integer label"
            )
        files.append(_beside(path, name))
        labels.append(label)
    if not files:
        raise DataError(f"{path}: no images in it")
    read, identities = _Files(files), max(labels) + 1
    table = torch.tensor(labels, dtype=torch.int64)
    return StoredFaces(path.stem, table, identities, [path, *files], read, read.where)


def _beside(path: Path, name: str) -> Path:
    """The file that a list at ``path`` names, relative to its folder; also as Windows writes it."""
    file = path.parent / name
    if "\\" in name and not os.path.lexists(file):
        file = path.parent / name.replace("\\", "/")
    return file


def _name_and_label(line: str) -> tuple[str, int]:
    """Path and label (-1: none) of a line in one of the three formats."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) == 1:
        name, _, label = line.strip().rpartition(" ")
    elif len(fields) == 2:
        name, label = fields
    elif _whole(fields[1]) < 0:  # InsightFace's; boxes and landmarks may follow
        name, label = fields[1:3]
    else:
        name, label = fields[-1], fields[1]
    return name.strip(), _whole(label)


def _whole(text: str) -> int:
    """The number that ``12`` or ``12.000000`` stands for; -1 for any other text."""
    number = re.fullmatch(r"([0-9]{1,18})(\.0*)?", text)
    return int(number[1]) if number else -1


def record_faces(path: str | Path) -> StoredFaces:
    """A RecordIO set: a folder with ``train.rec``, or a ``.rec`` file (its ``.idx`` beside it)."""
    records = FaceRecords(path)
    rec = records.file.path
    files = [rec, rec.with_suffix(".idx"), rec.with_name("property")]
    name = rec.parent.name if rec.stem == "train" else rec.stem
    return StoredFaces(
        name, torch.from_numpy(records.labels), records.num_identities,
        [file for file in files if file.is_file()], records.image, records.where,
    )  # fmt: skip


def open_faces(spec: Spec) -> FaceSet:
    """Open a RecordIO set, a folder or a list file (a text), or a registered kind (a mapping).

    ``{kind: part, faces: SPEC, held: true, percent: 10, seed: 0}``: :func:`hold_out`.
    ``{kind: without, faces: SPEC, images: [3, 17]}``, or a list's path: :func:`leave_out`.
    ``{kind: synthetic, identities: 300, images: 20, seed: 0, first: 0}`` is btnet_paper's.
    """
    spec = parse_spec(spec)
    if not isinstance(spec, str):
        return open_kind(spec, FACES)
    path = find(spec)
    if path.suffix.lower() == ".rec" or os.path.isfile(path / "train.rec"):
        return record_faces(path)
    if os.path.isdir(path):  # no error for a name that is too long
        return image_folder(path)
    if os.path.isfile(path):
        return list_file(path)
    raise DataError(
        f"{spec!r}: no such file or folder (looked for {path.absolute()}); see `btnet data`"
    )


register("part", hold_out)
register("without", leave_out)
