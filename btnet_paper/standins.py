"""Stand-ins for QMUL-SurvFace and IJB-C, built from any identity-labelled set, so that every protocol runs anywhere.

They are written in the real sets' layouts and read back by the same readers. Each says so in its name and in
``STAND-IN.txt``: numbers measured on them are not numbers on the real sets.
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

VERSION = 1  # of what the builders write


def native_sizes(count: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) of ``count`` surveillance faces: 6/5 to 124/106 pixels, mean 24/20, as SurvFace's.

    Log-normal heights; the shape of the distribution is ours, the paper gives only range and mean.
    """
    height = np.clip(np.exp(rng.normal(np.log(24) - 0.5**2 / 2, 0.5, count)), 6, 124)
    width = np.clip(height * 5 / 6 * rng.uniform(0.95, 1.05, count), 5, 106)
    return np.rint(np.stack([height, width], 1)).astype(int)


def _soften(image: Tensor, sigma: float) -> Tensor:
    reach = min(
        int(np.ceil(3 * sigma)), *(side - 1 for side in image.shape[-2:])
    )  # the border is mirrored
    return gaussian_blur(image, 2 * reach + 1, sigma) if sigma > 0.05 else image


def _people(faces: FaceSet, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """(identity, its images in random order) in random order."""
    labels = np.asarray(faces.labels)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [(int(labels[groups[i][0]]), groups[i]) for i in rng.permutation(len(groups))]


def _build(
    parent: str | Path, kind: str, faces: FaceSet, options: str, write: Callable[[Path], None]
) -> Path:
    """Write into a folder named after everything the content depends on, unless it is there already."""
    note = f"{kind} stand-in built from {faces.name} ({options})"
    digest = hashlib.sha256(f"{note} {faces.checksum} {VERSION}".encode()).hexdigest()[:10]
    root = Path(parent) / f"{kind.lower()}-standin-{digest}"
    if not root.is_dir():
        part = root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        (part / survface.NOTE).write_text(
            f"{note}\nNot {kind}: results on it are not results on {kind}.\n", "utf-8"
        )
        part.rename(root)
    return root


def survface_standin(
    faces: FaceSet, parent: str | Path, *, blur: float = 0.0, noise: float = 0.0, mated: float = 0.6,
    seed: int = 0, training: FaceSet | None = None,
) -> survface.OpenSet:  # fmt: skip
    """Build (once) and read a SurvFace-like open-set test under ``parent``.

    A share ``mated`` of the people with at least two images go half into the gallery, half into the mated probes; all
    others are unmated. ``blur`` (sigma, native pixels) and ``noise`` (standard deviation, levels) are upper ends of
    uniform draws for each image. ``training`` becomes the training set, degraded in the same way.
    """
    rng = np.random.default_rng(seed)
    people = _people(faces, rng)
    able = [person for person in people if len(person[1]) > 1]
    chosen = able[: max(1, round(mated * len(able)))]
    if not chosen or len(chosen) == len(people):
        raise DataError(
            f"{faces.name}: {len(able)} of {len(people)} people have two images; some, not all, are needed"
        )
    known = {identity for identity, _ in chosen}

    def shrunk(source: FaceSet, rows: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        for (identity, i), size in zip(rows, native_sizes(len(rows), rng).tolist(), strict=True):
            small = _soften(pixels.resize(source.images([i])[0], tuple(size)), rng.uniform(0, blur))
            grain = torch.from_numpy(rng.normal(0, rng.uniform(0, noise), small.shape)).float()
            yield identity, (small + grain).clamp(0, 255).round().to(torch.uint8)

    def write(root: Path) -> None:
        halves = [(identity, np.array_split(images, 2)) for identity, images in chosen]
        gallery, probes = (
            [(identity, int(i)) for identity, half in halves for i in half[k]] for k in (0, 1)
        )
        unmated = [
            (identity, int(i))
            for identity, images in people
            if identity not in known
            for i in images
        ]
        train = [(int(label), i) for i, label in enumerate(training.labels)] if training else []
        enrolled, mated_probes, strangers = (
            shrunk(faces, rows) for rows in (gallery, probes, unmated)
        )
        survface.write_layout(
            root, enrolled, mated_probes, strangers, shrunk(training or faces, train)
        )

    options = f"blur={blur}, noise={noise}, mated={mated}, seed={seed}, training={training and training.checksum}"
    return survface.read_open_set(_build(parent, "SurvFace", faces, options, write))


def ijbc_standin(
    faces: FaceSet, parent: str | Path, *, impostors: int = 200_000, seed: int = 0
) -> TemplateSet:
    """Build (once) and read an IJB-C-like template set under ``parent``.

    Each person's images are cut into templates of one to four, some sharing a medium; the first template is in the
    gallery of the person's half (G1 or G2), the others are probes. Loose crops are turned, scaled and shifted with
    their landmarks; a third are blurred, with a lower detector score. Pairs: all of the same person, and
    ``impostors`` random ones.
    """
    rng = np.random.default_rng(seed)

    def write(root: Path) -> None:
        members, owner, lists = [], [], {"G1": [], "G2": [], ijbc.PROBES: []}  # type: ignore[var-annotated]
        for k, (subject, images) in enumerate(_people(faces, rng)):
            start = 0
            while start < len(images):
                left = len(images) - start
                size = min(
                    left, int(rng.integers(1, 5)), max(1, len(images) - 1) if not start else left
                )
                members.append(images[start : start + size])
                lists[ijbc.PROBES if start else f"G{k % 2 + 1}"].append((len(members), subject))
                owner.append(subject)
                start += size
        ijbc.write_layout(
            root, crops(members), _template_pairs(np.array(owner), impostors, rng), lists
        )

    def crops(members: list[np.ndarray]) -> Iterator[tuple[Tensor, np.ndarray, float, int, int]]:
        medium = 0
        for template, images in enumerate(members, 1):
            for k, image in enumerate(faces.images(images)):
                medium += int(k == 0 or rng.random() < 0.7)
                angle, scale = rng.uniform(-0.3, 0.3), rng.uniform(1.0, 1.4)
                turn = scale * np.array(
                    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
                )
                matrix = np.column_stack([turn, 112 + rng.uniform(-8, 8, 2) - turn @ [56, 56]])
                worse = rng.random() if rng.random() < 1 / 3 else 0.0
                loose = ijbc.warp(_soften(image, 2 * worse), matrix, (224, 224))
                score = 0.99 - 0.5 * worse - 0.05 * rng.random()
                yield loose, ijbc.ARCFACE @ turn.T + matrix[:, 2], score, template, medium

    return ijbc.read_templates(
        _build(parent, "IJB-C", faces, f"impostors={impostors}, seed={seed}", write)
    )


def _template_pairs(owner: np.ndarray, impostors: int, rng: np.random.Generator) -> np.ndarray:
    """(P, 3) template, template (from 1), label: every pair of one owner, ``impostors`` distinct ones of two."""
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
    pairs, label = (
        np.concatenate([same, different]) + 1,
        np.repeat([1, 0], [len(same), len(different)]),
    )
    return np.column_stack([pairs, label])
