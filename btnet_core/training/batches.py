"""Batches: who comes when (resumable, independent of the number of processes), their pixels, the teacher's features."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.sources import Spec, spec_text
from btnet_core.errors import ConfigError
from btnet_core.images import Resize, degrade, resize, scaled_size
from btnet_core.models.backbone import Backbone
from btnet_core.training import distributed
from btnet_core.training.config import TrainConfig

MEMORY_SHARE = (
    0.3  # of the free memory that decoded images, and again the teacher's features, may take
)


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch, on the CPU: ``(b,)`` each, ``shift`` ``(b, 2)``."""

    records: Tensor
    labels: Tensor
    flip: Tensor
    size: Tensor  # rows to shrink to
    shift: Tensor  # right and down, in pixels


class Sampler:
    """Every epoch a new order, flips and sizes, drawn from (seed, epoch): a position is (epoch, step) and nothing else.

    The draws are for the batch of all processes together; each takes its consecutive part. The last incomplete batch
    is left out.
    """

    def __init__(self, labels: Tensor, config: TrainConfig) -> None:
        self.labels, self.config = labels, config
        self.mine = distributed.check_batch(config.batch)
        self.steps = len(labels) // config.batch
        if not self.steps:
            raise ConfigError(f"batch: got {config.batch} images, the data have only {len(labels)}")
        self._drawn: tuple[int, tuple[Tensor, ...]] | None = None

    def batch(self, step: int) -> Batch:
        """The part of global step ``step`` that belongs to this process."""
        epoch, place = divmod(step, self.steps)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        order, flip, size, shift = self._drawn[1]
        start = place * self.config.batch + distributed.rank() * self.mine
        part = slice(start, start + self.mine)
        records = order[part]
        return Batch(records, self.labels[records], flip[part], size[part], shift[part])

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        config, count = self.config, len(self.labels)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        if config.per_identity > 1:
            order = self._grouped(order, generator)
        flip = torch.rand(count, generator=generator) < (0.5 if config.flip else 0.0)
        weights = torch.tensor(config.size_weights or [1.0] * len(config.sizes))
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        shift = config.shift * (2 * torch.rand(count, 2, generator=generator) - 1)
        return order, flip, torch.tensor(config.sizes)[chosen], shift

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Runs of ``per_identity`` records of one identity, the runs in random order."""
        order = order[torch.argsort(self.labels[order], stable=True)]
        labels = self.labels[order]
        first = torch.searchsorted(labels, labels)  # where each identity begins
        run = (torch.arange(len(order)) - first) // self.config.per_identity
        key = labels * (len(order) + 1) + run
        _, group = torch.unique_consecutive(key, return_inverse=True)
        return order[
            torch.argsort(
                torch.randperm(int(group[-1]) + 1, generator=generator)[group], stable=True
            )
        ]


class Pixels:
    """uint8 faces by record: all in memory as one tensor when they fit, else decoded ahead by threads."""

    def __init__(self, faces: FaceSet, workers: int) -> None:
        self.faces, self.workers = faces, max(1, workers)
        size = len(faces) * 3 * 112 * 112
        self.all = faces.images(range(len(faces))) if size < MEMORY_SHARE * free_memory() else None

    def get(self, records: Tensor) -> Tensor:
        """uint8 ``(n, 3, 112, 112)``."""
        return self.faces.images(records.tolist()) if self.all is None else self.all[records]

    def stream(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its pixels, decoded while earlier ones are trained on."""
        if self.all is not None:
            yield from ((batch, self.all[batch.records]) for batch in batches)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque = deque()
            for batch in batches:
                waiting.append((batch, pool.submit(self.get, batch.records)))
                if len(waiting) > self.workers:
                    ready, pixels = waiting.popleft()
                    yield ready, pixels.result()
            yield from ((ready, pixels.result()) for ready, pixels in waiting)


def open_pixels(spec: Spec, workers: int) -> Pixels:
    """The faces of a spec, kept for the next run of this process on the same data."""
    return _pixels(spec_text(spec), workers)


@lru_cache(maxsize=1)
def _pixels(spec: str, workers: int) -> Pixels:
    return Pixels(open_faces(spec), workers)


def free_memory() -> float:
    """Bytes of memory that are free or hold files that can be dropped."""
    try:
        with open("/proc/meminfo") as file:
            return next(
                int(line.split()[1]) * 1024.0 for line in file if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return (
            4e9
            if not hasattr(os, "sysconf")
            else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
        )


def transfer(rows: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for the copy where there is one to make."""
    return (
        rows.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else rows.to(device)
    )


def mirrored(pixels: Tensor, flip: Tensor) -> Tensor:
    """Images with ``flip`` set are mirrored left to right; before any down-sampling (paper-and-code: teacher)."""
    return torch.where(flip.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


def moved(pixels: Tensor, shift: Tensor) -> Tensor:
    """Each image ``(B, 3, H, W)`` moved right and down by its ``shift`` ``(B, 2)`` pixels, to float32; edges go on."""
    rows, columns = pixels.shape[-2:]
    step = 2 * shift.to(pixels.device) / torch.tensor([columns, rows], device=pixels.device)
    matrix = torch.eye(2, 3, device=pixels.device).repeat(len(pixels), 1, 1)
    matrix[:, :, 2] = -step
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


def trunk_input(trunk: Backbone, pixels: Tensor, size: Tensor, how: Resize) -> Tensor:
    """Each face shrunk to its own ``size`` in rows and scaled back up (4.1), normalised ``(B, 3, H, W)``."""
    pixels = trunk.crop(pixels)
    faces = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    for rows in size.unique().tolist():
        members = torch.nonzero(size == rows).flatten().to(pixels.device)
        faces[members] = degrade(pixels[members], rows, how)
    return trunk.normalise(faces).contiguous(memory_format=torch.channels_last)


def branch_input(trunk: Backbone, pixels: Tensor, r: int, how: Resize) -> Tensor:
    """Each face shrunk to r rows, normalised ``(B, 3, r, r')``: what B_r sees, never scaled up."""
    faces = resize(trunk.crop(pixels), scaled_size(r, trunk.config.size), how)
    return trunk.normalise(faces).contiguous(memory_format=torch.channels_last)


class TeacherCache:
    """The branch's input and the teacher's output of every record, as it is and mirrored, computed once.

    Args:
        count: records; ``compute(pixels uint8) -> tensors`` gives the rows to keep, first the branch's input.
        folder: for the file; None keeps the rows in memory.

    ``rows(records, flip, device)`` returns what ``compute`` would for those faces.
    """

    def __init__(
        self, pixels: Pixels, count: int, compute: Callable[[Tensor], list[Tensor]], folder: Path | None, device: torch.device
    ) -> None:  # fmt: skip
        shares = distributed.world() if folder else 1
        like = compute(pixels.get(torch.arange(1)).to(device))
        self.size = sum(2 * count * row[0].numel() * row.element_size() for row in like)
        self.stores = [  # maps lie as (N, H, W, C): the loop reads them channels_last, as the network's own
            self._store(folder, index, (2 * count, *_channels_last(row).shape[1:]), row.dtype)
            for index, row in enumerate(like)
        ]
        done = folder / "complete" if folder else None
        if done and done.is_file():  # filled by an earlier run
            return
        for start in range(64 * (distributed.rank() if shares > 1 else 0), count, 64 * shares):
            records = torch.arange(start, min(start + 64, count))
            faces = pixels.get(records).to(device)
            for flip, images in enumerate((faces, faces.flip(-1))):
                for store, row in zip(self.stores, compute(images), strict=True):
                    store[2 * records + flip] = _channels_last(row).cpu()
        distributed.wait()
        if done and distributed.rank() == 0:
            done.touch()

    @staticmethod
    def _store(
        folder: Path | None, index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if folder is None:
            return torch.empty(shape, dtype=dtype)
        folder.mkdir(parents=True, exist_ok=True)
        size = torch.Size(shape).numel()
        return torch.from_file(
            str(folder / f"teacher_{index}.bin"), shared=True, size=size, dtype=dtype
        ).view(shape)

    def rows(
        self, records: Tensor, flip: Tensor, device: torch.device, *, first: int = 0
    ) -> list[Tensor]:
        """The rows from number ``first`` on."""
        index = 2 * records + flip
        rows = [transfer(store[index], device) for store in self.stores[first:]]
        return [row.permute(0, 3, 1, 2) if row.ndim == 4 else row for row in rows]


def _channels_last(row: Tensor) -> Tensor:
    return row.permute(0, 2, 3, 1) if row.ndim == 4 else row


def cache_place(choice: str, size: int, epochs: int, folder: Path) -> tuple[str, str]:
    """ "memory", "memmap" or "off" for features of ``size`` bytes, and the sentence that announces it.

    "auto" needs more than two passes to pay (the cache holds each face twice), prefers memory, and with several
    processes a file that they share.
    """
    disk = shutil.disk_usage(folder).free
    if choice == "auto":
        fits = size < MEMORY_SHARE * free_memory() and distributed.world() == 1
        choice = (
            "off" if epochs <= 2 else "memory" if fits else "memmap" if size < 0.5 * disk else "off"
        )
    if choice == "memmap" and size > disk:
        raise ConfigError(
            f"cache: {size / 1e9:.1f} GB of features, {folder} has {disk / 1e9:.1f} GB free"
        )
    place = {"off": "computed at every step", "memory": "kept in memory"}.get(
        choice, f"kept in {folder / 'cache'}"
    )
    return (
        choice,
        f"inputs and teacher features of both mirror images: {size / 1e6:.1f} MB, {place}",
    )
