"""IJB-C as InsightFace lays it out: templates, template pairs, 1:N galleries and probes, five-point alignment.

Under ``root``: ``meta/ijbc_face_tid_mid.txt`` (image, template, medium), ``meta/ijbc_name_5pts_score.txt`` (image, five
x y, detector score), ``meta/ijbc_template_pair_label.txt`` (template, template, 0 or 1), ``meta/ijbc_1N_gallery_G1.csv``,
``…_G2.csv``, ``ijbc_1N_probe_mixed.csv`` (template, subject, …; one header line) and the images in ``loose_crop/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core import images as pixels
from btnet_core.data.faces import decode_into
from btnet_core.data.folders import read_lines
from btnet_core.data.survface import stand_in_note
from btnet_core.errors import DataError
from btnet_core.files import checksum, integer_table

# Where ArcFace puts eyes, nose tip and mouth corners in a 112x112 crop: x, y in pixels.
ARCFACE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
PROBES = "probe_mixed"
GALLERIES = {"G1": "gallery_G1", "G2": "gallery_G2"}


@dataclass(frozen=True, kw_only=True)
class TemplateSet:
    """N images in templates, P template pairs for 1:1, galleries and probes for 1:N. Template ids are any integers."""

    name: str
    checksum: str
    images: Callable[[Any], Tensor]  # indices -> uint8 (n, 3, 112, 112), aligned
    template: Any  # (N,) template of each image
    media: Any  # (N,) medium of each image; counts within its template
    score: Any  # (N,) detector score
    first: Any  # (P,) template ids
    second: Any  # (P,)
    same: Any  # (P,) bool
    # "G1", "G2" -> (template ids, subjects), one template a subject
    galleries: Mapping[str, tuple[Any, Any]]
    probes: tuple[Any, Any]  # (template ids, subjects)


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of rotation, scale and shift that brings ``source`` (n, 2) nearest to ``target`` (n, 2).

    Least squares in closed form (Umeyama 1991); never a reflection. Raises :class:`DataError` for points that
    coincide or are not finite.
    """
    mean, goal = source.mean(0), target.mean(0)
    spread = ((source - mean) ** 2).sum()
    if not np.isfinite(source).all() or spread < 1e-6:
        raise DataError(f"landmarks {np.round(source, 1).tolist()} coincide or are not finite")
    u, d, vt = np.linalg.svd((target - goal).T @ (source - mean))
    d[1] *= (sign := np.sign(np.linalg.det(u) * np.linalg.det(vt)))
    turn = u @ np.diag([1, sign]) @ vt * (d.sum() / spread)
    return np.column_stack([turn, goal - turn @ mean])


def warp(image: Tensor, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """``image`` (3, H, W) moved by ``matrix`` (2, 3) into ``size``, bilinear, black outside; uint8."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    y, x = np.mgrid[: size[0], : size[1]]
    at = np.stack([x, y, np.ones_like(x)], -1) @ inverse.T  # (rows, columns, 2): x, y in the image
    grid = (2 * at + 1) / np.array([image.shape[2], image.shape[1]]) - 1
    out = F.grid_sample(
        image[None].float(), torch.from_numpy(grid).float()[None], align_corners=False
    )
    return out[0].round().to(torch.uint8)


def align(image: Tensor, landmarks: np.ndarray) -> Tensor:
    """The 112x112 crop in which ``landmarks`` (5, 2) come nearest to the ArcFace template."""
    return warp(image, similarity_transform(np.asarray(landmarks, np.float64), ARCFACE), (112, 112))


def _columns(path: Path, kinds: Sequence[type], header: bool = False) -> list[np.ndarray]:
    """The first ``len(kinds)`` columns of a text table split at blanks (or commas, after a header line)."""
    rows = [
        line.split("," if header else None) for line in read_lines(path)[header:] if line.strip()
    ]
    try:
        if any(len(row) < len(kinds) if header else len(row) != len(kinds) for row in rows):
            raise ValueError("a line with another number of columns")
        table = [np.array([kind(row[k]) for row in rows]) for k, kind in enumerate(kinds)]
        if not rows or any(column.dtype.kind not in "iufU" for column in table):
            raise ValueError("no lines, or numbers that no array holds")
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected {len(kinds)} columns in each line ({str(error)[:100]})"
        ) from None
    return table


def _subjects(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each template once with its subject."""
    template, subject = _columns(path, (int, int), header=True)
    template, first, which = np.unique(template, return_index=True, return_inverse=True)
    if (subject[first][which] != subject).any():
        raise DataError(f"{path}: a template has two subjects")
    return template, subject[first]


def _aligned(root: Path, names: np.ndarray, landmarks: np.ndarray, i: int) -> Tensor:
    path = root / "loose_crop" / names[i]
    try:
        return align(pixels.decode(pixels.read(path), where=str(path)), landmarks[i])
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from None


def read_templates(root: str | Path) -> TemplateSet:
    """Read the set under ``root``; images are aligned when asked for.

    Raises:
        DataError: a file is missing or damaged, an image has no landmarks, a list names an unknown template.
    """
    root = Path(root)
    meta = {
        name: root / "meta" / f"ijbc_{name}" for name in ("face_tid_mid.txt", "name_5pts_score.txt")
    }
    names, template, media = _columns(meta["face_tid_mid.txt"], (str, int, int))
    known, *numbers = _columns(meta["name_5pts_score.txt"], (str, *[float] * 11))
    row = {name: i for i, name in enumerate(known.tolist())}
    if lost := [name for name in names.tolist() if name not in row]:
        raise DataError(
            f"{meta['name_5pts_score.txt']}: no landmarks for {len(lost)} images, first {lost[0]}"
        )
    table = np.stack(numbers, 1)[[row[name] for name in names.tolist()]]
    pairs_path = root / "meta" / "ijbc_template_pair_label.txt"
    try:
        first, second, same = integer_table(pairs_path.read_bytes(), 3, where=str(pairs_path)).T
    except OSError as error:
        raise DataError(f"{pairs_path}: cannot be read ({error})") from error
    lists = {
        name: root / "meta" / f"ijbc_1N_{kind}.csv"
        for name, kind in {**GALLERIES, PROBES: PROBES}.items()
    }
    subjects = {name: _subjects(path) for name, path in lists.items()}
    used = {
        str(pairs_path): first,
        f"{pairs_path} (second)": second,
        **{str(lists[k]): v[0] for k, v in subjects.items()},
    }
    for where, ids in used.items():
        if len(unknown := ids[~np.isin(ids, template)]):
            raise DataError(f"{where}: {len(unknown)} templates have no image, first {unknown[0]}")
    if (same > 1).any():
        raise DataError(f"{pairs_path}: labels must be 0 or 1")
    files = [
        *meta.values(),
        pairs_path,
        *lists.values(),
        *(root / "loose_crop" / name for name in names.tolist()),
    ]
    read = partial(_aligned, root, names, table[:, :10].reshape(-1, 5, 2))
    return TemplateSet(
        name=stand_in_note(root) or "IJB-C", checksum=checksum(files), template=template, media=media,
        images=lambda indices: decode_into(read, indices, (112, 112)), score=table[:, 10],
        first=first, second=second, same=same.astype(bool),
        galleries={name: subjects[name] for name in GALLERIES}, probes=subjects[PROBES],
    )  # fmt: skip


def write_layout(
    root: Path, faces: Iterable[tuple[Tensor, np.ndarray, float, int, int]],
    pairs: np.ndarray, lists: Mapping[str, Sequence[tuple[int, int]]],
) -> None:  # fmt: skip
    """Write a set in this layout.

    ``faces``: (loose crop, landmarks (5, 2), score, template, medium); ``pairs`` (P, 3): template, template, label;
    ``lists``: (template, subject) of "G1", "G2" and PROBES.
    """
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    membership, points = [], []
    for i, (image, landmarks, score, template, medium) in enumerate(faces, 1):
        (root / "loose_crop" / f"{i}.jpg").write_bytes(pixels.encode(image, "JPEG"))
        membership.append(f"{i}.jpg {template} {medium}\n")
        points.append(f"{i}.jpg {' '.join(f'{x:.3f}' for x in np.ravel(landmarks))} {score:.4f}\n")
    texts = {"face_tid_mid.txt": membership, "name_5pts_score.txt": points}
    texts["template_pair_label.txt"] = [f"{a} {b} {label}\n" for a, b, label in pairs.tolist()]
    for name, rows in lists.items():
        kind = GALLERIES.get(name, PROBES)
        texts[f"1N_{kind}.csv"] = ["TEMPLATE_ID,SUBJECT_ID\n", *(f"{t},{s}\n" for t, s in rows)]
    for name, lines in texts.items():
        (root / "meta" / f"ijbc_{name}").write_text("".join(lines), "utf-8")
