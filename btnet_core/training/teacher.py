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
from btnet_core.training.batches import Pixels, memory_for_one, transfer


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

    Args:
        count: records; ``compute(pixels uint8)`` gives the tensors to keep, by name.
        folder: for the files, which other processes and runs share; None keeps all in memory.
    """

    def __init__(
        self, pixels: Pixels, count: int, compute: Callable[[Tensor], dict[str, Tensor]],
        folder: Path | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.device = device
        done = folder / "complete" if folder else None
        filled = done is not None and done.is_file()  # by an earlier run
        like = compute(pixels.get(torch.arange(1)).to(device))
        self.stores = {  # maps lie as (N, H, W, C), as the network's own
            name: _store(folder, name, 2 * count, channels_last(row)) for name, row in like.items()
        }
        if filled:
            return
        first, step = (distributed.rank(), distributed.world()) if folder else (0, 1)
        for records in torch.arange(count).split(64)[first::step]:
            faces = pixels.get(records).to(device)
            for flip, images in enumerate((faces, faces.flip(-1))):
                for name, row in compute(images).items():
                    self.stores[name][2 * records + flip] = channels_last(row).cpu()
        distributed.wait()
        if done and distributed.rank() == 0:
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


def _store(folder: Path | None, name: str, count: int, like: Tensor) -> Tensor:
    shape = (count, *like.shape[1:])
    if folder is None:
        return torch.empty(shape, dtype=like.dtype)
    path, size = folder / f"{name}.bin", torch.Size(shape).numel()
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a signal later
                os.posix_fallocate(file.fileno(), 0, size * like.element_size())
    distributed.wait()
    return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)


def cache_place(choice: str, size: int, epochs: int, folder: Path, shared: bool) -> tuple[str, str]:
    """Where features of ``size`` bytes go ("memory", "memmap", "off"), and a sentence on it.

    "auto" needs more than two passes to pay (the cache holds each face twice), prefers memory, and
    with several processes a file. Features for other runs (``shared``) are files in any case. What
    does not fit is computed at every step.
    """
    room = {"memory": memory_for_one(), "memmap": 0.5 * free_disk(folder)}
    if choice != "off" and shared:
        choice = "memmap"
    elif choice == "auto" and epochs <= 2:
        choice = "off"
    elif choice == "auto":
        alone = distributed.world() == 1 and size < room["memory"]
        choice = "memory" if alone else "memmap"
    text = f"inputs and teacher features of both mirror images: {size / 1e6:.1f} MB"
    complete = shared and (folder / "complete").is_file()
    if choice != "off" and size >= room[choice] and not complete:
        where = "memory" if choice == "memory" else str(folder)
        left = f"{where} has room for {room[choice] / 1e6:.1f} MB"
        return "off", f"{text}, {left}: computed at every step"
    kept = {"memory": "kept in memory", "memmap": f"kept in {folder}"}
    return choice, f"{text}, {kept.get(choice, 'computed at every step')}"


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
