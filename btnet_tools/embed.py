"""`btnet embed`: every picture under a folder through its own branch, read ahead by threads, into one .npz."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btnet_core.data.folders import find_images, warn_of
from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_core.images import decode, read, resize, scaled_size
from btnet_core.models.btnet import BTNet, select_branch
from btnet_paper.quality import optical_resolution

BATCH = 64  # faces of one branch that pass through the model together
LARGEST, WIDEST = 512, 2  # pixels a side, and times the shorter side, of what may be a crop


@dataclass(frozen=True, kw_only=True)
class Face:
    """A picture on its way: ``pixels`` (3, r, r') at the size of branch r; then ``embedding`` (D,)."""

    size: tuple[int, int]  # rows, columns of the picture
    r: int
    resize_factor: tuple[float, float]  # of rows, of columns
    reliability: float  # rows of detail, see quality.py
    pixels: Tensor | None = None
    embedding: np.ndarray | None = None


class Reader:
    """Reads a picture for the branch that the rule ``select`` chooses: "max+ceil", "detail+near", …"""

    def __init__(self, btnet: BTNet, select: str = "max+ceil") -> None:
        self.trunk, self.resolutions = btnet.trunk, btnet.resolutions
        self.indicator, _, self.rounding = select.partition("+")
        self.branch((1, 1), 1.0)  # an unknown rule is told now

    def branch(self, size: tuple[int, int], detail: float) -> int:
        """The branch of a face of ``size`` (rows, columns) with ``detail`` rows of detail."""
        rows, columns, indicator = *size, self.indicator
        if indicator == "detail":
            rows, columns, indicator = detail, detail, "max"
        return select_branch(
            columns,
            rows,
            indicator=indicator,
            rounding=self.rounding,
            resolutions=self.resolutions,
        )

    def __call__(self, path: Path) -> Face:
        whole = decode(read(path), where=str(path))
        detail = optical_resolution(whole)
        face = self.trunk.crop(whole)
        rows, columns = face.shape[-2:]
        r = self.branch((rows, columns), detail)
        target = scaled_size(r, self.trunk.config.size)
        return Face(
            size=tuple(whole.shape[-2:]),
            r=r,
            resize_factor=(target[0] / rows, target[1] / columns),
            reliability=detail,
            pixels=resize(face, target),
        )


def ahead(read: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """``read(item)`` for each item, in order, by threads up to ``depth`` items ahead; or its DataError."""

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
    """For each file its Face with an embedding of unit length; with ``keep_going`` perhaps a DataError."""
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
                raise DataError(f"{face}; --keep-going leaves such images out") from face
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
    """Embed every image under ``source`` into the .npz ``out``: one row an image in each array.

    ``names`` (relative to ``source``), ``embeddings`` (n, D) of unit length, ``branch`` (n,), ``size``
    (n, 2: rows, columns of the picture), ``resize_factor`` (n, 2), ``reliability`` (n,: rows of detail,
    see quality.py), and ``failed``, the names of those left out.

    Returns:
        The number of embeddings, and {name: reason} of the images left out (with ``keep_going``).

    Raises:
        DataError: no image there, or one that cannot be read; ``out`` cannot be written.
    """
    root = Path(source)
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise DataError(f"--out {out}: expected a file in a folder that is there")
    files, left_out = ([root], []) if root.is_file() else find_images(root)
    if not files:
        raise DataError(f"{source}: no images")
    files = sorted(files)
    warn_of(root, left_out)
    names = [str(file.relative_to(root)) if file != root else file.name for file in files]
    found = embed_files(btnet, files, Reader(btnet, select), keep_going)
    rows = {name: face for name, face in zip(names, found, strict=True) if isinstance(face, Face)}
    failed = {
        name: str(error)
        for name, error in zip(names, found, strict=True)
        if isinstance(error, DataError)
    }
    warn_of_photographs(rows)
    columns: dict[str, Any] = {
        "names": np.array(list(rows), np.str_),
        "embeddings": np.array([face.embedding for face in rows.values()], np.float32),
        "branch": np.array([face.r for face in rows.values()], np.int64),
        "failed": np.array(list(failed), np.str_),
    }
    for name in ("size", "resize_factor", "reliability"):
        columns[name] = np.array([getattr(face, name) for face in rows.values()])
    write_atomically(Path(out), lambda file: np.savez(file, **columns))
    return len(rows), failed


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
