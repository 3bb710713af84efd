"""The teacher of a branch, and its answers to every face kept where they are asked for often."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.device import autocast
from btnet_core.models.backbone import Backbone, embed_features
from btnet_core.training import distributed
from btnet_core.training.batches import Pixels, transfer

COMPLETE = "complete"  # file that says that all answers are in the folder


class Teacher(NamedTuple):
    """What the pretrained trunk says of the faces at full size (Section 3.3)."""

    z_s: Tensor | None = None  # (B, C_r, r, r') at the coupling layer; None: not distilled
    z: Tensor | None = None  # (B, D) embedding; None: not asked for


@torch.no_grad()
def ask(
    trunk: Backbone, faces: Tensor, couple_at: str, size: tuple[int, int], embedding: bool,
    precision: str,
) -> Teacher:  # fmt: skip
    """The teacher's answer to uint8 ``faces`` (paper-and-code: teacher).

    The trunk is in evaluation mode and runs up to the coupling layer, no further unless its
    embedding is asked for. A branch that ends before the layer of r meets a larger map, which is
    averaged to ``size`` (Figure 7).
    """
    x = trunk.preprocess(faces).contiguous(memory_format=torch.channels_last)
    z_s = None
    with autocast(faces.device, precision):
        for name, z in trunk.features(x, None if embedding else couple_at):
            if name == couple_at:
                z_s = z if z.shape[-2] <= size[0] else F.adaptive_avg_pool2d(z, size)
        return Teacher(z_s, embed_features(trunk.head, z) if embedding else None)


class TeacherCache:
    """The branch's input and the teacher's answers for every record, as it is and mirrored.

    They lie in files, which all processes share and the system keeps in memory where it can.

    Args:
        compute: pixels uint8 -> the tensors to keep, by name.
        folder: for the files; complete ones of an earlier run are used as they are.
    """

    def __init__(
        self, pixels: Pixels, compute: Callable[[Tensor], dict[str, Tensor]], folder: Path,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.device, count, done = device, len(pixels.faces), folder / COMPLETE
        filled = done.is_file()
        like = compute(pixels.get(torch.arange(1)).to(device))
        self.stores = {  # maps lie as (N, H, W, C), as the network's own
            name: _store(folder, name, 2 * count, channels_last(row)) for name, row in like.items()
        }
        if filled:
            return
        for records in torch.arange(count).split(64)[distributed.rank() :: distributed.world()]:
            faces = pixels.get(records).to(device)
            for flip, images in enumerate((faces, faces.flip(-1))):
                for name, row in compute(images).items():
                    self.stores[name][2 * records + flip] = channels_last(row).cpu()
        distributed.wait()
        if distributed.rank() == 0:
            done.touch()

    def get(self, name: str, records: Tensor, flip: Tensor) -> Tensor | None:
        """What ``compute`` calls ``name`` for those faces; None if it gives no such thing."""
        if name not in self.stores:
            return None
        rows = transfer(self.stores[name][2 * records + flip], self.device)
        return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows


def channels_last(row: Tensor) -> Tensor:
    """``(B, C, H, W)`` -> ``(B, H, W, C)``; embeddings as they are."""
    return row.permute(0, 2, 3, 1) if row.ndim == 4 else row


def _store(folder: Path, name: str, count: int, like: Tensor) -> Tensor:
    """A tensor like ``like`` with ``count`` rows, in a file."""
    shape = (count, *like.shape[1:])
    path, size = folder / f"{name}.bin", torch.Size(shape).numel()
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a signal later
                os.posix_fallocate(file.fileno(), 0, size * like.element_size())
    distributed.wait()
    return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)


def pays_and_fits(size: int, epochs: int, folder: Path, shared: bool) -> tuple[bool, str]:
    """Whether to keep features of ``size`` bytes in ``folder``, and a sentence on it.

    They pay from the third pass on (each face is kept twice), or where other runs use them, too
    (``shared``), and may take half of the free disk.
    """
    text = f"inputs and teacher features of both mirror images: {size / 1e6:.1f} MB"
    if epochs <= 2 and not shared:
        return False, f"{text}, computed at every step"
    room = 0.5 * free_disk(folder)
    if size >= room and not (folder / COMPLETE).is_file():
        left = f"{folder} has room for {room / 1e6:.1f} MB"
        return False, f"{text}, {left}: computed at every step"
    return True, f"{text}, kept in {folder}"


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
