"""Write faces in the layouts of QMUL-SurvFace and IJB-C, which btnet_core.data reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data.ijbc import LISTS, TABLES
from btnet_core.data.survface import TEST_FOLDER


def write_survface(
    root: Path, gallery: Iterable[tuple[int, Tensor]], mated: Iterable[tuple[int, Tensor]],
    unmated: Iterable[tuple[int, Tensor]],
) -> None:  # fmt: skip
    """Write (identity, image) pairs as SurvFace's test, as JPEG; same pairs, same bytes."""
    test = root / TEST_FOLDER
    for kind, faces in (("gallery", gallery), ("mated_probe", mated)):
        names, ids = _write_images(test / kind, faces, "{identity}_cam1_{i}.jpg")
        table = {
            f"{kind}_set": np.array(names, object)[:, None],
            f"{kind}_ids": np.array(ids, np.int64)[:, None],
        }
        path = test / f"{kind}_img_ID_pairs.mat"
        savemat(str(path), table)
        undated = b"MATLAB 5.0 MAT-file".ljust(116)  # scipy writes the time into these bytes
        path.write_bytes(undated + path.read_bytes()[116:])
    _write_images(test / "unmated_probe", unmated, "{i:06d}.jpg")


def write_survface_training(root: Path, faces: Iterable[tuple[int, Tensor]]) -> None:
    """Write (identity, image) pairs as SurvFace's training set, as JPEG."""
    _write_images(root / "training_set", faces, "{identity}/{identity}_cam1_{i}.jpg")


def _write_images(
    folder: Path, faces: Iterable[tuple[int, Tensor]], name: str
) -> tuple[list[str], list[int]]:
    """Names and identities of the images written; ``name`` is a format of identity and place."""
    names, ids = [], []
    for i, (identity, image) in enumerate(faces):
        names.append(name.format(identity=identity, i=i))
        ids.append(identity)
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pixels.encode(image, "JPEG"))
    return names, ids


def write_ijbc(
    root: Path, faces: Iterable[tuple[Tensor, np.ndarray, float, int, int]], pairs: np.ndarray,
    lists: Mapping[str, Sequence[tuple[int, int]]],
) -> None:  # fmt: skip
    """Write a set in this layout.

    ``faces``: (loose crop, landmarks (5, 2), score, template, medium); ``pairs`` (P, 3): template,
    template, label; ``lists``: (template, subject) of "G1", "G2" and PROBES.
    """
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    membership, points = [], []
    for i, (image, landmarks, score, template, medium) in enumerate(faces, 1):
        (root / "loose_crop" / f"{i}.jpg").write_bytes(pixels.encode(image, "JPEG"))
        membership.append(f"{i}.jpg {template} {medium}\n")
        points.append(f"{i}.jpg {' '.join(f'{x:.3f}' for x in np.ravel(landmarks))} {score:.4f}\n")
    rows = [f"{a} {b} {label}\n" for a, b, label in pairs.tolist()]
    texts = dict(zip(TABLES, (membership, points, rows), strict=True))
    for name, entries in lists.items():
        lines = [f"{template},{subject}\n" for template, subject in entries]
        texts[f"1N_{LISTS[name]}.csv"] = ["TEMPLATE_ID,SUBJECT_ID\n", *lines]
    for name, lines in texts.items():
        (root / "meta" / f"ijbc_{name}").write_text("".join(lines), "utf-8")
