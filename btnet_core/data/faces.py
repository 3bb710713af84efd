"""Face sets: images with identity labels, from RecordIO, folders, list files or the synthetic renderer; pairs of them.

Pixels are uint8 RGB ``(3, S, S)`` in [0, 255], S = 112. Files of another size are resized (bilinear, antialiased).
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from btnet_core import images as pixels
from btnet_core.data.recordio import FaceRecords
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import checksum, find

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:  # one in each process: threads do not survive a fork
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def read_parallel(read: Callable[[int], Tensor], indices: Iterable[int]) -> list[Tensor]:
    """``read(i)`` for each index, by several threads, in order."""
    wanted = [int(i) for i in indices]
    blocks = [wanted[start : start + 16] for start in range(0, len(wanted), 16)]
    done = _pool(os.getpid()).map(lambda block: [read(i) for i in block], blocks)
    return [image for block in done for image in block]


def stack(read: Callable[[int], Tensor], indices: Iterable[int], size: tuple[int, int]) -> Tensor:
    """uint8 ``(n, 3, *size)`` of ``read(i)`` for each index, read by several threads."""
    found = read_parallel(read, indices)
    return torch.stack(found) if found else torch.empty(0, 3, *size, dtype=torch.uint8)


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image at ``size``, resized and rounded when it has another."""
    if tuple(image.shape[-2:]) == size:
        return image
    return pixels.resize(image, size, pixels.Resize(round_uint8=True)).to(torch.uint8)


class FaceSet(Dataset, ABC):
    """Images with identity labels. ``faces[i] -> (uint8 (3, 112, 112), label)``.

    Attributes:
        name: what to call it in results.
        labels: int64 ``(N,)``, from 0 to ``num_identities - 1``.
        num_identities: size of the classifier it needs.
        checksum: of the files (:func:`btnet_core.files.checksum`) or of the renderer's parameters.
    """

    name: str
    labels: Tensor
    num_identities: int
    checksum: str
    size: int = 112

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Image ``index`` as uint8 ``(3, 112, 112)``."""

    def images(self, indices: Iterable[int]) -> Tensor:
        """uint8 ``(n, 3, 112, 112)``, decoded by several threads."""
        return stack(self.image, indices, (self.size, self.size))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: image {index} of {len(self)}")
        index = int(index) % len(self)
        return self.image(index), int(self.labels[index])


class StoredFaces(FaceSet):
    """A face set on disk: ``encoded(i) -> bytes`` of image ``i``, ``where(i)`` its place for messages.

    ``on_error="skip"`` puts the next readable image of the same identity in the place of one that does not decode,
    so that indices, labels and batch sizes hold; ``skipped`` counts the images left out, over all workers.
    """

    def __init__(
        self, name: str, labels: Tensor, num_identities: int, files: Sequence[Path],
        encoded: Callable[[int], bytes], where: Callable[[int], str], on_error: str = "raise",
    ) -> None:  # fmt: skip
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error: got {on_error!r}, expected 'raise' or 'skip'")
        self.name, self.labels, self.num_identities = name, labels, num_identities
        self.files, self.encoded, self.where, self.on_error = files, encoded, where, on_error
        self._bad = torch.zeros(len(labels) if on_error == "skip" else 0, dtype=torch.bool)
        if on_error == "skip":
            self._bad.share_memory_()

    @cached_property
    def checksum(self) -> str:  # type: ignore[override]
        return checksum(self.files)

    @property
    def skipped(self) -> int:
        """How many images were tried and did not decode."""
        return int(self._bad.sum())

    def native(self, index: int) -> Tensor:
        """Image ``index`` at the size it is stored in, uint8 ``(3, H, W)``."""
        return pixels.decode(self.encoded(index), where=self.where(index))

    def image(self, index: int) -> Tensor:
        here = index
        while True:
            try:
                return fit(self.native(here), (self.size, self.size))
            except DataError:
                if self.on_error == "raise":
                    raise
                self._bad[here] = True
            same = torch.nonzero((self.labels == self.labels[index]) & ~self._bad).flatten()
            if not len(same):
                raise DataError(
                    f"{self.where(index)}: no image of identity {int(self.labels[index])} decodes"
                )
            here = int(same[int((same < here).sum()) % len(same)])


class Part(FaceSet):
    """The images ``indices`` of another set, with its labels numbered anew from 0."""

    def __init__(self, faces: FaceSet, indices: Tensor, name: str) -> None:
        self.faces, self.indices, self.name = faces, indices, name
        identities, self.labels = torch.unique(faces.labels[indices], return_inverse=True)
        self.num_identities = len(identities)
        self.checksum = "sha256:" + hashlib.sha256(f"{faces.checksum} {name}".encode()).hexdigest()

    def image(self, index: int) -> Tensor:
        return self.faces[int(self.indices[index])][0]

    def images(self, indices: Iterable[int]) -> Tensor:
        return self.faces.images(
            self.indices[torch.as_tensor(list(indices), dtype=torch.int64)].tolist()
        )


def hold_out(faces: FaceSet, held: bool, percent: int = 10, seed: int = 0) -> Part:
    """``percent`` of the identities, drawn with ``seed`` (``held``), or all images of the others."""
    if not 0 < percent < 100 or faces.num_identities < 2:
        raise ConfigError(
            f"percent: got {percent} of {faces.num_identities} identities, expected 1 to 99 of 2 or more"
        )
    order = torch.randperm(faces.num_identities, generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(faces.labels, order[: max(1, round(faces.num_identities * percent / 100))])
    name = (
        f"{faces.name}, {'held' if held else 'without'} {percent} % of the identities, seed {seed}"
    )
    return Part(faces, torch.nonzero(chosen if held else ~chosen).flatten(), name)


class _Files:
    """Read image files by position; a class, so that data-loader workers can pickle it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __call__(self, index: int) -> bytes:
        return pixels.read(self.files[index])

    def where(self, index: int) -> str:
        return f"{self.files[index]} (image {index})"


def image_files(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def identity_folders(path: Path) -> list[list[Path]]:
    """The images of each sub-folder, sorted by name; sub-folders without images are left out."""
    folders = (
        sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    )
    groups = [group for folder in folders if (group := image_files(folder))]
    if not groups:
        raise DataError(
            f"{path}: no sub-folder with images ({', '.join(SUFFIXES)}); expected <identity>/<image>"
        )
    return groups


def image_folder(path: str | Path, on_error: str = "raise") -> StoredFaces:
    """One sub-folder per identity; in a folder of images alone, each counts as an identity of its own."""
    root = Path(path)
    loose = root.is_dir() and not any(entry.is_dir() for entry in root.iterdir())
    groups = [[file] for file in image_files(root)] if loose else []
    groups = groups or identity_folders(root)
    labels = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    read = _Files([file for group in groups for file in group])
    return StoredFaces(Path(path).name, labels, len(groups), read.files, read, read.where, on_error)


def list_file(path: str | Path, on_error: str = "raise") -> StoredFaces:
    """A text file with ``image label`` in each line: a path relative to the list's folder, an integer from 0."""
    path = Path(path)
    files, labels = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not name or not (label.isascii() and label.isdigit() and len(label) < 19):
            raise DataError(
                f"{path}, line {number}: got {line[:80]!r}, expected an image path and an integer label"
            )
        files.append(path.parent / name.strip())
        labels.append(int(label))
    if not files or max(labels) >= len(files):
        raise DataError(
            f"{path}: {len(files)} images with labels up to {max(labels, default=0)}, expected 0, 1, 2, …"
        )
    read = _Files(files)
    table = torch.tensor(labels, dtype=torch.int64)
    return StoredFaces(
        path.stem, table, max(labels) + 1, [path, *files], read, read.where, on_error
    )


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, or :class:`DataError`."""
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def record_faces(path: str | Path, on_error: str = "raise") -> StoredFaces:
    """A RecordIO set: a folder with ``train.rec``, or a ``.rec`` file (its ``.idx`` beside it)."""
    records = FaceRecords(path)
    rec = records.file.path
    files = [rec, rec.with_suffix(".idx"), rec.with_name("property")]
    name = rec.parent.name if rec.stem == "train" else rec.stem
    return StoredFaces(
        name, torch.from_numpy(records.labels), records.num_identities, [file for file in files if file.is_file()],
        records.image, records.where, on_error,
    )  # fmt: skip


def parse_options(text: str, spec: str, **types: Callable[[str], Any]) -> dict[str, Any]:
    """``a=1,b=2`` to a dict; an unknown or mistyped option is a :class:`ConfigError` that lists the known ones."""
    options = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = types[key.strip()](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"{spec!r}: got {part!r}, expected an integer for one of {', '.join(types)}"
            ) from None
    return options


def open_faces(spec: str, on_error: str = "raise") -> FaceSet:
    """Open ``synthetic:identities=300,images=20,seed=0,first=0``, a RecordIO set, an image folder or a list file.

    ``held:<faces spec>:percent=10,seed=0`` and ``without:…`` part a set by identity (:func:`hold_out`).
    Relative paths are looked up under the data root first. ``on_error``: "raise" or "skip" (:class:`StoredFaces`).
    """
    if spec.startswith(("held:", "without:")):
        kind, _, rest = spec.partition(":")
        inner, _, text = rest.rpartition(":")
        options = parse_options(text, spec, percent=int, seed=int)
        return hold_out(open_faces(inner, on_error), kind == "held", **options)
    if spec.startswith("synthetic:"):
        from btnet_paper.synthetic_faces import SyntheticFaces

        options = parse_options(spec[10:], spec, identities=int, images=int, seed=int, first=int)
        return SyntheticFaces(**{"identities": 300, "images": 20, **options})  # type: ignore[return-value]
    path = find(spec)
    if path.suffix == ".rec" or (path / "train.rec").is_file():
        return record_faces(path, on_error)
    if path.is_dir():
        return image_folder(path, on_error)
    if path.is_file():
        return list_file(path, on_error)
    raise DataError(
        f"{spec!r}: no such file or folder (looked for {path.absolute()}); see `btnet data`"
    )


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


def draw_pairs(faces: FaceSet, count: int, seed: int = 0) -> PairSet:
    """``count`` pairs in ten folds, each half same, half different, drawn evenly over the identities.

    No person is in two folds where each tenth of the identities holds enough pairs; otherwise (``shared identities``
    in the name) all folds draw from all. No pair occurs twice. The same ``seed`` gives the same pairs.
    """
    if count < 20 or count % 20:
        raise ConfigError(
            f"count: got {count}, expected a multiple of 20 (ten folds of half same, half different)"
        )
    rng = np.random.default_rng(seed)
    labels = np.asarray(faces.labels)
    order = np.argsort(labels, kind="stable")
    people = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    people = [people[i] for i in rng.permutation(len(people))]
    half, folds, note = count // 20, [people[i::10] for i in range(10)], ""
    if not all(_holds(fold, half) for fold in folds):
        if not _holds(people, 10 * half):
            raise DataError(
                f"{faces.name}: {len(faces)} images of {len(people)} people are too few for {count} pairs"
            )
        note = ", shared identities"
        pairs = [
            np.array_split(draw(people, 10 * half, rng), 10)
            for draw in (_same_pairs, _different_pairs)
        ]
    else:
        pairs = [
            [draw(fold, half, rng) for fold in folds] for draw in (_same_pairs, _different_pairs)
        ]
    table = torch.from_numpy(
        np.concatenate([block for fold in zip(*pairs, strict=True) for block in fold])
    )
    digest = hashlib.sha256(f"{faces.checksum} {count} {seed} 1".encode()).hexdigest()
    return PairSet(
        name=f"{faces.name}, {count} pairs, seed {seed}{note}", checksum=f"sha256:{digest}",
        first=table[:, 0], second=table[:, 1], same=torch.tensor(([True] * half + [False] * half) * 10),
        images=faces.images, num_images=len(faces),
    )  # fmt: skip


def _holds(people: list[np.ndarray], half: int) -> bool:
    sizes = np.array([len(images) for images in people], np.int64)
    return (sizes * (sizes - 1) // 2).sum() >= half and (
        sizes.sum() ** 2 - (sizes**2).sum()
    ) // 2 >= 4 * half


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
                b = int(
                    (1 + np.sqrt(1 + 8 * k)) // 2
                )  # pair k of the triangle (0,1) (0,2) (1,2) (0,3) …
                pairs.append((images[k - b * (b - 1) // 2], images[b]))
    return np.array(pairs[:count])


def _different_pairs(people: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        a, b = rng.choice(len(people), 2, replace=False)
        one, other = int(rng.choice(people[a])), int(rng.choice(people[b]))
        pairs[min(one, other), max(one, other)] = None
    return np.array(list(pairs))


def open_pairs(spec: str) -> PairSet:
    """Open a ``.bin``, ``pairs.txt`` (images beside it, or ``pairs.txt@FOLDER``), or pairs drawn from a face set.

    ``pairs:<faces spec>:count=6000,seed=0`` and ``synthetic:…,pairs=3000`` draw (:func:`draw_pairs`).
    """
    from btnet_core.data import pairs as verification

    if spec.startswith("pairs:"):
        inner, _, options = spec[6:].rpartition(":")
        return draw_pairs(
            open_faces(inner),
            **{"count": 6000, **parse_options(options, spec, count=int, seed=int)},
        )
    if spec.startswith("synthetic:"):
        parts = spec[10:].split(",")
        own = parse_options(
            ",".join(part for part in parts if part.startswith("pairs=")), spec, pairs=int
        )
        faces = open_faces(
            "synthetic:" + ",".join(part for part in parts if not part.startswith("pairs="))
        )
        return draw_pairs(faces, own.get("pairs", 6000), getattr(faces, "seed", 0))
    if spec.endswith(".bin"):
        return verification.read_bin(find(spec))
    path, _, folder = spec.partition("@")
    return verification.pairs_file(find(path), find(folder) if folder else None)
