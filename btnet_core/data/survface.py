"""QMUL-SurvFace as distributed: training set and open-set identification test, faces at their native 6 to 124 pixels.

Layout: ``training_set/<id>/*.jpg`` and ``Face_Identification_Test_Set/`` with folders ``gallery``, ``mated_probe``,
``unmated_probe`` and two ``.mat`` lists of (image name, identity). Identities are matched by id, never by order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from btnet_core import images as pixels
from btnet_core.data import matfile
from btnet_core.data.faces import StoredFaces, image_folder, in_parallel
from btnet_core.data.folders import entries, split_images
from btnet_core.errors import DataError
from btnet_core.files import checksum

TEST_FOLDER = "Face_Identification_Test_Set"
NOTE = "STAND-IN.txt"  # its first line names the stand-in that a folder holds


class Crops(Sequence[Tensor]):
    """Images at their own sizes: ``crops[i]`` is uint8 ``(3, h, w)``; ``load(indices)`` reads with several threads."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return pixels.decode(pixels.read(self.files[index]), where=str(self.files[index]))

    def load(self, indices: Iterable[int]) -> list[Tensor]:
        wanted = [int(i) for i in indices]
        return in_parallel(lambda k: self[wanted[k]], len(wanted))

    @cached_property
    def sizes(self) -> Tensor:
        """int64 ``(N, 2)``: width, height of each image, from its header."""
        return torch.stack(in_parallel(self._size, len(self)))

    def _size(self, index: int) -> Tensor:
        try:
            with Image.open(self.files[index]) as image:
                return torch.tensor(image.size)
        except OSError as error:
            raise DataError(f"{self.files[index]}: no image ({error})") from error


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """1:N open-set test: gallery, then mated probes (their id is in the gallery), then unmated probes (label -1)."""

    name: str
    checksum: str
    stand_in: bool  # built from another data set: results on it are not results on SurvFace
    images: Crops
    labels: Tensor  # int64 (N,)
    in_gallery: Tensor  # bool (N,)


def stand_in_note(root: Path) -> str:
    """What a stand-in calls itself; empty for the real data."""
    path = root / NOTE
    return path.read_text("utf-8").splitlines()[0] if path.is_file() else ""


def _read_list(folder: Path, kind: str) -> tuple[list[Path], Tensor]:
    path = folder / f"{kind}_img_ID_pairs.mat"
    if not path.is_file():
        raise DataError(f"{path}: no such file; see `btnet data` for the layout of SurvFace")
    try:
        names, ids = matfile.read_apart(path, [f"{kind}_set", f"{kind}_ids"])
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a SurvFace list ({error})") from None
    whole = all(isinstance(n, int | float) and 0 <= n < 2**62 and n == int(n) for n in ids)
    if (
        not names
        or len(names) != len(ids)
        or not whole
        or not all(isinstance(name, str) for name in names)
    ):
        raise DataError(
            f"{path}: {kind}_set and {kind}_ids are not one name and one integer for each image"
        )
    files = [folder / kind / name for name in names]
    missing = [
        file
        for file in files
        if file.name != str(file.relative_to(folder / kind)) or not file.is_file()
    ]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(files)} listed images are missing, first {missing[0]}"
        )
    return files, torch.tensor([int(n) for n in ids])


def read_open_set(root: str | Path) -> OpenSet:
    """The open-set test under ``root``. Raises :class:`DataError` when a list, image or identity is missing."""
    folder = Path(root) / TEST_FOLDER
    if not (folder / "unmated_probe").is_dir():
        raise DataError(
            f"{folder / 'unmated_probe'}: no such folder; see `btnet data` for the layout of SurvFace"
        )
    gallery, gallery_ids = _read_list(folder, "gallery")
    mated, mated_ids = _read_list(folder, "mated_probe")
    lost = mated_ids[~torch.isin(mated_ids, gallery_ids)]
    if len(lost):
        raise DataError(
            f"{folder}: {len(lost)} mated probes have no gallery image, first identity {int(lost[0])}"
        )
    unmated, _ = split_images(entries(folder / "unmated_probe")[1])
    note, files = stand_in_note(Path(root)), [*gallery, *mated, *unmated]
    return OpenSet(
        name=note or "QMUL-SurvFace", stand_in=bool(note), images=Crops(files),
        checksum=checksum([*sorted(folder.glob("*.mat")), *files]),
        labels=torch.cat([gallery_ids, mated_ids, torch.full((len(unmated),), -1)]),
        in_gallery=torch.arange(len(files)) < len(gallery),
    )  # fmt: skip


def training_set(root: str | Path) -> StoredFaces:
    """``training_set/<id>/``; images come at 112x112, ``native(i)`` at their own size."""
    return image_folder(Path(root) / "training_set")


def write_layout(
    root: Path, gallery: Iterable[tuple[int, Tensor]], mated: Iterable[tuple[int, Tensor]],
    unmated: Iterable[tuple[int, Tensor]], training: Iterable[tuple[int, Tensor]] = (),
) -> None:  # fmt: skip
    """Write (identity, image) pairs in SurvFace's layout, as JPEG."""
    for kind, faces in (("gallery", gallery), ("mated_probe", mated), ("unmated_probe", unmated)):
        folder, names, ids = root / TEST_FOLDER / kind, [], []
        folder.mkdir(parents=True)
        for i, (identity, image) in enumerate(faces):
            names.append(f"{i:06d}.jpg" if kind == "unmated_probe" else f"{identity}_cam1_{i}.jpg")
            (folder / names[-1]).write_bytes(pixels.encode(image, "JPEG"))
            ids.append(identity)
        if kind != "unmated_probe":
            table = {
                f"{kind}_set": np.array(names, object)[:, None],
                f"{kind}_ids": np.array(ids, np.int64)[:, None],
            }
            savemat(str(folder.with_name(f"{kind}_img_ID_pairs.mat")), table)
    for i, (identity, image) in enumerate(training):
        folder = root / "training_set" / str(identity)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{identity}_cam1_{i}.jpg").write_bytes(pixels.encode(image, "JPEG"))
