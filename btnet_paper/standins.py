"""Stand-ins for QMUL-SurvFace and IJB-C from any identity-labelled set.

They are written in the real sets' layouts and read back by the same readers. Each says so in its
name and in ``STAND-IN.txt``: numbers measured on them are not numbers on the real sets.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from btnet_core import images as pixels
from btnet_core.data import ijbc, survface
from btnet_core.data.faces import FaceSet
from btnet_core.data.ijbc import TemplateSet
from btnet_core.errors import DataError
from btnet_core.files import lock
from btnet_paper import layouts

VERSION = 1  # of what the builders write
Rows = list[tuple[int, int]]  # (identity, image)


def native_sizes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns (height, width) of surveillance faces: 6/5 to 124/106 px, mean 24/20, as SurvFace's.

    Log-normal heights; the shape of the distribution is ours, the paper gives only range and mean.
    """
    height = np.clip(np.exp(rng.normal(np.log(24) - 0.5**2 / 2, 0.5, count)), 6, 124)
    width = np.clip(height * 5 / 6 * rng.uniform(0.95, 1.05, count), 5, 106)
    return np.rint(np.stack([height, width], 1)).astype(int)


def survface_standin(
    faces: FaceSet, parent: str | Path, *, blur: float = 0.0, noise: float = 0.0,
    mated: float = 0.6, seed: int = 0,
) -> survface.OpenSet:  # fmt: skip
    """Builds (once) and returns a SurvFace-like open-set test under ``parent``.

    A fraction ``mated`` of the people with at least two images go half into the gallery, half into
    the mated probes; all others are unmated.

    Args:
        blur: upper end of sigma for each image, native pixels.
        noise: upper end of the standard deviation for each image, grey levels.
    """
    rng = np.random.default_rng(seed)
    people = _people(faces, rng)
    able = [person for person in people if len(person[1]) > 1]
    chosen = dict(able[: max(1, round(mated * len(able)))])
    if not chosen or len(chosen) == len(people):
        found = f"{len(able)} of {len(people)} people have two images"
        raise DataError(f"{faces.name}: {found}; some, not all, are needed")
    halves = {identity: np.array_split(images, 2) for identity, images in chosen.items()}
    parts = [
        _rows((identity, half[0]) for identity, half in halves.items()),
        _rows((identity, half[1]) for identity, half in halves.items()),
        _rows(person for person in people if person[0] not in chosen),
    ]

    def write(root: Path) -> None:
        layouts.write_survface(root, *(_degraded(faces, rows, rng, blur, noise) for rows in parts))

    options = f"blur={blur}, noise={noise}, mated={mated}, seed={seed}"
    return survface.read_open_set(_build(parent, "SurvFace", faces, options, write))


def survface_training_standin(
    faces: FaceSet, parent: str | Path, *, blur: float = 0.0, noise: float = 0.0, seed: int = 0
) -> Path:
    """Builds (once) a training part for `survface_standin`, of all ``faces``; returns its folder.

    The folder holds one for each identity, as SurvFace's ``training_set``.
    """
    rng = np.random.default_rng(seed)
    rows = [(int(label), i) for i, label in enumerate(faces.labels)]

    def write(root: Path) -> None:
        layouts.write_survface_training(root, _degraded(faces, rows, rng, blur, noise))

    options = f"training, blur={blur}, noise={noise}, seed={seed}"
    return _build(parent, "SurvFace", faces, options, write) / "training_set"


def ijbc_standin(
    faces: FaceSet, parent: str | Path, *, impostors: int = 200_000, seed: int = 0
) -> TemplateSet:
    """Builds (once) and returns an IJB-C-like template set under ``parent``.

    Each person's images are cut into templates of one to four, some sharing a medium; the first
    template is in the gallery of the person's half (G1 or G2), the others are probes. Pairs: all of
    the same person, and ``impostors`` random ones.
    """
    rng = np.random.default_rng(seed)

    def write(root: Path) -> None:
        members: list[np.ndarray] = []
        owner: list[int] = []
        lists: dict[str, Rows] = {"G1": [], "G2": [], ijbc.PROBES: []}
        for k, (subject, images) in enumerate(_people(faces, rng)):
            for first, own in _templates(images, rng):
                members.append(own)
                owner.append(subject)
                lists[f"G{k % 2 + 1}" if first else ijbc.PROBES].append((len(members), subject))
        crops = _loose_crops(faces, members, rng)
        layouts.write_ijbc(root, crops, _template_pairs(np.array(owner), impostors, rng), lists)

    options = f"impostors={impostors}, seed={seed}"
    return ijbc.read_templates(_build(parent, "IJB-C", faces, options, write))


def _build(
    parent: str | Path, kind: str, faces: FaceSet, options: str, write: Callable[[Path], None]
) -> Path:
    """Writes into a folder named after all that the content depends on, unless it is there."""
    note = f"{kind} stand-in built from {faces.name} ({options})"
    digest = hashlib.sha256(f"{note} {faces.checksum} {VERSION}".encode()).hexdigest()[:10]
    root = Path(parent) / f"{kind.lower()}-standin-{digest}"
    with lock(parent, wait=True):  # two notebooks may want it at once
        if not root.is_dir():
            part = root.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
            warning = f"Not {kind}: results on it are not results on {kind}."
            (part / survface.NOTE).write_text(f"{note}\n{warning}\n", "utf-8")
            part.rename(root)
    return root


def _people(faces: FaceSet, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """Returns (identity, its images in random order) in random order."""
    labels = np.asarray(faces.labels)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [(int(labels[groups[i][0]]), groups[i]) for i in rng.permutation(len(groups))]


def _rows(people: Iterator[tuple[int, np.ndarray]]) -> Rows:
    return [(identity, int(i)) for identity, images in people for i in images]


def _degraded(
    faces: FaceSet, rows: Rows, rng: np.random.Generator, blur: float, noise: float
) -> Iterator[tuple[int, Tensor]]:
    """Yields (identity, image) of native size, blurred, with grain."""
    for (identity, i), size in zip(rows, native_sizes(len(rows), rng).tolist(), strict=True):
        small = _soften(pixels.resize(faces.images([i])[0], tuple(size)), rng.uniform(0, blur))
        grain = torch.from_numpy(rng.normal(0, rng.uniform(0, noise), small.shape)).float()
        yield identity, (small + grain).clamp(0, 255).round().to(torch.uint8)


def _soften(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with the border mirrored, which a small image limits."""
    reach = min(int(np.ceil(3 * sigma)), *(side - 1 for side in image.shape[-2:]))
    return gaussian_blur(image, 2 * reach + 1, sigma) if sigma > 0.05 else image


def _templates(images: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[bool, np.ndarray]]:
    """Yields (whether it is the first, images) of one person; the first leaves some over."""
    start = 0
    while start < len(images):
        left = len(images) - start
        most = left if start else max(1, len(images) - 1)
        size = min(left, int(rng.integers(1, 5)), most)
        yield start == 0, images[start : start + size]
        start += size


def _loose_crops(
    faces: FaceSet, members: list[np.ndarray], rng: np.random.Generator
) -> Iterator[tuple[Tensor, np.ndarray, float, int, int]]:
    """Yields (crop 224x224, its five landmarks, detector score, template, medium).

    Crops are turned, scaled and shifted with their landmarks; a third are blurred, with a lower
    score.
    """
    medium = 0
    for template, images in enumerate(members, 1):
        for k, image in enumerate(faces.images(images)):
            medium += int(k == 0 or rng.random() < 0.7)
            angle, zoom = rng.uniform(-0.3, 0.3), rng.uniform(1.0, 1.4)
            cos, sin = np.cos(angle), np.sin(angle)
            turn = zoom * np.array([[cos, -sin], [sin, cos]])
            matrix = np.column_stack([turn, 112 + rng.uniform(-8, 8, 2) - turn @ [56, 56]])
            worse = rng.random() if rng.random() < 1 / 3 else 0.0
            loose = ijbc.warp(_soften(image, 2 * worse), matrix, (224, 224))
            score = 0.99 - 0.5 * worse - 0.05 * rng.random()
            yield loose, ijbc.ARCFACE @ turn.T + matrix[:, 2], score, template, medium


def _template_pairs(owner: np.ndarray, impostors: int, rng: np.random.Generator) -> np.ndarray:
    """Returns (P, 3): template, template (from 1), label.

    They are every pair of one owner, and ``impostors`` distinct ones of two.
    """
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    same = np.concatenate([g[np.stack(np.triu_indices(len(g), 1), 1)] for g in groups])
    available = (len(owner) ** 2 - sum(len(g) ** 2 for g in groups)) // 2
    different = np.empty((0, 2), np.int64)
    while len(different) < min(impostors, available):
        drawn = np.sort(rng.integers(0, len(owner), (2 * impostors, 2)), 1)
        drawn = np.concatenate([different, drawn[owner[drawn[:, 0]] != owner[drawn[:, 1]]]])
        different = drawn[np.sort(np.unique(drawn, axis=0, return_index=True)[1])]
    different = different[:impostors]
    label = np.repeat([1, 0], [len(same), len(different)])
    return np.column_stack([np.concatenate([same, different]) + 1, label])
