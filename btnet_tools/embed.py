"""`btnet embed`: pictures of any size, each through its own branch, read ahead by threads."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btnet_core.data.folders import find_images, split_images, walk, warn_of
from btnet_core.device import threads
from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_core.images import decode, read
from btnet_core.kinds import what_is
from btnet_core.models.btnet import BTNet, select_branch, weights_digest
from btnet_core.training.distributed import neighbours
from btnet_paper.quality import optical_resolution

BATCH = 64  # faces of one branch that pass through the model together
COLUMNS = ("size", "resize_factor", "reliability")  # of the .npz, as in Face
LARGEST, WIDEST = 512, 2  # pixels a side, and times the shorter side, of what may be a crop


@dataclass(frozen=True, kw_only=True)
class Face:
    """A picture on its way: ``pixels`` (3, r, r') for its branch, then ``embedding`` (D,)."""

    size: tuple[int, int]  # rows, columns of the picture
    r: int
    resize_factor: tuple[float, float]  # of rows, of columns
    reliability: float  # rows of detail, see quality.py
    pixels: Tensor | None = None
    embedding: np.ndarray | None = None


class Reader:
    """Reads a picture for the branch that ``select`` chooses: "max+ceil", "detail+near", …"""

    def __init__(self, btnet: BTNet, select: str = "max+ceil") -> None:
        indicator, _, self.rounding = select.partition("+")
        self.btnet, self.select = btnet, self.by_detail if indicator == "detail" else select
        btnet.entrance(torch.zeros(3, 8, 8), self.select)  # an unknown rule is told now

    def by_detail(self, picture: Tensor) -> int:
        """The branch for as many rows as ``picture`` has of detail."""
        rows = optical_resolution(picture)
        return select_branch(rows, rows, rounding=self.rounding, resolutions=self.btnet.resolutions)

    def __call__(self, path: Path) -> Face:
        picture = decode(read(path), where=str(path))
        pixels, facts = self.btnet.entrance(picture, self.select)
        return Face(pixels=pixels, reliability=optical_resolution(picture), **facts)


def ahead(read: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """``read(item)`` or its DataError for each item, in order, by threads up to ``depth`` ahead."""

    def guarded(item: Any) -> Any:
        try:
            return read(item)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="read") as pool:
        jobs: deque = deque()
        try:
            for item in items:
                jobs.append(pool.submit(guarded, item))
                if len(jobs) > depth:
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def embed_files(
    btnet: BTNet, files: Sequence[Path], reader: Reader, keep_going: bool = False
) -> list[Any]:
    """For each file its Face with a unit embedding; with ``keep_going`` perhaps a DataError."""
    faces: list[Any] = []
    waiting: dict[int, list[int]] = {r: [] for r in btnet.resolutions}

    def flush(r: int) -> None:
        chosen = [faces[index] for index in waiting[r]]
        x = torch.stack([face.pixels for face in chosen]).to(next(btnet.parameters()).device)
        z = btnet(btnet.trunk.normalise(x), r).float()
        unit = torch.nn.functional.normalize(z).cpu().numpy()
        for index, face, embedding in zip(waiting[r], chosen, unit, strict=True):
            faces[index] = replace(face, pixels=None, embedding=embedding)
        waiting[r].clear()

    for index, face in enumerate(ahead(reader, files, 2 * BATCH)):
        faces.append(face)
        if isinstance(face, DataError):
            if not keep_going:
                raise face
        else:
            waiting[face.r].append(index)
            if len(waiting[face.r]) == BATCH:
                flush(face.r)
    for r in (r for r, indices in waiting.items() if indices):
        flush(r)
    return faces


def embed_folder(
    btnet: BTNet, source: str, out: str, select: str = "max+ceil", keep_going: bool = False
) -> tuple[int, dict[str, str]]:
    """Embed every image under ``source`` into the .npz ``out``, see ``_embed_into``.

    Returns:
        The number of embeddings, and {name: reason} of the images left out (with ``keep_going``).

    Raises:
        DataError: no image there, or one that cannot be read; ``out`` cannot be written.
    """
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise DataError(f"--out {out}: expected a file in a folder that is there")
    files, reader = find_files(Path(source)), Reader(btnet, select)
    with threads():  # as many as cores are idle
        return _embed_into(Path(out), btnet, files, reader, keep_going)


def embed_shards(
    btnet: BTNet, source: str, out: str, select: str = "max+ceil", keep_going: bool = False,
    images: int = 10_000,
) -> Iterator[tuple[str, int, dict[str, str]]]:  # fmt: skip
    """Embed every image under ``source`` into the folder ``out``, ``images`` of them a file.

    Memory holds one such shard. What is there already is not done again; under torchrun each
    process takes its share, and the last one writes the ``index.json`` that lists all shards.

    Yields:
        File, number of embeddings and the images left out, for each shard that was made.

    Raises:
        DataError: as ``embed_folder``; a shard was made of other images, or otherwise.
    """
    root, reader = Path(source), Reader(btnet, select)
    made: list[Path] = []
    found, how = image_names(root), f"{weights_digest(btnet)} {btnet.inference} {select}"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    while names := list(islice(found, images)):
        number, path = len(made), Path(out) / f"shard_{len(made):06d}.npz"
        facts = hashlib.sha256("\n".join([how, *names]).encode("utf-8", "replace")).hexdigest()
        made.append(path)
        if path.is_file():
            if _columns(path)["made_of"] != facts:
                told = "made of other images, or by another model, rule or shard size"
                raise DataError(f"{path}: {told}; choose another --out")
        elif number % world == rank:
            files = {name: root / name if root.is_dir() else root for name in names}
            with threads(processes=neighbours()):
                yield (path.name, *_embed_into(path, btnet, files, reader, keep_going, facts))
    if not made:
        raise DataError(f"{source}: no images")
    if all(path.is_file() for path in made):
        shards = [
            {"file": path.name, **{key: len(_columns(path)[key]) for key in ("names", "failed")}}
            for path in made
        ]
        write_atomically(Path(out) / "index.json", json.dumps({"shards": shards}, indent=1) + "\n")


def _columns(path: Path) -> dict[str, np.ndarray]:
    """All but the embeddings of a shard; DataError if it is none."""
    try:
        with np.load(path) as table:
            return {key: table[key] for key in ("names", "failed", "made_of")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no shard of embeddings, but {what_is(path)}") from error


def _embed_into(
    path: Path, btnet: BTNet, files: dict[str, Path], reader: Reader, keep_going: bool,
    made_of: str = "",
) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Write an .npz; the number of embeddings, and the images left out with reasons.

    In it a row an image: ``names`` (relative to the folder), ``embeddings`` (n, D) of unit length,
    ``branch`` (n,), ``size`` (n, 2: rows, columns of the picture), ``resize_factor`` (n, 2),
    ``reliability`` (n,: rows of detail, see quality.py); ``failed``, the names of those left out;
    ``made_of``, a digest of names, model and rule, where it is a shard.
    """
    try:
        found = embed_files(btnet, list(files.values()), reader, keep_going)
    except DataError as error:
        raise DataError(f"{error}; --keep-going leaves such images out") from error
    rows = {n: face for n, face in zip(files, found, strict=True) if isinstance(face, Face)}
    failed = {n: str(one) for n, one in zip(files, found, strict=True) if n not in rows}
    warn_of_photographs(rows)
    columns: dict[str, Any]
    columns = {key: np.array([getattr(face, key) for face in rows.values()]) for key in COLUMNS}
    columns["branch"] = np.array([face.r for face in rows.values()], np.int64)
    columns["names"], columns["failed"] = (np.array(list(x), np.str_) for x in (rows, failed))
    columns["embeddings"] = np.array([face.embedding for face in rows.values()], np.float32)
    columns |= {"made_of": np.array(made_of)} if made_of else {}
    write_atomically(path, lambda file: np.savez(file, **columns))
    return len(rows), failed


def image_names(source: Path) -> Iterator[str]:
    """Images under a folder by their names, folder by folder, as they are met."""
    if source.is_file():
        yield source.name
        return
    for _, files in walk(source):
        images, left_out = split_images(files)
        warn_of(source, left_out)
        yield from (str(file.relative_to(source)) for file in images)


def find_files(source: Path) -> dict[str, Path]:
    """The images under a folder by their names, sorted, or the one image that ``source`` is."""
    if source.is_file():
        return {source.name: source}
    files, left_out = find_images(source)
    if not files:
        raise DataError(f"{source}: no images")
    warn_of(source, left_out)
    return {str(file.relative_to(source)): file for file in sorted(files)}


def warn_of_photographs(faces: dict[str, Face]) -> None:
    """Warn once of pictures too large or too wide to be aligned crops of one face."""
    odd = {
        name: face.size
        for name, face in faces.items()
        if max(face.size) > LARGEST or max(face.size) > WIDEST * min(face.size)
    }
    if odd:
        name, (rows, columns) = next(iter(odd.items()))
        warnings.warn(
            f"{len(odd)} pictures do not look like aligned crops of one face, first {name} "
            f"({columns}x{rows}); `btnet align` cuts faces out of photographs",
            stacklevel=2,
        )
