"""IJB-C as InsightFace lays it out: templates, pairs of them, 1:N galleries and probes, alignment.

Under ``root``: ``meta/ijbc_face_tid_mid.txt`` (image, template, medium),
``meta/ijbc_name_5pts_score.txt`` (image, five x y, detector score),
``meta/ijbc_template_pair_label.txt`` (template, template, 0 or 1), ``meta/ijbc_1N_gallery_G1.csv``,
``…_G2.csv``, ``ijbc_1N_probe_mixed.csv`` (template, subject, …; one header line) and the images in
``loose_crop/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core import images as pixels
from btnet_core.data.faces import decode_each
from btnet_core.data.folders import read_lines
from btnet_core.data.survface import stand_in_note
from btnet_core.errors import DataError
from btnet_core.files import checksum, integer_table, reason

# Where ArcFace puts eyes, nose tip and mouth corners in a 112x112 crop: x, y in pixels.
ARCFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                    [41.5493, 92.3655], [70.7299, 92.2041]])  # fmt: skip
PROBES = "probe_mixed"
LISTS = {"G1": "gallery_G1", "G2": "gallery_G2", PROBES: PROBES}
TABLES = ("face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt")


@dataclass(frozen=True, kw_only=True)
class TemplateSet:
    """N images in templates, P template pairs for 1:1, galleries and probes for 1:N."""

    name: str
    checksum: str
    images: Callable[[Any], Tensor]  # indices -> uint8 (n, 3, 112, 112), aligned
    template: Any  # (N,) template of each image, any integers
    media: Any  # (N,) medium of each image; counts within its template
    score: Any  # (N,) detector score
    first: Any  # (P,) template ids
    second: Any  # (P,)
    same: Any  # (P,) bool
    # "G1", "G2" -> (template ids, subjects), one template a subject
    galleries: Mapping[str, tuple[Any, Any]]
    probes: tuple[Any, Any]  # (template ids, subjects)


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of rotation, scale and shift that brings ``source`` (n, 2) nearest to
    ``target`` (n, 2).

    Least squares in closed form (Umeyama 1991); never a reflection. Raises :class:`DataError` for
    points that coincide or are not finite.
    """
    mean, goal = source.mean(0), target.mean(0)
    spread = ((source - mean) ** 2).sum()
    if not np.isfinite(source).all() or spread < 1e-6:
        raise DataError(f"landmarks {np.round(source, 1).tolist()} coincide or are not finite")
    u, d, vt = np.linalg.svd((target - goal).T @ (source - mean))
    d[1] *= (sign := np.sign(np.linalg.det(u) * np.linalg.det(vt)))
    turn = u @ np.diag([1, sign]) @ vt * (d.sum() / spread)
    return np.column_stack([turn, goal - turn @ mean])


def moved(image: Tensor, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """``image`` (3, H, W) moved by ``matrix`` (2, 3) into ``size``: float, bilinear, else black."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    y, x = np.mgrid[: size[0], : size[1]]
    at = np.stack([x, y, np.ones_like(x)], -1) @ inverse.T  # (rows, columns, 2): x, y in the image
    grid = (2 * at + 1) / np.array([image.shape[2], image.shape[1]]) - 1
    place = torch.from_numpy(grid).float()[None]
    return F.grid_sample(image[None].float(), place, align_corners=False)[0]


def warp(image: Tensor, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """:func:`moved`, in whole grey levels."""
    return moved(image, matrix, size).round().to(torch.uint8)


def align(image: Tensor, landmarks: np.ndarray) -> Tensor:
    """The 112x112 crop in which ``landmarks`` (5, 2) come nearest to the ArcFace template."""
    return warp(image, similarity_transform(np.asarray(landmarks, np.float64), ARCFACE), (112, 112))


def _columns(path: Path, kinds: Sequence[type], split: str | None = None) -> list[np.ndarray]:
    """The columns of a text table split at blanks, or the first of one split at ``split``.

    A first line without a number, where one is expected, is a heading.
    """
    names = {str: "a text", int: "an integer", float: "a number"}
    expected = ", ".join(names[kind] for kind in kinds)
    rows: list[list[Any]] = []
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split(split)
        if not line.strip() or (split and number == 1 and not cells[0].strip().isdigit()):
            continue
        try:
            if len(cells) < len(kinds) or (split is None and len(cells) > len(kinds)):
                raise ValueError
            rows.append([kind(cell) for kind, cell in zip(kinds, cells, strict=False)])
            if any(isinstance(cell, int) and abs(cell) >= 2**63 for cell in rows[-1]):
                raise ValueError
        except ValueError:
            got = f"got {line[:80]!r}, expected {expected}"
            raise DataError(f"{path}, line {number}: {got}") from None
    if not rows:
        raise DataError(f"{path}: no lines in it, expected {expected} in each")
    return [np.array(column) for column in zip(*rows, strict=True)]


def _landmarks(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 5, 2) and detector scores (N,) of the named images."""
    known, *numbers = _columns(path, (str, *[float] * 11))
    row = {name: i for i, name in enumerate(known.tolist())}
    if lost := [name for name in names if name not in row]:
        raise DataError(f"{path}: no landmarks for {len(lost)} images, first {lost[0]}")
    table = np.stack(numbers, 1)[[row[name] for name in names]]
    return table[:, :10].reshape(-1, 5, 2), table[:, 10]


def _pairs(path: Path) -> np.ndarray:
    """(P, 3): template, template, 0 or 1."""
    try:
        table = integer_table(path.read_bytes(), 3, where=str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    if not len(table):
        raise DataError(f"{path}: no pairs in it")
    if (table[:, 2] > 1).any():
        raise DataError(f"{path}: labels must be 0 or 1")
    return table


def _subjects(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each template once with its subject."""
    template, subject = _columns(path, (int, int), ",")
    template, first, which = np.unique(template, return_index=True, return_inverse=True)
    if (subject[first][which] != subject).any():
        raise DataError(f"{path}: a template has two subjects")
    return template, subject[first]


def _aligned(files: Sequence[Path], landmarks: np.ndarray, i: int) -> Tensor:
    try:
        return align(pixels.decode(pixels.read(files[i]), where=str(files[i])), landmarks[i])
    except DataError as error:
        named = str(files[i]) in str(error)
        raise error if named else DataError(f"{files[i]}: {error}") from None


def read_templates(root: str | Path) -> TemplateSet:
    """Read the set under ``root``; images are aligned when asked for.

    Raises:
        DataError: a file is missing or damaged, an image has no landmarks, a list names a template
            without images.
    """
    root = Path(root)
    media_path, points_path, pairs_path = (root / "meta" / f"ijbc_{name}" for name in TABLES)
    lists = {name: root / "meta" / f"ijbc_1N_{kind}.csv" for name, kind in LISTS.items()}
    names, template, media = _columns(media_path, (str, int, int))
    landmarks, score = _landmarks(points_path, names.tolist())
    pairs, subjects = _pairs(pairs_path), {name: _subjects(path) for name, path in lists.items()}
    used = {pairs_path: pairs[:, :2].flatten(), **{lists[k]: subjects[k][0] for k in lists}}
    for path, ids in used.items():
        unknown = np.unique(ids[~np.isin(ids, template)])
        if len(unknown):
            raise DataError(f"{path}: {len(unknown)} templates have no image, first {unknown[0]}")
    crops = [root / "loose_crop" / name for name in names.tolist()]
    read = partial(_aligned, crops, landmarks)
    return TemplateSet(
        name=stand_in_note(root) or "IJB-C",
        checksum=checksum([media_path, points_path, pairs_path, *lists.values(), *crops]),
        images=lambda indices: decode_each(read, indices, (112, 112)), template=template,
        media=media, score=score, first=pairs[:, 0], second=pairs[:, 1],
        same=pairs[:, 2].astype(bool), galleries={name: subjects[name] for name in ("G1", "G2")},
        probes=subjects[PROBES],
    )  # fmt: skip
